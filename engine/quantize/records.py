"""What the quantizer tells of each group of linears, as values and as JSON: the quality report reads it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from engine.errors import CheckpointError

__all__ = ["FILE_NAME", "LayerRecord", "read_records", "records_path", "write_records"]

FILE_NAME = "layers.json"


@dataclass(frozen=True)
class LayerRecord:
    """One group of linears that share an input. Errors are ||y - y_hat|| / ||y|| on calibration rows.

    `shape` is (N, K), the rows of the whole group. `kind` is "svdq" or "awq"; a weight-only group has one error,
    given twice. `naive_error` is plain rounding to nearest in the same format with 4-bit activations, no smoothing and
    no branch; `seconds` is what quantizing took. None means not measured. `names` are the linears' own names, as
    `--keep-16bit` takes them.
    """

    name: str
    kind: str
    shape: tuple[int, int]
    error_w4a4: float | None
    error_w4a8: float | None
    naive_error: float | None
    seconds: float | None
    names: tuple[str, ...] = ()


def records_path(checkpoint: str | Path) -> Path:
    """Where the records of a checkpoint lie: in its folder, or beside its file under the file's name."""
    path = Path(checkpoint)
    return path / FILE_NAME if path.is_dir() else path.with_suffix(f".{FILE_NAME}")


def write_records(path: str | Path, records: Iterable[LayerRecord]) -> None:
    """Write the records as a JSON list, to a temporary file first."""
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps([dataclasses.asdict(record) for record in records], indent=1) + "\n")
    partial.replace(path)


def read_records(path: str | Path) -> list[LayerRecord]:
    """Read what `write_records` wrote. Raises CheckpointError when the file is missing or holds something else."""
    try:
        rows = json.loads(Path(path).read_text(encoding="utf-8"))
        return [LayerRecord(**{**r, "shape": tuple(r["shape"]), "names": tuple(r.get("names", ()))}) for r in rows]
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: expected a list of layer records as the quantizer writes it ({error})"
        ) from error
