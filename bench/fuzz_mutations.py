"""Ways to damage a safetensors file, each told by a seed: what bench/fuzz_checkpoint.py and the tests try."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable, Iterator
from typing import Any

__all__ = ["MUTATIONS", "damage_config", "header_size", "specials", "truncations"]

WIDE = (
    0,
    1,
    -1,
    2**31,
    2**53,
    2**62,
    2**63 - 1,
    2**64,
    -(2**63),
    10**30,
    1.5,
    float("inf"),
    True,
    None,
    "x",
    "",
    [],
    {},
)
DTYPES = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "I64", "I32", "I16", "I8", "U8", "BOOL", "F4", "", None)
NAMES = ("", ".", "..", "a" * 10_000, "ключ", "\u0000", "__metadata__", "../../etc/passwd", "published.x", "a.qweight")


def header_size(data: bytes) -> int:
    """Bytes up to where tensor data begins."""
    return 8 + struct.unpack("<Q", data[:8])[0]


def truncations(data: bytes, every: int = 1) -> Iterator[bytes]:
    """The file cut at every byte of its header (or every so many), and at 64 places of its data."""
    size = header_size(data)
    step = max(1, (len(data) - size) // 64)
    for length in (*range(0, size, every), *range(size, len(data), step), len(data) - 1):
        yield data[:length]


def flip_header(data: bytes, rng: random.Random) -> bytes:
    """One to three bits of the header, its length field included."""
    return _flip(data, rng, 0, header_size(data), rng.randint(1, 3))


def flip_data(data: bytes, rng: random.Random) -> bytes:
    """Twenty bits of tensor data."""
    return _flip(data, rng, header_size(data), len(data), 20)


def scramble_header(data: bytes, rng: random.Random) -> bytes:
    """A run of random bytes in the header: hardly ever UTF-8."""
    size, run = header_size(data), rng.randint(1, 64)
    start = rng.randrange(8, max(9, size - run))
    return data[:start] + rng.randbytes(run) + data[start + run :]


def edit_header(data: bytes, rng: random.Random) -> bytes:
    """A header that is JSON, with wrong shapes, dtypes, offsets, names or metadata in it."""
    header, rest = _parts(data)
    for _ in range(rng.randint(1, 2)):
        rng.choice(_EDITS)(header, rng)
    return _whole(json.dumps(header), rest)


def repeat_key(data: bytes, rng: random.Random) -> bytes:
    """A key that comes twice, the second time with another tensor's place."""
    header, rest = _parts(data)
    names = [name for name in header if name != "__metadata__"]
    entry = json.dumps({rng.choice(names): header[rng.choice(names)]})[1:-1]
    return _whole(json.dumps(header)[:-1] + "," + entry + "}", rest)


def edit_metadata(data: bytes, rng: random.Random) -> bytes:
    """One value inside the JSON texts of the metadata."""
    header, rest = _parts(data)
    texts = header.get("__metadata__", {})
    if not texts:
        return edit_header(data, rng)
    key = rng.choice(sorted(texts))
    texts[key] = damage_config(texts[key], rng)
    return _whole(json.dumps(header), rest)


def damage_config(text: str, rng: random.Random) -> str:
    """A JSON text with one value changed, or bits flipped where it is none or by chance."""
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict) or not value or rng.random() < 0.2:
        raw = bytearray(text.encode() or b"x")
        raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(7)
        return raw.decode("utf-8", "replace")
    node = value
    while True:
        key = rng.choice(sorted(node))
        if not isinstance(node[key], dict) or not node[key] or rng.random() < 0.3:
            break
        node = node[key]
    if rng.random() < 0.2:
        del node[key]
    else:
        node[key] = rng.choice(WIDE)
    return json.dumps(value)


