"""The filter of pictures: off unless asked for, a refusal is shown as one, and what was refused is nowhere."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from gradio_client import Client

from apps import run
from apps.common import cli
from apps.common.runner import Finished, Job, Withheld, events
from apps.common.studio import Studio
from apps.deploy import zero
from apps.flux_t2i.run import APP
from engine import Request
from tests.apps.conftest import Served, arguments, serving, visit
from tests.apps.test_running import Driven, wait_settled

PROMPT = "a red cube"


def strict(studio: Studio, threshold: float = 0.0) -> Studio:
    """The same with a classifier that finds every picture explicit; above 1 it finds none so."""
    studio.image_checker = replace(studio.image_checker, threshold=threshold)
    return studio


@pytest.fixture
def filtered(vit_folder: Path) -> Iterator[Served]:
    made = Served("--safety-images", "nsfw", "--safety-images-path", str(vit_folder))
    wait_settled(made.studio.pool)
    yield made
    made.close()


def test_it_is_off_unless_asked_for(studio, filtered):
    assert arguments().safety_images == "off"
    assert (studio.image_checker, studio.previews) == (None, True)
    assert studio.job({"prompt": PROMPT}, ("bf16",)).judge is None
    assert filtered.studio.image_checker.name == "nsfw"


def test_a_picture_that_is_refused_is_shown_as_refused_and_is_nowhere(filtered):
    driven = Driven(strict(filtered.studio))
    driven.start(prompt=PROMPT, seed=7, steps=2)
    page, updates = driven.page, list(driven.run())
    told = next(update[page.message] for update in updates if update.get(page.message))
    assert "The picture is not shown" in told
    assert "the picture check finds it explicit" in told
    for column in page.columns.values():
        assert not any(update.get(column.image) for update in updates)
        assert "Painted, and withheld" in [update[column.status] for update in updates if column.status in update][-1]
    assert not any(page.history.entries in update for update in updates)
    assert list(Path(filtered.studio.pictures.folder).iterdir()) == []
    assert len(filtered.engines["int4"].runs) == 1


def test_a_picture_that_is_allowed_appears_and_no_preview_came_before_it(filtered, every_step):
    driven = Driven(strict(filtered.studio, threshold=1.1))
    driven.start(prompt=PROMPT, seed=7, steps=2)
    assert not driven.studio.desk._jobs["a session"].preview
    assert driven.page.preview.visible is False
    updates = list(driven.run())
    assert all(any(update.get(column.image) for update in updates) for column in driven.page.columns.values())


def test_it_judges_what_an_app_made_of_the_painted_picture(filtered):
    seen = []
    job = strict(filtered.studio).job({"prompt": PROMPT, "steps": 1}, ("int4",))
    job = replace(job, finish=lambda image, _: image.resize((64, 64)))
    judge = job.judge
    job.judge = lambda image: (seen.append(image.size), judge(image))[1]
    assert isinstance(list(events(filtered.studio.pool, job))[-1], Withheld)
    assert seen == [(64, 64)]


def test_the_interface_says_it_too(vit_folder):
    with serving("--safety-images", "nsfw", "--safety-images-path", str(vit_folder)) as page:
        strict(page.studio)
        with pytest.raises(Exception, match="The picture was withheld"):
            Client(page.url, verbose=False).predict(PROMPT, steps=1, api_name="/generate")


def test_where_a_gpu_is_lent_the_picture_is_judged_at_home(filtered):
    judge = strict(filtered.studio).image_checker.check_image
    result = filtered.studio.pool.engines()[0].run(Request(PROMPT, steps=1))
    job = Job(Request(PROMPT), ("bf16",), {}, judge=judge)
    assert "judge" not in zero._cargo(job)
    assert [type(event) for event in zero._relay(lambda _: (yield Finished("bf16", result)), job)] == [Withheld]


@pytest.mark.parametrize("start", [lambda flags: cli.main(APP, ["--model", "tiny", *flags]), run.main])
def test_one_that_cannot_load_ends_the_start(start, tmp_path, capsys):
    assert start(["--safety-images", "nsfw", "--safety-images-path", str(tmp_path / "nowhere")]) == 2
    assert "nowhere" in capsys.readouterr().err


@pytest.mark.browser
def test_a_visitor_is_told(browser, vit_folder):
    flags = ("--safety-images", "nsfw", "--safety-images-path", str(vit_folder))
    with serving(*flags) as page, visit(browser, page.url) as tab:
        strict(page.studio)
        tab.locator("#nb-prompt textarea").fill(PROMPT)
        tab.locator("#nb-generate").click()
        tab.locator("#nb-message .nb-refusal", has_text="The picture is not shown").wait_for()
        tab.locator("#nb-status-int4", has_text="Painted, and withheld").wait_for()
        tab.locator("#nb-generate:not([disabled])").wait_for()
        assert tab.locator("#nb-image-int4 img, #nb-gallery img").count() == 0
        assert not tab.locator("#nb-live-preview").is_visible()
