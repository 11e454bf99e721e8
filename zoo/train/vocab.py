"""Tokenizer files for the small text encoders, built from lists of words; no corpus, no download.

Both load as the classes FluxPipeline names (CLIPTokenizer, T5TokenizerFast). Every word a caption can hold is one
token; any other text falls apart into common pieces and letters (T5) or bytes (CLIP), so nothing is refused.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from zoo.train.words import CLOSERS, COMMON, OPENERS, PIECES

CLIP_LENGTH = 77
T5_RESERVED = ("<pad>", "</s>", "<unk>")
_WORD, _PIECE, _LETTER = -8.0, -12.0, -16.0  # Unigram scores: a whole word beats its pieces, pieces beat letters


def vocabulary_words(caption_words: Iterable[str]) -> list[str]:
    """Every whole word of the tokenizers, lower case, in a fixed order: the captions' first."""
    general = [word for phrase in OPENERS + CLOSERS for word in phrase.split()] + list(COMMON)
    words = [part for word in [*caption_words, *general] for part in (word.lower(), *word.lower().split("-"))]
    return list(dict.fromkeys(word for word in words if word))


def lowercase_charsmap() -> bytes:
    """SentencePiece's precompiled normalizer for A..Z to a..z: a double-array trie and the strings it points to.

    Transformers rebuilds T5's tokenizer from its vocabulary and drops every normalizer but this kind. Array layout
    (darts-clone): bits 0-7 label, 8 has a leaf, 10-30 offset, 31 is a leaf. The root's children lie at 256 ^ label,
    each one's leaf 256 places on.
    """
    units = [0] * 1024
    units[0] = 256 << 10
    strings = b""
    for letter in range(ord("A"), ord("Z") + 1):
        at = 256 ^ letter
        units[at] = (768 << 10) | (1 << 8) | letter
        units[at ^ 768] = (1 << 31) | len(strings)
        strings += bytes([letter + 32]) + b"\0"
    trie = struct.pack(f"<{len(units)}I", *units)
    return struct.pack("<I", len(trie)) + trie + strings


def t5_vocabulary(words: Iterable[str]) -> list[tuple[str, float]]:
    """(piece, score) list for a Unigram model: reserved tokens, words, pieces, single characters."""
    pieces: dict[str, float] = dict.fromkeys(T5_RESERVED, 0.0)
    for word in words:
        pieces.setdefault("▁" + word if word[0].isalnum() else word, _WORD)
    for piece in PIECES:
        pieces.setdefault(piece, _PIECE)
    for code in [*range(0x21, 0x7F), *range(0xA1, 0x180)]:
        pieces.setdefault(chr(code), _LETTER)
    for letter in "▁–—‘’“”…":
        pieces.setdefault(letter, _LETTER)
    return list(pieces.items())


def build_t5(words: Iterable[str], folder: Path) -> None:
    """Write the T5 tokenizer's files to `folder`. Ids: 0 pad, 1 end, 2 unknown."""
    from transformers import T5TokenizerFast

    tokenizer = T5TokenizerFast(
        vocab=t5_vocabulary(words), extra_ids=0, _spm_precompiled_charsmap=lowercase_charsmap(), model_max_length=512
    )
    tokenizer.save_pretrained(folder)


def clip_vocabulary(words: Iterable[str], size: int = 3000) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Byte-level BPE learned on the words themselves, with enough merges that each becomes one token.

    Merges learned on a list cannot contradict each other, as merges written down word by word can.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    learner = Tokenizer(BPE(end_of_word_suffix="</w>"))
    learner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    plain = [word for word in words if word.isascii() and word.isalpha()]
    trainer = BpeTrainer(vocab_size=size, end_of_word_suffix="</w>", initial_alphabet=alphabet, show_progress=False)
    learner.train_from_iterator(plain, trainer)
    learned = json.loads(learner.to_str())["model"]
    vocabulary = {piece: i for i, piece in enumerate([*alphabet, *(letter + "</w>" for letter in alphabet)])}
    for piece in sorted(learned["vocab"], key=learned["vocab"].get):
        vocabulary.setdefault(piece, len(vocabulary))
    for special in ("<|startoftext|>", "<|endoftext|>"):
        vocabulary[special] = len(vocabulary)
    return vocabulary, [tuple(merge) for merge in learned["merges"]]


def build_clip(words: Iterable[str], folder: Path) -> None:
    """Write the CLIP tokenizer's files to `folder`; the end token pads, as in OpenAI's."""
    from transformers import CLIPTokenizer

    vocabulary, merges = clip_vocabulary(words)
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=CLIP_LENGTH)
    tokenizer.save_pretrained(folder)
    tokenizer.backend_tokenizer.model.save(str(folder))  # vocab.json and merges.txt, for older transformers


class Encoder:
    """Texts to padded rows of ids with `tokenizers` alone, as FluxPipeline's tokenizer calls give them."""

    def __init__(self, folder: Path, length: int, pad: str) -> None:
        self.tokenizer = Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(length)
        self.tokenizer.enable_padding(length=length, pad_token=pad, pad_id=self.tokenizer.token_to_id(pad))

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.get_vocab_size()

    def __call__(self, texts: list[str]):
        """(len(texts), length) int16 array."""
        import numpy as np

        return np.array([e.ids for e in self.tokenizer.encode_batch(texts)], dtype=np.int16)


def encoders(model: Path, t5_length: int) -> tuple[Encoder, Encoder]:
    """The CLIP and T5 encoders of a pipeline folder."""
    model = Path(model)
    return (
        Encoder(model / "tokenizer", CLIP_LENGTH, "<|endoftext|>"),
        Encoder(model / "tokenizer_2", t5_length, "<pad>"),
    )
