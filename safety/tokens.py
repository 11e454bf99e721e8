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


def lattice(prompt: str) -> list[list[Reading]]:
    """All readings of `prompt`, by word."""
    text = plain(prompt)
    readings: list[list[Reading]] = []
    for chunk in _CHUNK.finditer(text):
        readings.extend(_chunk(chunk.group(), len(readings)))
    _join_letters(readings)
    return readings


def _chunk(chunk: str, base: int) -> list[list[Reading]]:
    """The readings of what stands between two spaces; `base` is the index of its first word."""
    words = list(_WORD.finditer(chunk))
    found = [[Reading(variant, base + i + 1) for variant in _variants(m.group())] for i, m in enumerate(words)]
    if _SYMBOL.search(chunk):
        _add_disguised(chunk, [m.start() for m in words], base, found)
    if len(words) > 1:
        joined = "".join(m.group() for m in words)
        if len(joined) <= LONGEST:
            found[0].extend(Reading(variant, base + len(words)) for variant in _variants(joined))
    return found


def _add_disguised(chunk: str, starts: list[int], base: int, found: list[list[Reading]]) -> None:
    """Add the readings in which symbols are letters; `starts` are the offsets of the chunk's words."""
    for match in _DISGUISED.finditer(chunk):
        if len(match.group()) > LONGEST or not _SYMBOL.search(match.group()):
            continue
        inside = [i for i, start in enumerate(starts) if match.start() <= start < match.end()]
        found[inside[0]].extend(Reading(v, base + inside[-1] + 1) for v in _variants(match.group()))


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


def _join_letters(readings: list[list[Reading]]) -> None:
    """Read runs of three or more single letters ("n u d e") as words too, wherever such a word may start and end."""
    run: list[str] = []
    for i in range(len(readings) + 1):
        letter = readings[i][0].text if i < len(readings) else ""
        if len(letter) == 1:
            run.append(letter.translate(_LEET).translate(_ONES[0]))
            continue
        if len(run) >= 3:
            _add_run("".join(run), i - len(run), readings)
        run = []


def _add_run(run: str, base: int, readings: list[list[Reading]]) -> None:
    for start in range(len(run) - 2):
        # Words of three letters are read only when they are the whole run: "a b s e x" is no word.
        shortest = 3 if len(run) == 3 else 4
        for end in range(start + shortest, min(start + 12, len(run)) + 1):
            readings[base + start].append(Reading(run[start:end], base + end))
