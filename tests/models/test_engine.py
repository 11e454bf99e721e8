"""The small model that ships, run as a user runs it: through Engine, the commands and the doctor."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from engine import ArgumentError, Cancelled, Engine, ModelError, Request, RequestError
from engine.commands.generate import main as generate
from engine.doctor import examine
from engine.doctor import main as doctor
from engine.metrics import psnr
from engine.models.catalogue import CATALOGUE, resolve

PROMPT = "a large red metal sphere left of a small blue cube"
FAST = Request(PROMPT, seed=7, steps=3)


@pytest.fixture(scope="module")
def bf16() -> Engine:
    return Engine.load("tiny", "bf16", device="cpu")


@pytest.fixture(scope="module")
def int4(bf16: Engine) -> Engine:
    return Engine.load("tiny", "int4", device="cpu", share=bf16)


def test_both_precisions_paint_the_same_picture(bf16: Engine, int4: Engine):
    exact, close = bf16.run(FAST), int4.run(FAST)
    assert exact.image.size == close.image.size == (256, 256)
    assert np.asarray(exact.image).std() > 5
    assert 26 < psnr(exact.image, close.image) < 80


def test_the_same_seed_gives_the_same_bits_and_another_does_not(int4: Engine):
    first, again, other = int4.run(FAST), int4.run(FAST), int4.run(Request(PROMPT, seed=8, steps=3))
    assert first.image.tobytes() == again.image.tobytes()
    assert first.image.tobytes() != other.image.tobytes()


def test_bits_do_not_depend_on_what_ran_before(bf16: Engine, int4: Engine):
    before = int4.run(FAST)
    int4.run(Request("two cones", seed=1, steps=2, width=192, height=128))
    assert int4.run(FAST).image.tobytes() == before.image.tobytes()


def test_four_bit_activations_are_a_choice_of_the_run(bf16: Engine):
    engine = Engine.load("tiny", "int4", device="cpu", activation="w4a4", share=bf16)
    assert engine.run(FAST).activation == "w4a4"
    assert psnr(bf16.run(FAST).image, engine.run(FAST).image) > 22


def test_encoders_and_vae_are_shared(bf16: Engine, int4: Engine):
    assert int4.pipe.text_encoder_2 is bf16.pipe.text_encoder_2
    assert int4.pipe.vae is bf16.pipe.vae
    assert int4.pipe.scheduler is not bf16.pipe.scheduler


def test_a_result_says_what_it_cost(int4: Engine, bf16: Engine):
    result = int4.run(FAST)
    assert result.seconds == pytest.approx(sum(result.stages.values()))
    assert result.ms_per_step == pytest.approx(1000 * result.stages["denoise"] / 3)
    assert result.peak_bytes >= result.weight_bytes
    assert result.weight_bytes < 0.4 * bf16.weight_bytes
    assert result.backend == int4.backend
    assert json.dumps(result.settings() | result.measurements())


def test_steps_are_told_and_a_stop_stops(int4: Engine):
    seen: list[int] = []
    with pytest.raises(Cancelled):
        int4.run(Request(PROMPT, steps=9), on_step=lambda s: seen.append(s.index), should_stop=lambda: len(seen) == 2)
    assert seen == [1, 2]


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: Engine.load("tiny", "int3"), ArgumentError, "precision: expected one of bf16, int4"),
        (lambda: Engine.load("tiny", "int4", activation="w2a2"), ArgumentError, "activation: expected auto"),
        (lambda: Engine.load("tiny", "int4", device="tpu"), ArgumentError, "device: expected auto"),
        (lambda: Engine.load("tiny", "int4", device="cuda:99"), ArgumentError, "torch sees"),
        (lambda: Engine.load("no such model"), ModelError, "model: expected one of tiny"),
    ],
)
def test_wrong_arguments_are_named(call, error, says: str):
    with pytest.raises(error, match=says):
        call()


def test_sharing_between_models_is_refused(bf16: Engine):
    from dataclasses import replace

    with pytest.raises(ArgumentError, match="share: expected an engine of other"):
        Engine.load(replace(bf16.spec, name="other"), "bf16", share=bf16)


def test_a_wrong_request_is_refused_before_any_work(int4: Engine):
    with pytest.raises(RequestError, match="steps: expected"):
        int4.run(Request(PROMPT, steps=0))


def test_the_command_writes_the_same_files_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    files = []
    for folder in ("first", "second"):
        out = tmp_path / folder
        assert generate([PROMPT, "--seed", "7", "--steps", "2", "--out", str(out), "--json"]) == 0
        rows = json.loads(capsys.readouterr().out)
        assert [row["precision"] for row in rows] == ["bf16", "int4"]
        assert rows[1]["psnr_db"] > 26
        files.append({path.name: path.read_bytes() for path in sorted(out.iterdir())})
    assert len(files[0]) == 2
    assert files[0] == files[1]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([""], "prompt: expected a description"),
        (["x" * 10_000], "prompt: expected at most"),
        ([PROMPT, "--steps", "0"], "steps: expected a whole number"),
        ([PROMPT, "--width", "250"], "width: expected a whole number from 128 to 512, a multiple of 16"),
        ([PROMPT, "--precision", "int3"], "precision: expected one of"),
        ([PROMPT, "--model", "nothing"], "model: expected one of"),
    ],
)
def test_the_command_refuses_with_one_sentence(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    assert generate([*arguments, "--out", str(tmp_path), "--json"]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert says in error
    assert list(tmp_path.iterdir()) == []


def test_a_truncated_checkpoint_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    zoo = Path(CATALOGUE["tiny"].source).parent
    (tmp_path / "flux-tiny").mkdir()
    for part in (zoo / "flux-tiny").iterdir():
        (tmp_path / "flux-tiny" / part.name).symlink_to(part)
    shutil.copytree(zoo / "flux-tiny-int4", tmp_path / "flux-tiny-int4")
    shard = sorted((tmp_path / "flux-tiny-int4").glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-1000])
    assert (
        generate([PROMPT, "--model", str(tmp_path / "flux-tiny"), "--precision", "int4", "--out", str(tmp_path)]) == 2
    )
    assert "truncated" in capsys.readouterr().err.strip().splitlines()[-1]
    shutil.rmtree(tmp_path / "flux-tiny-int4")
    with pytest.raises(ArgumentError, match="expected one of bf16 for flux-tiny"):
        Engine.load(str(tmp_path / "flux-tiny"), "int4")


def test_the_doctor_explains_every_backend(capsys: pytest.CaptureFixture[str]):
    report = examine()
    cpu = report["devices"][0]
    assert cpu["chosen"] in {row["name"] for row in cpu["backends"] if row["runs"]}
    assert all(row["why"] for row in cpu["backends"])
    assert report["models"][0]["on_this_machine"] | {"nvfp4": None} == {"bf16": True, "int4": True, "nvfp4": None}
    made = report["models"][0]["made_when_asked_for"]
    assert (made == ["nvfp4"]) is not report["models"][0]["on_this_machine"]["nvfp4"]
    assert doctor([]) == 0
    assert cpu["chosen"] in capsys.readouterr().out


def test_engines_run_alike_at_any_thread_count(int4: Engine):
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        single = np.asarray(int4.run(FAST).image, dtype=int)
    finally:
        torch.set_num_threads(threads)
    # torch's own float sums may split differently; our kernels do not.
    assert np.abs(single - np.asarray(int4.run(FAST).image, dtype=int)).max() <= 3


def test_the_catalogue_knows_the_shipped_folder():
    assert resolve(CATALOGUE["tiny"].source).name == "tiny"


@pytest.mark.parametrize(
    ("model", "given"), [("tiny-depth", ["control_image"]), ("tiny-fill", ["image", "mask_image"])]
)
def test_pictures_are_encoded_where_the_processor_has_no_bf16(
    model: str, given: list[str], monkeypatch: pytest.MonkeyPatch
):
    from engine.models import loading

    monkeypatch.setattr(loading, "has_bf16_instructions", lambda: False)
    engine = Engine.load(model, "int4", device="cpu")
    assert engine.pipe.vae.dtype == torch.float32
    inputs = {name: Image.linear_gradient("L").convert("RGB") for name in given}
    assert engine.run(Request("a red cube", steps=1, inputs=inputs)).image.size == (256, 256)


@pytest.mark.parametrize("native", [True, False])
def test_the_vae_on_a_cpu_takes_the_format_the_processor_knows(native: bool, monkeypatch: pytest.MonkeyPatch):
    from engine.models import loading

    monkeypatch.setattr(loading, "has_bf16_instructions", lambda: native)
    vae = torch.nn.Conv2d(4, 4, 3, dtype=torch.bfloat16)
    loading.settle_vae_on_cpu(vae)
    assert vae.weight.dtype == (torch.bfloat16 if native else torch.float32)
    assert vae.weight.is_contiguous(memory_format=torch.channels_last) == native
