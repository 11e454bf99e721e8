"""What a run says on the terminal while it is at work: a bar for each stage, with the time that is left."""

from __future__ import annotations

import sys
from types import TracebackType

from tqdm import tqdm

__all__ = ["Bars"]

_FORMAT = "{desc:<11} {percentage:3.0f} % |{bar:30}| {elapsed} gone, {remaining} left"
# Into a log file go few lines, onto a terminal a bar that moves.
_SECONDS_TERMINAL, _SECONDS_FILE = 0.1, 30.0


class Bars:
    """Hears (stage, done, in all) and shows it on standard error; leave the context to close the last bar."""

    def __init__(self) -> None:
        self._stage, self._bar = "", None

    def __enter__(self) -> Bars:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Move the bar of `stage`. What is done when a stage is first heard of was done by an earlier run."""
        if self._bar is None or stage != self._stage:
            self._close()
            pause = _SECONDS_TERMINAL if sys.stderr.isatty() else _SECONDS_FILE
            self._stage = stage
            self._bar = tqdm(
                total=total, initial=done, desc=stage, file=sys.stderr, bar_format=_FORMAT, mininterval=pause
            )
        self._bar.update(done - self._bar.n)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        self._bar = None
