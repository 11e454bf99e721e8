"""Take the pictures of the pages for the documentation: an example painted in each app, by day, by night, on a phone.

    python -m apps.common.screenshots --out docs/screenshots [--only PAGE ...] [--seed N] [-- FLAGS OF apps/run.py]

Needs playwright and a Chromium.
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from apps.common.app import App

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

__all__ = [
    "CHROMIUM_FLAGS",
    "HOUSE",
    "VIEWS",
    "choose_example",
    "find_chromium",
    "main",
    "paint",
    "paint_example",
    "set_seed",
    "set_steps",
    "shoot",
    "wait_for_both",
    "wait_for_quiet",
]

log = logging.getLogger("nibble")

CHROMIUM_FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
VIEWS = {
    "light": {"color_scheme": "light", "viewport": {"width": 1440, "height": 900}},
    "dark": {"color_scheme": "dark", "viewport": {"width": 1440, "height": 900}},
    "phone": {
        "color_scheme": "light", "viewport": {"width": 390, "height": 844}, "is_mobile": True,
        "has_touch": True, "device_scale_factor": 2,
    },
}  # fmt: skip
HOUSE = "house"
LONGEST = 600.0  # seconds that a page may take to load its model, or to paint


def find_chromium() -> str | None:
    """Path of an installed Chromium or Chrome; CHROMIUM overrides the search."""
    names = ("chromium", "chromium-browser", "google-chrome")
    return os.environ.get("CHROMIUM") or next((path for name in names if (path := shutil.which(name))), None)


def set_seed(page: Page, seed: int) -> None:
    """Type a seed, which also switches "New seed each time" off."""
    page.locator("#nb-seed input").fill(str(seed))
    page.locator("#nb-seed input").blur()


def set_steps(page: Page, steps: int) -> None:
    """Type a number of steps, with the options open."""
    number = page.locator("#nb-steps input[type=number]")
    if not number.is_visible():
        page.locator("#nb-options button").first.click()
    number.fill(str(steps))
    number.blur()


def wait_for_both(page: Page, timeout: float = LONGEST) -> None:
    """Wait until the comparison of the two pictures is on the page and the run is over."""
    page.locator("#nb-slider img").first.wait_for(timeout=1000 * timeout)
    page.locator("#nb-generate:not([disabled])").wait_for(timeout=1000 * timeout)


def paint(page: Page, prompt: str, seed: int | None = None, timeout: float = LONGEST) -> None:
    """Type a prompt, press Generate, and wait until the comparison of the two pictures is on the page."""
    if seed is not None:
        set_seed(page, seed)
    page.locator("#nb-prompt textarea").fill(prompt)
    page.locator("#nb-generate").click()
    wait_for_both(page, timeout)


def paint_example(page: Page, app: App, seed: int, timeout: float = LONGEST) -> None:
    """Choose the app's first example and wait for both pictures; a sketch paints at once, the others are told."""
    set_seed(page, seed)
    choose_example(page, app)
    if app.live is None:
        page.locator("#nb-generate").click()
    wait_for_both(page, timeout)


def choose_example(page: Page, app: App) -> None:
    """Choose the app's first example and wait until it stands in the controls."""
    page.evaluate("performance.setResourceTimingBufferSize(10000)")
    page.locator(".nb-example").first.click()
    prompt = str(app.examples[0].get("prompt", ""))
    page.wait_for_function("words => document.querySelector('#nb-prompt textarea').value === words", arg=prompt)
    for control in app.controls:
        if control.place == "picture" and app.examples[0].get(control.name) is not None:
            page.locator(f"#nb-{control.name} img, #nb-{control.name} canvas").first.wait_for()
    wait_for_quiet(page)


def wait_for_quiet(page: Page, milliseconds: int = 800) -> None:
    """Wait until the page has asked the server for nothing for a while: an editor uploads what it shows in parts."""
    page.wait_for_function(
        """quiet => {
            const ends = performance.getEntriesByType("resource").map(one => Math.max(one.startTime, one.responseEnd));
            return performance.now() - Math.max(0, ...ends) > quiet;
        }""",
        arg=milliseconds,
    )


