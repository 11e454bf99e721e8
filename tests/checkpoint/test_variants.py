"""Published files of other ranks, dtypes and spellings: through every layout and back without losing a bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.checkpoint import nunchaku
from engine.checkpoint.layouts import open_checkpoint
from engine.checkpoint.linears import GROUPS
from engine.checkpoint.pieces import Stored
from engine.checkpoint.quantization import Quantization
from engine.checkpoint.translate import convert
from tests.checkpoint.test_layouts import SANA, assert_same, files, read

FLUX_CONFIG = {
    "patch_size": 1, "in_channels": 16, "out_channels": None, "num_layers": 1, "num_single_layers": 1,
    "attention_head_dim": 128, "num_attention_heads": 1, "joint_attention_dim": 32, "pooled_projection_dim": 16,
    "guidance_embeds": False, "axes_dims_rope": [16, 56, 56],
}  # fmt: skip
FLUX, SANA_CLASS = "FluxTransformer2DModel", "SanaTransformer2DModel"


def sana_config() -> dict:
    with safe_open(SANA, "pt") as file:
        return json.loads(file.metadata()["config"])


def random_tensor(name: str, kind: Stored, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    part, wanted = name.rpartition(".")[2], kind.dtypes[0]
    if not wanted.is_floating_point:
        count = torch.Size(kind.shape).numel() * wanted.itemsize
        raw = torch.randint(0, 256, (count,), generator=generator, dtype=torch.uint8)
        return raw.view(wanted).view(kind.shape)
    even = torch.rand(kind.shape, generator=generator)
    if wanted.itemsize == 1 or part.startswith("smooth"):
        return (even + 0.5).to(wanted if wanted.itemsize == 1 else dtype)
    # Away from zero: float32 cannot hold every FP16 number below 2^-13 less the 1 of a modulation, and nunchaku_lite
    # has no records of stored tensors that would make up for it.
    return (even * 0.1 + 0.01 if "scale" in part else torch.copysign(even * 0.5 + 0.01, even - 0.5)).to(dtype)


def make(
    path: Path, model: str, config: dict, precision: str, rank: int, dtype: torch.dtype,
    without: Callable[[str], bool] = lambda name: False, pag: bool = False,
) -> Path:  # fmt: skip
    """A random file in nunchaku's layout, padding included, without the tensors that `without` names."""
    names = ["transformer_blocks.0.attn.pag_to_v.qweight"] if pag else []
    generator = torch.Generator().manual_seed(rank)
    stored = {
        name: random_tensor(name, kind, dtype, generator)
        for piece in nunchaku.pieces_for(model, config, precision, rank, names)
        for name, kind in piece.stored().items()
        if not without(name)
    }
    save_file(stored, path, metadata=nunchaku.metadata(Quantization(model, config, precision, GROUPS[precision], rank)))
    return path


