"""What the sm80 kernels read in the panel16 layout, without a device: the lanes of mma.sync worked through in torch."""

from __future__ import annotations

import torch

from engine import ops
from engine.ops.canonical import split_nibbles
from tests.ops.cases import Case, random_linear


def lane_bytes(words: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The two registers of 4 signed bytes that a word of 8 codes becomes (csrc/cuda/sm80/linear.cu)."""
    low = ((words << 4) & 0xF0) ^ 0x80
    high = (words & 0xF0) ^ 0x80
    return low.view(torch.int8), high.view(torch.int8)


def test_a_word_shows_sixteen_times_its_codes_in_the_order_of_the_tokens():
    linear = random_linear(Case(1, 40, 192, 0))
    packed = ops.pack(linear, "sm80")
    codes = packed.spec.sections["codes"].of(packed.blob)  # (panels, K/8, 16, 4)
    plain = (split_nibbles(linear.codes) ^ 8).to(torch.int8) - 8
    seen = 0
    for panel in range(3):
        for half in range(192 // 32):
            for lane in range(32):
                q, row = lane % 4, lane // 4
                for late in (0, 8):
                    n = panel * 16 + late + row
                    if n >= linear.n:
                        continue
                    first = half * 32 + q * 8
                    low, high = lane_bytes(codes[panel, half * 4 + q, late + row])
                    assert torch.equal(low.int(), plain[n, first : first + 4].int() * 16)
                    assert torch.equal(high.int(), plain[n, first + 4 : first + 8].int() * 16)
                    seen += 8
    assert seen == plain.numel()