def specials(data: bytes) -> Iterator[tuple[str, bytes]]:
    """Single cases: absurd lengths, deep nesting, a hundred thousand keys."""
    header, rest = _parts(data)
    for length in (0, 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1, len(data), header_size(data) - 9, 10**8):
        yield f"length field {length}", struct.pack("<Q", length) + data[8:]
    for depth in (100, 200, 100_000, 5_000_000):
        yield f"{depth} brackets", _whole('{"a":' + "[" * depth, rest)
        yield f"{depth} objects", _whole('{"a":' * depth, rest)
    end = len(rest)
    empty = {"dtype": "U8", "shape": [0], "data_offsets": [end, end]}
    for pattern in ("stray.{}", "encoder.block.{}.qweight", "transformer_blocks.{}.attn.pag_to_v.qweight", "{}.codes"):
        many = header | {pattern.format(index): empty for index in range(100_000)}
        yield f"100000 keys {pattern}", _whole(json.dumps(many), rest)
    yield "a header of spaces", _whole("{" + " " * 5_000_000 + "}", b"")
    yield "empty header", _whole("{}", b"")
    yield "a long metadata value", _whole(json.dumps(header | {"__metadata__": {"config": "[" * 2_000_000}}), rest)
    yield "not UTF-8", struct.pack("<Q", 8) + b'{"\xff\xfe":1' + rest
    yield "a pickle", b"\x80\x02cos\nsystem\n(S'true'\ntR."
    yield "nothing", b""


MUTATIONS: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "header bits": flip_header,
    "header bytes": scramble_header,
    "header values": edit_header,
    "keys twice": repeat_key,
    "metadata": edit_metadata,
    "data bits": flip_data,
}


def _flip(data: bytes, rng: random.Random, start: int, stop: int, times: int) -> bytes:
    flipped = bytearray(data)
    for _ in range(times):
        flipped[rng.randrange(start, stop)] ^= 1 << rng.randrange(8)
    return bytes(flipped)


def _parts(data: bytes) -> tuple[dict[str, Any], bytes]:
    size = header_size(data)
    return json.loads(data[8:size]), data[size:]


def _whole(header: str, rest: bytes) -> bytes:
    text = header.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text)) + text + rest


def _some(header: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    return header[rng.choice([name for name in header if name != "__metadata__"])]


def _shape(header: dict[str, Any], rng: random.Random) -> None:
    entry = _some(header, rng)
    old = entry["shape"] if isinstance(entry["shape"], list) else []
    wide = [rng.choice(WIDE), [rng.choice(WIDE)], [2**32, 2**32], [0, *old], old[::-1], [2**62, 4]]
    entry["shape"] = rng.choice(wide)


def _dtype(header: dict[str, Any], rng: random.Random) -> None:
    _some(header, rng)["dtype"] = rng.choice(DTYPES)


def _offsets(header: dict[str, Any], rng: random.Random) -> None:
    entry, other = _some(header, rng), _some(header, rng)
    old = entry.get("data_offsets")
    begin, end = old if isinstance(old, list) and len(old) == 2 else (0, 0)
    wide = [rng.choice(WIDE), [end, begin], [begin, 2**62], [begin + 1, end + 1], [begin, end + 2], [-1, end]]
    entry["data_offsets"] = rng.choice([*wide, other.get("data_offsets"), [rng.choice(WIDE), rng.choice(WIDE)]])


def _rename(header: dict[str, Any], rng: random.Random) -> None:
    name = rng.choice([name for name in header if name != "__metadata__"])
    other = rng.choice([*NAMES, name[:-1], name + ".x", name.replace("0", "99"), name.replace("0", "-1")])
    header[other] = header.pop(name)


def _drop(header: dict[str, Any], rng: random.Random) -> None:
    if len(header) > 2:
        del header[rng.choice([name for name in header if name != "__metadata__"])]


def _replace(header: dict[str, Any], rng: random.Random) -> None:
    header[rng.choice(list(header))] = rng.choice(WIDE)


_EDITS = (_shape, _dtype, _offsets, _rename, _drop)
