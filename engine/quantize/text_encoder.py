"""Quantize the T5 text encoder of a FLUX model to 4-bit weights with 16-bit activations, block by block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine.checkpoint import t5
from engine.checkpoint.files import all_finite, check_keys
from engine.checkpoint.quantization import Quantization
from engine.checkpoint.translate import Target
from engine.errors import ArgumentError, ModelError
from engine.generate import pick_device
from engine.models.catalogue import ModelSpec, resolve
from engine.models.install import is_kept
from engine.models.plan import LinearGroup
from engine.quantize.inputs import Inputs
from engine.quantize.layer import Recipe
from engine.quantize.output import check_place, check_text_layout, write_output
from engine.quantize.records import LayerRecord
from engine.quantize.rounding import pack_nibbles, round_affine
from engine.quantize.source import Weights, part_folder
from engine.quantize.work import Work

__all__ = ["quantize_text_encoder"]

_ROWS = 2048
_SHARED, _TIED = "shared.weight", "encoder.embed_tokens.weight"


@torch.inference_mode()
def quantize_text_encoder(
    model: str | ModelSpec,
    out: str | Path,
    *,
    prompts: Sequence[str] = (),
    recipe: Recipe | None = None,
    keep: Sequence[str] = (),
    device: str = "auto",
    format: Target = "canonical",
    resume: bool = False,
    max_shard_bytes: int = 2**30,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[LayerRecord]:
    """Quantize the T5 of the FLUX model `model` and write it to `out`; what `engine.quantize_model` says holds here.

    `prompts` are read by the encoder to see which inputs are large; of `recipe` only `search` and `dtype` count. The
    weights have a scale and a zero for 128 inputs, as published 4-bit T5 files have.
    """
    spec, out, where, recipe = resolve(model), Path(out), pick_device(device), recipe or Recipe()
    check_place(out, spec)
    check_text_layout(format, out, keep)
    encoder = _Encoder(spec, where, keep)
    details = Quantization(t5.MODEL_CLASS, encoder.config, "awq-int4", t5.GROUP, 0, tuple(keep))
    request = {
        "model": f"text encoder of {spec.name}, {encoder.weights.fingerprint()[:16]}",
        "prompts": sha256(repr(list(prompts)).encode()).hexdigest()[:16] if prompts else "none",
        "search": str(recipe.search),
        "dtype": str(recipe.dtype),
        "keep": ", ".join(keep) or "none",
        "device": where.type,
        "torch": torch.__version__,
    }
    tell = progress or (lambda *_: None)
    with Work(out, request, resume) as work:
        states = encoder.embed(prompts)
        for done, block in enumerate(encoder.blocks, start=1):
            if states or not work.has(block):
                states = _finish(encoder, block, states, work, recipe, details.metadata())
            tell("quantizing", done, len(encoder.blocks))
        work.keep_rest(encoder.rest(), details.metadata())
        figures = work.figures(encoder.blocks)
        write_output(
            work.blocks,
            out,
            format,
            work.scratch(),
            max_shard_bytes=max_shard_bytes,
            metadata=details.metadata(),
            figures=figures if prompts else None,
            tell=partial(tell, "writing"),
        )
        return figures


class _Encoder:
    """The T5 of `spec` of which one block at a time has its weights."""

    def __init__(self, spec: ModelSpec, device: torch.device, keep: Sequence[str]) -> None:
        from transformers import T5Config, T5EncoderModel

        if spec.family != "flux":
            raise ArgumentError(f"model: {spec.title} has no T5 text encoder; expected a FLUX model")
        self.spec, self.device = spec, device
        self.weights = Weights(part_folder(spec, "text_encoder_2"), "model")
        if self.weights.config.get("model_type") != "t5":
            raise ModelError(f"{self.weights.folder}: holds a {self.weights.config.get('model_type')}, expected a t5")
        config = T5Config(**self.weights.config)
        self.config: dict[str, Any] = config.to_diff_dict()
        with torch.device("meta"):
            self.model: Any = T5EncoderModel(config).requires_grad_(False).eval()
        tied = {_SHARED, _TIED}
        check_keys(self.weights.folder, set(self.weights) | tied, self.model.state_dict())
        self.blocks = [f"encoder.block.{index}" for index in range(len(self.model.encoder.block))]
        self.linears = {block: self._linears(block, keep) for block in self.blocks}
        for pattern in keep:
            if not any(is_kept(LinearGroup((name,)), [pattern]) for name in self._all_linears()):
                raise ArgumentError(f"keep: the pattern {pattern!r} matches no linear of the text encoder")
        if not any(self.linears.values()):
            raise ArgumentError(
                f"model: no linear of {spec.title}'s text encoder is left to quantize: its width is {config.d_model},"
                f" and groups are of {t5.GROUP} inputs"
            )

    def embed(self, prompts: Sequence[str]) -> list[tuple[Tensor, None]]:
        """What the first block reads of each prompt, padded as FLUX pads: (1, L, D) and no position bias yet."""
        if not prompts:
            return []
        from transformers import AutoTokenizer

        tokenizer: Any = AutoTokenizer.from_pretrained(part_folder(self.spec, "tokenizer_2"))
        name = _SHARED if _SHARED in set(self.weights) else _TIED
        table = self.weights.read([name], self.device)[name].float()
        length = self.spec.max_sequence_length
        read = tokenizer(list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        return [(table[ids].unsqueeze(0), None) for ids in read.input_ids.to(self.device)]

    @contextmanager
    def block(self, name: str) -> Iterator[nn.Module]:
        """The block called `name` with its weights, in float32, as long as the context lasts."""
        module = self.model.get_submodule(name)
        empty = module.state_dict()
        found = self.weights.read([f"{name}.{key}" for key in empty], self.device)
        module.load_state_dict({key.removeprefix(f"{name}."): value for key, value in found.items()}, assign=True)
        try:
            yield module.float()
        finally:
            module.load_state_dict(empty, assign=True)

    def rest(self) -> dict[str, Tensor]:
        """All tensors outside the blocks; the embedding once, though it has two names."""
        names = [name for name in self.weights if not name.startswith("encoder.block.")]
        if _SHARED in names and _TIED in names:
            names.remove(_TIED)
        return {name: value.cpu() for name, value in self.weights.read(names, self.device).items()}

    def _linears(self, block: str, keep: Sequence[str]) -> list[str]:
        """Linears of a block that the format can hold and that were not asked to stay."""
        found = [(name, self.model.get_submodule(name)) for name in self._all_linears() if name.startswith(f"{block}.")]
        fits = [name for name, linear in found if not (linear.in_features % t5.GROUP or linear.out_features % 4)]
        return [name for name in fits if not is_kept(LinearGroup((name,)), keep)]

    def _all_linears(self) -> list[str]:
        named = self.model.named_modules()
        return [name for name, part in named if isinstance(part, nn.Linear) and name.startswith("encoder.block.")]


_State = tuple[Tensor, Tensor | None]


def _finish(
    encoder: _Encoder,
    block: str,
    states: Sequence[_State],
    work: Work,
    recipe: Recipe,
    metadata: Mapping[str, str],
) -> list[_State]:
    """Take all prompts through a block, and quantize it unless `work` has it; returns what the next block reads."""
    linears = encoder.linears[block]
    with encoder.block(block) as module:
        rows, after = _run(encoder.model, module, linears, states)
        if not work.has(block):
            tensors = {f"{block}.{name}": value.bfloat16().cpu() for name, value in module.state_dict().items()}
            figures = [_round(encoder.model, name, rows.get(name), recipe, tensors) for name in linears]
            work.keep(block, tensors, figures, metadata)
    return after


def _run(
    model: nn.Module, module: nn.Module, linears: Sequence[str], states: Sequence[_State]
) -> tuple[dict[str, Tensor], list[_State]]:
    """Rows (S, K) that each linear reads, evenly of all prompts, and what the block gives for each prompt."""
    seen: dict[str, list[Tensor]] = {name: [] for name in linears}
    each = max(1, _ROWS // max(1, len(states)))

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def see(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            flat = args[0].flatten(0, -2)
            seen[name].append(flat[:: max(1, -(-len(flat) // each))])

        return see

    with ExitStack() as stack:
        for name in linears:
            stack.callback(model.get_submodule(name).register_forward_pre_hook(hook(name)).remove)
        after = [module(hidden, None, bias)[:2] for hidden, bias in states]
    return {name: torch.cat(parts) for name, parts in seen.items() if parts}, after


def _round(model: nn.Module, name: str, rows: Tensor | None, recipe: Recipe, tensors: dict[str, Tensor]) -> LayerRecord:
    """Put the codes of a linear into `tensors` in place of its weight."""
    weight: Any = model.get_submodule(name).weight
    if not all_finite(weight):
        raise ModelError(f"{name}.weight holds NaN or infinity; the model is damaged: fetch or make it again")
    n, k = weight.shape
    seen = Inputs.unknown(k, weight.device) if rows is None else Inputs(rows, rows.abs().amax(0))
    affine = partial(round_affine, weight, seen.mean_square(), recipe.dtype, group=t5.GROUP)
    codes, scales, zeros, rounded = affine(search=recipe.search)
    del tensors[f"{name}.weight"]
    tensors |= {
        f"{name}.codes": pack_nibbles(codes).cpu(),
        f"{name}.scales": scales.cpu(),
        f"{name}.zeros": zeros.cpu(),
    }
    error = _relative(weight, rounded, rows)
    naive = None if rows is None else _relative(weight, affine(search=False)[-1], rows)
    return LayerRecord(name, "awq", (n, k), error, error, naive, None, (name,))


def _relative(weight: Tensor, rounded: Tensor, rows: Tensor | None) -> float:
    """Error of the output on `rows` (S, K), of the weight where there are none."""
    lost, exact = (m if rows is None else rows @ m.T for m in (weight - rounded, weight))
    return float(lost.norm() / exact.norm().clamp_min(1e-12))
