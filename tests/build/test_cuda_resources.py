"""Every CUDA source compiles for its architectures, without spills and within what a block may use."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

CUDA = Path(__file__).parents[2] / "csrc" / "cuda"
NVCC = shutil.which("nvcc")
# Registers a thread, at most. sm80/linear.cu runs one block of 256 threads on a multiprocessor (two of 128 registers
# through INT4 units: its launch bounds see to that); Hopper's linear and attention move registers between their
# warpgroups, and 168 is what every thread starts with; its quantize_act has two blocks of 384 threads on a
# multiprocessor, or one of 384 (168 registers) or 416 (152), as each kernel's bounds say. sm120a/linear.cu runs two
# blocks of 256 threads.
BUDGETS = {
    "dequantize_sm80.cu": (("80", "89", "90"), 64),
    "dequantize_sm90a.cu": (("90a",), 64),
    "dequantize_sm120a.cu": (("120a",), 64),
    "sm80/quantize_act.cu": (("80", "89", "90", "120a"), 64),
    "sm80/linear.cu": (("80", "86", "89", "90", "120a"), 248),
    "sm80/awq_linear.cu": (("80", "89", "90", "120a"), 168),
    "sm80/rotate_heads.cu": (("80", "89", "90", "120a"), 84),
    "sm80/gated_add.cu": (("80", "89", "90", "120a"), 64),
    "sm80/depthwise_glu.cu": (("80", "89", "90", "120a"), 128),
    "sm80/linear_attention.cu": (("80", "89", "90", "120a"), 128),
    "sm120a/quantize_act.cu": (("120a",), 64),
    "sm120a/linear.cu": (("120a",), 128),
    "sm90a/linear.cu": (("90a",), 168),
    "sm90a/quantize.cu": (("90a",), 168),
    "sm90a/attention.cu": (("90a",), 168),
}
SHARED = 48 * 1024  # bytes of static shared memory a block may have; what is more is asked for at the launch


def test_every_source_has_a_budget():
    assert {str(path.relative_to(CUDA)) for path in CUDA.rglob("*.cu")} == set(BUDGETS)


@pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
@pytest.mark.parametrize("source", BUDGETS)
def test_compiles_within_its_budget(source: str, tmp_path: Path):
    architectures, registers = BUDGETS[source]
    targets = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in architectures]
    command = ["nvcc", "-std=c++20", "-O3", "-Xptxas=-v", *targets, "-c", str(CUDA / source), "-o", str(tmp_path / "o")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    report = done.stdout + done.stderr
    assert done.returncode == 0, report[-2000:]
    used = [int(count) for count in re.findall(r"Used (\d+) registers", report)]
    spilled = [int(count) for count in re.findall(r"(\d+) bytes spill stores", report)]
    shared = [int(count) for count in re.findall(r"(\d+) bytes smem", report)]
    assert len(used) == len(spilled) > 0
    assert {name for name in architectures if f"for 'sm_{name}'" in report} == set(architectures)
    assert max(spilled) == 0
    assert max(used) <= registers
    assert max(shared, default=0) <= SHARED
