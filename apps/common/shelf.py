"""The engines of a process: whose turn it is on the device, and which models stay in memory."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from apps.common.pool import Loader, Pool
from engine.models.catalogue import ModelSpec

__all__ = ["Shelf"]


class Shelf:
    """Every pool of this process. They share one device: one run at a time, whichever page asked.

    Small models stay once they are loaded. A large one is alone: it waits for the run under way, then the others go.
    """

    def __init__(self, loader: Loader) -> None:
        self.device = threading.Lock()
        self._loading = threading.Lock()
        self._loader = loader
        self._pools: dict[tuple[str, tuple[str, ...]], Pool] = {}

    def pool(self, spec: ModelSpec, precisions: Sequence[str]) -> Pool:
        """The pool of that model in those precisions; nothing is loaded before its `start`."""
        key = spec.name, tuple(precisions)
        if key not in self._pools:
            self._pools[key] = Pool(spec, key[1], self._loader, self.device, self._loading, self._make_room)
        return self._pools[key]

    def _make_room(self, coming: Pool) -> None:
        for pool in self._pools.values():
            if pool is not coming and not (pool.spec.ships and coming.spec.ships):
                pool.release()
