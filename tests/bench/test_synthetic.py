"""The random full-size checkpoint and what is measured on it, at a small size."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path

import pytest

from bench import load_time, synthetic_flux
from engine.checkpoint.layouts import open_checkpoint
from engine.checkpoint.quantization import read_quantization

SMALL = ["--width", "128", "--blocks", "1", "1"]


def test_the_same_seed_writes_the_same_file(tmp_path: Path):
    for name in ("a", "b"):
        synthetic_flux.main([str(tmp_path / f"{name}.safetensors"), *SMALL])
    first, second = (tmp_path / f"{name}.safetensors" for name in ("a", "b"))
    assert first.read_bytes() == second.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]


def test_it_opens_and_its_loras_switch(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "flux.safetensors"
    synthetic_flux.main([str(path), *SMALL])
    capsys.readouterr()
    load_time.main([str(path), "--device", "cpu", "--size", "128", "--json", str(tmp_path / "out.json")])
    told = json.loads(capsys.readouterr().out)
    assert told == json.loads((tmp_path / "out.json").read_text())
    assert told["lora_modules"] == [31, 21]
    assert told["finite"]
    assert told["same_bits_after_unloading"]
    assert told["load_s"] > 0
    assert 0 < told["strength_ms"] < 1000


def test_nvfp4_and_other_ranks_are_written_too(tmp_path: Path):
    path = tmp_path / "flux.safetensors"
    synthetic_flux.main([str(path), *SMALL, "--precision", "nvfp4", "--rank", "48"])
    with closing(open_checkpoint(path)) as source:
        details = read_quantization(source)
        assert (details.weight, details.rank) == ("nvfp4", 48)
        assert all(source[name].numel() for name in source)


def test_a_width_that_heads_do_not_divide_is_refused(tmp_path: Path):
    with pytest.raises(SystemExit):
        synthetic_flux.main([str(tmp_path / "x.safetensors"), "--width", "200"])
