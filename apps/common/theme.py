"""The look of the suite: colours, type and spacing as theme variables. Rules that need selectors are in page.css."""

from __future__ import annotations

import gradio as gr
from gradio.themes.utils.fonts import LocalFont

__all__ = ["NibbleTheme"]

# Ink on paper by day, paper on ink by night; a set bit is lit in one green.
_GREEN = gr.themes.Color(
    c50="#f1fbe4", c100="#e0f6c3", c200="#c8ee8f", c300="#aee25c", c400="#95d436", c500="#6fae1c",
    c600="#4d8412", c700="#3d6812", c800="#335314", c900="#2b4615", c950="#142706", name="bit",
)  # fmt: skip
_INK = gr.themes.Color(
    c50="#faf9f6", c100="#f2f1ec", c200="#e4e2da", c300="#cbc8bd", c400="#98968d", c500="#6d6b65",
    c600="#504f4b", c700="#393937", c800="#232425", c900="#17181a", c950="#0e0f11", name="ink",
)  # fmt: skip


_SURFACES = {
    "body_background_fill": "*neutral_100",
    "body_background_fill_dark": "*neutral_950",
    "body_text_color": "*neutral_900",
    "body_text_color_dark": "#eceae4",
    "body_text_color_subdued": "*neutral_500",
    "body_text_color_subdued_dark": "*neutral_400",
    "background_fill_primary": "#ffffff",
    "background_fill_primary_dark": "*neutral_900",
    "background_fill_secondary": "*neutral_50",
    "background_fill_secondary_dark": "#1c1d20",
    "border_color_primary": "*neutral_200",
    "border_color_primary_dark": "#2c2d30",
    "border_color_accent": "*primary_500",
    "color_accent": "*primary_600",
    "color_accent_soft": "*primary_100",
    "color_accent_soft_dark": "*primary_950",
    "block_background_fill": "transparent",
    "block_background_fill_dark": "transparent",
    "block_border_width": "0px",
    "block_shadow": "none",
    "block_padding": "0px",
    "block_label_background_fill": "*background_fill_primary",
    "block_label_background_fill_dark": "*background_fill_primary",
    "block_title_text_color": "*neutral_700",
    "block_title_text_color_dark": "*neutral_300",
    "block_title_text_size": "*text_sm",
    "block_title_text_weight": "700",
    "block_info_text_color": "*neutral_500",
    "block_info_text_color_dark": "*neutral_400",
    "block_info_text_size": "13px",
    "link_text_color": "*primary_700",
    "link_text_color_dark": "*primary_300",
    "layout_gap": "*spacing_xl",
    "form_gap_width": "0px",
    "block_radius": "0px",
    "section_header_text_weight": "700",
    "prose_header_text_weight": "700",
    "prose_text_size": "15px",
}

_INPUTS = {
    "input_background_fill": "*neutral_50",
    "input_background_fill_dark": "*neutral_950",
    "input_background_fill_focus": "#ffffff",
    "input_background_fill_focus_dark": "*neutral_950",
    "input_border_color": "*neutral_200",
    "input_border_color_dark": "#34353a",
    "input_border_color_focus": "*primary_600",
    "input_border_color_focus_dark": "*primary_400",
    "input_border_width": "1px",
    "input_shadow": "none",
    "input_shadow_focus": "none",
    "input_placeholder_color": "*neutral_400",
    "input_placeholder_color_dark": "*neutral_500",
    "slider_color": "*primary_600",
    "slider_color_dark": "*primary_400",
    "checkbox_background_color_selected": "*primary_600",
    "checkbox_background_color_selected_dark": "*primary_500",
    "checkbox_border_color_selected": "*primary_600",
    "checkbox_border_color_selected_dark": "*primary_500",
    "checkbox_label_background_fill": "transparent",
    "checkbox_label_background_fill_dark": "transparent",
    "checkbox_label_background_fill_hover": "*neutral_100",
    "checkbox_label_background_fill_hover_dark": "*neutral_800",
    "checkbox_label_border_color": "*neutral_200",
    "checkbox_label_border_color_dark": "#34353a",
    "checkbox_label_border_width": "1px",
    "checkbox_label_text_color": "*neutral_800",
    "checkbox_label_text_color_dark": "*neutral_200",
}

_BUTTONS = {
    "button_primary_background_fill": "*neutral_900",
    "button_primary_background_fill_hover": "*neutral_700",
    "button_primary_background_fill_dark": "*primary_300",
    "button_primary_background_fill_hover_dark": "*primary_200",
    "button_primary_text_color": "#ffffff",
    "button_primary_text_color_dark": "*neutral_950",
    "button_primary_border_color": "transparent",
    "button_secondary_background_fill": "transparent",
    "button_secondary_background_fill_dark": "transparent",
    "button_secondary_background_fill_hover": "*neutral_100",
    "button_secondary_background_fill_hover_dark": "*neutral_800",
    "button_secondary_border_color": "*neutral_300",
    "button_secondary_border_color_dark": "#3a3b40",
    "button_secondary_text_color": "*neutral_800",
    "button_secondary_text_color_dark": "*neutral_200",
    "button_cancel_background_fill": "transparent",
    "button_cancel_background_fill_dark": "transparent",
    "button_cancel_background_fill_hover": "#fbe9e4",
    "button_cancel_background_fill_hover_dark": "#3a1f19",
    "button_cancel_text_color": "#b23a1e",
    "button_cancel_text_color_dark": "#ff9a80",
    "button_cancel_border_color": "#e2b3a6",
    "button_cancel_border_color_dark": "#6a3528",
    "button_border_width": "1px",
    "button_large_text_weight": "700",
    "button_small_text_weight": "400",
    "button_primary_border_color_dark": "transparent",
    "button_primary_border_color_hover": "transparent",
    "button_primary_border_color_hover_dark": "transparent",
    "button_small_text_size": "13px",
    "button_small_padding": "6px 12px",
    "button_medium_text_weight": "700",
}


class NibbleTheme(gr.themes.Base):
    """Flat surfaces, one accent, fonts that Gradio serves itself: nothing is fetched from elsewhere."""

    def __init__(self) -> None:
        super().__init__(
            primary_hue=_GREEN,
            secondary_hue=_GREEN,
            neutral_hue=_INK,
            radius_size=gr.themes.sizes.radius_lg,
            spacing_size=gr.themes.sizes.spacing_md,
            text_size=gr.themes.sizes.text_md,
            # Most of the font files that Gradio carries lack half the alphabet; these four are whole.
            font=[LocalFont("IBM Plex Sans", (400, 700)), "system-ui", "sans-serif"],
            font_mono=[LocalFont("IBM Plex Mono", (400, 700)), "ui-monospace", "monospace"],
        )
        # In one call: each call of `set` puts the background fills it is not given back to Gradio's own.
        self.set(**_SURFACES, **_INPUTS, **_BUTTONS)
