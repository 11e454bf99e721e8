"""A browser for the tests that look at pages, and a picture checker for those that judge them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

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


@pytest.fixture(scope="session")
def vit_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier of the real classes with random weights."""
    import torch
    from transformers import ViTConfig, ViTForImageClassification

    from safety.nsfw import ViTImageProcessorPil

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=32,
        patch_size=8,
        id2label={0: "normal", 1: "nsfw"},
        label2id={"normal": 0, "nsfw": 1},
        initializer_range=0.5,
    )
    folder = tmp_path_factory.mktemp("nsfw")
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 32, "width": 32}, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(
        folder
    )
    return folder
