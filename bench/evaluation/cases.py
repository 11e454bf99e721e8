"""Requests for each small model of the zoo: held-out scenes, their captions, and what else the model starts from."""

from __future__ import annotations

from typing import Any

from PIL import Image
from torch import Tensor

from engine.errors import ArgumentError
from engine.request import Request

__all__ = ["MODELS", "requests"]

MODELS = ("tiny", "tiny-canny", "tiny-depth", "tiny-fill", "tiny-redux", "tiny-sketch", "tiny-sana")
_FIRST_NOISE = 1000  # as zoo/evaluate.py, whose captions and seeds these are
_SIDE = 256


def requests(model: str, count: int) -> list[Request]:
    """The first `count` held-out cases of `model`, each with a seed of its own; pictures are 256x256.

    Raises ArgumentError for a model that the zoo has no cases for.
    """
    if model not in MODELS:
        raise ArgumentError(f"models: expected some of {', '.join(MODELS)}, got {model!r}")
    prompts, inputs = _of(model.removeprefix("tiny-"), count)
    return [
        Request(prompt, seed=_FIRST_NOISE + i, inputs=given)
        for i, (prompt, given) in enumerate(zip(prompts, inputs, strict=True))
    ]


def _of(kind: str, count: int) -> tuple[list[str], list[dict[str, Any]]]:
    from zoo import control_cases, scenes
    from zoo.train import strokes

    if kind in ("canny", "depth"):
        cases = control_cases.control(kind, count, _SIDE, "cpu")
        return cases.prompts, [{"control_image": _picture(given)} for given in cases.given]
    if kind == "fill":
        cases = control_cases.fill(count, _SIDE, "cpu")
        assert cases.hole is not None
        pairs = zip(cases.given, cases.hole, strict=True)
        return cases.prompts, [
            {"image": _picture(given), "mask_image": Image.fromarray((hole * 255).byte().numpy())}
            for given, hole in pairs
        ]
    batch = scenes.sample(count, control_cases.SEED, "test")
    prompts = [caption.text for caption in scenes.describe(batch, control_cases.SEED)]
    if kind == "redux":
        return [""] * count, [{"images": [_picture(p)]} for p in control_cases.drawn(batch, _SIDE, "cpu").image]
    if kind == "sketch":
        pages = strokes.neat(strokes.find(batch, _SIDE, "cpu"))
        return prompts, [{"sketch": Image.fromarray(page.numpy()).convert("RGB")} for page in pages]
    return prompts, [{} for _ in prompts]


def _picture(pixels: Tensor) -> Image.Image:
    """A picture of (3, S, S) uint8."""
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
