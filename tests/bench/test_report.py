"""The quality report, made for the small model and opened as a reader would open it."""

from __future__ import annotations

import dataclasses
import html.parser
import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from engine import CheckpointError, Engine, graphs, read_metadata
from engine.commands.report import main
from engine.errors import ArgumentError
from engine.metrics import psnr
from engine.models.catalogue import resolve
from engine.quantize.naive import naive_error
from engine.quantize.records import FILE_NAME, LayerRecord, read_records, records_path, write_records
from engine.quantize.report import Report, write_report
from engine.quantize.report_advice import advise, put_back, role

PROMPTS = ["a large red metal sphere left of a small blue cube", "two <b>cones</b> & a cube"]


def record(name: str, error: float, n: int = 64, k: int = 64) -> LayerRecord:
    return LayerRecord(name, "svdq", (n, k), 2 * error, error, 3 * error, 0.1, (name,))


@pytest.fixture(scope="module")
def made(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report]:
    out = tmp_path_factory.mktemp("report") / "out"
    report = write_report(
        out, model="tiny", checkpoint=checkpoint, prompts=PROMPTS, steps=2, activations=("w4a8", "w4a4"), device="cpu"
    )
    return out, report


def test_every_layer_is_measured_and_every_stage_pays(made: tuple[Path, Report]):
    _, report = made
    assert len(report.layers) > 10
    for layer in report.layers:
        assert layer.error_w4a4 is not None
        assert layer.error_w4a8 is not None
        assert layer.naive_error is not None
        assert 0 < layer.error_w4a8 <= layer.error_w4a4 < 0.5
    ours = sum(layer.error_w4a4 or 0 for layer in report.layers)
    assert ours < 0.8 * sum(layer.naive_error or 0 for layer in report.layers)


def test_pictures_are_kept_and_their_figures_are_theirs(made: tuple[Path, Report]):
    out, report = made
    exact, close = report.columns[:2]
    assert [column.label for column in report.columns] == ["BF16", "INT4 W4A8", "INT4 W4A4"]
    for before, after in zip(exact.pictures, close.pictures, strict=True):
        files = [out / "pictures" / picture.file for picture in (before, after)]
        assert after.psnr == pytest.approx(psnr(*map(Image.open, files)))
        assert (read_metadata(files[1]) or {})["seed"] == (read_metadata(files[0]) or {})["seed"] == after.seed
    assert (close.mean("psnr") or 0) > (report.columns[2].mean("psnr") or 0) > 20


def test_json_holds_what_the_report_holds(made: tuple[Path, Report]):
    out, report = made
    assert json.loads((out / "report.json").read_text()) == json.loads(json.dumps(dataclasses.asdict(report)))
    assert report.bytes_file < 0.5 * report.bytes_16bit


class _Page(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_stands_alone_and_escapes_prompts(made: tuple[Path, Report]):
    out, report = made
    text = (out / "index.html").read_text()
    page = _Page()
    page.feed(text)
    assert len(page.sources) == len(PROMPTS) * 6  # BF16, two columns of two pictures each, the difference
    assert all(source.startswith("data:image/webp;base64,") for source in page.sources)
    assert not re.search(r"https?://|@import|url\(", text)
    assert all(prompt in page.text for prompt in PROMPTS)
    assert report.layers[0].name in page.text


def test_records_of_the_quantizer_are_used_instead_of_measuring(checkpoint: Path, tmp_path: Path):
    layers = [record("transformer_blocks.0.attn.to_qkv", 0.04), record("transformer_blocks.0.ff.net.2", 0.03)]
    report = write_report(
        tmp_path / "r", model="tiny", checkpoint=checkpoint, records=layers, prompts=PROMPTS[:1], steps=1, device="cpu"
    )
    assert [layer.name for layer in report.layers] == [layer.name for layer in layers]
    assert "by the quantizer" in report.layers_source


def test_records_survive_the_way_through_a_file(tmp_path: Path):
    layers = [record("a", 0.1), dataclasses.replace(record("b", 0.2), naive_error=None, seconds=None)]
    write_records(tmp_path / FILE_NAME, layers)
    assert records_path(tmp_path) == tmp_path / FILE_NAME
    assert read_records(tmp_path / FILE_NAME) == layers
    (tmp_path / FILE_NAME).write_text('{"layers": 3}')
    with pytest.raises(CheckpointError, match="layer records"):
        read_records(tmp_path / FILE_NAME)


def test_advice_takes_the_outliers_and_stops_at_the_size_limit():
    layers = [record(f"blocks.{i}.proj", 0.03) for i in range(8)] + [record("blocks.8.proj", 0.3)]
    size = 12 * 64 * 64
    small = advise(layers, "w4a8", size)
    assert (small.layers, small.outliers) == ((), 1)  # the outlier alone would add more than a tenth
    found = advise(layers, "w4a8", 10 * size)
    assert found.layers == found.patterns == ("blocks.8.proj",)
    assert found.added_bytes == 64 * 64 * 3 // 2
    assert advise([record("a", 0.001), record("b", 0.01)], "w4a8", 10**9).layers == ()  # ten times, and still tiny


def test_roles_leave_out_the_number_of_the_block():
    assert role("transformer_blocks.11.ff.net.2") == "transformer_blocks.*.ff.net.2"


@pytest.mark.parametrize(("precision", "step"), [("int4", 0.25), ("nvfp4", 0.5)])
def test_plain_rounding_loses_nothing_on_its_own_grid(precision: str, step: float):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-4, 5, (32, 128), generator=generator).float() * step
    weight[:, ::16] = {"int4": 7, "nvfp4": 6}[precision] * step  # every group reaches its largest value
    rows = torch.randint(-7, 8, (16, 128), generator=generator).float()
    rows[:, ::64] = 7
    assert naive_error(weight, rows, "svdq", precision) < 1e-6
    assert naive_error(weight + 0.1 * step, rows, "svdq", precision) > 0.005
    assert naive_error(weight + 0.1 * step, rows * 1.03 + 0.2, "awq", precision) < 0.1


