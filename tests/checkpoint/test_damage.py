"""Damaged and hostile files: one clear error each, no crash, no hang, no flood of memory."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from bench.fuzz_checkpoint import outcome
from bench.fuzz_mutations import MUTATIONS
from engine import SVDQuantSanaTransformer
from engine.checkpoint.layouts import open_checkpoint
from engine.checkpoint.translate import convert
from engine.errors import CheckpointError
from tests.checkpoint.conftest import DATA
from tests.checkpoint.test_layouts import FLUX, SANA


def touch_everything(path: Path) -> None:
    source = open_checkpoint(path)
    try:
        for name in source:
            source[name]
    finally:
        source.close()


def with_header(path: Path, change) -> bytes:
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    text = change(json.loads(data[8 : 8 + size]))
    header = (text if isinstance(text, str) else json.dumps(text)).encode()
    return struct.pack("<Q", len(header)) + header + data[8 + size :]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole SANA of one layer without spare bytes, so that damage is likely to matter."""
    path = tmp_path_factory.mktemp("small") / "sana.safetensors"
    save_file(load_file(SANA), path, metadata=safe_open(SANA, "pt").metadata())
    return path


def test_truncation_anywhere_is_refused(small: Path, tmp_path: Path):
    data = small.read_bytes()
    size = 8 + struct.unpack("<Q", data[:8])[0]
    cut = tmp_path / "cut.safetensors"
    lengths = [*range(0, size, 7), *range(size, len(data), len(data) // 40), len(data) - 1]
    for length in lengths:
        cut.write_bytes(data[:length])
        with pytest.raises(CheckpointError, match="cut"):
            open_checkpoint(cut)
    assert len(lengths) > 900


def test_flipped_header_bits_never_crash(small: Path, tmp_path: Path):
    data = small.read_bytes()
    size = 8 + struct.unpack("<Q", data[:8])[0]
    rng = random.Random(0)
    path = tmp_path / "flipped.safetensors"
    refused = 0
    for _ in range(400):
        flipped = bytearray(data)
        where = rng.randrange(size)
        flipped[where] ^= 1 << rng.randrange(8)
        path.write_bytes(flipped)
        try:
            open_checkpoint(path).close()
        except CheckpointError:
            refused += 1
    # The rest changed a character of the ComfyUI config or the like, which nothing here depends on.
    assert refused > 300


def test_flipped_data_bits_never_crash(small: Path, tmp_path: Path):
    data = small.read_bytes()
    size = 8 + struct.unpack("<Q", data[:8])[0]
    rng = random.Random(1)
    path = tmp_path / "flipped.safetensors"
    for _ in range(25):
        flipped = bytearray(data)
        for _ in range(20):
            flipped[rng.randrange(size, len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(flipped)
        try:
            touch_everything(path)
        except CheckpointError as error:
            assert "NaN" in str(error) or "zero" in str(error)  # noqa: PT017 - other outcomes are right as well


@pytest.mark.parametrize("name", ["sana_tiny_int4", "flux_tiny_int4", "lora/kohya_bfl"])
@pytest.mark.parametrize("what", MUTATIONS)
def test_whatever_is_changed_it_opens_or_is_refused_in_one_sentence(name: str, what: str, tmp_path: Path):
    """The fast part of bench/fuzz_checkpoint.py."""
    data = (DATA / f"{name}.safetensors").read_bytes()
    path = tmp_path / ("lora-x.safetensors" if name.startswith("lora") else "x.safetensors")
    rng = random.Random(f"{name} {what}")
    for _ in range(12):
        path.write_bytes(MUTATIONS[what](data, rng))
        assert outcome(path) in ("refused", "opened")


@pytest.mark.parametrize(
    ("key", "value"), [("num_layers", 10**9), ("sample_size", 2**20), ("attention_head_dim", "x"), ("patch_size", None)]
)
def test_a_canonical_file_of_absurd_sizes_is_refused(key: str, value: object, tmp_path: Path):
    convert(SANA, tmp_path / "a.safetensors", "canonical")
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        metadata = file.metadata()
    metadata["config"] = json.dumps(json.loads(metadata["config"]) | {key: value})
    save_file(load_file(tmp_path / "a.safetensors"), tmp_path / "b.safetensors", metadata=metadata)
    with pytest.raises(CheckpointError):
        SVDQuantSanaTransformer.from_pretrained(tmp_path / "b.safetensors", device="cpu")


def test_absurd_shapes_are_refused(small: Path, tmp_path: Path):
    path = tmp_path / "absurd.safetensors"
    for shape in ([2**62, 2], [2**32, 2**32, 2**32], [0, 64], [], [-1, 4], [1.5], "x", None):

        def change(header: dict, shape: object = shape) -> dict:
            header["proj_out.weight"]["shape"] = shape
            return header

        path.write_bytes(with_header(small, change))
        with pytest.raises(CheckpointError):
            open_checkpoint(path)


def test_absurd_configs_are_refused(tmp_path: Path):
    tensors, metadata = load_file(SANA), safe_open(SANA, "pt").metadata()
    path = tmp_path / "absurd.safetensors"
    for key, value in (
        ("num_layers", 10**9),
        ("num_layers", -1),
        ("num_attention_heads", "two"),
        ("attention_head_dim", 10**12),
        ("mlp_ratio", float("inf")),
        ("mlp_ratio", None),
        ("in_channels", {}),
        ("caption_channels", [1]),
        ("cross_attention_head_dim", "x"),
        ("num_cross_attention_heads", [2]),
    ):
        config = json.loads(metadata["config"]) | {key: value}
        save_file(tensors, path, metadata=metadata | {"config": json.dumps(config)})
        with pytest.raises(CheckpointError):
            open_checkpoint(path)
    for text in ("[]", "{", "1", '"x"', "[" * 100_000):
        save_file(tensors, path, metadata=metadata | {"config": text})
        with pytest.raises(CheckpointError, match="config"):
            open_checkpoint(path)


def test_duplicate_keys_are_refused(small: Path, tmp_path: Path):
    def change(header: dict) -> str:
        text = json.dumps(header)
        entry = json.dumps({"proj_out.bias": header["proj_out.weight"]})[1:-1]
        return text[:-1] + "," + entry + "}"

    path = tmp_path / "twice.safetensors"
    path.write_bytes(with_header(small, change))
    with pytest.raises(CheckpointError):
        open_checkpoint(path)


def test_a_hundred_thousand_keys_are_refused_by_name(small: Path, tmp_path: Path):
    def change(header: dict) -> dict:
        end = max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
        empty = {"dtype": "U8", "shape": [0], "data_offsets": [end, end]}
        return header | {f"stray.{index}": empty for index in range(100_000)}

    path = tmp_path / "many.safetensors"
    path.write_bytes(with_header(small, change))
    with pytest.raises(CheckpointError, match=r"100000 unexpected \(stray\.0, .* and 99995 more\)"):
        open_checkpoint(path)


def test_wrong_tensors_are_named(tmp_path: Path):
    metadata = safe_open(FLUX, "pt").metadata()
    block = "single_transformer_blocks.0"

    def refused(match: str, **changes: torch.Tensor) -> None:
        tensors = load_file(FLUX) | {name.replace("__", "."): value for name, value in changes.items()}
        save_file(tensors, tmp_path / "odd.safetensors", metadata=metadata)
        with pytest.raises(CheckpointError, match=match):
            touch_everything(tmp_path / "odd.safetensors")

    nan = load_file(FLUX)[f"{block}.mlp_fc1.wscales"]
    nan[1, 5] = float("nan")
    refused(r"mlp_fc1\.wscales holds NaN", **{f"{block}.mlp_fc1.wscales": nan})
    smooth = load_file(FLUX)[f"{block}.mlp_fc1.smooth"]
    smooth[3] = 0
    refused(r"mlp_fc1\.smooth holds a zero", **{f"{block}.mlp_fc1.smooth": smooth})
    rank = torch.zeros(128, 32, dtype=torch.bfloat16)
    refused(r"lora_down has rank 32, but the checkpoint says 16", **{f"{block}.out_proj.lora_down": rank})
    wide = torch.zeros(128, 128, dtype=torch.int8)
    refused(r"out_proj\.qweight has shape \(128, 128\), expected \(128, 64\)", **{f"{block}.out_proj.qweight": wide})
    floats = torch.zeros(128, 64)
    refused(r"out_proj\.qweight is F32, expected int8", **{f"{block}.out_proj.qweight": floats})


def test_wrong_classes_and_kinds_are_named(tmp_path: Path):
    tensors, metadata = load_file(FLUX), safe_open(FLUX, "pt").metadata()
    path = tmp_path / "odd.safetensors"
    save_file(tensors, path, metadata=metadata | {"model_class": "NunchakuQwenImageTransformer2DModel"})
    with pytest.raises(CheckpointError, match="made for NunchakuQwenImageTransformer2DModel"):
        open_checkpoint(path)
    save_file({"a.qweight": torch.zeros(1)}, path, metadata={"model_class": "NunchakuZImage"})
    with pytest.raises(CheckpointError, match='4-bit checkpoint of "NunchakuZImage"'):
        open_checkpoint(path)
    half = {name: value for name, value in tensors.items() if "transformer_blocks." in name}
    save_file(half, tmp_path / "transformer_blocks.safetensors")
    with pytest.raises(CheckpointError, match="half of a two-file checkpoint"):
        open_checkpoint(tmp_path / "transformer_blocks.safetensors")
    pickled = tmp_path / "model.bin"
    pickled.write_bytes(b"\x80\x02cos\nsystem\n")
    with pytest.raises(CheckpointError, match="no other kind is ever loaded"):
        open_checkpoint(pickled)
    pickled.rename(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        open_checkpoint(tmp_path / "model.safetensors")


def test_a_failed_conversion_leaves_nothing(tmp_path: Path):
    tensors = load_file(FLUX)
    tensors["single_transformer_blocks.0.mlp_fc2.wscales"][0, 0] = float("inf")
    source = tmp_path / "source" / "odd.safetensors"
    source.parent.mkdir()
    save_file(tensors, source, metadata=safe_open(FLUX, "pt").metadata())
    for target in ("one.safetensors", "folder"):
        with pytest.raises(CheckpointError, match="holds NaN or infinity"):
            convert(source, tmp_path / "out" / target, "canonical")
    assert list((tmp_path / "out").iterdir()) == []
