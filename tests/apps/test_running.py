"""From the click to the pictures, without a browser: loading, order, progress, Stop, refusal, mistakes."""

from __future__ import annotations

import itertools
import threading
from types import SimpleNamespace
from typing import Any

import gradio as gr
import pytest

from apps.common import history, painting, panels, recalling, runner, shell
from apps.common.models import Choice
from apps.common.pool import LoadFailed, Pool
from apps.common.runner import Began, Desk, Failed, Finished, Job, Loads, Stepped, Stopped, Unloaded
from apps.flux_t2i.run import APP
from engine import ModelError, Request
from engine.models import catalogue
from engine.request import MAX_SEED
from tests.apps.fake import FakeEngine

TINY = catalogue.resolve("tiny")


def never() -> bool:
    return False


def wait_settled(pool: Pool) -> None:
    for precision in pool.precisions:
        try:
            pool.get(precision, never)
        except LoadFailed:
            continue


def job(studio, **values: Any) -> Job:
    return Job(studio.request({"prompt": "a red cube", "steps": 3} | values), studio.pool.precisions, values)


def kinds(events) -> list[tuple[type, str]]:
    return [(type(event), event.precision) for event in events if not isinstance(event, Stepped)]


def test_engines_load_in_order_and_share_with_the_first():
    shares = []

    def load(spec, precision, share, progress):
        shares.append((precision, share and share.precision))
        return FakeEngine(spec, precision)

    pool = Pool(TINY, ("int4", "bf16"), load)
    assert not pool.settled
    pool.start()
    wait_settled(pool)
    assert shares == [("int4", None), ("bf16", "int4")]
    assert pool.settled
    assert [engine.precision for engine in pool.engines()] == ["int4", "bf16"]


def test_a_failed_load_is_told_and_the_other_precision_still_runs():
    def load(spec, precision, share, progress):
        if precision == "bf16":
            raise ModelError("model: the weights are not here; do this")
        return FakeEngine(spec, precision)

    pool = Pool(TINY, ("bf16", "int4"), load)
    pool.start()
    request = Request("a red cube", steps=2)
    seen = kinds(runner.events(pool, Job(request, pool.precisions, {})))
    assert (Unloaded, "bf16") in seen
    assert (Finished, "int4") in seen
    assert pool.state("bf16").text == "model: the weights are not here; do this"


def test_the_page_says_why_nothing_could_be_loaded(caplog):
    def load(spec, precision, share, progress):
        raise ModelError("model: the weights are not here; do this")

    pool = Pool(TINY, ("bf16", "int4"), load)
    pool.start()
    wait_settled(pool)
    said = panels.banner(Choice(TINY, "because"), pool, APP)
    assert "BF16 and INT4 could not be loaded. model: the weights are not here; do this" in said
    assert "Traceback" not in caplog.text


def test_columns_come_in_the_order_of_the_precisions(make_studio):
    for order in (("bf16", "int4"), ("int4", "bf16")):
        studio = make_studio("--precisions", *order).studio
        wait_settled(studio.pool)
        first, second = order
        expected = [(Began, first), (Finished, first), (Began, second), (Finished, second)]
        assert kinds(runner.events(studio.pool, job(studio))) == expected


def test_every_precision_gets_the_same_request(make_studio):
    made = make_studio()
    list(runner.events(made.studio.pool, job(made.studio, seed=11)))
    assert made.engines["bf16"].runs == made.engines["int4"].runs
    assert made.engines["bf16"].runs[0].seed == 11


def test_the_first_click_waits_for_the_load():
    ready = threading.Event()

    def load(spec, precision, share, progress):
        ready.wait(10)
        return FakeEngine(spec, precision)

    pool = Pool(TINY, ("int4",), load)
    pool.start()
    events = runner.events(pool, Job(Request("a red cube", steps=1), ("int4",), {}))
    assert isinstance(next(events), Loads)
    ready.set()
    assert [type(event) for event in events if not isinstance(event, Stepped)] == [Began, Finished]


def test_stop_ends_the_run_at_the_next_step_and_skips_the_rest(make_studio, every_step):
    made = make_studio(gated=True)
    work = job(made.studio, steps=20)
    seen = []
    made.gate.release(2)
    for event in runner.events(made.studio.pool, work):
        seen.append(event)
        if isinstance(event, Stepped) and event.step.index == 2:
            work.stop.set()
            made.gate.release(1)
    assert [(type(e), e.precision) for e in seen if isinstance(e, Stopped)] == [(Stopped, "bf16"), (Stopped, "int4")]
    assert max(e.step.index for e in seen if isinstance(e, Stepped)) <= 3
    assert made.engines["int4"].runs == []


