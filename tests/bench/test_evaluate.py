"""bench/evaluate.py on the small model: painting, resuming, sharing among processes, scoring."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from bench import evaluate
from bench.evaluation.painting import Shard
from bench.evaluation.scores import Column, Settings, prepare, score
from bench.evaluation.sets import Item, PromptSet, read_set
from bench.evaluation.table import figures, markdown
from engine import ArgumentError
from engine.errors import BackendError
from engine.metrics import psnr, ssim
from engine.models.catalogue import zoo_folder

ROOT = Path(__file__).resolve().parents[2]
FAST = ["--device", "cpu", "--steps", "1", "--size", "128"]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("a red cube\ntwo green cones\n")
    return path


def test_painting_scoring_and_going_on(tmp_path: Path, prompts: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "out"
    command = [*FAST, "--prompts", str(prompts), "--precisions", "bf16", "int4", "--out", str(out)]
    assert evaluate.main(command) == 0
    rows = {row["precision"]: row for row in json.loads((out / "results.json").read_text())["rows"]}
    pairs = [[Image.open(out / "prompts" / p / f"0000{i}.png") for p in ("bf16", "int4")] for i in range(2)]
    assert rows["int4"]["psnr"] == pytest.approx(sum(psnr(*pair) for pair in pairs) / 2)
    assert rows["int4"]["ssim"] == pytest.approx(sum(ssim(*pair) for pair in pairs) / 2)
    assert "psnr" not in rows["bf16"]
    assert "| prompts | 2 | int4 |" in (out / "RESULTS.md").read_text()
    assert all((out / f"prompts-{name}.png").stat().st_size > 5000 for name in ("figures", "psnr", "examples"))

    # Again: what is painted stays, what is missing is painted to the same bits, and its score is taken anew.
    kept, lost = (out / "prompts" / "int4" / f"0000{i}.png" for i in range(2))
    before, bits = kept.stat().st_mtime_ns, lost.read_bytes()
    lost.unlink()
    assert evaluate.main(command) == 0
    assert kept.stat().st_mtime_ns == before
    assert lost.read_bytes() == bits
    capsys.readouterr()

    # Pictures of other settings are not mixed in.
    command[command.index("--steps") + 1] = "2"
    assert evaluate.main(command) == 2
    assert "was made with steps=1, now it is 2" in capsys.readouterr().err


def test_a_label_keeps_its_meaning(tmp_path: Path, prompts: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]):
    command = [*FAST, "--prompts", str(prompts), "--only", "paint", "--out", str(tmp_path / "out"), "--precisions"]
    assert evaluate.main([*command, f"mine={checkpoint}"]) == 0
    assert evaluate.main([*command, f"mine={checkpoint}@w4a4"]) == 2
    assert "use another folder or label" in capsys.readouterr().err


def test_equal_pictures_have_no_psnr_and_are_counted():
    column = Column("same", {"psnr": {"a": float("inf"), "b": float("inf")}, "ssim": {"a": 1.0, "b": 1.0}})
    assert figures(column) == {"equal": 1.0, "ssim": 1.0}
    about = {"device": "CPU", "date": "today", "versions": {"torch": "2"}}
    assert "| s | 2 | same | equal | – | 1.0000 |" in markdown({"s": [_with_psnr(), column]}, {"s": 2}, about)


def _with_psnr() -> Column:
    return Column("other", {"psnr": {"a": 30.0, "b": 40.0}})


def test_scoring_needs_no_models(tmp_path: Path, prompts: Path):
    """Metrics of other environments run where neither diffusers nor transformers is installed."""
    out = tmp_path / "out"
    common = [*FAST, "--prompts", str(prompts), "--precisions", "bf16", "int4", "--out", str(out)]
    assert evaluate.main([*common, "--only", "paint"]) == 0
    assert not (out / "RESULTS.md").exists()
    code = (
        "import sys\n"
        "for name in ('diffusers', 'transformers', 'safetensors', 'huggingface_hub', 'matplotlib'):\n"
        "    sys.modules[name] = None\n"
        "from bench import evaluate\n"
        f"raise SystemExit(evaluate.main({[*common, '--only', 'score']!r}))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (out / "RESULTS.md").exists()
    assert "pip install matplotlib" in done.stderr


def test_scores_of_unfinished_painting_are_refused(tmp_path: Path, prompts: Path, capsys: pytest.CaptureFixture[str]):
    common = [*FAST, "--prompts", str(prompts), "--precisions", "bf16", "int4", "--out", str(tmp_path / "out")]
    assert evaluate.main([*common, "--shard", "1/2"]) == 0
    assert [path.name for path in (tmp_path / "out" / "prompts" / "int4").iterdir()] == ["00001.png"]
    assert evaluate.main([*common, "--only", "score", "--metrics", "ssim"]) == 2
    assert "00000.png is missing" in capsys.readouterr().err


def run(arguments: list[str], **more) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ENGINE_ZOO": str(zoo_folder())}
    return subprocess.Popen(
        [sys.executable, *arguments], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True, **more
    )


def test_a_kill_leaves_whole_pictures_and_the_next_run_ends_it(tmp_path: Path):
    path, out = tmp_path / "many.txt", tmp_path / "out"
    path.write_text("".join(f"a red cube number {i}\n" for i in range(40)))
    arguments = [*FAST, "--prompts", str(path), "--precisions", "int4", "--only", "paint", "--out", str(out)]
    process = run(["bench/evaluate.py", *arguments])
    assert process.stderr is not None
    for line in iter(lambda: process.stderr.read(1), ""):
        if line and len(list(out.glob("many/int4/*.png"))) >= 3:
            break
    process.send_signal(signal.SIGKILL)
    process.communicate()
    painted = sorted(out.glob("many/int4/*.png"))
    assert 3 <= len(painted) < 40
    for picture in painted:
        Image.open(picture).load()
    times = {picture: picture.stat().st_mtime_ns for picture in painted}
    assert evaluate.main(arguments) == 0
    assert len(list(out.glob("many/int4/*.png"))) == 40
    assert all(picture.stat().st_mtime_ns == time for picture, time in times.items())


def test_processes_share_the_work(tmp_path: Path, prompts: Path):
    out = tmp_path / "out"
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "bench/evaluate.py"]
    process = run([*launch, *FAST, "--prompts", str(prompts), "--out", str(out)])
    _, told = process.communicate(timeout=200)
    assert process.returncode == 0, told
    assert len(list(out.glob("prompts/*/*.png"))) == 4
    assert (out / "RESULTS.md").exists()


def test_shards_cover_everything_once(monkeypatch: pytest.MonkeyPatch):
    items = list(range(11))
    parts = [items[s.index :: s.count] for s in (Shard.parse(f"{i}/3") for i in range(3))]
    assert sorted(item for part in parts for item in part) == items
    for wrong in ("3/3", "1", "a/2", "-1/2"):
        with pytest.raises(ArgumentError, match="--shard"):
            Shard.parse(wrong)
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert Shard.of_this_process() == Shard(2, 4)
    assert Shard(2, 4).device("cpu") == "cpu"


def test_the_probe_reads_renders_better_than_chance(tmp_path: Path):
    """True renders of the captions' scenes, scored as if a model had painted them."""
    prompts = read_set("zoo", 6)
    evaluate.references(prompts, tmp_path / "renders", {})
    settings = Settings(probe=zoo_folder() / "probe")
    judged = prepare(["probe"], [prompts], settings)["probe"](tmp_path / "renders", prompts)
    assert judged["objects"] > 0.6
    shuffled = PromptSet("zoo", prompts.items, captions=[*prompts.captions[1:], prompts.captions[0]])
    assert prepare(["probe"], [shuffled], settings)["probe"](tmp_path / "renders", shuffled)["objects"] < 0.4


