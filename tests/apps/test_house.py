"""Six apps in one process: one shelf, one device, one queue, a page and an endpoint each."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator

import pytest
from gradio_client import Client

from apps import run
from apps.common import cli
from apps.common.house import build, gallery
from apps.common.shelf import Shelf
from engine.models import catalogue
from tests.apps.conftest import context_of, forget
from tests.apps.fake import loader

SLUGS = ("flux_t2i", "sketch", "depth_canny", "fill", "redux", "sana_t2i")


@pytest.fixture(scope="module")
def house() -> Iterator[tuple[Client, list]]:
    engines: dict = {}
    studios = run.open_studios(run.parser().parse_args(["--small", "--device", "cpu"]), loader(None, engines))
    demo = cli.serve(build(studios), server_name="127.0.0.1", prevent_thread_lock=True, quiet=True)
    yield Client(demo.local_url, verbose=False), studios
    demo.close()
    for studio in studios:
        studio.pictures.close()


def waiting(studio) -> bool:
    return all(studio.pool.state(precision).state == "waiting" for precision in studio.pool.precisions)


def test_nothing_is_loaded_before_a_page_is_opened(house):
    assert [studio.app.slug for studio in house[1]] == list(SLUGS)
    assert waiting(house[1][-1])


def test_every_app_has_an_endpoint_and_they_share_one_device(house):
    client, studios = house
    endpoints = client.view_api(return_format="dict")["named_endpoints"]
    assert {f"/{slug}" for slug in SLUGS} <= set(endpoints)
    assert len({id(studio.pool.device) for studio in studios}) == 1
    file, facts = client.predict("a red cube", seed=3, steps=2, api_name="/flux_t2i")
    assert facts["settings"]["model"] == "tiny"
    assert file


def test_the_first_page_leads_to_all_of_them():
    shown = gallery(run.apps())
    assert [f'href="{slug}"' in shown for slug in SLUGS] == [True] * 6
    assert shown.count("<img") == 6


@pytest.mark.browser
def test_a_visitor_goes_from_app_to_app(browser, house):
    client, studios = house
    tab = context_of(browser, "light").new_page()
    wrong: list[str] = []
    tab.on("pageerror", lambda error: wrong.append(str(error)))
    tab.goto(client.src)
    tab.locator(".nb-door", has_text="Sketch to picture").click()
    tab.locator("#nb-banner", has_text="Tiny FLUX Sketch").wait_for()
    tab.locator("#nb-banner .nb-load-ready").wait_for()
    tab.locator(".nb-rooms a", has_text="SANA").click()
    tab.locator("#nb-banner", has_text="Tiny SANA").wait_for()
    tab.locator("#nb-prompt textarea").fill("a red cube")
    tab.locator("#nb-generate").click()
    for precision in studios[-1].pool.precisions:
        tab.locator(f"#nb-image-{precision} img").wait_for(timeout=60_000)
    assert tab.locator(".nb-rooms a[aria-current]").inner_text() == studios[-1].app.title
    forget(tab)
    assert wrong == []


class Loads:
    """A loader that notes who comes."""

    def __init__(self) -> None:
        self.came: list[str] = []

    def __call__(self, spec, precision, share, progress):
        self.came.append(f"{spec.name} {precision}")
        return object()


def get(pool):
    return pool.get("bf16", threading.Event().is_set)


def test_small_models_stay_and_a_large_one_is_alone():
    loads = Loads()
    shelf, tiny = Shelf(loads), catalogue.resolve("tiny")
    small, other = (shelf.pool(catalogue.resolve(name), ("bf16",)) for name in ("tiny", "tiny-canny"))
    large = [shelf.pool(dataclasses.replace(tiny, name=name, source="/elsewhere"), ("bf16",)) for name in ("a", "b")]
    kept = get(small), get(other)
    assert get(small) is kept[0]
    assert get(large[0])
    assert small.engines() == []
    first = get(large[0])
    assert get(large[1])
    assert large[0].engines() == []
    assert get(large[0]) is not first
    assert large[1].engines() == []
    assert loads.came == ["tiny bf16", "tiny-canny bf16", "a bf16", "b bf16", "a bf16"]


def test_a_model_goes_only_when_the_run_is_over():
    shelf, tiny = Shelf(Loads()), catalogue.resolve("tiny")
    one, two = (shelf.pool(dataclasses.replace(tiny, name=name, source="/elsewhere"), ("bf16",)) for name in ("a", "b"))
    engine = get(one)
    with one.device:
        two.start()
        assert two.get("bf16", iter([False, False, True]).__next__, timeout=0.05) is None
        assert one.engines() == [engine]
    assert get(two)
    assert one.engines() == []


def test_a_pool_is_one_for_the_same_model_and_precisions():
    shelf, tiny = Shelf(Loads()), catalogue.resolve("tiny")
    assert shelf.pool(tiny, ("bf16",)) is shelf.pool(tiny, ["bf16"])
    assert shelf.pool(tiny, ("bf16",)) is not shelf.pool(tiny, ("int4",))
