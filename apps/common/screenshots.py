"""Take the pictures of a page for the documentation: a full run, by day, by night and on a phone.

    python -m apps.common.screenshots --out docs/screenshots [--app flux_t2i] [--prompt TEXT] [--seed N] [-- APP FLAGS]

Needs playwright and a Chromium.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

__all__ = ["CHROMIUM_FLAGS", "find_chromium", "main", "paint", "shoot"]

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
    "light": {"color_scheme": "light", "viewport": {"width": 1366, "height": 900}},
    "dark": {"color_scheme": "dark", "viewport": {"width": 1366, "height": 900}},
    "phone": {
        "color_scheme": "light", "viewport": {"width": 390, "height": 844}, "is_mobile": True,
        "has_touch": True, "device_scale_factor": 2,
    },
}  # fmt: skip


def find_chromium() -> str | None:
    """Path of an installed Chromium or Chrome; CHROMIUM overrides the search."""
    names = ("chromium", "chromium-browser", "google-chrome")
    return os.environ.get("CHROMIUM") or next((path for name in names if (path := shutil.which(name))), None)


def paint(page: Page, prompt: str, seed: int | None = None, timeout: float = 600) -> None:
    """Type a prompt, press Generate, and wait until the comparison of the two pictures is on the page."""
    if seed is not None:
        page.locator("#nb-seed input").fill(str(seed))
        page.locator("#nb-seed input").blur()
    page.locator("#nb-prompt textarea").fill(prompt)
    page.locator("#nb-generate").click()
    page.locator("#nb-slider img").first.wait_for(timeout=1000 * timeout)
    page.locator("#nb-generate:not([disabled])").wait_for(timeout=1000 * timeout)


def shoot(browser: Browser, url: str, out: Path, prompt: str, seed: int) -> list[Path]:
    """Run the page once in each view and write a picture of it whole. Returns the paths."""
    paths = []
    for name, options in VIEWS.items():
        context = browser.new_context(**options)
        page = context.new_page()
        page.goto(url)
        page.locator("#nb-banner .nb-load-ready").wait_for(timeout=600_000)
        paint(page, prompt, seed)
        page.mouse.move(0, 0)
        page.evaluate("window.scrollTo(0, 0)")
        # Pictures below the fold load when they are scrolled to; the screenshot does not scroll.
        page.evaluate("for (const image of document.images) image.loading = 'eager'")
        page.wait_for_function("[...document.images].every(image => image.complete)")
        paths.append(out / f"{name}.png")
        page.screenshot(path=paths[-1], full_page=True, animations="disabled")
        context.close()
    return paths


def main(argv: Sequence[str] | None = None) -> int:
    """Start the app, take the pictures, stop it. Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m apps.common.screenshots",
        description="Take the pictures of a page for the documentation: by day, by night and on a phone.",
        epilog="Flags of the app follow after --, as in: --out docs/screenshots -- --model tiny",
    )
    parser.add_argument("--out", type=Path, default=Path("docs/screenshots"))
    parser.add_argument("--app", default="flux_t2i", help="folder of the app (default flux_t2i)")
    parser.add_argument("--prompt", default="a large red metal sphere left of a small blue cube")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("flags", nargs="*", help="flags of the app itself, after --")
    args = parser.parse_args(argv)
    logging.basicConfig(format="%(message)s")
    log.setLevel(logging.INFO)
    chromium = find_chromium()
    if chromium is None:
        parser.error("no Chromium found; install one, or name it in the environment variable CHROMIUM")
    from playwright.sync_api import sync_playwright

    from apps.common import cli

    app = importlib.import_module(f"apps.{args.app}.run").APP
    studio = cli.open_studio(app, cli.parser(app).parse_args(args.flags))
    demo = cli.launch(studio, server_name="127.0.0.1", prevent_thread_lock=True, quiet=True)
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=chromium, args=CHROMIUM_FLAGS)
            for path in shoot(browser, demo.local_url, args.out, args.prompt, args.seed):
                log.info("%s", path)
            browser.close()
    finally:
        demo.close()
        studio.pictures.close()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
