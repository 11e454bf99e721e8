"""The depth estimator: its losses, its disguises, and the folder that transformers opens without torchvision."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForDepthEstimation

from zoo.train import depth_estimator, disguise
from zoo.train.log import read
from zoo.train.maps import inverse_depth, rank_correlation

SMOKE = Path(depth_estimator.CONFIG).with_name("depth_smoke.json")
CONFIG = json.loads(SMOKE.read_text())["model"]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_shipped_size_is_small():
    model = depth_estimator.build(json.loads(Path(depth_estimator.CONFIG).read_text())["model"])
    assert sum(p.numel() for p in model.parameters()) < 1_050_000


def test_the_loss_forgives_scale_and_shift_alone():
    wanted = random(2, 32, 32)
    terms = depth_estimator.loss_terms(3 * wanted + 5, wanted)
    assert terms["aligned"] < 1e-3
    assert terms["edges"] < 1e-2
    assert terms["plain"] > 1
    other = depth_estimator.loss_terms(random(2, 32, 32, seed=1), wanted)
    assert other["aligned"] > 0.1
    upside_down = depth_estimator.loss_terms(1 - wanted, wanted)
    assert upside_down["aligned"] > 0.1


def test_rank_correlation_is_spearmans():
    # Worked by hand: ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4 give a covariance of 4.5 over sqrt(4.5 * 5).
    a, b = torch.tensor([[[1.0, 3.0], [3.0, 9.0]]]), torch.tensor([[[0.1, 0.2], [0.7, 0.9]]])
    assert float(rank_correlation(a, b)) == pytest.approx((4.5 / 5) ** 0.5)
    values = random(1, 20, 20, seed=4)
    assert float(rank_correlation(values, values**3)) == pytest.approx(1)
    assert float(rank_correlation(values, -values)) == pytest.approx(-1)
    assert abs(float(rank_correlation(values, random(1, 20, 20, seed=5)))) < 0.2


def test_inverse_depth_spans_zero_to_one_in_each_picture():
    depth = random(3, 16, 16) * 20 + 2
    found = inverse_depth(depth)
    assert found.amin((1, 2)).tolist() == [0, 0, 0]
    assert found.amax((1, 2)).tolist() == pytest.approx([1, 1, 1])
    assert torch.equal(found.flatten(1).argmax(1), depth.flatten(1).argmin(1))


def test_disguises_stay_pictures():
    x = random(8, 3, 32, 32)
    for seed in range(5):
        made = disguise.disguise(x, torch.Generator().manual_seed(seed), drawings=0.3)
        assert made.shape == x.shape
        assert torch.isfinite(made).all()
        assert float(made.min()) >= 0
        assert float(made.max()) <= 1
        assert not torch.equal(made, x)


def test_depth_moves_with_its_picture():
    depth = random(6, 32, 32) * 10 + 3
    picture = (depth / 13)[:, None].expand(-1, 3, -1, -1)
    x, moved = disguise.move(picture, depth, torch.Generator().manual_seed(1))
    gap = (x[:, 0] - moved / 13).abs()  # bilinear against nearest
    assert float(gap.mean()) < 0.12
    assert float((x[:, 0] - picture[:, 0]).abs().mean()) > float(gap.mean())


def test_one_picture_can_be_learnt():
    torch.manual_seed(0)
    model = depth_estimator.build({**CONFIG, "size": 32})
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    x, wanted = random(1, 3, 32, 32), torch.linspace(0, 1, 32).view(1, 32, 1).expand(1, 32, 32)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        terms = depth_estimator.loss_terms(model(x * 2 - 1).predicted_depth, wanted)
        loss = terms["aligned"] + 0.25 * terms["edges"] + 0.1 * terms["plain"]
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.slow
def test_the_driver_writes_a_folder_that_transformers_opens(tmp_path):
    depth_estimator.main(
        ["--out", str(tmp_path), "--minutes", "5", "--config", str(SMOKE), "--max-steps", "2", "--device", "cpu"]
    )
    assert read(tmp_path / "logs" / "log.jsonl")[-1]["stage"] == "done"
    assert (tmp_path / "samples" / "depth-tiny.jpg").is_file()
    assert not list(tmp_path.glob("tokenizers*"))
    processor = AutoImageProcessor.from_pretrained(tmp_path / "depth-tiny")
    model = AutoModelForDepthEstimation.from_pretrained(tmp_path / "depth-tiny")
    assert next(model.parameters()).dtype == torch.float32
    for size in ((64, 64), (120, 80)):
        inputs = processor(images=Image.new("RGB", size, "red"), return_tensors="pt")
        with torch.no_grad():
            output = model(**inputs)
        depth = processor.post_process_depth_estimation(output, target_sizes=[size[::-1]])[0]["predicted_depth"]
        assert depth.shape == size[::-1]
        assert torch.isfinite(depth).all()
