"""A browser for the tests that look at pages."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session")
def browser() -> Iterator:
    """Chromium without a window. Where there is none the test is skipped; on CI it fails."""
    from apps.common.screenshots import CHROMIUM_FLAGS, find_chromium

    chromium = find_chromium()
    if chromium is None:
        message = "no Chromium on this machine (apt-get install chromium, or set CHROMIUM)"
        pytest.fail(message) if os.environ.get("CI") == "true" else pytest.skip(message)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=chromium, args=CHROMIUM_FLAGS)
        yield opened
        opened.close()
