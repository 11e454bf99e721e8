"""A FLUX pipeline folder at the smallest size, made once for all tests that tune or evaluate one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import zoo
from zoo import scenes
from zoo.train import models, vocab

SMOKE = Path(zoo.__file__).parent / "configs" / "smoke.json"


@pytest.fixture(scope="package", autouse=True)
def one_thread():
    """Models of this size are slower with threads, and much slower beside another busy process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def flux_base(tmp_path_factory) -> Path:
    """A FLUX folder of the real classes at the smallest size, with random weights."""
    folder = tmp_path_factory.mktemp("base")
    words = vocab.vocabulary_words(scenes.vocabulary())
    vocab.build_clip(words, folder / "tokenizers" / "tokenizer")
    vocab.build_t5(words, folder / "tokenizers" / "tokenizer_2")
    config = json.loads(SMOKE.read_text())
    torch.manual_seed(0)
    parts = models.build(config, folder / "tokenizers")
    for p in parts.transformer.parameters():  # a new model's zero gates would hide most of it
        torch.nn.init.normal_(p, std=0.05) if not p.any() else None
    parts.vae.register_to_config(scaling_factor=0.7, shift_factor=0.1)
    models.quiet()
    models.export(parts, config["scheduler"], folder / "tokenizers", folder / "model")
    return folder / "model"
