"""The published bit layouts: against published data, against the closed forms, and there and back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.checkpoint import packing
from engine.errors import ArgumentError
from tests.checkpoint.conftest import vectors

FEW = settings(max_examples=25, deadline=None)


def nibbles(codes: Tensor) -> Tensor:
    """One code per element (N, K) -> uint8 (N, K/2), low nibble = even k."""
    codes = codes.to(torch.int16) & 15
    return (codes[:, 0::2] | (codes[:, 1::2] << 4)).to(torch.uint8)


def same(left: Tensor, right: Tensor) -> bool:
    return (
        left.dtype == right.dtype
        and left.shape == right.shape
        and left.view(torch.uint8).equal(right.view(torch.uint8))
    )


def plain(file: str, case: str) -> dict[str, Tensor]:
    start = f"{case}.plain."
    return {key.removeprefix(start): value for key, value in vectors(file).items() if key.startswith(start)}


@pytest.mark.parametrize("case", ["a", "b", "p"])
def test_int4_layers_of_the_vectors(case: str):
    stored, logical = vectors("pack_int4"), plain("pack_int4", case)
    (n, k), (r, _) = logical["codes"].shape, logical["lora_down"].shape
    np, kp = packing.round_up(n), packing.round_up(k)
    codes = nibbles(logical["codes"])
    assert same(packing.pack_codes(packing.pad(codes, (np, kp // 2))), stored[f"{case}.qweight"])
    assert same(packing.unpack_codes(stored[f"{case}.qweight"])[:n, : k // 2].contiguous(), codes)
    forms = {
        "wscales": (packing.pack_scales, packing.unpack_scales, (np, kp // 64), 1),
        "bias": (packing.pack_vector, packing.unpack_vector, (np,), 1),
        "smooth": (packing.pack_vector, packing.unpack_vector, (kp,), 1),
        "lora_down": (packing.pack_lora_down, packing.unpack_lora_down, (r, kp), 0),
        "lora_up": (packing.pack_lora_up, packing.unpack_lora_up, (np, r), 0),
    }
    for part, (pack, unpack, shape, value) in forms.items():
        padded = packing.pad(logical[part], shape, value)
        assert same(pack(padded), stored[f"{case}.{part}"]), part
        assert same(unpack(stored[f"{case}.{part}"]), padded), part


@pytest.mark.parametrize("case", ["a", "b"])
def test_nvfp4_layers_of_the_vectors(case: str):
    stored, logical = vectors("pack_nvfp4"), plain("pack_nvfp4", case)
    assert same(packing.pack_codes(nibbles(logical["codes"])), stored[f"{case}.qweight"])
    assert same(packing.unpack_codes(stored[f"{case}.qweight"]), nibbles(logical["codes"]))
    assert same(packing.pack_micro_scales(logical["wscales"]), stored[f"{case}.wscales"])
    assert same(packing.unpack_micro_scales(stored[f"{case}.wscales"]), logical["wscales"])
    if case == "b":
        assert same(packing.unpack_vector(stored["b.wcscales"]), logical["wcscales"])


@pytest.mark.parametrize(("case", "chunks"), [("a", 1), ("b", 3), ("c", 6)])
def test_awq_layers_of_the_vectors(case: str, chunks: int):
    stored, logical = vectors("pack_awq"), plain("pack_awq", case)
    codes = nibbles(logical["codes"])
    assert same(packing.pack_awq_codes(codes), stored[f"{case}.qweight"])
    assert same(packing.unpack_awq_codes(stored[f"{case}.qweight"]), codes)
    source = torch.empty_like(codes)
    source[logical["source_row"].long()] = codes
    assert same(packing.unpack_awq_codes(stored[f"{case}.qweight"], chunks), source)
    assert same(packing.pack_awq_codes(source, chunks), stored[f"{case}.qweight"])


@pytest.mark.parametrize("case", ["a", "b"])
def test_t5_layers_of_the_vectors(case: str):
    stored, logical = vectors("pack_t5_awq"), plain("pack_t5_awq", case)
    codes = nibbles(logical["codes"])
    assert same(packing.unpack_awq_codes(stored[f"{case}.qweight"]), codes)
    assert same(packing.pack_awq_codes(codes).view(torch.int16), stored[f"{case}.qweight"])


@given(st.data())
@FEW
def test_codes_follow_the_closed_form(data: st.DataObject):
    n, k = 128 * data.draw(st.integers(1, 3)), 128 * data.draw(st.integers(1, 3))
    row, col = data.draw(st.integers(0, n - 1)), data.draw(st.integers(0, k - 1))
    codes = torch.zeros(n, k // 2, dtype=torch.uint8)
    codes[row, col // 2] = 9 << (4 * (col % 2))
    nt, p, h, q = row // 128, row % 128 // 16, row % 16 // 8, row % 8
    kt, u, c, j = col // 64, col % 64 // 32, col % 32 // 8, col % 8
    word = ((((nt * (k // 64) + kt) * 8 + p) * 8 + q) * 4 + c) * 4 + 2 * h + u
    flat = packing.pack_codes(codes).view(torch.uint8).flatten()
    assert flat.nonzero().tolist() == [[4 * word + j // 2]]
    assert int(flat.max()) == 9 << (4 * (j % 2))


@given(st.data())
@FEW
def test_low_rank_and_scales_follow_the_closed_forms(data: st.DataObject):
    n, r, g = 128 * data.draw(st.integers(1, 3)), 16 * data.draw(st.integers(1, 5)), data.draw(st.integers(1, 6))
    c, i = data.draw(st.integers(0, n - 1)), data.draw(st.integers(0, r - 1))
    tile = (c // 16) * (r // 16) + i // 16
    down = torch.zeros(r, n, dtype=torch.bfloat16)
    down[i, c] = 1
    where = (tile * 32 + (i % 8) * 4 + (c % 8) // 2) * 8 + 4 * ((i % 16) // 8) + 2 * ((c % 16) // 8) + c % 2
    assert int(packing.pack_lora_down(down).flatten().argmax()) == where
    where = (tile * 32 + (c % 8) * 4 + (i % 8) // 2) * 8 + 4 * ((c % 16) // 8) + 2 * ((i % 16) // 8) + i % 2
    assert int(packing.pack_lora_up(down.T.contiguous()).flatten().argmax()) == where
    group = data.draw(st.integers(0, g - 1))
    scales = torch.zeros(n, g, dtype=torch.float16)
    scales[c, group] = 1
    where = ((c // 128) * g + group) * 128 + 16 * ((c % 128) // 16) + 4 * ((c % 8) // 2) + 2 * ((c % 16) // 8) + c % 2
    assert int(packing.pack_scales(scales).flatten().argmax()) == where


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 6), st.sampled_from([1, 3, 6]), st.integers(0, 2**31))
@FEW
def test_there_and_back(nt: int, kt: int, rt: int, chunks: int, seed: int):
    generator = torch.Generator().manual_seed(seed)

    def bits(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        wide = torch.randint(0, 256, (*shape[:-1], shape[-1] * dtype.itemsize), generator=generator, dtype=torch.uint8)
        return wide.view(dtype)

    n, k, r = 128 * nt, 128 * kt, 16 * rt
    for pack, unpack, value in (
        (packing.pack_codes, packing.unpack_codes, bits(n, k // 2, dtype=torch.uint8)),
        (packing.pack_scales, packing.unpack_scales, bits(n, kt)),
        (packing.pack_vector, packing.unpack_vector, bits(n)),
        (packing.pack_micro_scales, packing.unpack_micro_scales, bits(n, k // 16, dtype=torch.float8_e4m3fn)),
        (packing.pack_lora_down, packing.unpack_lora_down, bits(r, k)),
        (packing.pack_lora_up, packing.unpack_lora_up, bits(n, r)),
    ):
        assert same(unpack(pack(value)), value)
        assert same(pack(unpack(pack(value))), pack(value))
    codes = bits(48 * nt, k // 2, dtype=torch.uint8)
    assert same(packing.unpack_awq_codes(packing.pack_awq_codes(codes, chunks), chunks), codes)


def test_sizes_off_the_tile_are_refused():
    with pytest.raises(ArgumentError, match="multiple of 128, got 64"):
        packing.unpack_codes(torch.zeros(64, 64, dtype=torch.int8))
    with pytest.raises(ArgumentError, match="multiple of 16, got 8"):
        packing.unpack_lora_down(torch.zeros(128, 8))