def test_a_reader_that_leaves_stops_the_run(make_studio, every_step):
    made = make_studio(gated=True)
    work = job(made.studio, steps=20)
    events = runner.events(made.studio.pool, work)
    made.gate.release(1)
    while not isinstance(next(events), Stepped):
        pass
    events.close()
    assert work.stop.is_set()


def test_an_engine_that_breaks_gives_one_sentence(make_studio, caplog):
    made = make_studio()
    wait_settled(made.studio.pool)

    def broken(*_, **__):
        raise RuntimeError("a kernel\nfell over")

    made.engines["bf16"].run = broken
    failed = next(e for e in runner.events(made.studio.pool, job(made.studio)) if isinstance(e, Failed))
    assert failed.text == "The engine failed: RuntimeError: a kernel fell over."
    assert "fell over" in caplog.text


def test_progress_is_reported_no_oftener_than_the_page_can_use(make_studio):
    studio = make_studio("--precisions", "int4").studio
    seen = [e.step for e in runner.events(studio.pool, job(studio, steps=50)) if isinstance(e, Stepped)]
    gaps = [after.seconds - before.seconds for before, after in itertools.pairwise(seen)]
    assert seen[0].index == 1
    assert gaps
    assert min(gaps) >= runner.STEP_INTERVAL


def test_unread_steps_give_way_to_newer_ones(make_studio, every_step):
    made = make_studio("--precisions", "int4", gated=True)
    made.gate.release(50)
    events = runner.events(made.studio.pool, job(made.studio, steps=30))
    assert isinstance(next(events), Began | Loads)
    with made.studio.pool.device:
        rest = list(events)
    assert sum(isinstance(event, Stepped) for event in rest) < 30
    assert isinstance(rest[-1], Finished)


def test_the_desk_takes_one_job_a_session():
    desk, first, second = Desk(), Job(Request("a"), (), {}), Job(Request("b"), (), {})
    assert desk.open("s", first)
    assert not desk.open("s", second)
    assert desk.claim("s") is first
    assert desk.claim("s") is None
    assert desk.stop("s")
    assert first.stop.is_set()
    desk.close("s", second)
    assert desk.stop("s")
    desk.close("s", first)
    assert not desk.stop("s")


class Driven:
    """A page's handlers, called as Gradio calls them."""

    def __init__(self, studio) -> None:
        self.studio = studio
        with gr.Blocks():
            self.page = shell.layout(studio)
        self.painter = painting.Painter(self.page, studio)
        self.request: Any = SimpleNamespace(session_hash="a session")

    def start(self, randomise: bool = False, batch: int = 1, **values: Any) -> dict:
        data = {part: values.get(name) for name, part in self.page.controls.items()}
        return self.painter.start(data | {self.page.randomise: randomise, self.page.batch: batch}, self.request)

    def run(self, entries: list | None = None):
        compared = self.page.comparison
        data = {self.page.history.entries: entries or [], compared.other: "int4", compared.amplify: 8}
        return self.painter.run(data, self.request)


@pytest.fixture
def driven(make_studio):
    made = make_studio()
    wait_settled(made.studio.pool)
    return Driven(made.studio)


def test_pictures_appear_one_after_the_other_and_then_the_comparison(driven):
    driven.start(prompt="a red cube", seed=7)
    page, pictures, compared = driven.page, [], []
    *updates, last = driven.run()
    for update in updates:
        pictures += [p for p, column in page.columns.items() if update.get(column.image)]
        if update.get(page.comparison.slider, {}).get("value"):
            compared.append(list(pictures))
    assert pictures == ["bf16", "int4"]
    assert compared == [["bf16", "int4"]]
    for precision, column in page.columns.items():
        assert last[column.image]["visible"] is True, "the page may have lost it, so it comes again"
        assert last[column.image]["value"].endswith(f"-{precision}.png")
        assert last[column.canvas]["visible"] == "hidden"
        assert column.status not in last
    assert [path.rpartition("-")[2] for path in last[page.comparison.slider]["value"]] == ["bf16.png", "int4.png"]
    assert not driven.studio.desk.stop("a session")


def test_the_slower_column_learns_its_speed_when_the_reference_arrives(make_studio):
    made = make_studio("--precisions", "int4", "bf16")
    driven = Driven(made.studio)
    driven.start(prompt="a red cube", seed=7, steps=10)
    figures = [u[driven.page.columns["int4"].figures] for u in driven.run() if driven.page.columns["int4"].figures in u]
    assert "faster" not in figures[0]
    assert "faster" in figures[-1]


