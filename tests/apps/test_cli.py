"""The command line and the choice of model: teaches, refuses in one sentence, reaches no network."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from apps.common import cli, models
from apps.flux_t2i.run import APP
from engine import ArgumentError, ModelError
from engine.models import catalogue
from safety import SafetyError
from tests.apps.conftest import arguments

RUN = Path(__file__).resolve().parents[2] / "apps" / "flux_t2i" / "run.py"


def start(*flags: str, cwd: Path | None = None) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(RUN), *flags], cwd=cwd, capture_output=True, text=True, timeout=120)


def test_help_teaches_from_any_folder(tmp_path):
    done = start("--help", cwd=tmp_path)
    assert done.returncode == 0
    for words in ("--model schnell", "--precisions int4 bf16", "--safety qwen3guard", "gradio_client", "127.0.0.1"):
        assert words in done.stdout


def test_help_imports_neither_gradio_nor_torch():
    code = (
        "import sys; from apps.common import cli; from apps.flux_t2i.run import APP; cli.parser(APP).format_help();"
        "print([name for name in ('gradio', 'torch', 'diffusers', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=RUN.parents[2], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--model", "tinny"], "model: expected one of"),
        (["--model", "./nowhere"], "model: expected one of"),
        (["--precisions", "int3"], "Tiny FLUX has bf16, int4, nvfp4, got int3"),
        (["--precisions", "int4", "int4"], "expected each once"),
        (["--device", "tpu"], "device: expected auto, cpu or cuda"),
        (["--port", "99999"], "expected a port from 1 to 65535"),
        (["--port", "http"], "expected a port from 1 to 65535"),
        (["--max-queue", "0"], "expected a whole number above 0"),
        (["--safety", "none"], "invalid choice: 'none'"),
        (["--activation", "w2a2"], "invalid choice: 'w2a2'"),
        (["--safety", "qwen3guard", "--safety-path", "/nowhere"], "/nowhere"),
        (["--safety-images", "blur"], "invalid choice: 'blur'"),
        (["--colour", "red"], "unrecognized arguments"),
    ],
)
def test_a_bad_value_gives_one_sentence_and_exit_code_2(flags, words, capsys):
    try:
        status = cli.main(APP, ["--model", "tiny", *flags])
    except SystemExit as end:  # the parser's own way out
        status = end.code
    said = capsys.readouterr().err
    assert status == 2, said
    assert words in said
    assert "Traceback" not in said


def test_so_does_the_program():
    done = start("--model", "tiny", "--precisions", "int3")
    assert done.returncode == 2, done.stderr
    assert "Tiny FLUX has bf16, int4, nvfp4, got int3" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_defaults_are_private():
    args = arguments()
    assert (args.host, args.share, args.safety, args.model) == ("127.0.0.1", False, "words", "auto")


def test_precisions_default_to_all_and_keep_their_order(make_studio):
    assert make_studio().studio.pool.precisions == ("bf16", "int4")
    assert make_studio("--precisions", "int4", "bf16").studio.pool.precisions == ("int4", "bf16")


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        (("--precisions", "fp8"), ArgumentError),
        (("--model", "no"), ModelError),
        (("--device", "cuda:99"), ArgumentError),
    ],
)
def test_errors_are_our_own(flags, error):
    with pytest.raises(error):
        cli.open_studio(APP, arguments(*flags))


def test_a_checker_that_cannot_load_ends_the_start(tmp_path):
    flags = ("--model", "tiny", "--safety", "shieldgemma", "--safety-path", str(tmp_path))
    with pytest.raises(SafetyError):
        cli.open_studio(APP, arguments(*flags))


def never_asked() -> bool:
    raise AssertionError("CUDA was asked for needlessly")


def test_auto_takes_the_small_model_and_says_why(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    choice = models.choose("auto", APP.models, never_asked)
    assert choice.spec.name == "tiny"
    assert "not on this machine" in choice.reason


@pytest.fixture
def cached_schnell(monkeypatch, tmp_path) -> Path:
    """The files that a complete download of schnell leaves in the hub's cache, empty but for the listings."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    spec = catalogue.resolve("schnell")

    def snapshot(repository: str) -> Path:
        root = tmp_path / f"models--{repository.replace('/', '--')}"
        (root / "refs").mkdir(parents=True)
        (root / "refs" / "main").write_text("1" * 40)
        folder = root / "snapshots" / ("1" * 40)
        folder.mkdir(parents=True)
        return folder

    folder = snapshot(spec.source)
    listing = {
        "_class_name": "FluxPipeline",
        "transformer": ["diffusers", "FluxTransformer2DModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "image_encoder": [None, None],
    }
    (folder / "model_index.json").write_text(json.dumps(listing))
    (folder / "tokenizer").mkdir()
    (folder / "transformer").mkdir()
    (folder / "transformer" / "config.json").write_text("{}")
    shards = ["a-1-of-2.safetensors", "a-2-of-2.safetensors"]
    weights = {"weight_map": {f"w{i}": shard for i, shard in enumerate(shards)}}
    (folder / "transformer" / "a.safetensors.index.json").write_text(json.dumps(weights))
    for shard in shards:
        (folder / "transformer" / shard).touch()
    owner, name, file = spec.checkpoints["int4"].split("/", 2)
    (snapshot(f"{owner}/{name}") / file).touch()
    return folder


def test_auto_takes_a_large_model_that_is_here_with_a_gpu(cached_schnell):
    choice = models.choose("auto", APP.models, lambda: True)
    assert choice.spec.name == "flux.1-schnell"
    assert "CUDA device" in choice.reason


def test_auto_stays_small_without_a_gpu(cached_schnell):
    choice = models.choose("auto", APP.models, lambda: False)
    assert choice.spec.name == "tiny"
    assert "no CUDA device" in choice.reason


@pytest.mark.parametrize("lost", ["transformer/a-2-of-2.safetensors", "tokenizer", "model_index.json"])
def test_half_a_download_is_no_download(cached_schnell, lost):
    assert models.downloaded(catalogue.resolve("schnell"))
    path = cached_schnell / lost
    path.rmdir() if path.is_dir() else path.unlink()
    assert not models.downloaded(catalogue.resolve("schnell"))
    assert models.choose("auto", APP.models, never_asked).spec.name == "tiny"


def test_a_named_model_is_taken_at_its_word():
    assert models.choose("dev", APP.models, never_asked).spec.name == "flux.1-dev"