def round_trips(source: Path, folder: Path, lite: bool) -> None:
    stored, canonical = load_file(source), read(source)
    convert(source, folder / "canonical", "canonical")
    convert(folder / "canonical", folder / "back.safetensors", "nunchaku")
    assert_same(files(folder / "back.safetensors"), stored)
    convert(folder / "back.safetensors", folder / "two", "nunchaku")
    assert_same(files(folder / "two"), stored)
    convert(folder / "two", folder / "again.safetensors", "canonical")
    assert_same(read(folder / "again.safetensors"), read(folder / "canonical"))
    if lite:
        convert(source, folder / "lite", "nunchaku_lite")
        found = {name: value for name, value in read(folder / "lite").items() if not name.startswith("published.")}
        assert_same(found, canonical)
        convert(folder / "lite", folder / "from-lite.safetensors", "nunchaku")
        assert_same(files(folder / "from-lite.safetensors"), stored)
        convert(folder / "from-lite.safetensors", folder / "lite-again", "nunchaku_lite")
        assert_same(files(folder / "lite-again"), files(folder / "lite"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rank", [0, 16, 48, 64, 128])
@pytest.mark.parametrize("precision", ["int4", "nvfp4"])
def test_flux_of_every_rank(tmp_path: Path, precision: str, rank: int, dtype: torch.dtype):
    path = make(tmp_path / "a.safetensors", FLUX, FLUX_CONFIG, precision, rank, dtype)
    round_trips(path, tmp_path, precision == "int4")


@pytest.mark.parametrize("end", ["smooth_orig", "wtscale", "wcscales"])
@pytest.mark.parametrize("precision", ["int4", "nvfp4"])
def test_flux_without_what_may_be_absent(tmp_path: Path, precision: str, end: str):
    path = make(tmp_path / "a.safetensors", FLUX, FLUX_CONFIG, precision, 32, torch.bfloat16, lambda n: n.endswith(end))
    round_trips(path, tmp_path, precision == "int4")


@pytest.mark.parametrize("change", [{"guidance_embeds": True}, {"in_channels": 96, "out_channels": 16}])
def test_flux_without_metadata_is_known_by_its_shapes(tmp_path: Path, change: dict):
    config = FLUX_CONFIG | change
    path = make(tmp_path / "a.safetensors", FLUX, config, "int4", 48, torch.bfloat16)
    save_file(load_file(path), tmp_path / "bare.safetensors")
    assert_same(read(tmp_path / "bare.safetensors"), read(path))
    source = open_checkpoint(tmp_path / "bare.safetensors")
    found = json.loads(source.metadata["config"])
    source.close()
    assert found == config | {"out_channels": config["out_channels"] or config["in_channels"]}


@pytest.mark.parametrize("pag", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("precision", "rank", "dtype"), [("int4", 16, torch.float16), ("nvfp4", 48, torch.bfloat16)])
def test_sana_with_odd_padding(tmp_path: Path, precision: str, rank: int, dtype: torch.dtype, bias: bool, pag: bool):
    config = sana_config() | {"attention_bias": bias}
    path = make(tmp_path / "a.safetensors", SANA_CLASS, config, precision, rank, dtype, pag=pag)
    round_trips(path, tmp_path, False)


@pytest.mark.parametrize("precision", ["int4", "nvfp4"])
def test_sana_whose_gated_channels_need_no_padding(tmp_path: Path, precision: str):
    """Their rows are interleaved all the same, also where no record of the stored tensors says how they lay."""
    config = sana_config() | {"mlp_ratio": 3.0}
    path = make(tmp_path / "a.safetensors", SANA_CLASS, config, precision, 16, torch.bfloat16)
    own = without_records(path, tmp_path)
    convert(own, tmp_path / "published.safetensors", "nunchaku")
    convert(tmp_path / "published.safetensors", tmp_path / "back.safetensors", "canonical")
    assert_same(load_file(tmp_path / "back.safetensors"), load_file(own))


def without_records(path: Path, folder: Path) -> Path:
    """The canonical form of `path` as a quantizer would write it."""
    convert(path, folder / "canonical.safetensors", "canonical")
    with safe_open(folder / "canonical.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys() if not name.startswith("published.")}  # noqa: SIM118
        save_file(tensors, folder / "own.safetensors", metadata=file.metadata())
    return folder / "own.safetensors"


def test_nvfp4_scales_of_32_bits_survive_the_published_form(tmp_path: Path):
    """q, k and v of a canonical file may have scales of their own, for which nunchaku's layout has 16-bit rows."""
    path = make(tmp_path / "a.safetensors", FLUX, FLUX_CONFIG, "nvfp4", 16, torch.bfloat16, lambda n: "wcscales" in n)
    convert(path, tmp_path / "canonical.safetensors", "canonical")
    tensors = load_file(tmp_path / "canonical.safetensors")
    for index, name in enumerate(sorted(name for name in tensors if name.endswith(".wtscale"))):
        tensors[name] = torch.tensor([0.0123 + 0.001 * index])
    tensors = {name: value for name, value in tensors.items() if not name.startswith("published.")}
    with safe_open(tmp_path / "canonical.safetensors", "pt") as file:
        save_file(tensors, tmp_path / "own.safetensors", metadata=file.metadata())
    convert(tmp_path / "own.safetensors", tmp_path / "published.safetensors", "nunchaku")
    convert(tmp_path / "published.safetensors", tmp_path / "back.safetensors", "canonical")
    assert_same(load_file(tmp_path / "back.safetensors"), tensors)


def test_a_folder_with_a_tensor_twice_is_refused(tmp_path: Path):
    from engine.errors import CheckpointError

    for name in ("a", "b"):
        make(tmp_path / f"{name}.safetensors", FLUX, FLUX_CONFIG, "int4", 16, torch.bfloat16)
    with pytest.raises(CheckpointError, match=r"is in b\.safetensors and in another file"):
        open_checkpoint(tmp_path)