def test_several_seeds_come_one_after_the_other(driven):
    driven.start(prompt="a red cube", seed=MAX_SEED, steps=2, batch=3)
    last = [update for update in driven.run() if driven.page.history.entries in update][-1]
    entries = last[driven.page.history.entries]
    assert [(entry.values["seed"], entry.path.rpartition("-")[2]) for entry in entries] == [
        (seed, f"{precision}.png") for seed in (1, 0, MAX_SEED) for precision in ("int4", "bf16")
    ]
    assert not driven.studio.desk.stop("a session")


def test_stop_ends_a_row_of_seeds(driven):
    driven.start(prompt="a red cube", seed=3, steps=2, batch=8)
    seeds = set()
    for update in driven.run():
        for entry in update.get(driven.page.history.entries, ()):
            seeds.add(entry.values["seed"])
        if 4 in seeds:
            driven.studio.desk.stop("a session")
    assert seeds <= {3, 4}


def test_the_seed_that_is_drawn_is_written_back(driven):
    update = driven.start(randomise=True, prompt="a red cube", seed=7)
    drawn = update[driven.page.controls["seed"]]
    last = None
    for update in driven.run():
        last = update.get(driven.page.last, last)
    assert last == drawn


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"prompt": ""}, "prompt: expected a description"),
        ({"prompt": None}, "prompt: expected a description"),
        ({"prompt": "x" * 10_000}, "prompt: expected at most"),
        ({"prompt": "a", "steps": 0}, "steps: expected a whole number"),
        ({"prompt": "a", "width": 250}, "a multiple of 16, got 250"),
        ({"prompt": "a", "seed": -1}, "seed: expected"),
        ({"prompt": "a", "guidance": float("nan")}, "guidance: expected"),
        ({"prompt": "a", "style": "Baroque"}, "style: expected one of"),
    ],
)
def test_a_mistake_is_told_at_once_and_nothing_runs(driven, values, words):
    update = driven.start(**values)
    assert set(update) == {driven.page.message}
    assert words in update[driven.page.message].replace("&#x27;", "'")
    # One update that changes nothing: Gradio blanks every output of a generator that yields none.
    assert list(driven.run()) == [{driven.page.message: gr.skip()}]
    assert not driven.studio.pool.engines()[0].runs


def test_a_refused_prompt_is_shown_with_its_reason_and_not_painted(driven):
    driven.start(prompt="a naked child", seed=1, style="Anime")
    updates = list(driven.run())
    assert len(updates) == 1
    assert "This prompt was refused" in updates[0][driven.page.message]
    assert driven.page.controls["prompt"] not in updates[0]
    assert not driven.studio.pool.engines()[0].runs


def test_markup_in_a_prompt_or_an_error_stays_text(driven):
    update = driven.start(prompt="a", style="<script>alert(1)</script>")
    assert "<script>" not in update[driven.page.message]
    assert "&lt;script&gt;" in update[driven.page.message]


def test_a_second_click_while_one_runs_starts_nothing(driven):
    driven.start(prompt="a red cube", seed=7)
    again = driven.start(prompt="a blue cube", seed=8)
    assert set(again) == {driven.page.message}
    list(driven.run())
    assert driven.studio.pool.engines()[0].runs[-1].prompt == "a red cube"


def test_who_waits_is_told_behind_how_many(make_studio):
    first, second = (Driven(make_studio().studio) for _ in range(2))
    column = second.page.columns["bf16"]
    before = Desk.others(Job(Request("x"), (), {}))
    first.start(prompt="a red cube", seed=7)
    update = second.start(prompt="a red cube", seed=7)
    others = before + 1
    assert f"behind {others} other{'s' * (others > 1)}" in update[column.status]
    for driven in (first, second):
        driven.studio.desk.close("a session")
    assert Desk.others(Job(Request("x"), (), {})) == before


def test_stop_with_nothing_running_says_so(driven):
    assert "Nothing is running" in driven.painter.stop(driven.request)[driven.page.message]


def test_the_history_is_bounded_and_keeps_the_newest(driven):
    entries: list[history.Entry] = []
    for seed in range(history.LIMIT):
        driven.start(prompt="a red cube", seed=seed, steps=1)
        for update in driven.run(entries):
            entries = update.get(driven.page.history.entries, entries)
    assert len(entries) == history.LIMIT
    assert entries[0].values["seed"] == history.LIMIT - 1
    assert "seed 23" in entries[0].caption


def test_recalled_settings_fit_or_are_named(driven):
    settings = {"prompt": "a cone", "seed": 5, "steps": 4, "guidance": 99.0, "width": "wide", "height": 192}
    settings |= {"model": "flux.1-dev", "backend": "x"}
    values, note = recalling.fit(settings, driven.studio)
    assert values == {"prompt": "a cone", "seed": 5, "steps": 4, "height": 192, "style": "None", "style_words": ""}
    assert "made with flux.1-dev" in note
    assert "guidance, width" in note
