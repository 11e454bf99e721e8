"""A 4-bit T5 in place of the model's own: the picture stays, the encoder shrinks, and what does not fit is named."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from engine import Engine, Request
from engine.errors import CheckpointError, ModelError
from engine.memory import module_bytes
from engine.metrics import psnr
from engine.models.catalogue import resolve
from engine.models.install import Quantization

TINY = resolve("tiny")
GROUP = 128


def rounded(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes (N, K/2), scales and zeros (N, K/128) of plain rounding between each group's least and largest value."""
    groups = weight.float().unflatten(1, (-1, GROUP))
    low, high = groups.amin(2), groups.amax(2)
    scales, zeros = ((high - low) / 15).bfloat16(), low.bfloat16()
    codes = ((groups - zeros[..., None].float()) / scales[..., None].float()).round().clamp(0, 15).to(torch.uint8)
    codes = codes.flatten(1)
    return codes[:, 0::2] | (codes[:, 1::2] << 4), scales, zeros


@pytest.fixture(scope="module")
def own() -> Engine:
    return Engine.load("tiny", "int4", device="cpu")


@pytest.fixture(scope="module")
def file(own: Engine, tmp_path_factory) -> Path:
    """The small model's own T5 in four bits."""
    encoder, tensors = own.pipe.text_encoder_2, {}
    for name, value in encoder.state_dict().items():
        module = name.removesuffix(".weight")
        if ("SelfAttention." in name or "DenseReluDense" in name) and "bias" not in name:
            codes, scales, zeros = rounded(value)
            tensors |= {f"{module}.codes": codes, f"{module}.scales": scales, f"{module}.zeros": zeros}
        elif name != "encoder.embed_tokens.weight":
            tensors[name] = value.bfloat16()
    path = tmp_path_factory.mktemp("t5") / "t5.safetensors"
    details = Quantization("T5EncoderModel", encoder.config.to_diff_dict(), "awq-int4", GROUP, 0)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata=details.metadata())
    return path


def test_the_picture_stays_and_the_encoder_shrinks(own: Engine, file: Path):
    engine = Engine.load(replace(TINY, text_encoder=str(file)), "int4", device="cpu")
    request = Request("a large red metal sphere left of a small blue cube", seed=7)
    ours, wanted = engine.run(request).image, own.run(request).image
    assert psnr(ours, wanted) > 20
    assert not np.array_equal(np.asarray(ours), np.asarray(wanted))
    assert module_bytes(engine.pipe.text_encoder_2) < 0.75 * module_bytes(own.pipe.text_encoder_2)


def test_what_does_not_fit_is_named(file: Path, tmp_path: Path):
    with pytest.raises(CheckpointError, match="no such file"):
        Engine.load(replace(TINY, text_encoder=str(tmp_path / "none.safetensors")), "int4", device="cpu")
    with pytest.raises(ModelError, match="Tiny SANA has no T5 text encoder"):
        Engine.load(replace(resolve("tiny-sana"), text_encoder=str(file)), "int4", device="cpu")
