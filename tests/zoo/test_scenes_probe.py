"""The probe learns, and the judge of the evaluation counts what it should."""

from __future__ import annotations

import json

import pytest
import torch

from zoo import evaluate, scenes
from zoo.probe import Detection, Probe, judge
from zoo.probe.augment import blocks, damage
from zoo.probe.data import build_pool, flipped, targets
from zoo.probe.judge import accuracy, rates, truth
from zoo.probe.model import CHANNELS, DEPTH_MIDDLE, DEPTH_SPREAD, WEIGHTS, Network, decode
from zoo.probe.train import fit
from zoo.scenes import Caption, Named

SIZE = 64


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Small tensors gain nothing from threads, and lose much when tests share the processor."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def batch() -> scenes.Scenes:
    return scenes.sample(8, seed=31)


@pytest.fixture(scope="module")
def pool(batch):
    return build_pool(batch, "cpu", size=SIZE)


def ideal_maps(pool) -> dict[str, torch.Tensor]:
    """The maps of a network that makes no mistake."""
    t = targets(pool)
    b, rows, columns = t.heat.shape
    maps = {name: torch.zeros(b, channels, rows * columns) for name, channels in CHANNELS.items()}
    maps["heat"] = torch.logit(t.heat.clamp(1e-4, 0.99))[:, None].flatten(2)
    for i in range(b):
        for k in t.present[i].nonzero().flatten().tolist():
            cell = t.cell[i, k]
            for name, values in t.attributes.items():
                maps[name][i, values[i, k], cell] = 9.0
            maps["offset"][i, :, cell], maps["depth"][i, 0, cell] = t.offset[i, k], t.depth[i, k]
    return {name: m.view(b, -1, rows, columns) for name, m in maps.items()}


def test_ideal_maps_decode_to_the_truth(batch):
    found = decode(ideal_maps(build_pool(batch, "cpu", size=256, oversample=1)))
    figures = accuracy(found, batch)
    assert {v for k, v in figures.items() if k != "pictures"} == {1.0}
    for real, seen in zip(truth(batch), found, strict=True):
        by_look = {(d.shape, d.color): d for d in seen}
        for d in real:
            match = by_look[d.shape, d.color]
            assert (match.x, match.y, match.depth) == pytest.approx((d.x, d.y, d.depth), abs=1e-3)


def test_a_perfect_detector_finds_every_caption_right():
    held = scenes.sample(300, 12, "test")
    assert rates(scenes.describe(held, 3), truth(held)) == {"objects": 1, "strict": 1, "relations": 1, "counted": 1}


def test_wrong_pictures_are_found_wrong():
    held = scenes.sample(60, 12, "test")
    figures = rates(scenes.describe(held, 3), truth(scenes.sample(60, 13, "test")))
    assert figures["objects"] < 0.2
    assert figures["relations"] < 0.2


def see(
    shape: str, color: str, x: float, depth: float = 8.0, size: str = "large", material: str = "matte"
) -> Detection:
    return Detection(shape, color, size, material, x, 0.5, depth, 0.9)


RED_LEFT_OF_BLUE = Caption("", (Named(0, "sphere", "red", "large"), Named(1, "cube", "blue")), ((0, "left", 1),))


@pytest.mark.parametrize(
    ("found", "objects", "strict", "relations", "counted"),
    [
        ([see("sphere", "red", 0.2), see("cube", "blue", 0.7)], True, True, (True,), True),
        ([see("sphere", "red", 0.7), see("cube", "blue", 0.2)], True, True, (False,), True),
        ([see("sphere", "red", 0.2, size="small"), see("cube", "blue", 0.7)], True, False, (True,), True),
        ([see("sphere", "blue", 0.2), see("cube", "red", 0.7)], False, False, (False,), True),
        ([see("sphere", "red", 0.2)], False, False, (False,), False),
        ([], False, False, (False,), False),
        # Of two red spheres the matching takes the one that makes the relation true.
        ([see("sphere", "red", 0.9), see("cube", "blue", 0.7), see("sphere", "red", 0.1)], True, True, (True,), False),
    ],
)
def test_judge(found, objects, strict, relations, counted):
    verdict = judge(RED_LEFT_OF_BLUE, found)
    assert (verdict.objects, verdict.strict, verdict.relations, verdict.counted) == (
        objects,
        strict,
        relations,
        counted,
    )


def test_one_detection_serves_one_object():
    twins = Caption("", (Named(0, "cube", "red"), Named(1, "cube", "red")))
    assert not judge(twins, [see("cube", "red", 0.3)]).objects
    assert judge(twins, [see("cube", "red", 0.3), see("cube", "red", 0.6)]).objects


