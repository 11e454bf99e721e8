"""Reading a checkpoint holds one tensor at a time: measured in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import synthetic_flux

ROOT = Path(__file__).parents[2]
# Memory that no file backs, on top of what was there before: the mapped file itself does not count.
CHILD = """
import gc, json, sys
from bench.load_time import Peak
from engine.checkpoint.layouts import open_checkpoint
import torch
torch.set_num_threads(1)
path, warm = sys.argv[1:]
def touch(path):
    largest, source = 0, open_checkpoint(path)
    for name in source:
        largest = max(largest, source[name].nbytes)
    source.close()
    return largest
touch(warm)
gc.collect()
with Peak() as peak:
    largest = touch(path)
print(json.dumps({"largest": largest, "grown": peak.most - peak.before}))
"""


@pytest.mark.slow
def test_no_more_than_a_largest_tensor_and_a_third_in_memory(tmp_path: Path):
    small, large = tmp_path / "small.safetensors", tmp_path / "large.safetensors"
    synthetic_flux.main([str(small), "--width", "128", "--blocks", "1", "1"])
    synthetic_flux.main([str(large), "--width", "3072", "--blocks", "1", "1"])
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(large), str(small)],
        capture_output=True, text=True, timeout=200, check=False, cwd=ROOT,
        # glibc keeps freed blocks of up to 32 MiB; this makes it give them back, so that what is used is seen.
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "1048576"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    # A modulation's codes are the largest: 18432 x 1536 bytes. A layer in work is several tensors, of less than that.
    assert told["largest"] >= 18432 * 1536
    assert told["grown"] <= 1.3 * told["largest"]
