"""The fused blocks of FLUX give what diffusers' own blocks give."""

from __future__ import annotations

import pytest
import torch
from diffusers import FluxTransformer2DModel

from engine import graphs
from engine.models import flux
from engine.models.flux_blocks import FusedDoubleBlock, FusedSingleBlock, unfuse_blocks
from engine.models.normed import owns_stream


@pytest.fixture
def model() -> FluxTransformer2DModel:
    torch.manual_seed(0)
    made = FluxTransformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=32, num_attention_heads=2,
        joint_attention_dim=24, pooled_projection_dim=20, axes_dims_rope=(8, 12, 12), guidance_embeds=False,
    )  # fmt: skip
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, 0.5 if parameter.ndim == 1 else 0, 0.2)
    return flux.prepare(made.eval().requires_grad_(False))


def inputs() -> dict:
    draw = torch.Generator().manual_seed(1)
    made = lambda *shape: torch.randn(*shape, generator=draw)  # noqa: E731
    ids = torch.zeros(16, 3)
    ids[:, 1], ids[:, 2] = torch.arange(16) // 4, torch.arange(16) % 4
    return dict(
        hidden_states=made(2, 16, 16), encoder_hidden_states=made(2, 7, 24), pooled_projections=made(2, 20),
        timestep=torch.tensor([0.3, 0.9]), img_ids=ids, txt_ids=torch.zeros(7, 3), return_dict=False,
    )  # fmt: skip


def concatenate(model: FluxTransformer2DModel) -> None:
    """Fused projections, as quantized models have them."""
    for block in [*model.transformer_blocks, *model.single_transformer_blocks]:
        flux._concatenate(block.attn, ("to_q", "to_k", "to_v"), "to_qkv")
        if block.attn.added_kv_proj_dim is not None:
            flux._concatenate(block.attn, ("add_q_proj", "add_k_proj", "add_v_proj"), "to_added_qkv")
        block.attn.fused_projections = True


@torch.no_grad()
def test_the_same_output_and_a_way_back(model: FluxTransformer2DModel):
    plain = model(**inputs())[0]
    concatenate(model)
    flux.fuse(model)
    assert all(type(block) is FusedDoubleBlock for block in model.transformer_blocks)
    assert all(type(block) is FusedSingleBlock for block in model.single_transformer_blocks)
    torch.testing.assert_close(model(**inputs())[0], plain, rtol=1e-5, atol=1e-5)
    unfuse_blocks(model)
    assert not any(isinstance(block, (FusedDoubleBlock, FusedSingleBlock)) for block in model.modules())
    torch.testing.assert_close(model(**inputs())[0], plain, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_another_processor_is_asked(model: FluxTransformer2DModel):
    concatenate(model)
    flux.fuse(model)
    plain, calls = model(**inputs())[0], []
    processor = type(model.transformer_blocks[0].attn.processor)

    class Watched(processor):
        def __call__(self, *args, **kwargs):
            calls.append(kwargs)
            return super().__call__(*args, **kwargs)

    for block in [*model.transformer_blocks, *model.single_transformer_blocks]:
        block.attn.processor = Watched()
    torch.testing.assert_close(model(**inputs())[0], plain, rtol=1e-5, atol=1e-5)
    assert len(calls) == 4


def test_compiling_repeated_blocks_finds_them(model: FluxTransformer2DModel):
    flux.fuse(model)
    names = {type(block).__name__ for block in [*model.transformer_blocks, *model.single_transformer_blocks]}
    assert names <= set(model._repeated_blocks)


@torch.no_grad()
def test_a_block_owns_its_stream_in_a_plain_step_alone(model: FluxTransformer2DModel, monkeypatch: pytest.MonkeyPatch):
    """Caches of the first block compare its input with its output: there it must not change the input."""
    concatenate(model)
    flux.fuse(model)
    first, last = model.transformer_blocks[0], model.single_transformer_blocks[-1]
    assert owns_stream(first)
    assert owns_stream(last)
    graphs.record(model)
    assert owns_stream(first)
    with torch.enable_grad():
        assert not owns_stream(first)
    handle = first.register_forward_hook(lambda *_: None)
    assert not owns_stream(first)
    handle.remove()
    with monkeypatch.context() as patched:
        patched.setattr(FluxTransformer2DModel, "forward", lambda *_: None)
        assert not owns_stream(first)
    blocks, model.transformer_blocks = model.transformer_blocks, torch.nn.ModuleList([torch.nn.Sequential(first)])
    assert not owns_stream(first)
    model.transformer_blocks = blocks
    assert owns_stream(first)
    model.forward = lambda *_: None
    assert not owns_stream(first)


@torch.no_grad()
def test_blocks_compile_without_a_break():
    """With 4-bit layers, and lanes that a graph would have."""
    from bench.random_models import quantized
    from tests.models.conftest import CONFIG, flux_inputs

    made = quantized("cpu", CONFIG | {"num_single_layers": 2, "num_attention_heads": 2}, "auto", 16)
    given = flux_inputs(tokens=24) | {"return_dict": False}
    wanted = made(**given)[0]
    made.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    assert torch.equal(made(**given)[0], wanted)
