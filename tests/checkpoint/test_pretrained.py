"""Published checkpoints as running models: against dense weights, against emulated kernels, and refused when wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel, SanaTransformer2DModel
from safetensors.torch import save_file
from torch import Tensor

from engine import SVDQuantFluxTransformer, SVDQuantSanaTransformer, SVDQuantT5Encoder, ops
from engine.checkpoint.layouts import open_checkpoint
from engine.checkpoint.quantization import Quantization
from engine.checkpoint.translate import convert
from engine.errors import ArgumentError, CheckpointError, ModelError
from engine.linear import SVDQuantLinear
from engine.models import flux, sana
from tests.checkpoint.conftest import DATA, vectors
from tests.checkpoint.test_layouts import FLUX, SANA, nvfp4  # noqa: F401 - a fixture

CPU = torch.device("cpu")


def layer(path: Path, name: str) -> ops.CanonicalLinear:
    source = open_checkpoint(path)
    parts = ("codes", "wscales", "smooth", "lora_down", "lora_up", "bias", "wtscale", "wcscales")
    found = {part: source[f"{name}.{part}"].contiguous() for part in parts if f"{name}.{part}" in source}
    source.close()
    return ops.CanonicalLinear(**found)


def dense(linear: ops.CanonicalLinear) -> Tensor:
    """Effective weight: dequant / smooth + up @ down."""
    weight = ops.dequantize(linear) / linear.smooth.float()
    return weight + linear.lora_up.float() @ linear.lora_down.float()


def relative(value: Tensor, exact: Tensor) -> float:
    return float((value.float() - exact.float()).norm() / exact.float().norm())


def flux_inputs() -> dict[str, Tensor]:
    torch.manual_seed(3)
    ids = torch.zeros(16, 3)
    ids[:, 1], ids[:, 2] = torch.arange(16) // 4, torch.arange(16) % 4
    return {
        "hidden_states": torch.randn(1, 16, 16).bfloat16(),
        "encoder_hidden_states": torch.randn(1, 8, 32).bfloat16(),
        "pooled_projections": torch.randn(1, 16).bfloat16(),
        "timestep": torch.tensor([0.5]).bfloat16(),
        "img_ids": ids,
        "txt_ids": torch.zeros(8, 3),
    }


def dense_model(path: Path, model_class: type, family: object) -> torch.nn.Module:
    """The same checkpoint as an ordinary model in float32, every 4-bit linear written out."""
    source = open_checkpoint(path)
    config = json.loads(source.metadata["config"])
    model = family.prepare(model_class.from_config(config))  # pyright: ignore
    state = {}
    for name in model.state_dict():
        module = name.removesuffix(".weight")
        if f"{module}.zeros" in source:
            weight = ops.AwqWeight(*(source[f"{module}.{part}"] for part in ("codes", "scales", "zeros")))
            state[name] = ops.dequantize_awq(weight)
        elif f"{module}.codes" in source:
            k = source.shape(f"{module}.codes")[1] * 2
            scales = source[f"{module}.wscales"].float()
            codes = source[f"{module}.codes"]
            nibbles = torch.stack((codes & 15, codes >> 4), -1).flatten(1)
            values = torch.tensor(ops.canonical.E2M1)[nibbles.long()]
            if scales.shape[1] == -(-k // 64):
                values = (((nibbles.to(torch.int8)) ^ 8) - 8).float()
            weight = values * scales.repeat_interleave(64 if scales.shape[1] == -(-k // 64) else 16, 1)[:, :k]
            for factor in ("wtscale", "wcscales"):
                if f"{module}.{factor}" in source:
                    weight = weight * source[f"{module}.{factor}"].float()[:, None]
            up, down = source[f"{module}.lora_up"].float(), source[f"{module}.lora_down"].float()
            state[name] = weight / source[f"{module}.smooth"].float() + up @ down
        else:
            state[name] = source[name].float()
    source.close()
    model.load_state_dict(state)
    return model.float().eval()


@pytest.mark.parametrize(("activation", "limit"), [("w4a8", 0.03), ("w4a4", 0.25)])
def test_flux_int4_runs_as_its_dense_weights_do(activation: str, limit: float):
    model = SVDQuantFluxTransformer.from_pretrained(FLUX, device="cpu", activation=activation)
    assert isinstance(model, FluxTransformer2DModel)
    with torch.inference_mode():
        y = model(**flux_inputs(), return_dict=False)[0]
        inputs = {name: value.float() for name, value in flux_inputs().items()}
        exact = dense_model(FLUX, FluxTransformer2DModel, flux)(**inputs, return_dict=False)[0]
    assert relative(y, exact) < limit


def test_every_layout_runs_to_the_same_bits(tmp_path: Path):
    outputs = []
    for number, to in enumerate((None, "canonical", "nunchaku_lite", "nunchaku")):
        path = FLUX if to is None else tmp_path / f"{number}"
        if to is not None:
            convert(FLUX, path, to)  # pyright: ignore
        model = SVDQuantFluxTransformer.from_pretrained(path, device="cpu")
        with torch.inference_mode():
            outputs.append(model(**flux_inputs(), return_dict=False)[0])
    assert all(torch.equal(outputs[0], other) for other in outputs[1:])


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_both_names_of_the_dtype_are_heard(name: str):
    model = SVDQuantFluxTransformer.from_pretrained(FLUX, device="cpu", **{name: torch.float16})
    assert model.x_embedder.weight.dtype == torch.float16
    with pytest.raises(ArgumentError, match=r"dtype: expected torch.bfloat16 or torch.float16, got torch.float32"):
        SVDQuantFluxTransformer.from_pretrained(FLUX, device="cpu", **{name: torch.float32})


def test_flux_nvfp4_runs_as_its_dense_weights_do(nvfp4: Path):  # noqa: F811
    model = SVDQuantFluxTransformer.from_pretrained(nvfp4, device="cpu", activation="w4a8")
    with torch.inference_mode():
        y = model(**flux_inputs(), return_dict=False)[0]
        inputs = {name: value.float() for name, value in flux_inputs().items()}
        exact = dense_model(nvfp4, FluxTransformer2DModel, flux)(**inputs, return_dict=False)[0]
    assert relative(y, exact) < 0.03


def test_sana_runs_as_its_dense_weights_do():
    model = SVDQuantSanaTransformer.from_pretrained(SANA, device="cpu", activation="w4a8")
    assert isinstance(model, SanaTransformer2DModel)
    torch.manual_seed(5)
    inputs = {"hidden_states": torch.randn(1, 8, 4, 4), "encoder_hidden_states": torch.randn(1, 6, 32)}
    half = {name: value.bfloat16() for name, value in inputs.items()}
    with torch.inference_mode():
        y = model(**half, timestep=torch.tensor([500.0]).bfloat16(), return_dict=False)[0]
        exact = dense_model(SANA, SanaTransformer2DModel, sana)(
            **inputs, timestep=torch.tensor([500.0]), return_dict=False
        )[0]
    assert relative(y, exact) < 0.03


def test_linears_for_the_glu_keep_sanas_function():
    from diffusers.models.transformers.sana_transformer import GLUMBConv

    torch.manual_seed(0)
    source = GLUMBConv(64, 64, 2.5, norm_type=None, residual_connection=False)
    x = torch.randn(2, 64, 5, 3)
    assert torch.allclose(sana.ChannelsLastGLU(source)(x), source(x), atol=1e-5)


BLOCK = "single_transformer_blocks.0"


def check_codes(codes: Tensor, emulated: Tensor) -> None:
    """The kernels round x / smooth to 16 bits first: a code next to a boundary may fall on the other side."""
    apart = (codes.int() - emulated.int()).abs()
    assert int(apart.max()) <= 1
    assert float(apart.float().mean()) < 0.02


def test_int4_qkv_follows_the_published_kernels():
    """On equal codes outputs agree within one percent (16-bit sums there, fp32 here); codes may differ by one."""
    data = vectors("numerics_emulated")
    parts = [layer(FLUX, f"{BLOCK}.attn.to_{part}") for part in "qkv"]
    ys = []
    for linear in parts:
        packed = ops.pack(linear, "reference", torch.bfloat16)
        act = ops.quantize_act(data["int4.x"], packed, "int4")
        check_codes(act.codes, data["int4.qkv_proj.act_codes"])
        assert relative(act.scales, data["int4.qkv_proj.act_scales"]) < 0.005
        assert torch.allclose(act.low_rank, data["int4.qkv_proj.lora_act"], atol=2e-3)
        emulated = ops.QuantizedAct(
            data["int4.qkv_proj.act_codes"], data["int4.qkv_proj.act_scales"].float(), data["int4.qkv_proj.lora_act"]
        )
        ys.append((ops.linear(act, packed, torch.bfloat16), ops.linear(emulated, packed, torch.bfloat16)))
    own, on_emulated_codes = (torch.cat(part, -1) for part in zip(*ys, strict=True))
    assert relative(on_emulated_codes, data["int4.qkv_proj.y"]) < 0.01
    assert relative(own, data["int4.qkv_proj.y"]) < 0.04


def test_int4_mlp_with_shifted_gelu_follows_the_published_kernels():
    data = vectors("numerics_emulated")
    first = SVDQuantLinear(
        layer(FLUX, f"{BLOCK}.proj_mlp"), backend="reference", activation="w4a4", dtype=torch.bfloat16
    )
    assert relative(first(data["int4.x"]), data["int4.mlp.fc1_out"]) < 0.04
    gelu = torch.nn.functional.gelu(data["int4.mlp.fc1_out"], approximate="tanh")
    assert relative(gelu, data["int4.mlp.gelu"]) < 0.005
    second = SVDQuantLinear(
        layer(FLUX, f"{BLOCK}.proj_out.mlp"),
        backend="reference",
        activation="w4a4",
        dtype=torch.bfloat16,
        unsigned_input=True,
    )
    act = ops.quantize_act(data["int4.mlp.gelu"], second.packed, "uint4")
    check_codes(act.codes, data["int4.mlp.fc2_act_codes"])
    assert relative(act.scales, data["int4.mlp.fc2_act_scales"]) < 0.005
    assert relative(second(data["int4.mlp.gelu"]), data["int4.mlp.y"]) < 0.02


def test_nvfp4_layers_follow_the_published_kernels(nvfp4: Path):  # noqa: F811
    """Activations are 8-bit here, 4-bit there: only the arithmetic of the weights is compared, on emulated codes."""
    data = vectors("numerics_emulated")
    codes, scales = data["nvfp4.qkv_proj.act_codes"], data["nvfp4.qkv_proj.act_scales"].float()
    x_hat = torch.tensor(ops.canonical.E2M1)[codes.long()] * scales.repeat_interleave(16, 1)
    ys = []
    for part in "qkv":
        linear = layer(nvfp4, f"{BLOCK}.attn.to_{part}")
        low_rank = data["nvfp4.x"].float() @ linear.lora_down.float().T @ linear.lora_up.float().T
        ys.append(x_hat @ ops.dequantize(linear).T + low_rank + linear.bias.float())
    assert relative(torch.cat(ys, -1), data["nvfp4.qkv_proj.y"]) < 0.01


def t5_pair(folder: Path) -> tuple[Path, torch.nn.Module]:
    """A published T5 file, and the ordinary model whose weights are what that file means."""
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(2)
    config = T5Config(
        vocab_size=64, d_model=128, d_kv=32, num_heads=4, d_ff=256, num_layers=1, feed_forward_proj="gated-gelu"
    )
    model = T5EncoderModel(config).eval()
    tensors: dict[str, Tensor] = {}
    meant = model.state_dict()
    for name, value in model.state_dict().items():
        module = name.removesuffix(".weight")
        if value.ndim == 2 and ("SelfAttention." in name or "DenseReluDense" in name) and "bias" not in name:
            codes = torch.randint(0, 15, value.shape, dtype=torch.uint8)
            scales = torch.rand(value.shape[0], value.shape[1] // 128).add(0.5).mul(0.02).bfloat16()
            zeros = (-7 * scales.float()).bfloat16()
            packed = codes[:, 0::2] | (codes[:, 1::2] << 4)
            tensors |= {f"{module}.codes": packed, f"{module}.scales": scales, f"{module}.zeros": zeros}
            by_column = [part.float().repeat_interleave(128, 1) for part in (scales, zeros)]
            meant[name] = codes.float() * by_column[0] + by_column[1]
        elif name != "encoder.embed_tokens.weight":
            tensors[name] = value.bfloat16()
    model.load_state_dict(meant)
    details = Quantization("T5EncoderModel", config.to_diff_dict(), "awq-int4", 128, 0)
    save_file(tensors, folder / "canonical.safetensors", metadata=details.metadata())
    convert(folder / "canonical.safetensors", folder / "t5.safetensors", "nunchaku")
    return folder / "t5.safetensors", model


def test_t5_runs_as_its_dense_weights_do(tmp_path: Path):
    from transformers import T5EncoderModel

    path, exact = t5_pair(tmp_path)
    model = SVDQuantT5Encoder.from_pretrained(path, device="cpu")
    assert isinstance(model, T5EncoderModel)
    tokens = torch.arange(12).view(1, -1)
    with torch.inference_mode():
        y, wanted = model(tokens).last_hidden_state, exact(tokens).last_hidden_state
    assert y.dtype == torch.bfloat16
    assert relative(y, wanted) < 0.03
    again = SVDQuantT5Encoder.from_pretrained(tmp_path / "canonical.safetensors", device="cpu")
    with torch.inference_mode():
        assert torch.equal(again(tokens).last_hidden_state, y)


def test_the_wrong_model_is_refused():
    with pytest.raises(CheckpointError, match=r"made for SanaTransformer2DModel, expected FluxTransformer2DModel"):
        SVDQuantFluxTransformer.from_pretrained(SANA, device="cpu")
    with pytest.raises(CheckpointError, match="made for FluxTransformer2DModel, expected T5EncoderModel"):
        SVDQuantT5Encoder.from_pretrained(FLUX, device="cpu")
    with pytest.raises(CheckpointError, match="a LoRA, not a checkpoint"):
        SVDQuantFluxTransformer.from_pretrained(DATA / "lora" / "diffusers.safetensors", device="cpu")


def test_a_place_that_is_nowhere_says_what_to_do(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(CheckpointError, match="no such file or folder, nor a hub name"):
        SVDQuantFluxTransformer.from_pretrained("./missing.safetensors")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelError, match=r"not on this machine and the hub does not answer \(HF_HUB_OFFLINE is set\)"):
        SVDQuantFluxTransformer.from_pretrained("nobody/nothing/file.safetensors")


@pytest.mark.parametrize(
    ("device", "sentence"),
    [("cuda:99", r"cuda:99 is not there; torch sees \d+ CUDA devices"), ("gpu", "expected auto, cpu or cuda"),
     ("meta", "expected auto, cpu or cuda")],
)  # fmt: skip
def test_a_device_that_is_not_there_is_refused_before_anything_is_read(device: str, sentence: str, tmp_path: Path):
    for model in (SVDQuantFluxTransformer, SVDQuantSanaTransformer, SVDQuantT5Encoder):
        with pytest.raises(ArgumentError, match=sentence):
            model.from_pretrained(FLUX, device=device)
    with pytest.raises(ArgumentError, match=sentence):
        convert(FLUX, tmp_path / "out", "canonical", device=device)
