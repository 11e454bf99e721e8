"""The default checker: words, phrases and combinations of them from `words.json`, no weights, no network.

It knows English only and reads words, not meaning: a floor, fast and the same everywhere. A model checker
(`qwen3guard`, `shieldgemma`) understands more. Disguises are undone first: look-alike letters, invisible
characters, marks, leetspeak, letters drawn out or spaced apart, stars in place of letters.

The data: `allow` lists harmless phrases whose words are then never held against a prompt ("naked mole rat").
A rule has either `any` (one term suffices) or `near` (two lists; both must occur, `within` so many words of each
other, the first before the second if `ordered`). `@name` in a list stands for a group. A term is one or more words;
`*` at its end admits any ending, a plural s is always admitted, `<18` stands for a number below 18.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, NamedTuple

from safety.tokens import Reading, lattice, squeeze
from safety.verdict import Verdict

__all__ = ["WordChecker"]


class Term(NamedTuple):
    """A phrase of the data, compiled: one pattern a word, and the list it belongs to."""

    text: str
    patterns: tuple[re.Pattern[str], ...]
    owner: int


class Span(NamedTuple):
    """Where a term was found: from word `start` up to, not including, word `end`."""

    start: int
    end: int
    term: str


@dataclass(frozen=True)
class Rule:
    """A rule of the data; `lists` are owners of terms: one for `any`, two for `near`."""

    category: str
    lists: tuple[int, ...]
    within: int | None
    ordered: bool


def _pattern(word: str) -> re.Pattern[str]:
    if word == "<18":
        return re.compile(r"0?\d|1[0-7]")
    stem = word.rstrip("*")
    drawn = "".join(_drawn_out(m.group(1), len(m.group()), len(stem)) for m in re.finditer(r"(.)\1*", stem))
    return re.compile(drawn + (r"\w*" if word.endswith("*") else "s*"))


def _drawn_out(letter: str, count: int, length: int) -> str:
    """A letter may be drawn out, never shortened: "bobs" is not "boobs". In short words a mere doubling makes
    another word ("annals"), so there it takes three."""
    return f"(?:{letter}{{{count}}}|{letter}{{3,}})" if length <= 4 else f"{letter}{{{count},}}"


class _Index:
    """All terms, found by their first word in a time that does not grow with their number."""

    def __init__(self) -> None:
        self.lists: list[list[str]] = []
        self._whole: dict[str, list[Term]] = {}
        self._stems: dict[str, list[Term]] = {}
        self._by_length: dict[int, list[tuple[str, Term]]] = {}
        self._stem_sizes: list[int] = []

    def add(self, terms: list[str]) -> int:
        """Index a list of terms; the number returned names the list."""
        owner = len(self.lists)
        self.lists.append(terms)
        for text in terms:
            words = text.split()
            term = Term(text, tuple(_pattern(word) for word in words), owner)
            table = self._stems if words[0].endswith("*") else self._whole
            stem = words[0].rstrip("*")
            table.setdefault(squeeze(stem), []).append(term)
            self._by_length.setdefault(len(stem), []).append((stem, term))
        self._stem_sizes = sorted({len(stem) for stem in self._stems})
        return owner

    def _candidates(self, word: str) -> list[Term]:
        """Terms whose first word may be `word`; the pattern decides."""
        key = squeeze(word)
        found = [*self._whole.get(key, ())]
        if key.endswith("s"):
            found += self._whole.get(key[:-1], ())
        if word.isdecimal():
            found += self._whole.get("<18", ())
        for size in self._stem_sizes:
            found += self._stems.get(key[:size], ()) if size <= len(key) else ()
        return found

    def _starred(self, word: str) -> list[Term]:
        """Terms that "p*rn" may stand for: a star is one letter, and at least half of the letters are shown."""
        if 2 * word.count("*") > len(word) or len(word) < 3:
            return []
        shape = re.compile(re.escape(word).replace(r"\*", "."))
        return [term for stem, term in self._by_length.get(len(word), ()) if shape.fullmatch(stem)]

    def spans(self, readings: list[list[Reading]]) -> list[list[Span]]:
        """Every occurrence of every term, by list."""
        found: list[list[Span]] = [[] for _ in self.lists]
        known: dict[str, list[Term]] = {}  # prompts repeat themselves
        for start, alternatives in enumerate(readings):
            for text, after in alternatives:
                terms = known.get(text)
                if terms is None:
                    terms = known[text] = self._terms(text)
                for term in terms:
                    end = _rest(term.patterns[1:], after, readings)
                    if end is not None:
                        found[term.owner].append(Span(start, end, term.text))
        return found

    def _terms(self, word: str) -> list[Term]:
        """Terms whose first word is `word`."""
        if not word.isascii():
            return []
        if "*" in word:
            return self._starred(word)
        return [term for term in self._candidates(word) if term.patterns[0].fullmatch(word)]


def _rest(patterns: tuple[re.Pattern[str], ...], at: int, readings: list[list[Reading]]) -> int | None:
    """Where the phrase ends if its other words follow from word `at` on, else None."""
    if not patterns:
        return at
    if at >= len(readings):
        return None
    for text, after in readings[at]:
        if patterns[0].fullmatch(text):
            end = _rest(patterns[1:], after, readings)
            if end is not None:
                return end
    return None


def _near(first: list[Span], second: list[Span], within: int | None, ordered: bool) -> Span | None:
    """The first pair that is near enough, as one span over both; `within` None is anywhere in the prompt."""
    if not first or not second:
        return None
    if within is None:
        return Span(0, 0, f"{first[0].term} … {second[0].term}")
    second = sorted(second)
    starts = [span.start for span in second]
    for a in first:
        b = bisect_left(starts, a.end if ordered else a.start - within)
        if b < len(second) and second[b].start <= a.end + within:
            return Span(0, 0, f"{a.term} … {second[b].term}")
    return None


@cache
def _data() -> dict[str, Any]:
    return json.loads(files("safety").joinpath("words.json").read_text(encoding="utf-8"))


class WordChecker:
    """Checks a prompt against `words.json`. Score is 1 for a match, 0 without one."""

    name = "words"

    def __init__(self) -> None:
        data = _data()
        self._sentences: dict[str, str] = data["categories"]
        self._index = _Index()
        self._harmless = _Index()
        self._harmless.add(data["allow"])
        groups: dict[str, list[str]] = data["groups"]
        self._rules = [self._rule(rule, groups) for rule in data["rules"]]
        self._words = frozenset(
            word.rstrip("*") for terms in self._index.lists for text in terms for word in text.split()
        )

    def _rule(self, rule: dict[str, Any], groups: dict[str, list[str]]) -> Rule:
        lists = rule["near"] if "near" in rule else [rule["any"]]
        owners = tuple(self._index.add(_expand(terms, groups)) for terms in lists)
        return Rule(rule["category"], owners, rule.get("within"), rule.get("ordered", False))

    def check(self, prompt: str) -> Verdict:
        """Judge `prompt`; rules are tried in the order of the data, the gravest first."""
        readings = lattice(prompt, self._words)
        spans = self._index.spans(readings)
        # Only what is written plainly is harmless; "n0 porn" is a disguise of something else.
        [allowed] = self._harmless.spans([alternatives[:1] for alternatives in readings])
        harmless = {word for span in allowed for word in range(span.start, span.end)}
        if harmless:
            spans = [[span for span in found if not harmless.issuperset(range(*span[:2]))] for found in spans]
        for rule in self._rules:
            hit = self._apply(rule, spans)
            if hit:
                return self._refusal(rule, hit)
        return Verdict(True, None, 0.0, self.name, "Nothing on the word list was found.")

    @staticmethod
    def _apply(rule: Rule, spans: list[list[Span]]) -> Span | None:
        if len(rule.lists) == 1:
            return next(iter(spans[rule.lists[0]]), None)
        first, second = (spans[owner] for owner in rule.lists)
        return _near(first, second, rule.within, rule.ordered)

    def _refusal(self, rule: Rule, hit: Span) -> Verdict:
        what = self._sentences[rule.category]
        # Which words gave a prompt about minors away is nobody's business.
        matched = "" if rule.category == "minors" else f" (“{hit.term.replace('*', '…')}” on the word list)"
        reason = f"The prompt was read as asking for {what}{matched}."
        return Verdict(False, rule.category, 1.0, self.name, reason)


def _expand(terms: list[str], groups: dict[str, list[str]]) -> list[str]:
    """Put the terms of a group where `@name` stands."""
    return [word for term in terms for word in (groups[term[1:]] if term.startswith("@") else [term])]
