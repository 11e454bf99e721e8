"""A start from which a small T5 learns the order of words: heads that look at neighbours, from the first step on.

T5 knows where a word stands through one table alone, `relative_attention_bias`, added to the attention scores. It
starts near zero, and AdamW moves an entry by the learning rate a step at most: to single out one of 64 tokens it must
grow by several nats, which a minute of training never gives it. Until then the encoder reads a bag of words, and "a red
cube left of a blue sphere" is the same as "a blue cube left of a red sphere".
"""

from __future__ import annotations

import torch
from transformers import T5EncoderModel

_FAR = -6.0  # nats: e^6 tokens of the rest weigh as much as one that a head looks at
_FLAT = 1.0  # nats: a table without a larger value tells no order worth keeping
_SLOPE = 0.3  # nats a token, of the head that looks around itself


def table(buckets: int, heads: int, max_distance: int) -> torch.Tensor:
    """A bidirectional T5's bias: (buckets, heads), in nats.

    Heads take turns: at the word before, at the word after, around the word (as in ALiBi, arXiv 2108.12409), anywhere.
    The first half of the buckets is distances 0, 1, 2, ... back, the second half ahead; the upper half of each grows
    as a power, see T5Attention._relative_position_bucket.
    """
    side = buckets // 2
    exact = side // 2
    at = torch.arange(side, dtype=torch.float32)
    distance = torch.where(
        at < exact, at, exact * (max_distance / exact) ** ((at - exact).clamp(min=0) / (side - exact))
    )
    near, none = -(distance - 1).abs(), torch.full_like(distance, _FAR)
    itself = torch.where(at == 0, -1.0, none)
    around, anywhere = -_SLOPE * distance, torch.zeros_like(distance)
    kinds = ((near, none), (itself, near), (around, around), (anywhere, anywhere))
    columns = [torch.cat(kinds[head % len(kinds)]) for head in range(heads)]
    return torch.stack(columns, 1).clamp(min=_FAR)


@torch.no_grad()
def give_order(t5: T5EncoderModel) -> bool:
    """Start an encoder whose own table is still flat anew, with the table above; True if it was.

    Its other weights go too: those of a trained reader of bags outweigh the table, and learn slower than random ones.
    An encoder that has learned an order is left alone.
    """
    bias = _bias(t5)
    if float(bias.abs().max()) >= _FLAT:
        return False
    t5.load_state_dict(T5EncoderModel(t5.config).state_dict())
    config = t5.config
    bias.copy_(table(config.relative_attention_num_buckets, config.num_heads, config.relative_attention_max_distance))
    return True


def _bias(t5: T5EncoderModel) -> torch.Tensor:
    return t5.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
