"""The start that gives T5 the order of words."""

from __future__ import annotations

import torch
from transformers import T5Config, T5EncoderModel

from zoo.train.positions import give_order, table


def encoder() -> T5EncoderModel:
    torch.manual_seed(0)
    return T5EncoderModel(T5Config(vocab_size=40, d_model=32, d_kv=16, d_ff=32, num_layers=2, num_heads=4)).eval()


def attention(t5: T5EncoderModel):
    return t5.encoder.block[0].layer[0].SelfAttention


def test_heads_look_at_the_word_before_and_after():
    t5 = encoder()
    assert give_order(t5)
    bias = attention(t5).compute_bias(12, 12)[0]  # (heads, query, key), through T5's own buckets
    assert bias[0, 1:].argmax(-1).tolist() == list(range(11))
    assert bias[1, :-1].argmax(-1).tolist() == list(range(1, 12))
    assert bias[2].argmax(-1).tolist() == list(range(12))
    assert not bias[3].any()
    assert bias.min() == -6


def test_an_encoder_of_bags_starts_anew_and_one_that_knows_order_stays():
    t5 = encoder()
    with torch.no_grad():
        attention(t5).q.weight.mul_(9)  # as a long training leaves it
    before = attention(t5).q.weight.clone()
    assert give_order(t5)
    assert attention(t5).q.weight.std() < before.std() / 4
    kept = {name: value.clone() for name, value in t5.state_dict().items()}
    assert not give_order(t5)
    assert all(torch.equal(value, kept[name]) for name, value in t5.state_dict().items())


def test_a_swap_of_words_is_seen_at_once():
    """States of the same bag in another order: nearly the same from T5's own start, far apart from this one."""
    one, other = torch.tensor([[5, 6, 9, 7, 8, 1]]), torch.tensor([[7, 6, 9, 5, 8, 1]])

    def gap(t5: T5EncoderModel) -> float:
        with torch.no_grad():
            a, b = t5(input_ids=one)[0][0, 1], t5(input_ids=other)[0][0, 1]  # of the word beside the swapped one
        return float((a - b).norm() / a.norm())

    t5 = encoder()
    plain = gap(t5)
    give_order(t5)
    assert gap(t5) > 3 * plain


def test_any_number_of_heads_and_buckets():
    assert table(32, 2, 128).shape == (32, 2)
    assert table(16, 6, 64).shape == (16, 6)
    assert torch.isfinite(table(16, 6, 64)).all()
