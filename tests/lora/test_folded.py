"""LoRAs on checkpoints whose V rows carry the smooth factor of the output projection."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine import SVDQuantFluxTransformer, SVDQuantSanaTransformer
from engine.checkpoint.folding import outputs
from engine.checkpoint.translate import convert
from engine.lora import load_lora, set_lora_strength, unload_lora
from engine.lora.convert import convert_lora
from engine.lora.weights import Factors, LoraWeights
from tests.checkpoint.conftest import DATA
from tests.checkpoint.test_pretrained import FLUX, flux_inputs, relative

SANA = DATA / "sana_tiny_int4.safetensors"
BLOCK, SINGLE = "transformer_blocks.0", "single_transformer_blocks.0"


def pair(source: Path, folder: Path) -> tuple[Path, Path]:
    """Two files of one model in nunchaku's layout: one that smooths where it quantizes, one that smooths in V.

    Factors are powers of two, so that dividing and multiplying by them loses nothing.
    """
    convert(source, folder / "canonical.safetensors", "canonical")
    tensors = load_file(folder / "canonical.safetensors")
    tensors = {name: value for name, value in tensors.items() if not name.startswith("published.")}
    with safe_open(folder / "canonical.safetensors", "pt") as file:
        metadata = file.metadata()
    plain, folded = dict(tensors), dict(tensors)
    done: set[str] = set()
    names = [name.removesuffix(".codes") for name in tensors if name.endswith(".codes")]
    for index, (out, values) in enumerate(outputs(names).items()):
        # Both streams of a double block share one factor, so it depends on the block alone.
        torch.manual_seed(0 if "transformer_blocks.0" in out and "single" not in out else index)
        smooth = tensors[f"{out}.smooth"]
        s = torch.exp2(torch.randint(-2, 3, smooth.shape).float()).to(smooth.dtype)
        plain[f"{out}.smooth"] = s
        folded |= {f"{out}.smooth": torch.ones_like(s), f"{out}.smooth_orig": s}
        folded[f"{out}.lora_down"] = tensors[f"{out}.lora_down"] * s
        for value in values:
            for part in ("wscales", "lora_up", "bias", "weight"):
                key = f"{value}.{part}"
                if key in tensors and key not in done:
                    done.add(key)
                    folded[key] = tensors[key] / (s if tensors[key].ndim == 1 else s[:, None])
    paths = []
    for name, version in (("plain", plain), ("folded", folded)):
        save_file(version, folder / f"{name}-canonical.safetensors", metadata=metadata)
        convert(folder / f"{name}-canonical.safetensors", folder / f"{name}.safetensors", "nunchaku")
        paths.append(folder / f"{name}.safetensors")
    return paths[0], paths[1]


def factors(n: int, k: int, seed: int) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    return Factors(torch.randn(4, k, generator=generator) * 0.1, torch.randn(n, 4, generator=generator) * 0.1)


def flux_lora(fused: bool) -> LoraWeights:
    """Deltas and biases on everything around attention; `fused` gives q, k and v as one."""
    d, lora = 128, LoraWeights()
    for index, (block, streams) in enumerate(((BLOCK, ("to_{}", "add_{}_proj")), (SINGLE, ("to_{}",)))):
        for stream in streams:
            whole = factors(3 * d, d, index)
            if fused:
                lora.factors[f"{block}.attn.{'to_qkv' if stream == 'to_{}' else 'add_qkv_proj'}"] = whole
                continue
            for part, up in zip("qkv", whole.up.chunk(3), strict=True):
                lora.factors[f"{block}.attn.{stream.format(part)}"] = Factors(whole.down, up)
            lora.biases[f"{block}.attn.{stream.format('v')}"] = torch.linspace(-1, 1, d)
    for seed, name in enumerate(("attn.to_out.0", "attn.to_add_out", "ff.net.2"), start=5):
        lora.factors[f"{BLOCK}.{name}"] = factors(d, 4 * d if "ff" in name else d, seed)
    lora.factors[f"{SINGLE}.proj_out"] = factors(d, 5 * d, 9)
    return lora


def run_flux(model: torch.nn.Module) -> Tensor:
    with torch.inference_mode():
        return model(**flux_inputs(), return_dict=False)[0]


@pytest.mark.parametrize("activation", ["w4a8", "w4a4"])
@pytest.mark.parametrize("fused", [False, True])
def test_flux(tmp_path: Path, fused: bool, activation: str):
    paths = pair(FLUX, tmp_path)
    plain, folded = (
        SVDQuantFluxTransformer.from_pretrained(path, device="cpu", activation=activation) for path in paths
    )
    before = run_flux(folded)
    assert relative(before, run_flux(plain)) < 1e-3
    lora = flux_lora(fused)
    for model in (plain, folded):
        load_lora(model, lora, 2.0, "style")
    wanted = run_flux(plain)
    assert relative(before, wanted) > 0.2
    assert relative(run_flux(folded), wanted) < 1e-3
    for model in (plain, folded):
        set_lora_strength(model, "style", -0.7)
    assert relative(run_flux(folded), run_flux(plain)) < 1e-3
    unload_lora(folded)
    assert torch.equal(run_flux(folded), before)


def test_flux_in_the_runtime_form(tmp_path: Path):
    """The form is made for one checkpoint, so it holds the LoRA as that checkpoint needs it."""
    _, path = pair(FLUX, tmp_path)
    lora = flux_lora(True)
    convert_lora(path, lora, tmp_path / "runtime.safetensors")
    model = SVDQuantFluxTransformer.from_pretrained(path, device="cpu")
    load_lora(model, lora, 1.5)
    wanted = run_flux(model)
    unload_lora(model)
    load_lora(model, tmp_path / "runtime.safetensors", 1.5)
    assert relative(run_flux(model), wanted) < 1e-3


def test_sana(tmp_path: Path):
    plain, folded = (SVDQuantSanaTransformer.from_pretrained(path, device="cpu") for path in pair(SANA, tmp_path))

    def run(model: torch.nn.Module) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        shapes = ((1, 8, 4, 4), (1, 6, 32))
        x, text = (torch.randn(shape, generator=generator).bfloat16() for shape in shapes)
        with torch.inference_mode():
            return model(x, text, torch.tensor([500.0]).bfloat16(), return_dict=False)[0]

    before = run(folded)
    assert relative(before, run(plain)) < 1e-3
    names = [f"attn{i}.{leaf}" for i in (1, 2) for leaf in ("to_q", "to_k", "to_v", "to_out.0")]
    lora = LoraWeights({f"{BLOCK}.{name}": factors(64, 64, i) for i, name in enumerate(names)})
    for model in (plain, folded):
        load_lora(model, lora, 3.0)
    wanted = run(plain)
    assert relative(before, wanted) > 0.1
    assert relative(run(folded), wanted) < 1e-3
    unload_lora(folded)
    assert torch.equal(run(folded), before)
