"""Reads a prompt as words, each with the other readings that a disguise may hide.

The result is a lattice: for each word, a list of `(reading, next)` where `next` is the index of the word after it.
"n.u.d.e art" gives the four letters, and at the first of them also `("nude", 4)`.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from safety.lookalikes import plain

__all__ = ["Reading", "lattice", "squeeze"]


class Reading(NamedTuple):
    """One way to read the words from here up to, not including, the word `next`."""

    text: str
    next: int


_CHUNK = re.compile(r"\S+")
# Scripts written without spaces end a Latin word; words of other scripts are one unknown word, however many.
_UNSPACED = re.compile("[\u0e00-\u0eff\u1100-\u11ff\u2e80-\u9fff\ua960-\ud7ff\uf900-\ufaff\U00020000-\U0003ffff]+")
_FOREIGN = re.compile(r"(?:(?![a-z])[^\W\d_])+(?:\s+(?:(?![a-z])[^\W\d_])+)*")
_UNKNOWN = "\u0436"
_WORD = re.compile(r"[^\W_]+")
# A word with symbols standing in for letters inside it: p@ss, a$$, h!s. A closing "!" is an exclamation.
_DISGUISED = re.compile(r"[@$]*[^\W_]+(?:[@$!|+*]+[^\W_]+)*\$*")
_SYMBOL = re.compile(r"[@$!|+*]")
_LETTER = re.compile(r"[^\W\d_]")
_AGE = re.compile(r"(\d{1,2})(?:yo|yrs?|y)")
_REPEAT = re.compile(r"(.)\1+")

_LEET = str.maketrans({"0": "o", "3": "e", "4": "a", "5": "s", "7": "t", "8": "b", "9": "g",
                       "@": "a", "$": "s", "!": "i", "+": "t"})  # fmt: skip
_ONES = (str.maketrans("1|", "ii"), str.maketrans("1|", "ll"))

LONGEST = 40  # characters; no term is near this long


def squeeze(word: str) -> str:
    """ "nuuude" -> "nude", "boobs" -> "bobs": the key under which drawn-out spellings meet."""
    return _REPEAT.sub(r"\1", word)


def lattice(prompt: str, words: frozenset[str] = frozenset()) -> list[list[Reading]]:
    """All readings of `prompt`, by word. Letters spaced apart are read as one of `words` or, alone, as any word."""
    text = plain(prompt)
    if not text.isascii():
        text = _FOREIGN.sub(_UNKNOWN, _UNSPACED.sub(" ", text))
    readings: list[list[Reading]] = []
    known: dict[str, list[list[Reading]]] = {}  # prompts repeat themselves
    for match in _CHUNK.finditer(text):
        chunk, base = match.group(), len(readings)
        if chunk not in known:
            known[chunk] = _chunk(chunk)
        readings.extend([Reading(word, base + after) for word, after in found] for found in known[chunk])
    _join_letters(readings, words)
    return readings


def _chunk(chunk: str) -> list[list[Reading]]:
    """The readings of what stands between two spaces, its first word counting as word 0."""
    if chunk.isalpha():
        return [[Reading(chunk, 1)]]
    words = list(_WORD.finditer(chunk))
    found = [[Reading(variant, i + 1) for variant in _variants(m.group())] for i, m in enumerate(words)]
    if _SYMBOL.search(chunk):
        _add_disguised(chunk, [m.start() for m in words], found)
    if len(words) > 1:
        joined = "".join(m.group() for m in words)
        if len(joined) <= LONGEST:
            found[0].extend(Reading(variant, len(words)) for variant in _variants(joined))
    return found


def _add_disguised(chunk: str, starts: list[int], found: list[list[Reading]]) -> None:
    """Add the readings in which symbols are letters; `starts` are the offsets of the chunk's words."""
    for match in _DISGUISED.finditer(chunk):
        if len(match.group()) > LONGEST or not _SYMBOL.search(match.group()):
            continue
        inside = [i for i, start in enumerate(starts) if match.start() <= start < match.end()]
        found[inside[0]].extend(Reading(v, inside[-1] + 1) for v in _variants(match.group()))


def _variants(word: str) -> list[str]:
    """The word as it is and with digits and symbols read as letters; numbers stay numbers."""
    variants = [word]
    if not word.isalpha() and _LETTER.search(word):
        decoded = word.translate(_LEET)
        variants += [v for v in dict.fromkeys(decoded.translate(ones) for ones in _ONES) if v != word]
        age = _AGE.fullmatch(word)
        if age and int(age[1]) < 18:
            variants.append("<18yo")
    return variants


def _join_letters(readings: list[list[Reading]], words: frozenset[str]) -> None:
    """Read runs of three or more single letters ("n u d e") as words too, wherever such a word may start and end."""
    run: list[str] = []
    for i in range(len(readings) + 1):
        letter = readings[i][0].text if i < len(readings) else ""
        if len(letter) == 1:
            run.append(letter.translate(_LEET).translate(_ONES[0]))
            continue
        if len(run) >= 3:
            _add_run("".join(run), i - len(run), readings, words)
        run = []


def _add_run(run: str, base: int, readings: list[list[Reading]], words: frozenset[str]) -> None:
    if len(run) <= LONGEST:
        readings[base].append(Reading(run, base + len(run)))
    # Inside a longer run, words of three letters are coincidence more often than not.
    sizes = sorted({len(word) for word in words if len(word) > 3})
    heads = {word[:2] for word in words}
    for start in range(len(run) - 3):
        if run[start : start + 2] in heads:
            found = (start + size for size in sizes if run[start : start + size] in words)
            readings[base + start].extend(Reading(run[start:end], base + end) for end in found if end <= len(run))
