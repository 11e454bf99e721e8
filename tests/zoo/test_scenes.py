"""The renderer: what it draws must agree with the scenes' own geometry."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from zoo import scenes
from zoo.scenes import geometry, lexicon, maps
from zoo.scenes.renderer import SKY_DEPTH
from zoo.scenes.scene import MIN_VISIBLE, is_held_out, object_set

SIZE = 64


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Small tensors gain nothing from threads, and lose much when tests share the processor."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def drawn() -> tuple[scenes.Scenes, scenes.Rendered]:
    batch = scenes.sample(10, seed=3)
    return batch, scenes.render(batch, SIZE)


def same(a: scenes.Scenes, b: scenes.Scenes) -> bool:
    pairs = [(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a)]
    return all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in pairs)


def sets(batch: scenes.Scenes):
    return object_set(*(t.numpy() for t in (batch.shape, batch.color, batch.size, batch.material, batch.count)))


def test_a_scene_depends_on_its_seed_and_number_alone():
    whole = scenes.sample(40, seed=5)
    assert same(whole[10:25], scenes.sample(15, seed=5, start=10))
    assert not torch.equal(whole.position, scenes.sample(40, seed=6).position)


def test_pictures_do_not_depend_on_the_batch(drawn):
    batch, pictures = drawn
    alone = scenes.render(batch[6:8], SIZE)
    assert torch.equal(alone.image, pictures.image[6:8])
    assert torch.equal(alone.depth, pictures.depth[6:8])


def test_the_splits_share_no_set_of_several_objects():
    train, test = scenes.sample(400, 1, "train"), scenes.sample(400, 1, "test")
    several = [set(sets(b[b.count > 1]).tolist()) for b in (train, test)]
    assert len(several[1]) > 150
    assert not several[0] & several[1]
    assert is_held_out(sets(test[test.count > 1])).all()


def test_every_kind_of_thing_occurs():
    batch = scenes.sample(500, 2)
    used = torch.arange(3)[None] < batch.count[:, None]
    for name, words in (("shape", 4), ("color", 8), ("size", 2), ("material", 2)):
        counts = torch.bincount(getattr(batch, name)[used], minlength=words)
        assert counts.min() > 0.65 * counts.float().mean(), name
    for name, words in (("floor", lexicon.FLOORS), ("sky", lexicon.SKIES), ("wall", lexicon.WALLS)):
        assert len(getattr(batch, name).unique()) == len(words)
    assert torch.bincount(batch.count)[1:].min() > 80


def test_objects_are_apart_in_view_and_in_the_picture():
    batch = scenes.sample(150, 4)
    s, box = geometry.solids(batch), geometry.boxes(batch)
    assert box[s.present].min() > 0
    assert box[s.present].max() < 1
    distance = ((s.x[:, :, None] - s.x[:, None]) ** 2 + (s.z[:, :, None] - s.z[:, None]) ** 2).sqrt()
    pairs = s.present[:, :, None] & s.present[:, None] & ~torch.eye(3, dtype=torch.bool)
    assert (distance > s.base[:, :, None] + s.base[:, None])[pairs].all()
    crowded = batch[batch.count == 3][:20]
    assert geometry.visibility(crowded, grid=40).min() > MIN_VISIBLE


def test_the_centre_of_an_object_in_front_lies_in_its_mask(drawn):
    batch, pictures = drawn
    places = geometry.project(batch, batch.position)
    checked = 0
    for b in range(len(batch)):
        nearest = int(places[b, : batch.count[b], 2].argmin())
        x, y = (int(v * SIZE) for v in places[b, nearest, :2])
        assert pictures.mask[b, y, x] == nearest
        assert pictures.depth[b, y, x] < places[b, nearest, 2]  # the surface lies before the centre
        checked += 1
    assert checked == 10


def test_masks_hold_the_objects_and_nothing_else(drawn):
    batch, pictures = drawn
    box = geometry.boxes(batch) * SIZE
    for b in range(len(batch)):
        assert set(pictures.mask[b].unique().tolist()) == {-1, *range(int(batch.count[b]))}
        for k in range(int(batch.count[b])):
            y, x = (pictures.mask[b] == k).nonzero().T
            left, top, right, bottom = box[b, k].tolist()
            assert left - 1 <= x.min() <= x.max() <= right
            assert top - 1 <= y.min() <= y.max() <= bottom


def test_depth_of_floor_wall_and_sky_is_exact(drawn):
    batch, pictures = drawn
    bottom = pictures.mask[:, SIZE - 1, 0]
    assert (bottom == -1).all()
    height, pitch, tan_half = batch.camera.unbind(1)
    up = (1 - (SIZE - 0.5) * 2 / SIZE) * tan_half
    floor = height / (pitch.sin() - up * pitch.cos())
    torch.testing.assert_close(pictures.depth[:, SIZE - 1, 0], floor)
    top = pictures.depth[:, 0, 0]
    rise = (1 - 1 / SIZE) * tan_half
    wall = batch.wall_z / (pitch.cos() + rise * pitch.sin())
    torch.testing.assert_close(top, torch.where(batch.walled, wall, SKY_DEPTH))


@pytest.mark.parametrize("shape", lexicon.SHAPES)
def test_a_solid_is_hit_where_its_formula_says(shape):
    batch = scenes.sample(48, 8)
    kind = lexicon.SHAPES.index(shape)
    batch = batch[(batch.count == 1) & (batch.shape[:, 0] == kind)][:2]
    assert len(batch)
    depth, mask, normal = scenes.geometry_maps(batch, 96)
    s = geometry.solids(batch)
    right, up = torch.meshgrid((torch.arange(96) + 0.5) / 48 - 1, 1 - (torch.arange(96) + 0.5) / 48, indexing="xy")
    origin, direction = geometry.camera_rays(geometry.camera(batch), right.reshape(-1), up.reshape(-1))
    at = [(o + d * depth.flatten(1)).view_as(depth) for o, d in zip(origin, direction, strict=True)]
    for b in range(len(batch)):
        on = mask[b] == 0
        base, height = s.base[b, 0], s.height[b, 0]
        x, y, z = at[0][b][on] - s.x[b, 0], at[1][b][on], at[2][b][on] - s.z[b, 0]
        x, z = s.cos[b, 0] * x + s.sin[b, 0] * z, s.cos[b, 0] * z - s.sin[b, 0] * x
        radius = (x**2 + z**2).sqrt()
        edge = {
            "sphere": (x**2 + (y - base) ** 2 + z**2).sqrt() - base,
            "cube": torch.stack([x.abs() - base, (y - height / 2).abs() - height / 2, z.abs() - base]).amax(0),
            "cylinder": torch.maximum(radius - base, y - height),
            "cone": radius - base * (1 - y / height),
        }[shape]
        assert on.sum() > 20
        assert edge.abs().max() < 2e-3
        torch.testing.assert_close(normal[b].norm(dim=0)[on], torch.ones(int(on.sum())))
        toward = sum(normal[b, i][on] * direction[i].view(len(batch), 96, 96)[b][on] for i in range(3))
        assert toward.max() < 1e-3  # every visible surface faces the camera


def test_a_shadow_falls_away_from_the_light():
    batch = scenes.sample(60, 9)
    batch = batch[(batch.count == 1) & (batch.pattern == 0) & (batch.light[:, 0].abs() > 0.5)][:3]
    image = scenes.render(batch, SIZE, oversample=1).image.float().mean(1)
    s = geometry.solids(batch)
    for b in range(len(batch)):
        step = 1.25 * s.base[b, 0] * batch.light[b, 0].sign()
        spots = torch.stack([torch.stack([s.x[b, 0] + sign * step, torch.zeros(()), s.z[b, 0]]) for sign in (1, -1)])
        (lit, dark) = geometry.project(batch[b : b + 1], spots[None])[0, :, :2].mul(SIZE).long().tolist()
        assert image[b, dark[1], dark[0]] < 0.92 * image[b, lit[1], lit[0]]


def test_pictures_use_the_whole_range_and_show_the_colours(drawn):
    batch, pictures = drawn
    assert pictures.image.float().std((1, 2, 3)).min() > 12
    for b in range(len(batch)):
        for k in range(int(batch.count[b])):
            name = lexicon.COLORS[int(batch.color[b, k])]
            red, green, blue = pictures.image[b].float()[:, pictures.mask[b] == k].mean(1).tolist()
            holds = {
                "red": red > 1.3 * max(green, blue),
                "green": green > max(red, blue),
                "blue": blue > max(red, green),
            }
            assert holds.get(name, True), (b, k, name)


def test_sketch_lines_follow_the_masks():
    batch = scenes.sample(12, 4)
    batch = batch[torch.cat([(~batch.walled).nonzero()[:2, 0], batch.walled.nonzero()[:1, 0]])]
    depth, mask, normal = scenes.geometry_maps(batch, 96)
    lines = maps.creases(depth, mask, normal)
    change = (mask[:, :, 1:] != mask[:, :, :-1]) & (lines[:, :, 1:] | lines[:, :, :-1])
    assert torch.equal(change, mask[:, :, 1:] != mask[:, :, :-1])
    other = (depth < SKY_DEPTH).float()[:, None]
    deep_in_the_sky = torch.nn.functional.max_pool2d(other, 5, stride=1, padding=2)[:, 0] == 0
    assert deep_in_the_sky.sum() > 100
    assert not lines[deep_in_the_sky].any()
    assert torch.equal(normal.norm(dim=1).round(decimals=4), torch.ones_like(depth))
    drawing = maps.sketch(batch, 96, width=2)
    assert drawing.shape == (3, 96, 96)
    assert 0.01 < (drawing < 128).float().mean() < 0.12


def test_canny_finds_edges_of_rendered_objects(drawn):
    edges = maps.canny(drawn[1].image)
    assert set(edges.unique().tolist()) == {0, 255}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: scenes.sample(3, 1, "valid"), "split must be"),
        (lambda: scenes.sample(-1, 1), "n and start"),
        (lambda: scenes.render(scenes.sample(1, 1), size=0), "size and oversample"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_no_scenes_give_no_pictures():
    nothing = scenes.render(scenes.sample(0, 1), SIZE)
    assert nothing.image.shape == (0, 3, SIZE, SIZE)
    assert nothing.mask.dtype == torch.int8