def test_clipscore_is_the_cosine_of_the_models_embeddings(tmp_path: Path):
    """A CLIP of random weights, saved and opened as the real one is."""
    from transformers import AutoImageProcessor, AutoTokenizer, CLIPConfig, CLIPModel

    tokenizer = AutoTokenizer.from_pretrained(zoo_folder() / "flux-tiny" / "tokenizer")
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {
        **small,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 16,
        "eos_token_id": tokenizer.eos_token_id,
    }
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config={**small, "image_size": 32, "patch_size": 8}))
    model.save_pretrained(tmp_path / "clip")
    tokenizer.save_pretrained(tmp_path / "clip")
    sizes = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    (tmp_path / "clip" / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "CLIPImageProcessor", **sizes})
    )
    picture = tmp_path / "a.png"
    Image.effect_noise((40, 40), 60).convert("RGB").save(picture)
    scorer = prepare(["clip"], [], Settings(clip=str(tmp_path / "clip")))["clip"]
    long = "a red cube " * 20
    found = [scorer(Item("a", prompt, 0), picture) for prompt in ("a red cube", long)]

    pixels = AutoImageProcessor.from_pretrained(tmp_path / "clip")(images=Image.open(picture), return_tensors="pt")
    words = tokenizer(["a red cube"], return_tensors="pt")
    with torch.inference_mode():
        out = model.eval()(**pixels, **words)
    wanted = 100 * float(torch.nn.functional.cosine_similarity(out.image_embeds, out.text_embeds))
    assert found[0] == pytest.approx(max(0.0, wanted), abs=1e-3)
    assert 0 <= found[1] <= 100


