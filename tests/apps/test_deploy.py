"""A Space from a checkout: what is in its folder, what is refused, and how long a GPU is asked for."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import huggingface_hub
import pytest
from packaging.requirements import Requirement

from apps.common import cli
from apps.deploy import folder, upload, zero
from apps.deploy import plan as planning
from apps.deploy.__main__ import main
from apps.deploy.plan import DeployError, Plan, plan
from engine import Request
from engine.models import catalogue

TINY = catalogue.resolve("tiny")
PINS = folder.pins()
WHEEL = "nibble_studio-0.1.0-cp312-cp312-linux_x86_64.whl"
SCENE = "a large red metal sphere left of a small blue cube"


def stub(where: Path, cuda: bool) -> Path:
    (where / WHEEL).write_bytes(b"")
    return where / WHEEL


@pytest.fixture
def python_312(monkeypatch):
    """The command as Python 3.12 would run it, which ZeroGPU asks for."""
    monkeypatch.setattr(planning, "_running", lambda: "3.12")


@pytest.fixture(scope="module", params=planning.apps())
def space(request, tmp_path_factory) -> tuple[Plan, Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "_running", lambda: "3.12")
        made = plan(request.param, "me/nibble")
    return made, folder.write(made, tmp_path_factory.mktemp(request.param) / "space", stub)


def test_the_folder_is_whole(space):
    made, where = space
    named = {path.name for path in where.iterdir()}
    assert named == {"README.md", "requirements.txt", "app.py", ".gitattributes", "weights", WHEEL}
    files = [path for path in where.rglob("*") if path.is_file()]
    assert not any(path.is_symlink() for path in where.rglob("*"))  # the hub has none
    # The app's own small models find all they need there.
    held = {path.name for path in (where / "weights").iterdir()}
    for name in made.app.models:
        row = catalogue.resolve(name)
        if row.ships:
            places = [row.source, row.checkpoints["int4"], row.lora, row.prior]
            assert {Path(place).relative_to(catalogue.zoo_folder()).parts[0] for place in places if place} <= held
    assert sum(path.stat().st_size for path in files) > 2**20
    assert where.stat().st_mode & 0o777 == 0o755


def test_the_head_of_the_readme_is_what_the_hub_asks_for(space):
    made, where = space
    head = huggingface_hub.metadata_load(where / "README.md") or {}
    assert head["sdk"] == "gradio"
    assert (head["sdk_version"], head["python_version"]) == (PINS["gradio"], "3.12")
    assert (where / str(head["app_file"])).is_file()
    assert made.app.title in head["title"]
    assert len(head["short_description"]) <= 60
    assert {head["colorFrom"], head["colorTo"]} <= {
        "red",
        "yellow",
        "green",
        "blue",
        "indigo",
        "purple",
        "pink",
        "gray",
    }
    assert head["license"] == "apache-2.0"
    assert "models" not in head  # its weights are in the folder


def test_the_app_file_starts_the_app_with_a_hosts_flags(space):
    made, where = space
    text = (where / "app.py").read_text(encoding="utf-8")
    ast.parse(text)
    assert f"from apps.{made.app.slug}.run import APP" in text
    assert WHEEL in text
    assert text.index("import spaces") < text.index("from apps.")
    args = cli.parser(made.app).parse_args(json.loads(re.findall(r"main\(APP, (\[.*\])\)", text)[0]))
    assert (args.host, args.share, args.model) == ("0.0.0.0", False, made.spec.name)
    assert tuple(args.precisions) == made.precisions


def test_only_the_checkpoints_of_its_columns_go_along_and_nvfp4_is_made_there(python_312):
    def held(*precisions: str) -> set[str]:
        return {path.name for path in plan("flux_t2i", "me/nibble", precisions=precisions).weights}

    zoo = catalogue.zoo_folder()
    assert held("bf16") == {"flux-tiny"}
    assert held("bf16", "int4-w4a4") == {"flux-tiny", "flux-tiny-int4"}
    ships = {"flux-tiny-nvfp4"} if (zoo / "flux-tiny-nvfp4").exists() else set()
    assert held("bf16", "nvfp4") == {"flux-tiny"} | ships


@pytest.mark.parametrize(("hardware", "version"), [("zero-gpu", "2.11.0"), ("cpu-basic", PINS["torch"])])
def test_requirements_are_pins_that_the_host_accepts(python_312, hardware, version):
    text = folder.requirements(plan("flux_t2i", "me/nibble", hardware=hardware))
    lines = [line for line in text.splitlines() if not line.startswith("--extra-index-url")]
    wanted = {Requirement(line).name: str(Requirement(line).specifier) for line in lines}
    assert wanted == {name: f"=={PINS[name]}" for name in wanted} | {"torch": f"=={version}"}
    assert not {"gradio", "spaces", "huggingface_hub", "nibble-studio"} & set(wanted)
    assert ("download.pytorch.org/whl/cpu" in text) == (hardware == "cpu-basic")


def test_a_large_model_is_named_and_fetched_there(python_312, tmp_path):
    made = plan("redux", "me/nibble", model="redux", precisions=["int4"])
    where = folder.write(made, tmp_path / "space", stub)
    head = huggingface_hub.metadata_load(where / "README.md") or {}
    assert head["models"] == [
        "black-forest-labs/FLUX.1-dev", "nunchaku-tech/nunchaku-flux.1-dev", "black-forest-labs/FLUX.1-Redux-dev"
    ]  # fmt: skip
    assert head["startup_duration_timeout"] == "1h"
    assert "HF_TOKEN" in (where / "README.md").read_text(encoding="utf-8")
    assert not (where / "weights").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["flux", "--space", "me/x"], "app: expected one of depth_canny"),
        (["flux_t2i", "--space", "nibble"], "space: expected OWNER/NAME as in the Space's address, got 'nibble'"),
        (["flux_t2i", "--space", "me/x/y"], "space: expected OWNER/NAME"),
        (["flux_t2i", "--space", "me/x", "--model", "tinny"], "model: expected one of"),
        (
            ["flux_t2i", "--space", "me/x", "--precisions", "int3"],
            "precisions: Tiny FLUX has bf16, int4, nvfp4, got int3",
        ),
        (["flux_t2i", "--space", "me/x", "--hardware", "tpu"], "hardware: expected one of zero-gpu, cpu-basic"),
        (["flux_t2i", "--space", "me/x", "--python", "3.11"], "python: expected 3.12 on zero-gpu, got 3.11"),
        (["flux_t2i", "--space", "me/x", "--dry-run", "."], "dry-run: expected a folder that is empty"),
        (["flux_t2i", "--space", "me/x", "--hardware", "cpu-basic", "--python", "3.13"], "built by Python 3.13"),
    ],
)
def test_a_bad_value_gives_one_sentence_and_exit_code_2(python_312, capsys, flags, words):
    assert main(flags) == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1


def test_another_python_is_told_what_to_do(monkeypatch):
    monkeypatch.setattr(planning, "_running", lambda: "3.11")
    with pytest.raises(ValueError, match=r"environment of python3\.12 .* --hardware cpu-basic, which takes 3\.11"):
        plan("flux_t2i", "me/nibble")
    assert plan("flux_t2i", "me/nibble", hardware="cpu-basic").python == "3.11"


def test_a_folder_of_this_machine_is_no_model_for_a_space(python_312, tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(DeployError, match="upload it to the hub and give its id"):
        plan("flux_t2i", "me/nibble", model=str(tmp_path))


def test_nothing_half_written_stays(python_312, tmp_path):
    def fails(where: Path, cuda: bool) -> Path:
        stub(where, cuda)
        raise DeployError("wheel: no compiler")

    with pytest.raises(DeployError, match="no compiler"):
        folder.write(plan("fill", "me/nibble"), tmp_path / "space", fails)
    assert list(tmp_path.iterdir()) == []


class Hub:
    """Takes down what is asked of it; refuses when told to."""

    def __init__(self, error: Exception | None = None) -> None:
        self.asked: list[tuple[str, dict]] = []
        self.error = error

    def __getattr__(self, name: str):
        def call(*args, **named):
            self.asked.append((name, dict(enumerate(args)) | named))
            if self.error is not None:
                raise self.error
            return "https://hub/spaces/me/nibble"

        return call


def test_upload_makes_the_space_and_asks_for_its_hardware(python_312, monkeypatch, tmp_path):
    hub = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    assert upload.upload(plan("flux_t2i", "me/nibble", private=True), tmp_path) == "https://hub/spaces/me/nibble"
    made, sent, hardware = hub.asked
    assert made[0] == "create_repo"
    assert {"repo_type": "space", "space_sdk": "gradio", "private": True, "exist_ok": True}.items() <= made[1].items()
    assert (sent[0], sent[1]["folder_path"], sent[1]["repo_type"]) == ("upload_folder", tmp_path, "space")
    assert (hardware[0], hardware[1][1].value) == ("request_space_hardware", "zero-a10g")


def test_an_upload_that_the_hub_refuses_is_one_sentence(python_312, monkeypatch, tmp_path):
    refusal = huggingface_hub.errors.LocalTokenNotFoundError("no token")
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: Hub(refusal))
    with pytest.raises(DeployError, match="hf auth login"):
        upload.upload(plan("flux_t2i", "me/nibble"), tmp_path)


def request(**values) -> Request:
    return Request(SCENE, **values).resolved(TINY)


def test_the_gpu_is_asked_for_as_long_as_the_request_takes():
    dev = catalogue.resolve("dev")
    large = Request(SCENE).resolved(dev)
    least = zero.seconds(TINY, request(), ["int4"])
    assert 5 < least < 15
    assert (
        least
        < zero.seconds(TINY, request(steps=50), ["int4"])
        < zero.seconds(TINY, request(steps=50), ["int4", "bf16"])
    )
    assert zero.seconds(dev, large, ["bf16"]) > 30
    wide = Request(SCENE, width=2048, height=2048).resolved(dev)
    assert zero.seconds(dev, wide, ["bf16"]) > 3 * zero.seconds(dev, large, ["bf16"])
