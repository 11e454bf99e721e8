"""What a page is told of a run: sums of changes, and messages joined."""

from __future__ import annotations

from collections.abc import Iterator

import gradio as gr

from apps.common import changes


class Clock:
    """A clock that messages move on."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def send(self, *messages: tuple[float, dict]) -> Iterator[dict]:
        for at, message in messages:
            self.now = at
            yield message


def gathered(*messages: tuple[float, dict]) -> list[dict]:
    clock = Clock()
    return list(changes.gathered(clock.send(*messages), 0.5, clock))


def test_a_quick_run_is_told_at_once_and_its_last_words_count():
    assert gathered((0.0, {"a": "waits"}), (0.1, {"a": "paints", "b": 1}), (0.3, {"a": "done"})) == [
        {"a": "done", "b": 1}
    ]


def test_a_slow_run_is_told_as_it_comes():
    messages = [(1.0, {"a": 1}), (2.0, {"a": 2}), (3.0, {"b": 3})]
    assert gathered(*messages) == [message for _, message in messages]


def test_updates_of_one_part_add_up_and_values_take_their_place():
    shown = gathered(
        (0.0, {"a": gr.update(value=1), "b": gr.update(visible=True)}), (0.1, {"a": gr.update(visible=False), "b": "x"})
    )
    assert shown == [{"a": gr.update(value=1, visible=False), "b": "x"}]
    assert gathered((0.0, {"a": "x"}), (0.1, {"a": gr.update(visible=True)})) == [{"a": gr.update(visible=True)}]


def test_nothing_is_lost_between_two_messages():
    assert gathered((0.2, {"a": 1}), (0.6, {"b": 2}), (0.7, {"c": 3})) == [{"a": 1, "b": 2}, {"c": 3}]
    assert gathered() == []


def test_what_a_page_was_told_comes_to_a_sum():
    shown: dict = {}
    told = [{"a": gr.update(value=1)}, {"a": gr.update(visible=True)}, {"b": "x"}]
    assert list(changes.kept(told, shown)) == told
    assert shown == {"a": gr.update(value=1, visible=True)}
