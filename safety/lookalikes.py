"""Brings text to plain lower-case Latin letters, undoing the usual disguises of a word.

Only letters are changed here; how letters are gathered into words is `safety.tokens`' business.
Source of the pairs: Unicode's confusables (UTS 39), cut down to the scripts people really mix into English.
"""

from __future__ import annotations

import unicodedata

__all__ = ["plain"]

# Latin letter -> what passes for it. Capitals are listed where they look like another letter than their lower case.
_LOOKALIKES = {
    "a": "аαɑɐᴀАΑᎪ∀",
    "b": "ьᏏʙВΒЬβ฿",
    "c": "сϲᴄСϹᏟ¢",
    "d": "ԁᴅᎠđð",
    "e": "еεєэҽᴇǝɛЕΕᎬ€",
    "f": "ғꜰƒϝ",
    "g": "ɡɢԍᏀ",
    "h": "һнʜНΗᎻħ",
    "i": "іιɪıІΙ",
    "j": "јᴊЈᎫ",
    "k": "кκᴋКΚᏦ",
    "l": "ӏʟłᏞӀ£",
    "m": "мᴍМΜᎷ",
    "n": "пηɴиИΝոП",
    "o": "оοσᴏøօОΟ",
    "p": "рρᴘРΡᏢþ",
    "q": "ԛգ",
    "r": "гʀяЯɹᏒ",
    "s": "ѕꜱЅςᏚ§",
    "t": "тτᴛТΤᎢŧʇ",
    "u": "υᴜսцμ",
    "v": "νѵᴠѴᏙ",
    "w": "ѡԝωᴡшШᎳ",
    "x": "хχХΧ×",
    "y": "уγʏУΥүҮ¥",
    "z": "ᴢΖζᏃ",
    "ae": "æÆ",
}
# The fillers are letters or symbols to Unicode and nothing to the eye.
_INVISIBLE = "\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0"
# Lettered badges that NFKC leaves alone: negative circled, negative squared, regional indicators.
_BADGES = (0x1F150, 0x1F170, 0x1F1E6)

_TABLE: dict[int, str | None] = {ord(char): latin for latin, chars in _LOOKALIKES.items() for char in chars}
_TABLE.update({ord(char): None for char in _INVISIBLE})
_TABLE.update({start + i: chr(ord("a") + i) for start in _BADGES for i in range(26)})

# Arabic ligatures of a whole phrase; unfolded, each is up to eighteen letters that no term has.
_TABLE_BEFORE = dict.fromkeys(range(0xFDF0, 0xFDFE), "\u0436")

_DROPPED = frozenset({"Mn", "Me", "Cf"})


def plain(text: str) -> str:
    """Fold `text` to lower case with look-alike letters as Latin ones, without marks and invisible characters.

    White space and punctuation stay, so that words can still be told apart; other scripts stay as they are.
    """
    if text.isascii():
        return text.lower()
    text = unicodedata.normalize("NFKD", unicodedata.normalize("NFKC", text.translate(_TABLE_BEFORE)))
    dropped = dict.fromkeys(ord(char) for char in set(text) if unicodedata.category(char) in _DROPPED)
    return text.translate({**_TABLE, **dropped}).casefold()
