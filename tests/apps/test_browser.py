"""The page in a real browser, as a visitor uses it."""

from __future__ import annotations

import re

import pytest

from apps.common import cli, screenshots
from apps.flux_t2i.run import APP
from tests.apps.conftest import arguments, context_of, forget, serving, visit

pytestmark = pytest.mark.browser

PROMPT = "a large red metal sphere left of a small blue cube"


def text(tab, selector: str) -> str:
    return tab.locator(selector).first.inner_text()


def test_a_visitor_gets_two_pictures_and_compares_them(browser, page):
    with visit(browser, page.url) as tab:
        assert "Tiny FLUX" in text(tab, "#nb-banner")
        for empty in ("#nb-compare", "#nb-history"):
            assert not tab.locator(empty).is_visible(), "there is nothing to compare and to keep yet"
        screenshots.paint(tab, PROMPT, 7, 60)
        for precision in ("bf16", "int4"):
            picture = tab.locator(f"#nb-image-{precision} img")
            picture.wait_for()
            assert picture.evaluate("image => image.decode().then(() => image.naturalWidth)") == 256
            assert "Done, seed 7" in text(tab, f"#nb-status-{precision}")
            assert {"Time", "A step", "Peak memory", "Model size"} <= set(
                text(tab, f"#nb-figures-{precision}").split("\n")
            )
        assert "2.00× faster" in text(tab, "#nb-figures-int4")
        assert "3.5× smaller" in text(tab, "#nb-figures-int4")
        assert re.search(r"PSNR\n+\d+\.\d dB", text(tab, "#nb-scores"))
        move_the_slider(tab)
        amplify_the_difference(tab)


def move_the_slider(tab) -> None:
    slider = tab.locator("#nb-slider")
    slider.scroll_into_view_if_needed()
    box = slider.bounding_box()
    picture = tab.locator("#nb-slider img").first
    before = slider.screenshot()
    y = box["y"] + box["height"] / 2
    tab.mouse.move(box["x"] + box["width"] / 2, y)
    tab.mouse.down()
    tab.mouse.move(box["x"] + box["width"] / 4, y, steps=4)
    tab.mouse.up()
    tab.mouse.move(0, 0)
    assert picture.is_visible()
    assert slider.screenshot() != before


def amplify_the_difference(tab) -> None:
    before = tab.locator("#nb-map img").get_attribute("src")
    number = tab.locator("#nb-amplify input[type=number]")
    number.fill("32")
    number.press("Enter")
    number.blur()
    tab.locator("#nb-compare .nb-legend", has_text="8+ of 255").wait_for()
    tab.wait_for_function("old => document.querySelector('#nb-map img').src !== old", arg=before)


def test_ctrl_enter_paints_and_the_new_seed_is_written_back(browser, page):
    with visit(browser, page.url) as tab:
        tab.locator("#nb-prompt textarea").fill("a red cube")
        tab.locator("#nb-prompt textarea").press("Control+Enter")
        tab.locator("#nb-status-int4", has_text="Done, seed").wait_for()
        seed = tab.locator("#nb-seed input").input_value()
        assert f"Done, seed {seed}" in text(tab, "#nb-status-int4")
        tab.locator("#nb-last-seed", has_text=f"Reuse seed {seed}").click()
        tab.wait_for_function("!document.querySelector('#nb-randomise input').checked")
        tab.locator("#nb-generate:not([disabled])").click()
        tab.locator("#nb-history img").nth(3).wait_for()
        assert f"Done, seed {seed}" in text(tab, "#nb-status-int4")


def test_a_style_brings_its_words_which_can_be_changed(browser, page):
    with visit(browser, page.url) as tab:
        tab.locator("#nb-options button").first.click()
        tab.locator("#nb-style input").click()
        tab.get_by_role("option", name="Manga").click()
        words = "document.querySelector('#nb-style_words textarea').value"
        tab.wait_for_function(f"{words}.startsWith('a manga panel of {{prompt}}')")
        tab.locator("#nb-style_words textarea").fill("{prompt} of {glass}, {")
        screenshots.paint(tab, "a red cube", 7, 60)
        assert page.engines["int4"].runs[-1].prompt == "a red cube of {glass}, {"
        tab.locator("#nb-style input").click()
        tab.get_by_role("option", name="None").click()
        tab.wait_for_function(f"{words} === ''")


def test_empty_and_refused_prompts_are_answered_in_words(browser, page):
    with visit(browser, page.url) as tab:
        tab.locator("#nb-generate").click()
        tab.locator("#nb-message", has_text="expected a description of the picture").wait_for()
        assert text(tab, "#nb-status-int4").endswith("Nothing painted yet"), "the page stays as it was"
        tab.locator("#nb-prompt textarea").fill("a naked child")
        tab.locator("#nb-generate").click()
        tab.locator("#nb-message", has_text="This prompt was refused").wait_for()
        assert tab.locator("#nb-prompt textarea").input_value() == "a naked child"
        tab.locator("#nb-generate:not([disabled])").wait_for()
        screenshots.paint(tab, "a red cube", 7, 60)
        assert text(tab, "#nb-message") == ""


