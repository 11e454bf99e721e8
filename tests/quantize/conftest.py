"""A whole FLUX pipeline of the smallest size, quantized in under a second."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import zoo
from engine.quantize import Recipe
from zoo import scenes
from zoo.train import models, vocab

SMOKE = Path(zoo.__file__).parent / "configs" / "smoke.json"
PROMPTS = ("a red cube", "two blue cones left of a large green sphere")
QUICK = Recipe(rank=16, rounds=2, alphas=(0.5,))
SMALL = {"size": 256, "steps": 2, "device": "cpu"}


@pytest.fixture(scope="package", autouse=True)
def one_thread():
    """Models of this size are slower with threads, and much slower beside another busy process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A FLUX folder of the real classes with random weights of a size that training would give."""
    root = tmp_path_factory.mktemp("flux")
    words = vocab.vocabulary_words(scenes.vocabulary())
    vocab.build_clip(words, root / "tokenizers" / "tokenizer")
    vocab.build_t5(words, root / "tokenizers" / "tokenizer_2")
    config = json.loads(SMOKE.read_text())
    torch.manual_seed(0)
    parts = models.build(config, root / "tokenizers")
    for parameter in parts.transformer.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    models.quiet()
    models.export(parts, config["scheduler"], root / "tokenizers", root / "model")
    return root / "model"


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """The calibration prompts as a file."""
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(PROMPTS) + "\n")
    return file


def contents(out: Path) -> dict[str, bytes]:
    """Every byte of a checkpoint, by file name."""
    if out.is_dir():
        return {file.name: file.read_bytes() for file in sorted(out.iterdir())}
    return {file.name: file.read_bytes() for file in sorted(out.parent.glob(f"{out.stem}.*"))}
