"""What the sm80 kernels read in the panel16 layout, without a device: the lanes of mma.sync worked through in torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engine import ops
from engine.ops.canonical import split_nibbles
from tests.ops.cases import Case, random_linear

ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # inputs of a word's nibbles, the lowest first


def paired(codes: Tensor) -> Tensor:
    """Token codes (M, K) in pairs (M, K/2): byte j of eight inputs has input j below and input j + 4 above."""
    eight = codes.to(torch.uint8).unflatten(1, (-1, 8)) & 15
    return (eight[..., :4] | eight[..., 4:] << 4).flatten(1)


def unpaired(pairs: Tensor, mode: str) -> Tensor:
    """The codes (M, K) int8 of pairs."""
    four = pairs.view(torch.uint8).unflatten(1, (-1, 4))
    codes = torch.cat((four & 15, four >> 4), -1).flatten(1).to(torch.int8)
    return codes if mode == "uint4" else signed(codes)


def signed(nibbles: Tensor) -> Tensor:
    return (nibbles.to(torch.int8) ^ 8) - 8


def nibbles_of(words: Tensor) -> Tensor:
    """Words (..., 4 bytes) -> their eight nibbles, the lowest first."""
    return torch.stack((words & 15, words >> 4), -1).flatten(-2)


def lane_bytes(words: Tensor) -> Tensor:
    """The two registers of 4 signed bytes that words of 8 codes become (csrc/cuda/sm80/linear.cu), side by side."""
    low = ((words << 4) & 0xF0) ^ 0x80
    high = (words & 0xF0) ^ 0x80
    return torch.cat((low, high), -1).view(torch.int8)


@pytest.mark.parametrize("form", ["8 bits", "4 bits"])
def test_a_lanes_words_are_its_inputs_of_both_operands(form: str):
    linear = random_linear(Case(1, 40, 192, 0))
    packed = ops.pack(linear, "sm80")
    words = packed.spec.sections["codes"].of(packed.blob)  # (panels, K/8, 16, 4)
    plain = signed(split_nibbles(linear.codes)).int()
    tokens = torch.randint(-8, 8, (3, 192), dtype=torch.int8)
    pairs = paired(tokens).view(3, 24, 4)
    assert torch.equal(unpaired(pairs.flatten(1), "int4"), tokens)
    dots = torch.zeros(3, 48, dtype=torch.int32)
    for group in range(3):
        for lane_q in range(4):
            for word in range(2):  # inputs 16q + 8 word and the seven behind it
                block, first = group * 8 + lane_q * 2 + word, group * 64 + lane_q * 16 + word * 8
                of_token = pairs[:, block]
                if form == "8 bits":
                    a = torch.cat((of_token << 4 & 0xF0, of_token & 0xF0), -1).view(torch.int8).int()
                    b, inputs, unit = lane_bytes(words[:, block]).int(), range(8), 16
                else:
                    a = signed(nibbles_of(of_token)).int()
                    b, inputs, unit = signed(nibbles_of(words[:, block] ^ 0x88)).int(), ORDER, 1
                assert torch.equal(a, tokens[:, [first + i for i in inputs]].int() * unit)
                # Lane r = l / 4 brings outputs 2r and 2r + 1 to two products; column c of product h is output 2c + h.
                for h in range(2):
                    columns = torch.arange(8) * 2 + h
                    for panel in range(3):
                        dots[:, panel * 16 + columns] += a @ b[panel, columns].T // unit**2
    assert torch.equal(dots[:, :40], tokens.int() @ plain.T)
