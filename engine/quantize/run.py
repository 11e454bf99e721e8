"""Quantize a whole model, block by block, into a checkpoint of any layout."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from hashlib import sha256
from pathlib import Path

import torch

from engine.checkpoint.linears import GROUPS
from engine.checkpoint.quantization import Quantization
from engine.checkpoint.translate import Target
from engine.devices import pick_device
from engine.errors import ArgumentError
from engine.models.catalogue import ModelSpec, resolve
from engine.models.install import is_kept
from engine.models.plan import LinearGroup, get_linear
from engine.quantize.block import quantize_block
from engine.quantize.calibrate import check_prompts, collect
from engine.quantize.layer import Recipe
from engine.quantize.output import check_layout, check_place, write_output
from engine.quantize.records import LayerRecord
from engine.quantize.streamed import StreamedModel
from engine.quantize.work import Work
from engine.request import Request

__all__ = ["MAX_SHARD_BYTES", "Progress", "quantize_model"]

Progress = Callable[[str, int, int], None]
# Hosts of public repositories refuse larger files more often than not; readers join shards anyway.
MAX_SHARD_BYTES = 14 * 2**20


@torch.inference_mode()
def quantize_model(
    model: str | ModelSpec,
    out: str | Path,
    *,
    prompts: Sequence[str] = (),
    size: int | None = None,
    steps: int | None = None,
    recipe: Recipe | None = None,
    keep: Sequence[str] = (),
    device: str = "auto",
    format: Target = "canonical",
    resume: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress | None = None,
) -> list[LayerRecord]:
    """Quantize the transformer of `model` by `recipe`, one block in memory at a time, and write it to `out`.

    `out` ending in .safetensors becomes one file, any other a folder; `format` is one of engine.convert's. `prompts`
    are painted to see real inputs, `size` pixels a side in `steps` steps (None: the model's own); without any, every
    input channel counts alike. `keep` holds name patterns (fnmatch) of linears that stay in 16 bits. Finished blocks
    are kept in a folder beside `out` until all is written; `resume` goes on from those of a run that was ended, to the
    bytes of an undisturbed run. `progress` hears (stage, done, in all), in units of work. Returns the errors of each
    group of linears.

    Raises ArgumentError for a value that does not suit, ModelError or CheckpointError for a model that cannot be read.
    """
    spec, out, where = resolve(model), Path(out), pick_device(device)
    _refuse_lora(spec)
    check_place(out, spec)
    requests = check_prompts(spec, prompts, size, steps)
    job = _Job(spec, requests, _settled(recipe or Recipe(), bool(prompts)), tuple(keep), where, progress)
    check_layout(format, out, job.details, job.streamed, [group for found in job.groups.values() for group in found])
    with Work(out, job.request(), resume) as work:
        job.quantize(work)
        return job.write(work, out, format, max_shard_bytes)


class _Job:
    """One model to be quantized in one way: what is known before anything is read, and the stages of the work."""

    def __init__(
        self,
        spec: ModelSpec,
        requests: Sequence[Request],
        recipe: Recipe,
        keep: tuple[str, ...],
        device: torch.device,
        progress: Progress | None,
    ) -> None:
        self.spec, self.requests, self.recipe, self.keep, self.device = spec, requests, recipe, keep, device
        self.tell: Progress = progress or (lambda *_: None)
        self.streamed = StreamedModel(spec, device)
        self.groups = _without_kept(self.streamed, keep)
        size = GROUPS[recipe.precision]
        model_class = self.streamed.leaves.MODEL_CLASS
        shift = recipe.shift or not any(group.unsigned for found in self.groups.values() for group in found)
        self.details = Quantization(
            model_class, self.streamed.config, recipe.precision, size, recipe.rank, keep, gelu_shift=shift
        )

    def request(self) -> dict[str, str]:
        """All that decides on the bytes of a block. Layout and place do not: they may change when a run goes on."""
        pictures = sha256(repr(self.requests).encode()).hexdigest()[:16]
        return {
            "model": f"{self.spec.name}, {self.streamed.weights.fingerprint()[:16]}",
            "calibration pictures": f"{len(self.requests)}, {pictures}" if self.requests else "none",
            **{name: str(value) for name, value in asdict(self.recipe).items()},
            "keep": ", ".join(self.keep) or "none",
            "device": self.device.type,
            "torch": torch.__version__,
        }

    def quantize(self, work: Work) -> None:
        """Finish every block that `work` does not have yet, and keep what is outside the blocks."""
        todo = [block for block in self.streamed.blocks if not work.has(block)]
        if self.requests and not work.has_inputs(todo):
            done = partial(self.tell, "calibrating")
            with self.streamed.keeping_blocks():
                work.keep_inputs(collect(self.streamed, self.spec, self.requests, self.device, done))
        meter = _Meter(self.streamed, self.groups, todo, partial(self.tell, "quantizing"))
        metadata = self.details.metadata()
        for block in todo:
            seen = work.inputs(block, self.streamed.groups[block], self.device) if self.requests else {}
            found = quantize_block(self.streamed, block, self.groups[block], seen, self.recipe, meter.add)
            work.keep(block, *found, metadata)
        work.keep_rest({name: value.cpu() for name, value in self.streamed.rest().items()}, metadata)

    def write(self, work: Work, out: Path, format: Target, max_shard_bytes: int) -> list[LayerRecord]:
        """Write the output; returns the figures of all groups, which go beside it where they were measured on data."""
        figures = work.figures(self.streamed.blocks)
        write_output(
            work.blocks,
            out,
            format,
            work.scratch(),
            max_shard_bytes=max_shard_bytes,
            metadata=self.details.metadata(),
            figures=figures if self.requests else None,
            tell=partial(self.tell, "writing"),
        )
        return figures


class _Meter:
    """Counts finished weights: those of blocks that a run before this one finished come first."""

    def __init__(
        self,
        streamed: StreamedModel,
        groups: Mapping[str, Sequence[LinearGroup]],
        todo: Sequence[str],
        tell: Callable[[int, int], None],
    ) -> None:
        self.model, self.tell = streamed.model, tell
        self.total = sum(self._weights(group) for found in groups.values() for group in found)
        self.done = self.total - sum(self._weights(group) for block in todo for group in groups[block])
        tell(self.done, self.total)

    def add(self, group: LinearGroup) -> None:
        """One more group is finished."""
        self.done += self._weights(group)
        self.tell(self.done, self.total)

    def _weights(self, group: LinearGroup) -> int:
        return sum(get_linear(self.model, name).weight.numel() for name in group.names)


def _refuse_lora(spec: ModelSpec) -> None:
    if spec.lora:
        raise ArgumentError(
            f"model: {spec.name} is a LoRA on the model in {spec.source}; quantize that one, which takes LoRAs as it"
            " is, or merge the LoRA into a folder of its own first"
        )


def _settled(recipe: Recipe, data: bool) -> Recipe:
    """GPTQ says how errors of one channel make up for another's: without data no two have to do with each other."""
    useful = data and recipe.precision == "int4" and recipe.rounds > 1
    return replace(recipe, gptq=recipe.gptq and useful)


def _without_kept(streamed: StreamedModel, keep: Sequence[str]) -> dict[str, list[LinearGroup]]:
    for pattern in keep:
        if not any(is_kept(group, [pattern]) for found in streamed.groups.values() for group in found):
            raise ArgumentError(f"keep: the pattern {pattern!r} matches no linear of the model")
    return {b: [group for group in found if not is_kept(group, keep)] for b, found in streamed.groups.items()}
