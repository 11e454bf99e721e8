"""Prompt sets read from files as their publishers lay them out."""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bench.evaluation.sets import Item, read_set, seed_of
from engine import ArgumentError

NAMES = [f"{i:04x}" for i in range(40)]


def jpeg(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), shade, np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.fixture
def mjhq(tmp_path: Path) -> Path:
    table = {name: {"category": "art", "prompt": f"picture {name}"} for name in NAMES}
    (tmp_path / "meta_data.json").write_text(json.dumps(table))
    with zipfile.ZipFile(tmp_path / "mjhq30k_imgs.zip", "w") as files:
        for shade, name in enumerate(NAMES):
            files.writestr(f"mjhq30k_imgs/art/{name}.jpg", jpeg(shade))
        files.writestr("mjhq30k_imgs/readme.txt", "no picture")
    return tmp_path


@pytest.fixture
def sdci(tmp_path: Path) -> Path:
    lines = [f"sa_{i}: a summarised caption {i}" for i in range(12)]
    (tmp_path / "sDCI.yaml").write_text("\n".join(lines) + "\n")
    with tarfile.open(tmp_path / "sDCI.gz", "w:gz") as files:
        for i in range(12):
            member = tarfile.TarInfo(f"sDCI/sa_{i}.jpg")
            data = jpeg(i)
            member.size = len(data)
            files.addfile(member, io.BytesIO(data))
    return tmp_path


def test_mjhq_is_read_from_its_files(mjhq: Path, tmp_path: Path):
    found = read_set(f"mjhq:{mjhq}", None)
    assert [item.name for item in found.items] == NAMES
    assert found.items[3] == Item("0003", "picture 0003", seed_of("0003"))
    assert found.references is not None
    found.references.copy(["0007", "0001"], tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["0001.jpg", "0007.jpg"]
    assert Image.open(tmp_path / "out" / "0007.jpg").getpixel((0, 0)) == (7, 7, 7)


def test_a_part_is_always_the_same_and_spread(mjhq: Path):
    part = [item.name for item in read_set(f"mjhq:{mjhq}", 5).items]
    assert part == [item.name for item in read_set(f"mjhq:{mjhq}", 5).items] == sorted(part)
    assert len(set(part)) == 5
    assert part != NAMES[:5]


def test_sdci_is_read_from_yaml_and_tar(sdci: Path, tmp_path: Path):
    found = read_set(f"sdci:{sdci}", 4)
    assert all(item.prompt == f"a summarised caption {item.name[3:]}" for item in found.items)
    assert found.references is not None
    found.references.copy([item.name for item in found.items], tmp_path / "out")
    assert len(list((tmp_path / "out").iterdir())) == 4


def test_a_picture_that_is_not_there_is_named(mjhq: Path, tmp_path: Path):
    references = read_set(f"mjhq:{mjhq}", None).references
    assert references is not None
    with pytest.raises(ArgumentError, match=r"holds no picture named 'zzzz' \(1 missing\)"):
        references.copy(["0001", "zzzz"], tmp_path / "out")


def test_a_damaged_archive_is_named(mjhq: Path, tmp_path: Path):
    (mjhq / "mjhq30k_imgs.zip").write_bytes(b"PK no more")
    references = read_set(f"mjhq:{mjhq}", None).references
    assert references is not None
    with pytest.raises(ArgumentError, match="cannot be read"):
        references.copy(["0001"], tmp_path / "out")


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("p.txt", "a cat\n\n  a dog \n"),
        ("p.json", '["a cat", {"prompt": "a dog"}]'),
        ("p.yaml", "- a cat\n- caption: a dog\n"),
    ],
)
def test_prompt_files(tmp_path: Path, file: str, text: str):
    (tmp_path / file).write_text(text)
    found = read_set(str(tmp_path / file), None)
    assert found.name == "p"
    assert [(item.name, item.prompt) for item in found.items] == [("00000", "a cat"), ("00001", "a dog")]


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("p.txt", "\n", "holds no prompt"),
        ("p.json", "{", "cannot be read"),
        ("p.json", '{"a": 3}', "expected a prompt for 'a', got 3"),
        ("p.json", '{"../a": "b"}', "expected names of letters"),
        ("p.yaml", "!!python/object/apply:os.getcwd []", "cannot be read"),
        ("p.csv", "a", "expected a .txt, .json or .yaml file"),
    ],
)
def test_wrong_files_are_refused(tmp_path: Path, file: str, text: str, message: str):
    (tmp_path / file).write_text(text)
    with pytest.raises(ArgumentError, match=message):
        read_set(str(tmp_path / file), None)


def test_missing_files_are_named(tmp_path: Path):
    with pytest.raises(ArgumentError, match="got 'nothing'"):
        read_set("nothing", None)
    with pytest.raises(ArgumentError, match=r"meta_data.json is missing"):
        read_set(f"mjhq:{tmp_path}", None)


def test_seeds_follow_the_names():
    assert seed_of("") == 0
    assert seed_of("ab") == 31 * ord("a") + ord("b")
    assert 0 <= seed_of("f" * 64) < 10**9 + 7


def test_the_zoo_says_what_each_picture_must_show():
    found = read_set("zoo", 3)
    assert [item.prompt for item in found.items] == [caption.text for caption in found.captions]
    assert len(found.scenes) == 3