def shoot(browser: Browser, url: str, app: App | None, out: Path, seed: int) -> list[Path]:
    """Write a picture of a page in each view, NAME-VIEW.webp; of an app (None: the house) with an example painted.

    The page is shown whole, and on a phone what fits on it. Returns the paths.
    """
    paths = []
    for view, options in VIEWS.items():
        context = browser.new_context(**options)
        page = context.new_page()
        page.goto(url)
        if app is None:
            page.locator(".nb-door img").last.wait_for()
        else:
            page.locator("#nb-banner .nb-load-ready").wait_for(timeout=1000 * LONGEST)
            paint_example(page, app, seed)
        paths.append(out / f"{app.slug if app else HOUSE}-{view}.webp")
        _write(_screen(page, app) if view == "phone" else _whole(page), paths[-1])
        context.close()
    return paths


def _whole(page: Page) -> Image.Image:
    """A picture of the page from top to bottom."""
    page.mouse.move(0, 0)
    page.evaluate("document.activeElement?.blur(); window.scrollTo(0, 0)")
    # Pictures below the fold load when they are scrolled to; the screenshot does not scroll.
    page.evaluate("for (const image of document.images) image.loading = 'eager'")
    page.wait_for_function("[...document.images].every(image => image.complete)")
    return Image.open(BytesIO(page.screenshot(full_page=True, animations="disabled")))


def _screen(page: Page, app: App | None) -> Image.Image:
    """What a visitor sees who has just painted: the results, and where each stroke paints also the page to draw on."""
    if app is not None:
        page.locator("#nb-work" if app.live else "#nb-results").evaluate("part => part.scrollIntoView()")
    wait_for_quiet(page)
    return Image.open(BytesIO(page.screenshot(animations="disabled")))


def _write(image: Image.Image, path: Path) -> None:
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    image.convert("RGB").save(partial, "WEBP", quality=88, method=6)
    partial.replace(path)


@contextmanager
def _served(flags: Sequence[str]) -> Iterator[str]:
    """The house on loopback: its address."""
    from apps import run
    from apps.common import cli
    from apps.common.house import build

    studios = run.open_studios(run.parser().parse_args([*flags]))
    demo = cli.serve(build(studios), server_name="127.0.0.1", prevent_thread_lock=True, quiet=True)
    try:
        yield demo.local_url
    finally:
        demo.close()
        for studio in studios:
            studio.pictures.close()


def main(argv: Sequence[str] | None = None) -> int:
    """Start all six apps, take the pictures, stop them. Returns the exit status."""
    from apps.run import apps

    pages: dict[str, App | None] = {HOUSE: None, **{app.slug: app for app in apps()}}
    parser = argparse.ArgumentParser(
        prog="python -m apps.common.screenshots",
        description="Take the pictures of the pages for the documentation: the page that leads to the apps and each of "
        "the six with its first example painted, by day, by night and on a phone, as PAGE-VIEW.webp.",
        epilog="The pictures show times: run it on a machine with nothing else to do. Flags of apps/run.py follow "
        "after --, as in: --out docs/screenshots -- --device cuda",
    )
    parser.add_argument("--out", type=Path, default=Path("docs/screenshots"), help="folder (default %(default)s)")
    parser.add_argument("--only", nargs="+", choices=list(pages), metavar="PAGE", help=f"some of {', '.join(pages)}")
    parser.add_argument("--seed", type=int, default=7, help="seed of every picture (default %(default)s)")
    parser.add_argument("flags", nargs="*", help="flags of apps/run.py, after -- (default --small)")
    args = parser.parse_args(argv)
    logging.basicConfig(format="%(message)s")
    log.setLevel(logging.INFO)
    chromium = find_chromium()
    if chromium is None:
        parser.error("no Chromium found; install one, or name it in the environment variable CHROMIUM")
    from playwright.sync_api import sync_playwright

    args.out.mkdir(parents=True, exist_ok=True)
    with _served(args.flags or ["--small"]) as url, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=CHROMIUM_FLAGS)
        for name in args.only or pages:
            app = pages[name]
            for path in shoot(browser, f"{url}{app.slug if app else ''}", app, args.out, args.seed):
                log.info("%s", path)
        browser.close()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