def test_scores_are_kept_until_picture_prompt_or_judge_change(tmp_path: Path):
    (tmp_path / "p").mkdir()
    Image.new("RGB", (16, 16)).save(tmp_path / "p" / "a.png")
    asked: list[str] = []

    def scored(prompt: str, judge: str) -> float:
        prompts = PromptSet("s", [Item("a", prompt, 0)])
        models = {"clip": lambda item, _: asked.append(item.prompt) or float(len(asked))}
        settings = Settings(clip=judge)
        column = score(prompts, {"p": tmp_path / "p"}, ["clip"], models, settings, tmp_path, lambda _: None)[0]
        return column.scores["clip"]["a"]

    assert [scored("one", "x"), scored("one", "x"), scored("two", "x"), scored("two", "y")] == [1, 1, 2, 3]
    Image.new("RGB", (16, 16), "red").save(tmp_path / "p" / "a.png")
    assert scored("two", "y") == 4


@pytest.mark.parametrize(
    ("metric", "package", "message"),
    [
        ("lpips", "torchvision", "pip install both"),
        ("fid", "cleanfid", "clean-fid and torchvision"),
        ("image-reward", "ImageReward", "environment of its own"),
    ],
)
def test_a_missing_library_is_told_before_painting(
    tmp_path: Path, metric: str, package: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys
):
    for name in (package, f"{package}.fid"):
        monkeypatch.setitem(sys.modules, name, None)
    assert evaluate.main([*FAST, "--prompts", "zoo", "--count", "1", "--metrics", metric, "--out", str(tmp_path)]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert list(tmp_path.iterdir()) == []


def test_metrics_that_a_set_cannot_have_are_refused(prompts: Path):
    sets = [read_set(str(prompts), None)]
    for metric, message in (("fid", "real pictures"), ("probe", "captions of the set `zoo`"), ("fvd", "got 'fvd'")):
        with pytest.raises(ArgumentError, match=message):
            prepare([metric], sets, Settings())
    with pytest.raises(BackendError, match="is missing: train one"):
        prepare(["probe"], [read_set("zoo", 1)], Settings(probe=Path("nowhere")))
