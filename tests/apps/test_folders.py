"""The app folders as text: what all of them need is written once, and each stays short."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from apps import run
from tests.apps.test_house import SLUGS

APPS = Path(run.__file__).parent
TOGETHER = 6
LONGEST = 120


def lines_of(text: str) -> list[str]:
    """Lines that say something; lists of imports are alike wherever the same things are used."""
    stripped = (line.strip() for line in text.splitlines())
    return [line for line in stripped if line and not line.startswith(("import ", "from "))]


def passages(text: str) -> Iterator[tuple[str, ...]]:
    lines = lines_of(text)
    return (tuple(lines[first : first + TOGETHER]) for first in range(len(lines) - TOGETHER + 1))


def repeated(texts: dict[str, list[str]]) -> dict[tuple[str, ...], set[str]]:
    """Passages found in more than one folder, and where."""
    found: dict[tuple[str, ...], set[str]] = defaultdict(set)
    for folder, files in texts.items():
        for text in files:
            for passage in passages(text):
                found[passage].add(folder)
    return {passage: folders for passage, folders in found.items() if len(folders) > 1}


def test_no_six_lines_are_the_same_in_two_apps():
    texts = {slug: [path.read_text() for path in (APPS / slug).rglob("*.py")] for slug in SLUGS}
    assert all(texts.values())
    assert repeated(texts) == {}


def test_six_lines_that_are_the_same_would_be_found():
    six, five = "\n\n".join("abcdef"), "\n".join("abcde")
    assert list(repeated({"one": [f"import x\n{six}"], "two": [f"y\n  {six}"]})) == [tuple("abcdef")]
    assert repeated({"one": [five], "two": [five]}) == {}


@pytest.mark.parametrize("slug", SLUGS)
def test_an_app_is_short(slug):
    assert len((APPS / slug / "run.py").read_text().splitlines()) <= LONGEST