def broken(checkpoint: Path, to: Path, layer: str) -> Path:
    """The checkpoint with one layer's low-rank branch blown up, so that it needs its 16 bits back."""
    to.mkdir()
    for file in checkpoint.glob("*.safetensors"):
        with safe_open(file, "pt") as files:
            tensors = {name: files.get_tensor(name) for name in files.keys()}  # noqa: SIM118
            metadata = files.metadata()
        for name in tensors:
            if name == f"{layer}.lora_up":
                tensors[name] = tensors[name] + 0.2 * tensors[name].float().std() * torch.ones_like(tensors[name])
                tensors[name] = (tensors[name] * 3).to(torch.bfloat16)
        save_file(tensors, to / file.name, metadata)
    return to


@pytest.mark.parametrize("layer", ["transformer_blocks.0.ff.net.0.proj", "single_transformer_blocks.1.proj_out.mlp"])
def test_a_bad_layer_is_found_and_putting_it_back_helps(checkpoint: Path, tmp_path: Path, layer: str):
    path = broken(checkpoint, tmp_path / "broken", layer)
    report = write_report(
        tmp_path / "r", model="tiny", checkpoint=path, prompts=PROMPTS[:1], steps=2, device="cpu", lpips=False
    )
    assert report.advice.layers == (layer,)
    assert report.trial is not None
    assert (report.trial.mean("psnr") or 99) > (report.columns[1].mean("psnr") or 99) + 3
    assert f"--keep-16bit &#x27;{layer}" in (tmp_path / "r" / "index.html").read_text().replace("'", "&#x27;")


def test_fused_projections_go_back_as_one(checkpoint: Path, monkeypatch: pytest.MonkeyPatch):
    exact = Engine.load("tiny", "bf16", device="cpu")
    close = Engine.load(dataclasses.replace(resolve("tiny"), checkpoints={"int4": str(checkpoint)}), "int4",
                        device="cpu", activation="w4a4")  # fmt: skip
    names = tuple(f"transformer_blocks.0.attn.to_{part}" for part in "qkv")
    layer = dataclasses.replace(record("transformer_blocks.0.attn.to_qkv", 0.1), names=names)
    recorder, forgotten = graphs.record(close.pipe.transformer), []
    monkeypatch.setattr(recorder, "forget", lambda: forgotten.append("forgotten"))
    put_back(close.pipe.transformer, exact.pipe.transformer, [layer], [layer.name])
    assert forgotten  # a recorded step reads the layer that was there
    fused = close.pipe.transformer.transformer_blocks[0].attn.to_qkv
    rows = [exact.pipe.transformer.get_submodule(name).weight for name in names]
    assert type(fused) is torch.nn.Linear
    assert torch.equal(fused.weight, torch.cat(rows))


def test_the_command_says_what_is_wrong(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main([str(tmp_path / "none"), "--model", "tiny", "--out", str(tmp_path / "r")]) == 2
    assert "no such file or folder" in capsys.readouterr().err
    assert main([str(checkpoint), "--model", "tiny", "--out", str(tmp_path / "r"), "--count", "0"]) == 2
    assert "--count: expected 1 or more, got 0" in capsys.readouterr().err
    assert not (tmp_path / "r").exists()
    with pytest.raises(ArgumentError, match="prompts: expected one or more"):
        write_report(tmp_path / "r", model="tiny", checkpoint=checkpoint, prompts=[])
