"""The examples that need a file beside the model: LoRAs, and a 4-bit T5."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageChops
from safetensors.torch import save_file
from transformers import T5EncoderModel

from tests.t5 import four_bit_t5

ROOT = Path(__file__).parents[2]
TINY = ROOT / "zoo" / "weights" / "flux-tiny"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch):
    """Runs an example with arguments, as a user does from a shell."""

    def run(name: str, *arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")

    return run


def lora(path: Path, module: str, seed: int) -> Path:
    """A LoRA that changes one linear of the small FLUX by much."""
    g = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(shape, generator=g) * 0.15 for shape in ((4, 384), (384, 4)))
    save_file({f"transformer.{module}.lora_A.weight": a, f"transformer.{module}.lora_B.weight": b}, path)
    return path


def differ(one: Path, other: Path) -> bool:
    with Image.open(one) as a, Image.open(other) as b:
        return ImageChops.difference(a.convert("RGB"), b.convert("RGB")).getbbox() is not None


def test_one_lora_at_two_strengths(example, tmp_path: Path):
    file = lora(tmp_path / "style.safetensors", "single_transformer_blocks.0.attn.to_q", 0)
    example("flux_lora", file, "--out", tmp_path / "out", "--steps", 2, "--strengths", 1, 0)
    full, zero, none = (tmp_path / "out" / f"{name}.png" for name in ("strength-1", "strength-0", "none"))
    assert differ(full, none)
    assert not differ(zero, none)


def test_two_loras(example, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    one = lora(tmp_path / "one.safetensors", "single_transformer_blocks.0.attn.to_q", 0)
    two = lora(tmp_path / "two.safetensors", "single_transformer_blocks.1.attn.to_v", 1)
    example("flux_several_loras", one, 1.0, two, 0.5, "--steps", 2, "--out", tmp_path / "two.png")
    assert "one: 1.0\ntwo: 0.5" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        example("flux_several_loras", one, 1.0, two)
    assert "expected a strength after each file" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["flux_t5_4bit", "flux_offload"])
def test_a_four_bit_t5_in_a_plain_pipeline(name: str, example, tmp_path: Path):
    own = T5EncoderModel.from_pretrained(TINY / "text_encoder_2", dtype=torch.bfloat16)
    encoder, out = four_bit_t5(own, tmp_path / "t5.safetensors"), tmp_path / "picture.png"
    checkpoint = ROOT / "zoo" / "weights" / "flux-tiny-int4"
    example(name, "--pipeline", TINY, "--transformer", checkpoint, "--encoder", encoder, "--device", "cpu",
            "--size", 256, "--steps", 2, "--text", 64, "--prompt", "a red cube", "--out", out)  # fmt: skip
    with Image.open(out) as picture:
        low, high = picture.convert("L").getextrema()
    assert high - low > 20
