"""A LoRA from a file: it changes the picture in both precisions, and without it the very same bits come back."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gradio_client import handle_file
from PIL import Image
from safetensors.torch import save_file

from apps.common import loras
from engine import Engine, Request, RequestError
from engine.models import catalogue

DEV, TINY = catalogue.resolve("dev"), catalogue.resolve("tiny")


@pytest.fixture(scope="module")
def served(small_house):
    return small_house[0], small_house[1]["flux_t2i"]


@pytest.fixture(scope="module")
def lora(served, tmp_path_factory):
    """A LoRA of random factors on every attention of the picture's stream."""
    transformer = served[1].pool.get("bf16", lambda: False).pipe.transformer
    random, tensors = torch.Generator().manual_seed(0), {}
    for name, module in transformer.named_modules():
        if name.startswith("transformer_blocks.") and name.endswith(("attn.to_q", "attn.to_v")):
            n, k = module.weight.shape
            tensors[f"transformer.{name}.lora_A.weight"] = torch.randn(8, k, generator=random) * k**-0.5
            tensors[f"transformer.{name}.lora_B.weight"] = torch.randn(n, 8, generator=random) * 0.2
    path = tmp_path_factory.mktemp("lora") / "wobble.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path


def paint(served, precision: str, **more) -> tuple[np.ndarray, dict]:
    file, facts = served[0].predict("a red cube", seed=5, steps=4, precision=precision, **more, api_name="/flux_t2i")
    with Image.open(file if isinstance(file, str) else file["path"]) as picture:
        return np.asarray(picture).astype(int), facts


@pytest.mark.parametrize("precision", ["bf16", "int4"])
def test_a_file_changes_the_picture_and_leaves_no_trace(served, lora, precision):
    plain, _ = paint(served, precision)
    worn, facts = paint(served, precision, lora_file=handle_file(lora))
    weaker, _ = paint(served, precision, lora_file=handle_file(lora), lora_strength=0.5)
    assert np.abs(worn - plain).mean() > 1
    assert 0 < np.abs(weaker - plain).mean() < np.abs(worn - plain).mean()
    assert facts["settings"]["loras"] == {"wobble.safetensors": 1.0}
    assert (paint(served, precision)[0] == plain).all()


def test_both_precisions_wear_it_alike(served, lora):
    a, b = (paint(served, precision, lora_file=handle_file(lora))[0] for precision in ("bf16", "int4"))
    assert 10 * np.log10(255**2 / np.mean((a - b) ** 2)) >= 24


def test_what_is_no_lora_is_answered_in_words_and_the_next_run_works(served, tmp_path):
    wrong = tmp_path / "wrong.safetensors"
    wrong.write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    with pytest.raises(Exception, match="expected a LoRA"):
        paint(served, "int4", lora_file=handle_file(wrong))
    with pytest.raises(Exception, match="lora: expected a hub name"):
        paint(served, "int4", lora="../secrets.safetensors")
    assert paint(served, "int4")[0].shape == (256, 256, 3)


def test_known_ones_bring_their_words():
    values = {"lora": "Yarn Art", "lora_strength": 0.8}
    assert loras.wanted(values, DEV) == {"linoyts/yarn_art_Flux_LoRA/pytorch_lora_weights.safetensors": 0.8}
    assert loras.worded(values, DEV, "a {fox}") == "a {fox}, yarn art style"
    assert loras.worded(values, TINY, "a fox") == "a fox"
    with pytest.raises(RequestError, match="lora: expected"):
        loras.wanted(values, TINY)
    assert loras.wanted({"lora": "owner/repo/file.safetensors"}, TINY) == {"owner/repo/file.safetensors": 1.0}


@pytest.mark.parametrize("name", ["/etc/passwd", "~/x.safetensors", "file.safetensors", "a/../../b", "http://a/b"])
def test_a_path_of_this_machine_is_not_taken(name):
    with pytest.raises(RequestError, match="lora: expected"):
        loras.wanted({"lora": name}, TINY)


def test_the_engine_names_a_strength_that_is_none():
    engine = Engine.load("tiny", "int4", device="cpu")
    with pytest.raises(RequestError, match=r"loras\[x.safetensors\]: expected a number from -4 to 4"):
        engine.run(Request("a cube", loras={"/somewhere/x.safetensors": float("nan")}))