def test_stop_really_stops_and_so_does_leaving_the_page(browser, every_step):
    with serving(gated=True) as served:
        with visit(browser, served.url) as tab:
            tab.locator("#nb-prompt textarea").fill("a red cube")
            tab.locator("#nb-generate").click()
            served.gate.release(2)
            tab.locator("#nb-status-bf16", has_text="Step 2 of 12").wait_for()
            tab.locator("#nb-stop:not([disabled])").click()
            tab.locator("#nb-stop", has_text="Stopping").wait_for()
            served.gate.release(1)
            tab.locator("#nb-status-int4", has_text="Stopped").wait_for()
            assert "Stopped" in text(tab, "#nb-status-bf16")
            tab.locator("#nb-generate:not([disabled])").wait_for()
            assert served.engines["int4"].runs == []
            served.gate.release(24)
            screenshots.paint(tab, "a red cube", 7, 60)
            tab.locator("#nb-generate").click()
            served.gate.release(1)
            tab.locator("#nb-status-bf16", has_text="Step 1 of 12").wait_for()
            tab.locator("#nb-compare").wait_for(state="hidden")
            assert tab.locator("#nb-history").is_visible()
            job = next(iter(served.studio.desk._jobs.values()))
        assert job.stop.wait(30)


def test_settings_come_back_from_history_examples_and_png(browser, page, tmp_path):
    with visit(browser, page.url) as tab:
        tab.locator(".nb-example").nth(1).click()
        tab.wait_for_function(f"document.querySelector('#nb-prompt textarea').value === {APP.examples[1]['prompt']!r}")
        tab.locator("#nb-options button").first.click()
        tab.locator("#nb-aspect label", has_text="4:3").click()
        tab.wait_for_function("document.querySelector('#nb-width input[type=number]').value === '288'")
        screenshots.paint(tab, "a yellow cone", 21, 60)
        with tab.expect_download() as saved:
            tab.locator("#nb-image-int4 [aria-label*=ownload], #nb-image-int4 a[download]").first.click()
        saved.value.save_as(tmp_path / "cone.png")
        tab.reload()
        tab.locator("#nb-banner .nb-load-ready").wait_for()
        tab.locator("#nb-recall input, input[type=file]").first.set_input_files(tmp_path / "cone.png")
        tab.locator("#nb-message", has_text="Settings recalled").wait_for()
        assert tab.locator("#nb-prompt textarea").input_value() == "a yellow cone"
        assert tab.locator("#nb-seed input").input_value() == "21"
        assert not tab.locator("#nb-randomise input").is_checked()


def test_history_fills_the_controls_again(browser, page):
    with visit(browser, page.url) as tab:
        screenshots.paint(tab, "a yellow cone", 21, 60)
        screenshots.paint(tab, "a white sphere", 22, 60)
        tab.locator("#nb-gallery img").nth(3).wait_for()
        tab.locator("#nb-gallery button:has(img)").nth(3).click()
        tab.locator("#nb-reuse:not([disabled])").click()
        tab.wait_for_function("document.querySelector('#nb-prompt textarea').value === 'a yellow cone'")
        assert tab.locator("#nb-seed input").input_value() == "21"
        tab.locator("#nb-clear").click()
        tab.locator("#nb-history").wait_for(state="hidden")


def test_the_page_of_the_interface_opens(browser, page):
    with visit(browser, page.url) as tab:
        tab.locator("#nb-api").click()
        tab.get_by_text("generate", exact=True).first.wait_for()


@pytest.mark.parametrize("view", ["light", "dark", "phone"])
def test_nothing_sticks_out_and_the_light_switch_works(browser, page, view):
    with visit(browser, page.url, view) as tab:
        is_dark = "document.body.classList.contains('dark')"
        assert tab.evaluate(is_dark) == (view == "dark")
        width = screenshots.VIEWS[view]["viewport"]["width"]
        screenshots.paint(tab, PROMPT, 7, 60)
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        paper = "getComputedStyle(document.querySelector('#nb-desk')).backgroundColor"
        before = tab.evaluate(paper)
        tab.locator("#nb-light").click()
        assert tab.evaluate(is_dark) != (view == "dark")
        assert tab.evaluate(paper) != before
        tab.reload()
        tab.wait_for_function(f"{is_dark} !== {str(view == 'dark').lower()}")


def test_loading_is_shown_until_it_is_done(browser, make_studio):
    import threading

    from tests.apps.fake import FakeEngine

    ready = threading.Event()

    def load(spec, precision, share, progress):
        progress("loading the weights of a test")
        ready.wait(60)
        return FakeEngine(spec, precision)

    studio = cli.open_studio(APP, arguments(), load)
    demo = cli.launch(studio, server_name="127.0.0.1", prevent_thread_lock=True, quiet=True)
    tab = context_of(browser, "light").new_page()
    try:
        tab.goto(demo.local_url)
        tab.locator("#nb-banner", has_text="Loading the weights of a test").wait_for()
        tab.locator("#nb-prompt textarea").fill("a red cube")
        tab.locator("#nb-generate").click()
        tab.locator("#nb-status-bf16", has_text="Loading the weights").wait_for()
        ready.set()
        tab.locator("#nb-status-int4", has_text="Done").wait_for()
        tab.locator("#nb-banner .nb-load-ready").wait_for()
    finally:
        ready.set()
        forget(tab)
        demo.close()
        studio.pictures.close()
