"""What we write as nunchaku_lite has exactly the tensors that diffusers' own loader makes room for."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import diffusers.utils
import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.quantizers.quantization_config import NunchakuLiteQuantizationConfig
from safetensors.torch import load_file

from engine.checkpoint.translate import convert
from tests.checkpoint.test_variants import FLUX, FLUX_CONFIG, make


@pytest.fixture
def loader(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """diffusers' module for these checkpoints, which asks for GPU kernels (not needed here) when it is imported."""
    kernels = SimpleNamespace(get_kernel=lambda *_, **__: SimpleNamespace(ops=None))
    monkeypatch.setitem(sys.modules, "kernels", kernels)  # pyright: ignore[reportArgumentType]
    monkeypatch.delitem(sys.modules, "diffusers.quantizers.nunchaku.utils", raising=False)
    monkeypatch.setattr(diffusers.utils, "is_kernels_available", lambda: True)
    monkeypatch.setattr(diffusers.utils, "is_kernels_version", lambda *_: True)
    monkeypatch.setattr("diffusers.utils.constants.DIFFUSERS_TRUST_REMOTE_KERNELS", True)
    import diffusers.quantizers.nunchaku.utils as found

    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rank", [0, 16, 48])
def test_names_shapes_and_types_are_those_of_diffusers(
    loader: ModuleType, tmp_path: Path, rank: int, dtype: torch.dtype
):
    path = make(tmp_path / "a.safetensors", FLUX, FLUX_CONFIG, "int4", rank, dtype)
    convert(path, tmp_path / "lite", "nunchaku_lite")
    config = json.loads((tmp_path / "lite" / "config.json").read_text())
    section = config.pop("quantization_config")
    assert section.pop("quant_method") == "nunchaku_lite"
    details: Any = NunchakuLiteQuantizationConfig.from_dict(section)
    assert details.compute_dtype == dtype
    with torch.device("meta"):
        model: Any = FluxTransformer2DModel.from_config(config)
    loader.replace_with_nunchaku_linear(model, details.to_dict(), details.compute_dtype)
    stored = load_file(tmp_path / "lite" / "diffusion_pytorch_model.safetensors")
    loader.check_strict_state_dict_match(model, stored)
    for name, parameter in model.named_parameters():
        assert stored[name].shape == parameter.shape, name
        # The layers that stay dense are cast by diffusers; those in 4 bits are taken as they are.
        if parameter.dtype != torch.float32:
            assert stored[name].dtype == parameter.dtype, name
