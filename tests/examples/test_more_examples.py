"""The examples that need a file beside the model: LoRAs, a 4-bit T5, published checkpoints."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageChops
from safetensors.torch import load_file, save_file
from transformers import T5EncoderModel

from engine.commands import convert
from engine.quantize.__main__ import main as quantize
from tests.t5 import four_bit_t5

ROOT = Path(__file__).parents[2]
ZOO = ROOT / "zoo" / "weights"
TINY = ZOO / "flux-tiny"


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


def painted(path: Path) -> bool:
    with Image.open(path) as picture:
        low, high = picture.convert("L").getextrema()
    return high - low > 20


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
    checkpoint = ZOO / "flux-tiny-int4"
    example(name, "--pipeline", TINY, "--transformer", checkpoint, "--encoder", encoder, "--device", "cpu",
            "--size", 256, "--steps", 2, "--text", 64, "--prompt", "a red cube", "--out", out)  # fmt: skip
    assert painted(out)


def published(checkpoint: str, folder: Path) -> Path:
    """A checkpoint that ships, as the published single file."""
    file = folder / f"svdq-{checkpoint}.safetensors"
    assert convert.main([str(ZOO / checkpoint), str(file), "--to", "nunchaku"]) == 0
    return file


def test_a_published_flux_file_in_a_plain_pipeline(example, tmp_path: Path):
    """Another seed gives another picture."""
    file = published("flux-tiny-int4", tmp_path)
    one, other = tmp_path / "one.png", tmp_path / "other.png"
    for seed, out in ((7, one), (8, other)):
        example("flux_published", "--transformer", file, "--pipeline", TINY, "--device", "cpu", "--size", 256,
                "--steps", 2, "--text", 64, "--guidance", 4.5, "--prompt", "a red cube", "--seed", seed,
                "--out", out)  # fmt: skip
    assert painted(one)
    assert differ(one, other)


def test_a_published_sana_file_in_a_plain_pipeline(example, tmp_path: Path):
    """The checkpoint that ships keeps linears in 16 bits, which a published file cannot: so one is made."""
    file, out = tmp_path / "svdq-sana.safetensors", tmp_path / "picture.png"
    assert quantize(["tiny-sana", "--out", str(file), "--format", "nunchaku", "--no-report", "--rounds", "1"]) == 0
    example("sana_published", "--transformer", file, "--pipeline", ZOO / "sana-tiny", "--device", "cpu", "--size", 256,
            "--steps", 2, "--text", 64, "--prompt", "a red cube", "--out", out)  # fmt: skip
    assert painted(out)


def unpacked(example, capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[object, str]:
    """Exit status and what was printed."""
    with pytest.raises(SystemExit) as ended:
        example("unpack_layers", *arguments)
    told = capsys.readouterr()
    return ended.value.code, told.out + told.err


def test_unpacked_layers_are_compared_with_their_plain_form(example, tmp_path: Path, capsys):
    file = ROOT / "tests" / "data" / "pack_int4.safetensors"
    status, told = unpacked(example, capsys, file)
    assert status == 0
    assert "equals plain" in told
    assert "DIFFERS" not in told
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("plain.bias"))
    save_file({**tensors, name: tensors[name] + 1}, tmp_path / "changed.safetensors")
    status, told = unpacked(example, capsys, tmp_path / "changed.safetensors")
    assert status == 1
    assert told.count("DIFFERS") == 1


def test_layers_to_unpack_are_chosen_by_name(example, capsys):
    file = ROOT / "tests" / "data" / "flux_tiny_int4.safetensors"
    status, told = unpacked(example, capsys, file, "--only", "single_transformer_blocks.0.")
    assert status == 0
    assert {line.split(".")[0] for line in told.splitlines()} == {"single_transformer_blocks"}
    status, told = unpacked(example, capsys, file, "--only", "nowhere")
    assert status == 2
    assert "holds no 4-bit layer whose name begins with 'nowhere'" in told
    status, told = unpacked(example, capsys, "nowhere.safetensors")
    assert status == 2
    assert "expected a .safetensors file, got nowhere.safetensors" in told


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "examples").glob("*.py")))
def test_help_shows_commands_to_copy(name: str, example, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as ended:
        example(name, "--help")
    assert ended.value.code == 0
    assert f"python examples/{name}.py" in capsys.readouterr().out
