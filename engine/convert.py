"""Convert 4-bit checkpoints between layouts: `python -m engine.convert SRC DST --to LAYOUT`."""

from __future__ import annotations

__all__ = ["main"]


def main() -> int:
    """Run the command; returns its exit status."""
    from engine.commands.convert import main as run

    return run()


if __name__ == "__main__":
    raise SystemExit(main())
