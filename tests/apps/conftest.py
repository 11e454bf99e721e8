"""Pages under test are the real ones, served on loopback; only the engine may be the fake of `fake.py`."""

from __future__ import annotations

import argparse
import asyncio
import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from gradio_client import Client

from apps import run
from apps.common import App, cli, house, runner, screenshots
from apps.common.studio import Studio
from apps.flux_t2i.run import APP
from tests.apps.fake import FakeEngine, loader


def arguments(*flags: str) -> argparse.Namespace:
    return cli.parser(APP).parse_args(list(flags))


class Served:
    """An app with fake engines; `gate`, when there is one, lets one step pass a release."""

    def __init__(self, *flags: str, gated: bool = False, app: App = APP) -> None:
        self.gate = threading.Semaphore(0) if gated else None
        self.engines: dict[str, FakeEngine] = {}
        args = cli.parser(app).parse_args([*flags])
        self.studio: Studio = cli.open_studio(app, args, loader(self.gate, self.engines))
        self.demo: Any = None

    @property
    def url(self) -> str:
        return self.demo.local_url

    def serve(self) -> Served:
        self.demo = cli.launch(self.studio, server_name="127.0.0.1", prevent_thread_lock=True, quiet=True)
        return self

    def close(self) -> None:
        if self.demo is not None:
            self.demo.close()
        self.studio.pictures.close()


@contextmanager
def serving(*flags: str, gated: bool = False, app: App = APP) -> Iterator[Served]:
    page = Served(*flags, gated=gated, app=app).serve()
    try:
        yield page
    finally:
        if page.gate is not None:
            page.gate.release(1000)
        page.close()


@contextmanager
def really_served(app: App, *flags: str) -> Iterator[tuple[Client, Studio]]:
    """An app with its true small model on the CPU: a client of its page, and what is behind it."""
    studio = cli.open_studio(app, cli.parser(app).parse_args(["--device", "cpu", *flags]))
    demo = cli.launch(studio, server_name="127.0.0.1", prevent_thread_lock=True, quiet=True)
    try:
        yield Client(demo.local_url, verbose=False), studio
    finally:
        demo.close()
        studio.pictures.close()


def context_of(browser, view: str):
    """The browser's context of a view: one for the session, so that Gradio's scripts are fetched and compiled once."""
    context = next((one for one in browser.contexts if getattr(one, "view", None) == view), None)
    if context is None:
        context = browser.new_context(**screenshots.VIEWS[view], accept_downloads=True)
        context.view = view
    return context


def forget(tab) -> None:
    """What a page keeps in the browser is not there for the next visitor; closes the tab."""
    tab.evaluate("localStorage.clear(); sessionStorage.clear()")
    tab.context.clear_cookies()
    tab.close()


@contextmanager
def visit(browser, url: str, view: str = "light", slug: str = "") -> Iterator:
    """A visitor's tab; leaves only when the console is free of errors and nothing was asked of another host.

    `slug` is the page of an app, where `url` is a house.
    """
    tab = context_of(browser, view).new_page()
    wrong: list[str] = []
    tab.on("console", lambda message: message.type == "error" and wrong.append(message.text))
    tab.on("pageerror", lambda error: wrong.append(str(error)))
    tab.on("response", lambda answer: answer.status >= 400 and wrong.append(f"{answer.status} {answer.url}"))
    tab.on("request", lambda asked: (asked.url.startswith(("http", "ws")) and asked.url.startswith(url)) or
           asked.url.startswith(("data:", "blob:")) or wrong.append(f"asked {asked.url}"))  # fmt: skip
    try:
        tab.goto(url + slug)
        tab.locator("#nb-banner .nb-load-ready").wait_for(timeout=120_000)
        yield tab
    finally:
        forget(tab)
    assert wrong == []


@pytest.fixture(scope="session", autouse=True)
def dropped_event_loops() -> Iterator[None]:
    """Gradio makes event loops while it builds Blocks and drops them unclosed; they are kept here and closed."""
    made, new = [], asyncio.new_event_loop

    def recorded() -> asyncio.AbstractEventLoop:
        made.append(new())
        return made[-1]

    asyncio.new_event_loop = recorded
    yield
    asyncio.new_event_loop = new
    asyncio.set_event_loop(None)
    for loop in made:
        if not loop.is_running():
            loop.close()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Gradio's server, its client and the MCP client drop sockets and streams unclosed.
    ignored = pytest.mark.filterwarnings("ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning")
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(ignored)


@pytest.fixture(scope="module", autouse=True)
def collected() -> Iterator[None]:
    """What a module of these tests drops is collected with it, not during somebody else's test."""
    yield
    gc.collect()


@pytest.fixture
def every_step(monkeypatch) -> None:
    """Progress is reported at each step, however fast."""
    monkeypatch.setattr(runner, "STEP_INTERVAL", 0.0)


@pytest.fixture(scope="session")
def page() -> Iterator[Served]:
    """One page for all tests that only look at it or call it."""
    with serving() as served:
        yield served


@pytest.fixture(scope="session")
def small_house() -> Iterator[tuple[Client, dict[str, Studio]]]:
    """All six apps with their true small models on the CPU: a client, and the studios by slug."""
    studios = run.open_studios(run.parser().parse_args(["--small", "--device", "cpu"]))
    demo = cli.serve(house.build(studios), server_name="127.0.0.1", prevent_thread_lock=True, quiet=True)
    yield Client(demo.local_url, verbose=False), {studio.app.slug: studio for studio in studios}
    demo.close()
    for one in studios:
        one.pictures.close()


@pytest.fixture
def studio() -> Iterator[Studio]:
    """A studio that is not served."""
    made = Served()
    yield made.studio
    made.close()


@pytest.fixture
def make_studio() -> Iterator[Callable[..., Served]]:
    """Studios with flags of the test's choice."""
    made: list[Served] = []

    def make(*flags: str, gated: bool = False) -> Served:
        made.append(Served(*flags, gated=gated))
        return made[-1]

    yield make
    for one in made:
        if one.gate is not None:
            one.gate.release(1000)
        one.close()
