"""INT4 with a LoRA beside BF16 with the same LoRA through PEFT: how near the small models' pictures are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import lora_quality


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in lora_quality.LORAS if name != "tiny-sketch"])
def test_int4_with_a_lora_is_near_bf16_with_peft(name: str):
    found = lora_quality.measure(name, 1)
    assert min(row["worst"] for row in found.values()) >= lora_quality.GOAL


def test_int4_sketches_are_near_those_with_peft_and_the_bench_tells_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """The strength follows the drawing's, so PEFT scales the LoRA and the engine its own ranks."""
    out = tmp_path / "told.json"
    assert lora_quality.main(["--models", "tiny-sketch", "--count", "2", "--json", str(out)]) == 0
    told = json.loads(out.read_text())
    row = told["psnr"]["tiny-sketch"]
    assert set(row) == {"w4a8", "w4a4"}
    for figures in row.values():
        assert lora_quality.GOAL <= figures["worst"] <= figures["mean"] < 60
        assert figures["pictures_below_goal"] == 0
    assert f"| sketch | {row['w4a8']['mean']:.1f} ({row['w4a8']['worst']:.1f}) |" in capsys.readouterr().out
