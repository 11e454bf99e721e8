"""What the sm80 kernels read in the panel16 layout, without a device: the lanes of mma.sync worked through in torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engine import ops
from engine.ops import sm80
from engine.ops.canonical import split_nibbles
from tests.ops.cases import Case, random_linear

ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # inputs of a word's nibbles, the lowest first


def paired(codes: Tensor) -> Tensor:
    """Token codes (M, K) in pairs (M/16, K/64, 512), as LinearSm80 in csrc/cuda/kernels.h has them; M full sixteens."""
    eight = codes.to(torch.uint8).unflatten(1, (-1, 4, 2, 8)).unflatten(0, (-1, 2, 8)) & 15
    words = eight[..., :4] | eight[..., 4:] << 4  # (tiles, half, r, groups, q, word, 4): now groups, r, q, word, half
    return words.permute(0, 3, 2, 4, 5, 1, 6).flatten(2)


def unpaired(pairs: Tensor, mode: str, m: int) -> Tensor:
    """The codes (M, K) int8 of pairs."""
    words = pairs.view(torch.uint8).unflatten(2, (8, 4, 2, 2, 4)).permute(0, 5, 2, 1, 3, 4, 6)
    codes = torch.cat((words & 15, words >> 4), -1).flatten(3).flatten(0, 2)[:m].to(torch.int8)
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
    tokens = torch.randint(-8, 8, (32, 192), dtype=torch.int8)
    pairs = paired(tokens)
    assert pairs.shape == sm80.pairs_shape(32, 192)
    assert torch.equal(unpaired(pairs, "int4", 32), tokens)
    lanes = pairs.view(2, 3, 8, 4, 2, 2, 4)  # tiles, groups, r, q, word, half of the tile, bytes
    dots = torch.zeros(32, 48, dtype=torch.int32)
    for group in range(3):
        for lane_q in range(4):
            for word in range(2):  # inputs 16q + 8 word and the seven behind it
                block, first = group * 8 + lane_q * 2 + word, group * 64 + lane_q * 16 + word * 8
                of_token = lanes[:, group, :, lane_q, word].transpose(1, 2).flatten(0, 2)
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
