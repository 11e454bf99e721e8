"""The tiling of consumer Blackwell, and its kernel's index arithmetic worked through in torch: no such card is needed.

Fragments and selectors are those of the PTX ISA ("Matrix Fragments for mma.m16n8k64", "Block Scaling for mma.sync");
the copies, addresses and lanes are those of csrc/cuda/sm120a/linear.cu.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engine import ops
from engine.linear import SVDQuantLinear, resolve_activation
from engine.ops import backends, mma64, reference
from engine.ops.canonical import E2M1
from tests.ops.cases import Case, check_nvfp4_comes_back, random_linear, tokens
from tests.ops.test_wgmma64 import random_nvfp4

VALUES = torch.tensor(E2M1, dtype=torch.float64)
LANES = torch.arange(32)
ROW, Q = LANES // 4, LANES % 4  # groupID and threadID_in_group
TILE, STAGES, SCALE_STEPS = 128, 4, 4  # of linear.cu: tokens and outputs of a block


@pytest.mark.parametrize("factors", [False, True])
@pytest.mark.parametrize(("n", "k", "rank"), [(24, 128, 16), (70, 192, 0), (1, 64, 48), (128, 320, 32)])
def test_packs_and_comes_back(n: int, k: int, rank: int, factors: bool):
    linear = random_nvfp4(n, k, rank, factors)
    check_nvfp4_comes_back(linear, "sm120a")


def test_other_weights_take_amperes_kernels():
    assert ops.pack(random_linear(Case(1, 48, 64, 16)), "sm120a").backend == "sm80"


def test_memory_is_what_four_bits_need():
    assert ops.pack(random_nvfp4(3072, 3072, 32), "sm120a").nbytes <= 0.31 * 2 * 3072 * 3072


def multiply(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, thread_a: int = 0, thread_b: int = 0) -> Tensor:
    """mma.m16n8k64 of mxf4nvf4, scale_vec::4X: registers a (32,4), b (32,2), scales (32) of all lanes -> d (32,4)."""
    left, right = torch.zeros(16, 64, dtype=torch.float64), torch.zeros(64, 8, dtype=torch.float64)
    for i in range(32):
        row = ROW if i < 8 or 16 <= i < 24 else ROW + 8
        left[row, Q * 8 + i % 8 + 32 * (i >= 16)] = VALUES[a[:, i // 8] >> 4 * (i % 8) & 15]
    for i in range(16):
        right[Q * 8 + i % 8 + 32 * (i >= 8), ROW] = VALUES[b[:, i // 8] >> 4 * (i % 8) & 15]
    rows, columns = torch.arange(16), torch.arange(8)
    left *= four_scales(scale_a[4 * (rows % 8) + 2 * thread_a + rows // 8])
    right *= four_scales(scale_b[4 * columns + thread_b]).T
    d = left @ right
    return torch.stack([d[ROW + 8 * (i // 2), Q * 2 + i % 2] for i in range(4)], 1)


def four_scales(words: Tensor) -> Tensor:
    """Words of four e4m3 each -> (rows, 64), a scale for each 16 inputs."""
    scales = torch.stack([words >> 8 * i & 255 for i in range(4)], 1).to(torch.uint8).view(torch.float8_e4m3fn)
    return scales.double().repeat_interleave(16, 1)


def words_of(data: Tensor) -> Tensor:
    """Bytes -> 32-bit words, as non-negative integers."""
    return data.contiguous().view(torch.int32).long() & 0xFFFFFFFF


class Block:
    """Shared memory of one block, and what its threads copy there and read back."""

    def __init__(self, act: ops.QuantizedAct, packed: ops.PackedLinear, token: int, panel: int):
        parts = packed.spec.views(packed.blob)
        self.codes, self.scales = parts["codes"].flatten(), parts["scales"].view(torch.uint8).flatten()
        pad = (0, -act.scales.shape[1] % 16)
        self.token_codes = act.codes
        self.token_scales = torch.nn.functional.pad(act.scales.view(torch.uint8), pad, value=0x7F)
        self.token, self.panel, self.panels, self.steps = token, panel, *parts["codes"].shape[:2]
        sizes = {"tokens": (STAGES, TILE * 32), "codes": (STAGES, 4096), "scales": (STAGES, 512), "by": (2, TILE * 16)}
        self.shared = {name: torch.full(size, 255, dtype=torch.uint8) for name, size in sizes.items()}

    def copy(self, to: str, stage: int, at: int, source: Tensor, start: int, real: bool) -> None:
        self.shared[to][stage, at : at + 16] = source[start : start + 16] if real else 0

    def fetch(self, step: int) -> None:
        m, stage = len(self.token_codes), step % STAGES
        for thread in range(256):
            row, half, panel, piece = thread // 2, thread % 2, thread // 32, thread % 32 * 16
            token = self.token + row
            source = self.token_codes[token if token < m else 0]
            self.copy("tokens", stage, token_byte(row, half), source, step * 32 + half * 16, token < m)
            self.copy("codes", stage, panel * 512 + piece, self.codes, self.block(panel, step) * 512 + piece,
                      self.panel + panel < self.panels)  # fmt: skip
            if thread < 32:
                of, part = thread // 4, thread % 4 * 16
                self.copy("scales", stage, of * 64 + part, self.scales, self.block(of, step) * 64 + part,
                          self.panel + of < self.panels)  # fmt: skip
            if step % SCALE_STEPS == 0 and thread >= TILE:
                token = self.token + thread - TILE
                source = self.token_scales[token if token < m else 0]
                self.copy("by", step // SCALE_STEPS % 2, (thread - TILE) * 16, source, step * 4, token < m)

    def block(self, panel: int, step: int) -> int:
        return (self.panel + panel if self.panel + panel < self.panels else 0) * self.steps + step

    def a(self, step: int, first: int) -> Tensor:
        """ldmatrix.x4: lane l gives the address of row l % 8 of matrix l / 8, and gets word l % 4 of its row l / 4."""
        address = [token_byte(first + lane % 16, lane // 16) for lane in range(32)]
        rows = torch.stack([self.shared["tokens"][step % STAGES, at : at + 16] for at in address])
        return torch.stack([words_of(rows)[8 * matrix + ROW, Q] for matrix in range(4)], 1)

    def run(self) -> Tensor:
        """Sums (128,128) of the block's eight warps."""
        sums = torch.zeros(TILE, TILE, dtype=torch.float64)
        for step in range(min(STAGES - 1, self.steps)):
            self.fetch(step)
        for step in range(self.steps):
            if step + STAGES - 1 < self.steps:
                self.fetch(step + STAGES - 1)
            for warp in range(8):
                self.multiply(step, warp % 4 * 32, warp // 4 * 4, sums)
        return sums

    def multiply(self, step: int, token: int, panel: int, sums: Tensor) -> None:
        by_token = words_of(self.shared["by"][step // SCALE_STEPS % 2])
        for t in range(2):
            first = token + t * 16
            a, scale = self.a(step, first), by_token[(first + ROW + LANES % 2 * 8) * SCALE_STEPS + step % SCALE_STEPS]
            for j in range(4):
                at = (panel + j) * 512
                b = words_of(self.shared["codes"][step % STAGES, at : at + 512]).view(32, 4)
                by = words_of(self.shared["scales"][step % STAGES, (panel + j) * 64 : (panel + j + 1) * 64]).view(8, 2)
                for h in range(2):
                    threads = [(x, y) for x in range(2) for y in range(4)]  # any may be asked for the scales
                    d = multiply(a, b[:, 2 * h : 2 * h + 2], scale, by[ROW, h], *threads[(step + j) % 8])
                    for i in range(4):
                        n = (panel + j) * 16 + h * 8 + Q * 2 + i % 2
                        sums[first + ROW + i // 2 * 8, n] += d[:, i]


def token_byte(row: int, half: int) -> int:
    return row * 32 + (half ^ (row // 4 & 1)) * 16


def test_eight_rows_of_ldmatrix_lie_in_banks_of_their_own():
    for first, half in ((0, 0), (0, 1), (8, 0), (8, 1)):
        banks = {(token_byte(first + row, half) + byte) // 4 % 32 for row in range(8) for byte in range(16)}
        assert len(banks) == 32


@pytest.mark.parametrize(("m", "n", "k", "token", "panel"), [(37, 40, 384, 0, 0), (150, 150, 704, 128, 8)])
def test_lanes_multiply_what_the_reference_does(m: int, n: int, k: int, token: int, panel: int):
    linear, x = random_nvfp4(n, k, 0, factors=False), tokens(Case(m, n, k, 0), torch.bfloat16)
    act = reference.quantize_act(x, linear.smooth, None, "nvfp4")
    sums = Block(act, ops.pack(linear, "sm120a"), token, panel).run()
    wanted = reference.token_values(act, torch.float64) @ ops.dequantize(linear, torch.float64).T
    wanted = wanted[token : token + TILE, panel * 16 : panel * 16 + TILE]
    torch.testing.assert_close(sums[: len(wanted), : wanted.shape[1]], wanted, rtol=1e-12, atol=1e-9)
    assert not sums[len(wanted) :].any()
    assert not sums[:, wanted.shape[1] :].any()


def test_low_rank_factors_lie_as_the_16_bit_product_reads_them():
    factor = torch.arange(40 * 48, dtype=torch.int16).view(40, 48)
    tiles = mma64.tile_factor(factor).view(3, 3, 32, 4, 2)
    for panel, step, lane, word in torch.cartesian_prod(*map(torch.arange, tiles.shape[:4])).tolist():
        h, r = divmod(word, 2)  # b0 has rows (here: columns) 2 q and 2 q + 1, b1 those 8 later; column g is row g here
        row, column = panel * 16 + 8 * h + lane // 4, step * 16 + 8 * r + 2 * (lane % 4)
        pair = factor[row, column : column + 2] if row < 40 else torch.zeros(2, dtype=torch.int16)
        assert torch.equal(tiles[panel, step, lane, word], pair)
    assert torch.equal(mma64.untile_factor(mma64.tile_factor(factor), 40), factor)


def test_layers_choose_their_tokens():
    int4, nvfp4 = random_linear(Case(1, 48, 64, 16)), random_nvfp4(48, 64)
    made = lambda linear, backend, activation: SVDQuantLinear(  # noqa: E731
        linear, backend=backend, activation=activation, dtype=torch.bfloat16, unsigned_input=True
    )
    found = {
        (linear.kind, backend, activation): (layer.backend, layer.mode)
        for linear in (int4, nvfp4)
        for backend in ("sm120a", "sm90a", "reference")
        for activation in ("w4a4", "w4a8")
        if linear.kind == "nvfp4" or backend != "sm90a"
        for layer in (made(linear, backend, activation),)
    }
    assert found == {
        ("int4", "sm120a", "w4a4"): ("sm80", "uint4"),
        ("int4", "sm120a", "w4a8"): ("sm80", "int8"),
        ("int4", "reference", "w4a4"): ("reference", "uint4"),
        ("int4", "reference", "w4a8"): ("reference", "int8"),
        ("nvfp4", "sm120a", "w4a4"): ("sm120a", "nvfp4"),
        ("nvfp4", "sm120a", "w4a8"): ("reference", "int8"),
        ("nvfp4", "sm90a", "w4a4"): ("reference", "nvfp4"),
        ("nvfp4", "sm90a", "w4a8"): ("sm90a", "fp8"),
        ("nvfp4", "reference", "w4a4"): ("reference", "nvfp4"),
        ("nvfp4", "reference", "w4a8"): ("reference", "int8"),
    }


def test_it_is_taken_only_where_it_is_named(monkeypatch: pytest.MonkeyPatch):
    device = torch.device("cuda", 0)
    monkeypatch.setattr(backends, "cuda_kernels", lambda: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (12, 0))
    monkeypatch.delenv("ENGINE_BACKEND", raising=False)
    backends._select.cache_clear()
    try:
        names = [row.name for row in backends.table(device) if row.runs]
        assert names.index("reference") < names.index("sm120a")
        monkeypatch.setenv("ENGINE_BACKEND", "sm120a")
        assert backends.select(device).name == "sm120a"
        assert resolve_activation("auto", device) == "w4a4"
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (12, 1))
        backends._select.cache_clear()
        with pytest.raises(
            ops.backends.BackendError, match=r"made for compute capability 12\.0, this device has 12\.1"
        ):
            backends.select(device)
    finally:
        backends._select.cache_clear()
