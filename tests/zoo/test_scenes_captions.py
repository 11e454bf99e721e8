"""Captions say only what is true of their scene, in words of the vocabulary."""

from __future__ import annotations

import random
import re

import pytest
import torch

from zoo import scenes
from zoo.scenes import geometry, lexicon

SYNONYMS = {
    "shape": dict(zip(lexicon.SHAPES, lexicon.SHAPE_WORDS, strict=True)),
    "color": dict(zip(lexicon.COLORS, lexicon.COLOR_WORDS, strict=True)),
    "size": dict(zip(lexicon.SIZES, lexicon.SIZE_WORDS, strict=True)),
    "material": dict(zip(lexicon.MATERIALS, lexicon.MATERIAL_WORDS, strict=True)),
}
PLURAL = {1: ("one", "single"), 2: ("two",), 3: ("three",)}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Small tensors gain nothing from threads, and lose much when tests share the processor."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def described() -> tuple[scenes.Scenes, list[scenes.Caption]]:
    batch = scenes.sample(400, seed=21)
    return batch, scenes.describe(batch, seed=1)


def test_named_attributes_are_the_scene_s(described):
    batch, captions = described
    for b, caption in enumerate(captions):
        assert sorted(n.slot for n in caption.objects) == list(range(int(batch.count[b])))
        for named in caption.objects:
            for name, words in (("shape", lexicon.SHAPES), ("color", lexicon.COLORS), ("size", lexicon.SIZES)):
                assert getattr(named, name) in (None, words[int(getattr(batch, name)[b, named.slot])])
            assert named.material in (None, lexicon.MATERIALS[int(batch.material[b, named.slot])])


def test_the_text_says_each_named_attribute_and_no_other(described):
    """Read the nouns off the text: in order they are the named objects, with their very attributes."""
    for caption in described[1]:
        nouns = _objects(caption.text)
        mentioned = [{k: getattr(n, k) for k in SYNONYMS if getattr(n, k)} for n in caption.objects]
        for each in mentioned:
            assert any(each == noun for noun in nouns), caption
        for noun in nouns:  # a second mention ("the red cube") may hold fewer attributes
            assert any(noun.items() <= each.items() for each in mentioned), caption


def _objects(text: str) -> list[dict[str, str]]:
    meaning = {w: (kind, name) for kind, table in SYNONYMS.items() for name, ws in table.items() for w in ws}
    found = []
    place = r"(?:on|under|against|in front of) an? (?:[a-z-]+ ){1,2}(?:floor|ground|sky|wall)"
    bare = re.sub(place, "", text)
    for phrase in re.split(r"\b(?:an?|the)\b|[,.;:]", bare):
        attributes = dict(meaning[w] for w in lexicon.words(phrase) if w in meaning)
        if "shape" in attributes:
            found.append(attributes)
    return found


def test_stated_relations_hold_without_doubt(described):
    batch, captions = described
    holds, places = geometry.relations(batch), geometry.project(batch, batch.position)
    stated = {name: 0 for name in scenes.RELATIONS}
    for b, caption in enumerate(captions):
        for i, relation, j in caption.relations:
            stated[relation] += 1
            i, j = caption.objects[i].slot, caption.objects[j].slot
            assert holds[b, i, j, scenes.RELATIONS.index(relation)]
            shift = float(places[b, i, 0] - places[b, j, 0])
            away = float(places[b, i, 2] - places[b, j, 2])
            assert {"left": -shift, "right": shift}.get(relation, 1) >= 0.09
            assert {"front": -away, "behind": away}.get(relation, 1) >= 0.8
    assert min(stated.values()) > 30


def test_relation_words_agree_with_the_relations(described):
    """Where a text has one relation word between two objects, the stated relation is that word's."""
    checked = 0
    for caption in described[1]:
        match = re.match(r"^an? [a-z -]+? (?:is )?(left of|right of|behind|in front of) an? [a-z -]+$", caption.text)
        if match and len(caption.objects) == 2 and not re.search("wall|floor|sky|ground", caption.text):
            word = {"left of": "left", "right of": "right", "in front of": "front"}.get(match[1], match[1])
            assert caption.relations == ((0, word, 1),)
            checked += 1
    assert checked > 20


def test_counts_and_surroundings_are_true(described):
    batch, captions = described
    for b, caption in enumerate(captions):
        words = lexicon.words(caption.text)
        for count, names in PLURAL.items():
            if (any(name in words for name in names) and "objects" in words) or "single" in words:
                assert (int(batch.count[b]) == count) == any(name in words for name in names)
        for noun, table, value, there in (
            ("(?:floor|ground)", lexicon.FLOOR_WORDS, batch.floor, True),
            ("sky", lexicon.SKY_WORDS, batch.sky, not bool(batch.walled[b])),
            ("wall", lexicon.WALL_WORDS, batch.wall, bool(batch.walled[b])),
        ):
            said = re.search(rf"\ban? ([a-z -]+?) {noun}\b", caption.text)
            if said:
                assert there
                color = said[1].split(" a ")[-1].split(" an ")[-1].replace("checkered", "").strip()
                assert color in ("", *table[int(value[b])]), caption.text
        if "checkered" in words:
            assert batch.pattern[b] == 1


def test_words_are_in_the_vocabulary_and_prompts_of_users_are_too(described):
    known = set(scenes.vocabulary())
    prompts = ["a large red metal sphere left of a small blue cube", "a red cube", "red cube"]
    for text in [*scenes.captions(described[0], 5), *prompts]:
        assert set(lexicon.words(text)) <= known


def test_the_plain_form_is_frequent(described):
    texts = [c.text for c in described[1]]
    plain = r"^an? (?:large|small) \w+ (?:metal|matte) \w+ (?:left|right) of an? (?:large|small) \w+ \w+"
    assert any(re.match(plain, t) for t in texts)
    assert any(re.match(r"^an? \w+ (?:sphere|cube|cylinder|cone)$", t) for t in texts)
    assert len(set(texts)) > 0.9 * len(texts)


def test_a_caption_depends_on_its_scene_and_seed_alone(described):
    batch, captions = described
    assert scenes.describe(batch[50:60], seed=1) == captions[50:60]
    assert scenes.captions(batch[:50], seed=2) != [c.text for c in captions[:50]]
    assert scenes.caption(batch, 7, random.Random(3)) == scenes.caption(batch, 7, random.Random(3))
