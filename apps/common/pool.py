"""Engines of one model, loaded in the background: the page opens at once and the first click waits its turn."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from apps.common.trouble import sentence
from engine import EngineError
from engine.models.catalogue import ModelSpec

__all__ = ["LoadFailed", "Loader", "Loading", "Pool"]

log = logging.getLogger("nibble")

# (spec, precision, share, progress) -> engine
Loader = Callable[[ModelSpec, str, Any, Callable[[str], None]], Any]


class LoadFailed(RuntimeError):
    """An engine could not be loaded; the message is a sentence for the page."""


@dataclass(frozen=True)
class Loading:
    """How one precision stands: "waiting", "loading", "ready" or "failed", and what to say about it."""

    state: str
    text: str = ""


class Pool:
    """The engines of `spec` in `precisions`; later ones share the first one's text encoders and VAE.

    `device` is held by whoever runs, so that no run is timed beside another; `loading` by whoever loads, and
    `make_room` is called first then.
    `lent`, where it is set, runs a job on a device that is not this process's (apps.deploy.zero).
    """

    def __init__(
        self,
        spec: ModelSpec,
        precisions: tuple[str, ...],
        loader: Loader,
        device: threading.Lock | None = None,
        loading: threading.Lock | None = None,
        make_room: Callable[[Pool], None] | None = None,
    ) -> None:
        self.spec = spec
        self.precisions = precisions
        self.device = device or threading.Lock()
        self.lent: Callable[[Any], Iterator[Any]] | None = None
        self._loader = loader
        self._make_room = make_room
        self._started = False
        self._loading = loading or threading.Lock()
        self._engines: dict[str, Any] = {}
        self._changed = threading.Condition()
        self._states = {precision: Loading("waiting", "waiting to load") for precision in precisions}

    def start(self) -> None:
        """Begin loading in a background thread, if that has not begun."""
        with self._changed:
            if self._started:
                return
            self._started = True
        threading.Thread(target=self.load, name="load-engines", daemon=True).start()

    def release(self) -> None:
        """Let go of the engines once nobody runs; the next who wants one loads them again. Not while loading."""
        with self.device, self._changed:
            if not self._started:
                return
            self._engines.clear()
            self._states = {precision: Loading("waiting", "waiting to load") for precision in self.precisions}
            self._started = False
        _free_memory()

    def state(self, precision: str) -> Loading:
        """How that precision stands now."""
        return self._states[precision]

    @property
    def settled(self) -> bool:
        """Whether every precision is ready or has failed."""
        return all(state.state in ("ready", "failed") for state in self._states.values())

    def engines(self) -> list[Any]:
        """The engines that are ready, in order of precision."""
        return [self._engines[precision] for precision in self.precisions if precision in self._engines]

    def get(self, precision: str, should_stop: Callable[[], bool], timeout: float = 0.2) -> Any | None:
        """Wait for that engine and return it, or None when `should_stop` answers true first. Loads it where need be.

        Raises LoadFailed with the reason when it could not be loaded.
        """
        while not should_stop():
            self.start()
            with self._changed:
                state = self._states[precision]
                if state.state == "ready":
                    return self._engines[precision]
                if state.state == "failed":
                    raise LoadFailed(state.text)
                self._changed.wait(timeout)
        return None

    def load(self) -> None:
        """Load every precision, here and now; one that fails is marked so and does not stop the others."""
        with self._loading:
            self._started = True
            if self._make_room is not None:
                self._make_room(self)
            for precision in self.precisions:
                self._load(precision)

    def _load(self, precision: str) -> None:
        self._set(precision, Loading("loading", "loading"))
        share = next(iter(self._engines.values()), None)
        try:
            engine = self._loader(
                self.spec, precision, share, lambda text, p=precision: self._set(p, Loading("loading", text))
            )
        except Exception as error:
            # An error raised on purpose says all there is to say; any other needs its traceback.
            log.error(
                "%s of %s was not loaded: %s", precision, self.spec.name, sentence(error),
                exc_info=None if isinstance(error, EngineError) else error,
            )  # fmt: skip
            self._set(precision, Loading("failed", sentence(error)))
        else:
            self._engines[precision] = engine
            self._set(precision, Loading("ready"))

    def _set(self, precision: str, state: Loading) -> None:
        with self._changed:
            self._states[precision] = state
            self._changed.notify_all()


def _free_memory() -> None:
    """Give the device back what was let go of."""
    import gc

    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()
