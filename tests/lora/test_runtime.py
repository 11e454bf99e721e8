"""LoRAs on a running model: what they do to outputs, and that nothing is left behind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

from engine import ArgumentError, CheckpointError, SVDQuantFluxTransformer, SVDQuantSanaTransformer
from engine.graphs import Recorder
from engine.lora import (
    list_loras,
    load_lora,
    load_loras,
    read_lora,
    set_lora_strength,
    set_lora_strengths,
    unload_lora,
)
from engine.lora.convert import convert_lora
from engine.lora.fuse import part_factors
from engine.lora.weights import Factors, LoraWeights
from engine.models import flux
from tests.checkpoint.test_pretrained import dense_model, flux_inputs, relative
from tests.lora.conftest import DATA, FLUX, LORA


@pytest.fixture(scope="module")
def model() -> FluxTransformer2DModel:
    return SVDQuantFluxTransformer.from_pretrained(FLUX, device="cpu", activation="w4a8")


@pytest.fixture(autouse=True)
def _clean(model: FluxTransformer2DModel):
    yield
    unload_lora(model)


@pytest.fixture(scope="module")
def exact() -> torch.nn.Module:
    return dense_model(FLUX, FluxTransformer2DModel, flux)


def run(model: torch.nn.Module, **more: Tensor) -> Tensor:
    with torch.inference_mode():
        return model(**(flux_inputs() | more), return_dict=False)[0]


def run_dense(model: torch.nn.Module, loras: list[tuple[LoraWeights, float]]) -> Tensor:
    """The float32 model with the deltas added to its weights."""
    state = {name: value.clone() for name, value in model.state_dict().items()}
    changed = dict(state)
    for lora, strength in loras:
        for name in state:
            module = name.removesuffix(".weight")
            if name.endswith(".weight") and state[name].ndim == 2:
                found = part_factors(lora, module, *state[name].shape)
                if found is not None:
                    changed[name] = changed[name] + strength * found.up.float() @ found.down.float()
            if (
                name.endswith(".bias")
                and (bias := lora.biases.get(name.removesuffix(".bias").removesuffix(".mlp"))) is not None
            ):
                changed[name] = changed[name] + strength * bias.float()
    model.load_state_dict(changed)
    with torch.inference_mode():
        y = model(**{name: value.float() for name, value in flux_inputs().items()}, return_dict=False)[0]
    model.load_state_dict(state)
    return y


@pytest.mark.parametrize("name", ["diffusers", "kohya_bfl", "xlabs", "kohya_diffusers_names", "peft_bfl"])
def test_a_lora_does_what_it_does_to_dense_weights(name: str, model: FluxTransformer2DModel, exact: torch.nn.Module):
    lora = read_lora(LORA / f"{name}.safetensors")
    before = run(model)
    load_lora(model, LORA / f"{name}.safetensors", strength=6)
    after, wanted = run(model), run_dense(exact, [(lora, 6)])
    assert relative(before, wanted) > 0.3
    assert relative(after, wanted) < 0.03
    unload_lora(model)
    assert torch.equal(run(model), before)


def test_several_loras_with_their_own_strengths(model: FluxTransformer2DModel, exact: torch.nn.Module):
    before = run(model)
    names = {"diffusers": 0.75, "kohya_bfl": -0.5}
    load_loras(model, [(LORA / f"{name}.safetensors", strength, name) for name, strength in names.items()])
    wanted = run_dense(exact, [(read_lora(LORA / f"{name}.safetensors"), s) for name, s in names.items()])
    both = run(model)
    assert relative(both, wanted) < 0.03
    assert [(lora.name, lora.strength) for lora in list_loras(model)] == list(names.items())

    set_lora_strengths(model, {"diffusers": 0.0, "kohya_bfl": 1.0})
    switched = run(model)
    unload_lora(model)
    load_lora(model, LORA / "kohya_bfl.safetensors", 1.0, "other")
    assert relative(switched, run(model)) < 0.01
    unload_lora(model, "other")
    assert torch.equal(run(model), before)


def test_strength_changes_take_effect_and_go_back(model: FluxTransformer2DModel):
    load_lora(model, LORA / "diffusers.safetensors", 1.0, "style")
    full = run(model)
    set_lora_strength(model, "style", 0.5)
    half = run(model)
    set_lora_strength(model, "style", 1.0)
    assert not torch.equal(half, full)
    assert torch.equal(run(model), full)


def addresses(model: torch.nn.Module) -> list[int]:
    """Of everything that a step reads."""
    own = (getattr(m, name, None) for m in model.modules() for name in ("branch_scale", "bias_delta"))
    read = [*model.parameters(), *model.buffers(), *(value for value in own if value is not None)]
    return [tensor.data_ptr() for tensor in read]


def test_a_recorded_step_is_forgotten_unless_all_it_reads_stays_in_its_place(
    model: FluxTransformer2DModel, monkeypatch: pytest.MonkeyPatch
):
    """A CUDA graph reads addresses: loading and unloading move layers, a strength is written where it was."""
    recorder, forgotten = Recorder(model), []
    monkeypatch.setitem(model.__dict__, "forward", recorder)
    monkeypatch.setattr(recorder, "forget", lambda: forgotten.append("forgotten"))

    def forgets() -> bool:
        found = bool(forgotten)
        forgotten.clear()
        return found

    torch.manual_seed(0)
    load_lora(model, LORA / "diffusers.safetensors", 1.0, "style")  # 4-bit layers and their biases
    assert forgets()
    dense = LoraWeights(factors={"x_embedder": Factors(torch.randn(4, 16) * 0.1, torch.randn(128, 4) * 0.1)},
                        biases={"transformer_blocks.0.attn.to_k": torch.randn(128)})  # fmt: skip
    load_lora(model, dense, 0.5, "dense")
    assert forgets()
    before, place = run(model), addresses(model)
    set_lora_strengths(model, {"style": 0.3, "dense": 0.9})
    assert not torch.equal(run(model), before)
    assert not forgets()
    assert addresses(model) == place
    norms = LoraWeights(norms={"transformer_blocks.0.attn.norm_q": torch.rand(128) + 0.5}, factors={}, biases={})
    load_lora(model, norms, 1.0, "norms")
    assert forgets()
    set_lora_strength(model, "norms", 0.0)  # another parameter in its place
    assert forgets()
    unload_lora(model, "style")
    assert forgets()
    unload_lora(model)
    assert forgets()


def test_unloading_one_leaves_the_other(model: FluxTransformer2DModel):
    load_lora(model, LORA / "kohya_bfl.safetensors", 0.7, "kept")
    alone = run(model)
    load_lora(model, LORA / "diffusers.safetensors", 1.0, "gone")
    assert not torch.equal(run(model), alone)
    unload_lora(model, "gone")
    assert torch.equal(run(model), alone)


def test_runtime_form_is_read_back_onto_its_checkpoint(model: FluxTransformer2DModel, tmp_path: Path):
    load_lora(model, LORA / "diffusers.safetensors")
    wanted = run(model)
    unload_lora(model)
    convert_lora(FLUX, LORA / "diffusers.safetensors", tmp_path / "runtime.safetensors")
    load_lora(model, tmp_path / "runtime.safetensors")
    assert relative(run(model), wanted) < 0.01


def test_biases_norms_and_wider_inputs_of_control_loras(model: FluxTransformer2DModel):
    before = run(model)
    torch.manual_seed(0)
    lora = LoraWeights(
        factors={"x_embedder": Factors(torch.randn(4, 32) * 0.1, torch.randn(128, 4) * 0.1)},
        biases={
            "transformer_blocks.0.attn.to_k": torch.randn(128),
            "single_transformer_blocks.0.proj_out": torch.randn(128),
            "single_transformer_blocks.0.norm.linear": torch.randn(384),
            "norm_out.linear": torch.randn(256),
        },
        norms={"transformer_blocks.0.attn.norm_q": torch.rand(128) + 0.5},
    )
    load_lora(model, lora, name="control")
    assert model.config["in_channels"] == 32
    wide = torch.cat([flux_inputs()["hidden_states"], torch.randn(1, 16, 16).bfloat16()], -1)
    changed = run(model, hidden_states=wide)
    assert changed.isfinite().all()
    assert not torch.equal(changed, before)
    set_lora_strength(model, "control", 0.0)
    assert relative(run(model, hidden_states=wide), before) < 1e-6
    unload_lora(model)
    assert model.config["in_channels"] == 16
    assert torch.equal(run(model), before)


def test_bias_deltas_are_what_they_are_on_dense_weights(model: FluxTransformer2DModel, exact: torch.nn.Module):
    torch.manual_seed(1)
    lora = read_lora(LORA / "xlabs.safetensors")
    lora.biases = {
        "single_transformer_blocks.0.proj_out": torch.randn(128),
        "transformer_blocks.0.ff.net.0.proj": torch.randn(512),
        "transformer_blocks.0.norm1.linear": torch.randn(768) * 0.3,
        "norm_out.linear": torch.randn(256) * 0.3,
    }
    load_lora(model, lora, 0.8, "biased")
    assert relative(run(model), run_dense(exact, [(lora, 0.8)])) < 0.03


def test_what_matches_nothing_is_an_error_unless_told(model: FluxTransformer2DModel):
    before = run(model)
    lora = read_lora(LORA / "xlabs.safetensors")
    lora.factors["transformer_blocks.9.attn.to_q"] = lora.factors["transformer_blocks.0.attn.to_q"]
    with pytest.raises(CheckpointError, match=r"match nothing in the model: transformer_blocks\.9\.attn\.to_q"):
        load_lora(model, lora, name="far")
    assert torch.equal(run(model), before)
    assert load_lora(model, lora, name="far", strict=False).unmatched == ["transformer_blocks.9.attn.to_q"]


def test_a_lora_of_another_shape_leaves_the_model_as_it_was(model: FluxTransformer2DModel):
    before = run(model)
    lora = read_lora(LORA / "xlabs.safetensors")
    name = "transformer_blocks.0.attn.to_out.0"
    lora.factors[name] = Factors(torch.ones(2, 64), lora.factors[name].up)
    with pytest.raises(CheckpointError, match="made for another model"):
        load_lora(model, lora, name="odd")
    assert list_loras(model) == []
    assert torch.equal(run(model), before)


def test_names_and_strengths_are_checked(model: FluxTransformer2DModel):
    load_lora(model, LORA / "xlabs.safetensors")
    with pytest.raises(ArgumentError, match="'xlabs' is loaded already"):
        load_lora(model, LORA / "xlabs.safetensors")
    with pytest.raises(ArgumentError, match="no LoRA called 'style' is loaded; there is xlabs"):
        set_lora_strength(model, "style", 1.0)
    with pytest.raises(ArgumentError, match="finite number"):
        set_lora_strength(model, "xlabs", float("nan"))
    with pytest.raises(ArgumentError, match="expected an Engine, a pipeline or a transformer"):
        load_lora("model", LORA / "xlabs.safetensors")


def test_sana_takes_loras_too():
    sana = SVDQuantSanaTransformer.from_pretrained(DATA / "sana_tiny_int4.safetensors", device="cpu")
    torch.manual_seed(4)

    def go() -> Tensor:
        generator = torch.Generator().manual_seed(0)
        with torch.inference_mode():
            return sana(
                torch.randn(1, 8, 4, 4, generator=generator).bfloat16(),
                torch.randn(1, 6, 32, generator=generator).bfloat16(),
                torch.tensor([500.0]).bfloat16(),
                return_dict=False,
            )[0]

    before = go()
    names = {"attn1.to_q": (64, 64), "attn2.to_k": (64, 64), "ff.conv_inverted": (320, 64), "ff.conv_point": (64, 160)}
    tensors = {}
    for name, (n, k) in names.items():
        start = f"transformer.transformer_blocks.0.{name}"
        tensors |= {
            f"{start}.lora_A.weight": torch.randn(4, k) * 0.1,
            f"{start}.lora_B.weight": torch.randn(n, 4) * 0.1,
        }
    from engine.lora.weights import from_tensors

    assert load_lora(sana, from_tensors(tensors), 2.0).unmatched == []
    assert not torch.equal(go(), before)
    unload_lora(sana)
    assert torch.equal(go(), before)
