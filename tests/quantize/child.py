"""What a process that tests kill runs."""

from __future__ import annotations

import sys

import torch


def quantize(arguments: list[str]) -> None:
    """The command, on one thread; the process ends with its exit status."""
    from engine.quantize.__main__ import main

    torch.set_num_threads(1)
    sys.exit(main(arguments))
