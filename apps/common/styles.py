"""Ten ways to dress a prompt, in our own words.

A style is text around a mark. The mark is replaced, never formatted, so braces and percent signs in a prompt stay what
they are. Styles are applied before the safety check: what is judged is what is painted.
"""

from __future__ import annotations

from engine import RequestError

__all__ = ["MARK", "NONE", "STYLES", "apply", "template"]

MARK = "{prompt}"
NONE = "None"

STYLES: dict[str, str] = {
    NONE: MARK,
    "Cinematic": f"a film still of {MARK}, anamorphic lens, low sun, drifting haze, muted grade, fine grain",
    "3D Model": f"a rendered 3D model of {MARK}, studio light, clean geometry, soft contact shadows, path traced",
    "Anime": f"an anime key frame of {MARK}, inked outlines, flat cel shading, painted sky, lively colour",
    "Digital Art": f"a digital painting of {MARK}, visible brushwork, bold light, rich palette, fine finish",
    "Photographic": f"a photograph of {MARK}, 50 mm lens, natural light, shallow focus, true colour",
    "Pixel art": f"pixel art of {MARK}, small grid, few colours, hard edges, 16-bit console look",
    "Fantasy art": f"a fantasy illustration of {MARK}, distant towers, drifting light, ornate detail, storybook mood",
    "Neonpunk": f"{MARK} in a neon-lit night, wet streets, magenta and cyan glow, chrome, rain, high contrast",
    "Manga": f"a manga panel of {MARK}, black ink, screen tone, speed lines, strong silhouette",
}


# What a style speaks of where a picture is given and no prompt.
NOTHING = "the scene"


MAX_WORDS = 500


def apply(style: str | None, prompt: str, words: str | None = None) -> str:
    """Return `prompt` dressed in `words`, in which {prompt} stands for it, or, without any, in those of `style`.

    None and "None" leave it as it is. Words without the mark follow the prompt.
    Raises RequestError naming the styles when there is no such style, or when the words are too long or no text.
    """
    template = STYLES.get(style or NONE) if isinstance(style, str | None) else None
    if template is None:
        raise RequestError("style", f"style: expected one of {', '.join(STYLES)}, got {style!r}")
    if words is not None and (not isinstance(words, str) or len(words) > MAX_WORDS):
        got = len(words) if isinstance(words, str) else repr(words)
        raise RequestError("style_words", f"style_words: expected a text of at most {MAX_WORDS} characters, got {got}")
    if words and words.strip():
        template = words.strip() if MARK in words else f"{MARK}, {words.strip()}"
    return template.replace(MARK, prompt.strip() or NOTHING) if template != MARK else prompt


def template(style: str | None) -> str:
    """What the page writes into the box of words when `style` is chosen: nothing for none."""
    return "" if style in (None, NONE) else STYLES.get(style, "")
