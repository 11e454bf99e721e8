"""The small SANA's text: tokenizer files, ids as SanaPipeline makes them, and the Gemma-2 encoder.

SanaPipeline puts a long English instruction before every prompt and then keeps the first token and the last ones.
Here that instruction is one added token, so it costs one place and can be learned; prompts without it work as well.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from zoo.train.vocab import vocabulary_words
from zoo.train.words import PIECES

if TYPE_CHECKING:
    from transformers import Gemma2Model

PAD, EOS, BOS, UNKNOWN, MASK = range(5)
_SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")
SPACE = "▁"


def instruction() -> str:
    """The text that SanaPipeline's default puts before a prompt."""
    from diffusers import SanaPipeline

    lines = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
    return "\n".join(lines)


def bpe(caption_words: Iterable[str], limit: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges that make a caption's words one token each, at a text's start and inside it.

    General English gets a token a word as far as `limit` pieces allow, inside a text alone; the rest falls into pieces,
    letters and bytes. Merges come from a learner run on the words, so they cannot contradict each other.
    """
    captions = list(dict.fromkeys(word.lower() for word in caption_words if word.isalpha()))
    general = [word for word in vocabulary_words(captions) if word.isascii() and word.isalpha()]
    forms = [SPACE + word for word in general] + captions + [piece for piece in PIECES if piece.isalpha()]
    alphabet = [SPACE, "\n", *map(chr, range(0x21, 0x7F))]
    learner = Tokenizer(BPE())
    # A form's weight decides what is learned first: the captions' words must all fit.
    known = set(captions)
    weighted = [form for form in forms for _ in range(8 if form.lstrip(SPACE) in known else 1)]
    base = len(_SPECIAL) + 256
    trainer = BpeTrainer(vocab_size=limit - base - 1, initial_alphabet=alphabet, show_progress=False)
    learner.train_from_iterator(weighted, trainer)
    learned = json.loads(learner.to_str())["model"]
    vocabulary = {token: i for i, token in enumerate(_SPECIAL)}
    vocabulary |= {f"<0x{byte:02X}>": len(_SPECIAL) + byte for byte in range(256)}
    for piece in sorted(learned["vocab"], key=learned["vocab"].get):
        vocabulary.setdefault(piece, len(vocabulary))
    return vocabulary, [tuple(merge) for merge in learned["merges"]]


def build_tokenizer(caption_words: Iterable[str], folder: Path, limit: int = 2048) -> None:
    """Write the files of a GemmaTokenizer(Fast) to `folder`."""
    from transformers import AddedToken, GemmaTokenizerFast

    vocabulary, merges = bpe(caption_words, limit)
    tokenizer = GemmaTokenizerFast(vocab=vocabulary, merges=merges, add_bos_token=True, model_max_length=300)
    tokenizer.add_tokens([AddedToken(instruction(), normalized=False, lstrip=False, rstrip=False, special=False)])
    tokenizer.save_pretrained(folder)


class Encoder:
    """Texts to padded rows of ids, the very rows that SanaPipeline's tokenizer call gives."""

    def __init__(self, folder: Path, length: int) -> None:
        self.tokenizer = Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(length)
        self.tokenizer.enable_padding(length=length, pad_token=_SPECIAL[PAD], pad_id=PAD, direction="right")

    @property
    def instruction(self) -> int:
        """Id of the pipeline's instruction."""
        return self.tokenizer.token_to_id(instruction())

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.get_vocab_size()

    def __call__(self, texts: list[str]) -> np.ndarray:
        """(len(texts), length) int16: begin, the text's tokens, padding. No instruction."""
        rows = self.tokenizer.encode_batch([text.lower().strip() for text in texts])
        return np.array([row.ids for row in rows], dtype=np.int16)


def build_encoder(config: dict, vocab_size: int) -> Gemma2Model:
    """A Gemma-2 of the given sizes with random weights; attention sees the whole prompt in every layer."""
    from transformers import Gemma2Config, Gemma2Model

    layers = config["num_hidden_layers"]
    return Gemma2Model(Gemma2Config(
        vocab_size=vocab_size, max_position_embeddings=2048, sliding_window=2048,
        layer_types=["full_attention"] * layers,
        query_pre_attn_scalar=config["head_dim"], attn_logit_softcapping=None, final_logit_softcapping=None,
        pad_token_id=PAD, eos_token_id=EOS, bos_token_id=BOS, use_cache=False, initializer_range=0.05, **config,
    ))  # fmt: skip
