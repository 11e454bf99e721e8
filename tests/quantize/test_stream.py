"""Blocks that come and go give what the whole model gives, bit for bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine import ArgumentError, CheckpointError, Engine, ModelError, Request
from engine.models import loading
from engine.models.catalogue import resolve
from engine.models.families import family
from engine.models.plan import get_linear
from engine.quantize.calibrate import check_prompts, collect
from engine.quantize.lockstep import ask, run_together
from engine.quantize.source import Weights
from engine.quantize.streamed import StreamedModel
from tests.quantize.conftest import PROMPTS

CPU = torch.device("cpu")


def streamed(model: Path) -> StreamedModel:
    return StreamedModel(resolve(str(model)), CPU)


def test_a_block_holds_the_weights_of_the_whole_model_and_gives_them_back(model: Path):
    stream, spec = streamed(model), resolve(str(model))
    whole = family(spec.family).leaves.prepare(Engine.load(spec, "bf16", device="cpu").pipe.transformer).state_dict()
    seen = {}
    for block in stream.blocks:
        with stream.block(block) as module:
            seen |= {f"{block}.{name}": value.clone() for name, value in module.state_dict().items()}
        assert all(value.is_meta for value in stream.model.get_submodule(block).state_dict().values())
    seen |= stream.rest()
    assert seen.keys() == whole.keys()
    assert all(torch.equal(seen[name], whole[name]) and seen[name].dtype == whole[name].dtype for name in whole)


def test_a_cpu_without_bf16_reads_nearly_the_same_in_float32(model: Path, monkeypatch: pytest.MonkeyPatch):
    found = []
    for has in (True, False):
        monkeypatch.setattr(loading, "has_bf16_instructions", lambda _has=has: _has)
        stream, spec = streamed(model), resolve(str(model))
        seen = collect(stream, spec, check_prompts(spec, PROMPTS, 256, 2), CPU, lambda *_: None)
        found.append({group.title: read.rows for _, groups in seen for group, read in groups.items()})
    for name, exact in found[0].items():
        assert exact.dtype == found[1][name].dtype == torch.bfloat16
        assert float((found[1][name] - exact).float().norm() / exact.float().norm()) < 0.05, name


def test_calibration_reads_what_the_whole_model_reads(model: Path, monkeypatch: pytest.MonkeyPatch):
    """Rows and largest values, against a plain run of the pipeline with everything in memory."""
    monkeypatch.setattr(loading, "has_bf16_instructions", lambda: True)
    stream, spec = streamed(model), resolve(str(model))
    requests = check_prompts(spec, PROMPTS, 256, 2)
    found = {group.title: seen for _, groups in collect(stream, spec, requests, CPU, lambda *_: None)
             for group, seen in groups.items()}  # fmt: skip
    engine = Engine.load(spec, "bf16", device="cpu")
    whole = family(spec.family).leaves.prepare(engine.pipe.transformer)
    groups = family(spec.family).leaves.plan(whole)
    read: dict[str, list[torch.Tensor]] = {group.title: [] for group in groups}
    for group in groups:
        hook = lambda _, args, into=read[group.title]: into.append(args[0].reshape(-1, args[0].shape[-1]))  # noqa: E731
        get_linear(whole, group.names[0]).register_forward_pre_hook(hook)
    for seed, prompt in enumerate(PROMPTS):
        engine.run(Request(prompt, seed=seed, steps=2, width=256, height=256))
    assert found.keys() == read.keys()
    for name, calls in read.items():
        assert len(calls) == 5  # two pictures of two steps, and one step that comes before the first
        assert torch.equal(found[name].largest, torch.cat(calls).abs().amax(0).float()), name
        every = {tuple(row) for row in torch.cat(calls).tolist()}
        assert {tuple(row) for row in found[name].rows.tolist()} <= every, name
        assert torch.equal(found[name].rows[: len(calls[0][:1])], calls[0][:1]), name


def test_a_model_that_was_watched_is_as_before(model: Path):
    stream, spec = streamed(model), resolve(str(model))
    requests = check_prompts(spec, PROMPTS[:1], 256, 1)
    first, second = (
        [seen.rows for _, groups in collect(stream, spec, requests, CPU, lambda *_: None) for seen in groups.values()]
        for _ in range(2)
    )
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))
    assert "forward" not in vars(stream.model.get_submodule(stream.blocks[0]))


def test_tasks_meet_at_every_place_in_a_fixed_order():
    heard: list[tuple[int, list[int]]] = []
    answers: dict[int, list[str]] = {0: [], 1: [], 2: []}

    def work(number: int, rounds: int):
        def run() -> None:
            for _ in range(rounds):
                answers[number] += [ask(place, f"{number}@{place}") for place in (0, 1)]

        return run

    def serve(place: int, calls: list[tuple[int, str]]) -> list[str]:
        heard.append((place, [number for number, _ in calls]))
        return [text.upper() for _, text in calls]

    run_together([work(0, 2), work(1, 1), work(2, 1)], serve)
    assert heard == [(0, [0, 1, 2]), (1, [0, 1, 2]), (0, [0]), (1, [0])]
    assert answers == {0: ["0@0", "0@1"] * 2, 1: ["1@0", "1@1"], 2: ["2@0", "2@1"]}


@pytest.mark.parametrize("where", ["task", "serve"])
def test_an_error_ends_all_tasks(where: str):
    ended = []

    def work() -> None:
        try:
            ask(0, None)
        finally:
            ended.append(True)

    def broken() -> None:
        raise ZeroDivisionError(where)

    def serve(place: int, calls: list[tuple[int, None]]) -> list[None]:
        if where == "serve":
            raise ZeroDivisionError(where)
        return [None for _ in calls]

    with pytest.raises(ZeroDivisionError, match=where):
        run_together([work, work, broken] if where == "task" else [work, work], serve)
    assert len(ended) == 2


def copy_of(model: Path, folder: Path) -> Path:
    shutil.copytree(model, folder)
    return folder


def test_a_fingerprint_tells_models_apart_by_their_values(model: Path, tmp_path: Path):
    other = copy_of(model, tmp_path / "other")
    first = Weights(model / "transformer").fingerprint()
    assert Weights(other / "transformer").fingerprint() == first
    file = next((other / "transformer").glob("*.safetensors"))
    tensors = load_file(file)
    name = max(tensors, key=lambda name: tensors[name].numel())
    save_file({**tensors, name: tensors[name] * 1.01}, file)
    assert Weights(other / "transformer").fingerprint() != first


def test_a_folder_that_is_not_this_model_is_refused(model: Path, tmp_path: Path):
    other = copy_of(model, tmp_path / "other")
    file = next((other / "transformer").glob("*.safetensors"))
    config = other / "transformer" / "config.json"
    text = config.read_text()
    config.write_text(json.dumps({**json.loads(text), "num_layers": 2}))
    with pytest.raises(CheckpointError, match=r"missing \(transformer_blocks\.1"):
        streamed(other)
    config.write_text(json.dumps({**json.loads(text), "_class_name": "SD3Transformer2DModel"}))
    with pytest.raises(ModelError, match="holds a SD3Transformer2DModel, expected a FluxTransformer2DModel"):
        streamed(other)
    config.write_text(text)
    file.rename(file.with_suffix(".bin"))
    with pytest.raises(ModelError, match=r"expected diffusion_pytorch_model\.safetensors"):
        streamed(other)


def test_a_model_that_paints_from_pictures_cannot_be_calibrated_on_words():
    with pytest.raises(ArgumentError, match=r"calib: flux\.1-canny-dev is told by pictures"):
        check_prompts(resolve("canny"), PROMPTS)
    assert check_prompts(resolve("canny"), []) == []
