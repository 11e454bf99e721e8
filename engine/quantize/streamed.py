"""A transformer of which one block at a time has its weights, so that no device has to hold the whole of it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from engine.checkpoint.files import check_keys
from engine.errors import ModelError
from engine.models.buffers import fill_buffers
from engine.models.catalogue import ModelSpec
from engine.models.families import family
from engine.models.loading import DTYPE
from engine.models.plan import LinearGroup
from engine.quantize.source import Weights, part_folder

__all__ = ["StreamedModel"]

# What pictures on their way and the layers' own work need beside the weights, and room to spare.
_SPARE_BYTES = 16 * 2**30


class StreamedModel:
    """The diffusers transformer of `spec` without weights, prepared for quantizing, and the files it is filled from.

    `blocks` are the names of its blocks ("transformer_blocks.0") in the order they run, `groups` the groups of linears
    of each. Raises ModelError or CheckpointError when the folder does not hold this model.
    """

    def __init__(self, spec: ModelSpec, device: torch.device) -> None:
        row = family(spec.family)
        self.leaves = row.leaves
        self.weights, self.device = Weights(part_folder(spec, "transformer")), device
        named = self.weights.config.get("_class_name")
        if named != self.leaves.MODEL_CLASS:
            raise ModelError(f"{self.weights.folder}: holds a {named}, expected a {self.leaves.MODEL_CLASS}")
        with torch.device("meta"):
            bare = row.transformer_class.from_config(self.weights.config).requires_grad_(False).eval()
        nn.Module.to(bare, DTYPE)  # diffusers' own `to` warns of what does not happen here
        check_keys(self.weights.folder, self.weights, bare.state_dict())
        self._bare, self._build = bare, partial(row.transformer_class.from_config, self.weights.config)
        self.model: Any = self.leaves.prepare(copy.deepcopy(bare))
        self.groups: dict[str, list[LinearGroup]] = {}
        for group in self.leaves.plan(self.model):
            self.groups.setdefault(".".join(group.names[0].split(".")[:2]), []).append(group)
        self.blocks = list(self.groups)
        self._kept: dict[str, dict[str, Tensor]] | None = None

    @property
    def config(self) -> dict[str, Any]:
        """The model's configuration, defaults included."""
        return {key: value for key, value in self.model.config.items() if not key.startswith("_")}

    def rest(self) -> dict[str, Tensor]:
        """All tensors outside the blocks, on the device."""
        inside = tuple(f"{block}." for block in self.blocks)
        return self.weights.read([name for name in self.weights if not name.startswith(inside)], self.device)

    def fill_rest(self) -> None:
        """Give everything outside the blocks its weights: with blocks that come and go the model then runs."""
        self.model.load_state_dict(self.rest(), strict=False, assign=True)
        fill_buffers(self.model, self._build, self.device)
        for name, buffer in self.model.named_buffers():
            if buffer.is_meta:
                raise ModelError(f"{self.weights.folder}: {name} is in no file, so this model cannot run in parts")

    @contextmanager
    def keeping_blocks(self) -> Iterator[None]:
        """Blocks that were read stay on the device as long as the context lasts, where it has the room for all.

        Calibration reads every block once a step: from host memory that takes longer than running it.
        """
        if _room(self.device) < _SPARE_BYTES + self.weights.nbytes:
            yield
            return
        self._kept = {}
        try:
            yield
        finally:
            self._kept = None

    @contextmanager
    def block(self, name: str) -> Iterator[nn.Module]:
        """The block called `name` of `model`, with its weights on the device as long as the context lasts."""
        module = self.model.get_submodule(name)
        empty = module.state_dict()
        found = self._read(name) if self._kept is None or name not in self._kept else self._kept[name]
        if self._kept is not None:
            self._kept[name] = found
        module.load_state_dict(found, assign=True)
        try:
            yield module
        finally:
            module.load_state_dict(empty, assign=True)

    def _read(self, name: str) -> dict[str, Tensor]:
        """Weights of a block under the names they have once it is prepared."""
        module = copy.deepcopy(self._bare.get_submodule(name))
        found = self.weights.read([f"{name}.{key}" for key in module.state_dict()], self.device)
        module.load_state_dict({key.removeprefix(f"{name}."): value for key, value in found.items()}, assign=True)
        # A family prepares whole models, so the block is handed over as a model with no other block.
        alone, mine = nn.Module(), name.partition(".")[0]
        for blocks in {block.partition(".")[0] for block in self.blocks}:
            setattr(alone, blocks, nn.ModuleList([module] if blocks == mine else []))
        return self.leaves.prepare(alone).get_submodule(f"{mine}.0").state_dict()


def _room(device: torch.device) -> int:
    """Bytes that this process may still take of a CUDA device; none of a CPU, where files are memory already."""
    if device.type != "cuda":
        return 0
    # One of these wants a number, which "cuda" alone does not have.
    index = torch.cuda.current_device() if device.index is None else device.index
    free, total = torch.cuda.mem_get_info(index)
    allowed = int(total * torch.cuda.get_per_process_memory_fraction(index))
    return min(free, allowed - torch.cuda.memory_reserved(index))
