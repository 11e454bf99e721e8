"""A T5 in four bits, made by the command: what it loses, where it opens, and going on after a kill."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import T5Config, T5EncoderModel

from engine.checkpoint.layouts import detect
from engine.models.t5 import load_t5
from engine.quantize import quantize_text_encoder
from engine.quantize.__main__ import main
from engine.quantize.records import read_records, records_path
from tests.quantize.conftest import PROMPTS, contents


def states(encoder: Any, model: Path) -> torch.Tensor:
    """What an encoder makes of two prompts."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model / "tokenizer_2")
    read = tokenizer(list(PROMPTS), padding="max_length", max_length=32, return_tensors="pt")
    with torch.inference_mode():
        return encoder(read.input_ids)[0].float()


@pytest.fixture(scope="module")
def model(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small random FLUX with a T5 wide enough for groups of 128."""
    folder = tmp_path_factory.mktemp("wide") / "model"
    shutil.copytree(model, folder)
    torch.manual_seed(0)
    words = T5Config.from_pretrained(folder / "text_encoder_2").vocab_size
    config = T5Config(vocab_size=words, d_model=128, d_ff=256, d_kv=64, num_heads=2, num_layers=2,
                      feed_forward_proj="gated-gelu")  # fmt: skip
    shutil.rmtree(folder / "text_encoder_2")
    T5EncoderModel(config).bfloat16().save_pretrained(folder / "text_encoder_2")
    return folder


def opened(file: Path) -> Any:
    return load_t5(file, backend="reference", device=torch.device("cpu"))


@pytest.mark.parametrize("layout", ["canonical", "nunchaku"])
def test_the_command_writes_a_t5_that_opens_and_says_nearly_the_same(
    model: Path, prompts: Path, tmp_path: Path, layout: str
):
    out = tmp_path / "t5.safetensors"
    asked = [str(model), "--text-encoder", "--out", str(out), "--calib", str(prompts), "--format", layout]
    assert main([*asked, "--device", "cpu"]) == 0
    assert detect(out).kind == {"canonical": "canonical", "nunchaku": "t5_awq"}[layout]
    exact = T5EncoderModel.from_pretrained(model / "text_encoder_2", dtype=torch.bfloat16)
    wanted, found = states(exact, model), states(opened(out), model)
    assert float((found - wanted).norm() / wanted.norm()) < 0.15
    rows = read_records(records_path(out))
    assert len(rows) == 7 * exact.config.num_layers
    assert sum(row.error_w4a8 for row in rows) < sum(row.naive_error for row in rows)  # pyright: ignore


def test_what_is_kept_stays_in_16_bits(model: Path, tmp_path: Path):
    quantize_text_encoder(str(model), tmp_path / "t5", keep=("*.DenseReluDense.wo",), device="cpu")
    encoder = opened(tmp_path / "t5")
    assert isinstance(encoder.encoder.block[0].layer[1].DenseReluDense.wo, torch.nn.Linear)
    assert not isinstance(encoder.encoder.block[0].layer[0].SelfAttention.q, torch.nn.Linear)


def test_a_run_that_was_ended_goes_on_to_the_same_bytes(model: Path, tmp_path: Path):
    def stop(stage: str, done: int, total: int) -> None:
        if (stage, done) == ("quantizing", 1):
            raise KeyboardInterrupt

    asked: dict[str, Any] = {"prompts": PROMPTS, "device": "cpu"}
    quantize_text_encoder(str(model), tmp_path / "a" / "t5", **asked)
    with pytest.raises(KeyboardInterrupt):
        quantize_text_encoder(str(model), tmp_path / "b" / "t5", progress=stop, **asked)
    quantize_text_encoder(str(model), tmp_path / "b" / "t5", resume=True, **asked)
    assert contents(tmp_path / "a" / "t5") == contents(tmp_path / "b" / "t5")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--precision", "nvfp4"], "--precision: a text encoder has no such choice, .*"),
        (["--format", "nunchaku_lite"], "format: a text encoder is written as canonical or nunchaku, got .*"),
        (["--format", "nunchaku"], "out: nunchaku's text encoder is one file, expected a name in .safetensors, got t5"),
        (["--keep-16bit", "*.none"], r"keep: the pattern '\*\.none' matches no linear of the text encoder"),
    ],
)
def test_a_bad_argument_is_one_sentence(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str
):
    assert main([str(model), "--text-encoder", "--out", str(tmp_path / "t5"), "--device", "cpu", *arguments]) == 2
    assert re.fullmatch(f"engine.quantize: {sentence}", capsys.readouterr().err.strip())


def test_a_t5_too_narrow_for_the_format_is_named(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    narrow = tmp_path / "narrow"
    shutil.copytree(model, narrow)
    T5EncoderModel(T5Config(vocab_size=64, d_model=32, d_ff=32, d_kv=16, num_heads=2, num_layers=1)).save_pretrained(
        narrow / "text_encoder_2"
    )
    assert main([str(narrow), "--text-encoder", "--out", str(tmp_path / "t5")]) == 2
    assert "is left to quantize: its width is 32, and groups are of 128 inputs" in capsys.readouterr().err


def test_a_model_without_a_t5_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["tiny-sana", "--text-encoder", "--out", str(tmp_path / "t5")]) == 2
    assert "Tiny SANA has no T5 text encoder; expected a FLUX model" in capsys.readouterr().err
