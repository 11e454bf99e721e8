"""The report in a real browser: light, dark and on a phone, with its slider, sorting and filter."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.quantize.report import write_report

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def page_file(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("page") / "out"
    write_report(out, model="tiny", checkpoint=checkpoint, prompts=["two cones"], steps=1, device="cpu", lpips=False)
    return out / "index.html"


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (1280, "dark"), (390, "light")])
def test_the_page_works_offline(browser, page_file: Path, width: int, scheme: str):
    context = browser.new_context(viewport={"width": width, "height": 844}, color_scheme=scheme, offline=True)
    tab = context.new_page()
    wrong: list[str] = []
    tab.on("console", lambda message: message.type == "error" and wrong.append(message.text))
    tab.on("pageerror", lambda error: wrong.append(str(error)))
    tab.on("request", lambda asked: asked.url.startswith(("data:", "file:")) or wrong.append(asked.url))
    tab.goto(page_file.as_uri())

    assert tab.evaluate("document.documentElement.scrollWidth") == width
    dark = tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(14, 15, 16)"
    assert dark == (scheme == "dark")
    assert tab.evaluate("[...document.images].every(image => image.naturalWidth === 256)")

    tab.locator(".compare input").first.fill("40")
    assert "60%" in tab.locator(".compare .over").first.evaluate("image => getComputedStyle(image).clipPath")

    tab.locator("summary").click()
    tab.get_by_role("button", name="Worst first").click()
    errors = tab.locator("#all tr[data-index]").evaluate_all("rows => rows.map(row => Number(row.dataset.error))")
    assert errors == sorted(errors, reverse=True)
    tab.get_by_role("button", name="Model order").click()
    order = tab.locator("#all tr[data-index]").evaluate_all("rows => rows.map(row => Number(row.dataset.index))")
    assert order == sorted(order)
    tab.get_by_role("searchbox").fill("proj_mlp")
    shown = tab.locator("#all tr[data-index]:visible")
    assert 0 < shown.count() < len(order)
    assert all("proj_mlp" in text for text in shown.all_inner_texts())
    assert wrong == []
    context.close()
