"""A folder that is another training of a model that ships takes over its settings; any other takes the family's."""

from __future__ import annotations

import json
from pathlib import Path

from engine.models.catalogue import resolve


def folder(root: Path, **changes: object) -> Path:
    source = Path(resolve("tiny").source)
    (root / "transformer").mkdir(parents=True)
    (root / "model_index.json").write_text((source / "model_index.json").read_text())
    config = json.loads((source / "transformer" / "config.json").read_text())
    (root / "transformer" / "config.json").write_text(json.dumps(config | changes))
    return root


def test_another_training_has_the_settings_of_its_parent(tmp_path: Path):
    found, parent = resolve(str(folder(tmp_path / "mine", _diffusers_version="9"))), resolve("tiny")
    assert (found.name, found.source, dict(found.checkpoints)) == ("mine", str(tmp_path / "mine"), {})
    assert (found.size, found.steps, found.max_sequence_length) == (
        parent.size,
        parent.steps,
        parent.max_sequence_length,
    )


def test_another_shape_has_those_of_its_family(tmp_path: Path):
    found = resolve(str(folder(tmp_path / "other", num_layers=5)))
    assert found.max_sequence_length == 512
    assert found.size.default == 1024