def test_depth_decides_front_and_behind():
    caption = Caption("", (Named(0, "cube", "red"), Named(1, "cone", "blue")), ((0, "behind", 1), (1, "front", 0)))
    near, far = see("cone", "blue", 0.5, depth=7.0), see("cube", "red", 0.5, depth=9.0)
    assert judge(caption, [near, far]).relations == (True, True)
    wrong = [see("cone", "blue", 0.5, depth=9.0), see("cube", "red", 0.5, depth=7.0)]
    assert judge(caption, wrong).relations == (False, False)


def test_a_small_network_learns_a_few_pictures(pool):
    torch.manual_seed(0)
    network = Network(width=32, dilations=(1, 2))
    losses = fit(network, pool, steps=60, batch=8, rate=8e-3, augment=False, quiet=True)
    assert sum(losses[-5:]) < 0.45 * sum(losses[:5])
    with torch.inference_mode():
        maps = network(pool.images.float() / 255)
    t = targets(pool)
    scores = maps["heat"].sigmoid().flatten(2)[:, 0]
    on = scores.gather(1, t.cell)[t.present]
    assert on.mean() > 3 * scores.mean()


def test_targets_follow_a_mirrored_picture(pool):
    once, twice = flipped(pool), flipped(flipped(pool))
    assert torch.equal(twice.images, pool.images)
    torch.testing.assert_close(once.center[..., 0][once.present], 1 - pool.center[..., 0][pool.present])
    assert targets(pool).heat.amax((1, 2)).eq(1).all()
    assert (targets(pool).depth * DEPTH_SPREAD + DEPTH_MIDDLE)[pool.present].min() > 4


def test_damage_is_small_and_block_rounding_of_zero_changes_nothing(pool):
    images = pool.images.float() / 255
    torch.testing.assert_close(blocks(images, torch.zeros(len(images), 1, 1, 1)), images, atol=1e-3, rtol=0)
    changed = damage(images, torch.Generator().manual_seed(1))
    assert changed.min() >= 0
    assert changed.max() <= 1
    assert 0.005 < (changed - images).abs().mean() < 0.12


def test_a_saved_probe_says_the_same(tmp_path, pool):
    torch.manual_seed(1)
    probe = Probe(Network(), {"held_out": {"recall": 0.5}})
    probe.save(tmp_path)
    assert (tmp_path / WEIGHTS).stat().st_size < 3_000_000
    again = Probe.load(tmp_path)
    assert again.report == probe.report
    with torch.inference_mode():
        a, b = (p.network(pool.images[:2].float() / 255)["heat"] for p in (probe, again))
    torch.testing.assert_close(a, b, atol=0.02, rtol=0)


def test_a_missing_probe_and_a_wrong_picture_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"zoo\.probe\.train"):
        Probe.load(tmp_path)
    with pytest.raises(ValueError, match="uint8"):
        Probe(Network(32, (1,))).detect(torch.zeros(1, 3, 64, 64))


def test_evaluate_scores_ready_pictures(tmp_path, monkeypatch, capsys):
    """True renders, judged with the truth in the detector's place, get 100 %, and the files say so."""
    held = scenes.sample(4, evaluate.EVALUATION_SEED, "test")
    pictures = scenes.render(held, SIZE).image
    for name, shown in (("bf16", pictures), ("int4", (pictures.int() + 4).clamp(max=255).to(torch.uint8))):
        evaluate._save(tmp_path / "in" / name, shown)
    Probe(Network(32, (1,))).save(tmp_path / "probe")
    monkeypatch.setattr(Probe, "load", classmethod(lambda cls, *_: cls(Network(32, (1,)))))
    monkeypatch.setattr(Probe, "detect", lambda self, images: truth(held)[: len(images)])
    flags = ["--samples-from", str(tmp_path / "in"), "--count", "4", "--probe", "x", "--out", str(tmp_path / "out")]
    evaluate.main([*flags, "--device", "cpu", "--no-reference"])
    record = json.loads((tmp_path / "out" / "results.json").read_text())
    assert record["rows"]["int4"]["objects"] == 1
    assert record["rows"]["int4"]["psnr_mean"] == pytest.approx(36.1, abs=0.6)
    assert (tmp_path / "out" / "sheet-bf16.png").stat().st_size > 10_000
    assert "| int4 | 4 | 100.0 |" in (tmp_path / "out" / "RESULTS.md").read_text()
    assert "100.0" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"0004\.png is missing"):
        evaluate.main([*flags, "--device", "cpu", "--count", "5"])
