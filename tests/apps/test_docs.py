"""What docs/apps.md says of the pages stands on the pages: labels, flags, apps, pictures."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from apps import run
from apps.common import cli, house
from tests.apps.fake import loader

DOCS = Path(run.__file__).parents[1] / "docs"
TEXT = (DOCS / "apps.md").read_text(encoding="utf-8")
QUOTED = re.compile(r'"([^"]+)"')


def cells(column: int) -> str:
    """One column of all the tables."""
    rows = [line.strip().strip("|").split(" | ") for line in TEXT.splitlines() if line.startswith("| ")]
    return "\n".join(row[column] for row in rows if len(row) > column)


@pytest.fixture(scope="module")
def shown() -> Iterator[str]:
    """All words of the six pages."""
    studios = run.open_studios(run.parser().parse_args(["--small", "--device", "cpu"]), loader())
    yield json.dumps(house.build(studios).get_config_file(), default=str, ensure_ascii=False)
    for studio in studios:
        studio.pictures.close()


@pytest.mark.parametrize("label", sorted(set(QUOTED.findall(cells(1)))))
def test_what_it_quotes_stands_on_a_page(shown, label):
    assert label in shown


def test_it_quotes_something():
    assert {"Recall from PNG", "Widen the picture"} <= set(QUOTED.findall(cells(1)))


@pytest.mark.parametrize("flag", sorted(set(re.findall(r"`(--[a-z-]+)", cells(1)))))
def test_its_flags_exist(flag):
    assert flag in cli.parser(run.apps()[0]).format_help()


@pytest.mark.parametrize("app", run.apps(), ids=lambda app: app.slug)
def test_it_names_and_shows_every_app(app):
    assert f"`{app.slug}`" in TEXT
    assert f"### {app.title}\n" in TEXT
    assert f"screenshots/{app.slug}-" in TEXT


def test_its_pictures_are_there():
    pictures = re.findall(r"\]\((screenshots/[^)]+)\)", TEXT)
    assert pictures
    assert [name for name in pictures if not (DOCS / name).is_file()] == []
