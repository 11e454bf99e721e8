"""The small SANA's training: its tokenizer and texts, its sampler's convention, and the whole command at toy size."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, SanaPAGPipeline, SanaPipeline
from torch import nn
from transformers import GemmaTokenizerFast

from zoo import scenes
from zoo.train import flow, sana_depthwise, sana_flow, sana_models, sana_text, sana_vae
from zoo.train.dist import World
from zoo.train.log import read
from zoo.train.sana import main
from zoo.train.sana_batches import Batches
from zoo.train.sana_pool import Pool

SMOKE = Path(__file__).parents[2] / "zoo" / "configs" / "sana_smoke.json"
WORLD = World(0, 1, torch.device("cpu"))
LENGTH = 48
NOTHING = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)


def pool(images: torch.Tensor) -> Pool:
    """Pictures without any text."""
    n, tokens = len(images), (images.shape[-1] // 32) ** 2
    return Pool(images, *(torch.zeros(n, *shape) for shape in ((1, 8), (128,), (1, 2, 3), (tokens,))))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sana") / "tokenizer"
    sana_text.build_tokenizer(scenes.vocabulary(), folder)
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the command leaves behind after a few steps of each stage."""
    out = tmp_path_factory.mktemp("run")
    main(["--config", str(SMOKE), "--out", str(out), "--max-steps", "3", "--workers", "1", "--minutes-render", "0.1",
          "--device", "cpu"])  # fmt: skip
    return out


def test_every_caption_word_is_one_token_at_the_start_and_inside(tokenizer: Path):
    encode = sana_text.Encoder(tokenizer, LENGTH)
    for word in (w for w in scenes.vocabulary() if w.isalpha()):
        row = encode([f"{word} {word}"])[0]
        assert (row != sana_text.PAD).sum() == 3, word


def test_unknown_text_falls_into_pieces_and_nothing_is_unknown(tokenizer: Path):
    row = sana_text.Encoder(tokenizer, LENGTH)(["zyxq émü 漢字 #1"])[0]
    assert sana_text.UNKNOWN not in row
    assert (row != sana_text.PAD).sum() > 12


def test_rows_are_those_of_the_tokenizer_that_the_pipeline_loads(tokenizer: Path):
    encode, theirs = sana_text.Encoder(tokenizer, LENGTH), GemmaTokenizerFast.from_pretrained(tokenizer)
    theirs.padding_side = "right"
    texts = ["a red cube", "", "two cones: highly detailed, 8k", *scenes.captions(scenes.sample(20, seed=3), 1)]
    rows = theirs(texts, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="np")
    assert (rows.input_ids == encode(texts)).all()
    assert rows.attention_mask.sum() == (encode(texts) != sana_text.PAD).sum()


def test_the_pipelines_instruction_is_one_token(tokenizer: Path):
    encode, theirs = sana_text.Encoder(tokenizer, LENGTH), GemmaTokenizerFast.from_pretrained(tokenizer)
    for pipeline in (SanaPipeline, SanaPAGPipeline):
        lines = inspect.signature(pipeline.__call__).parameters["complex_human_instruction"].default
        assert theirs.encode("\n".join(lines)) == [sana_text.BOS, encode.instruction]


def test_training_reads_prompts_exactly_as_the_pipeline_does(trained: Path):
    pipe = SanaPipeline.from_pretrained(trained / "model", dtype=torch.float32)
    default = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
    joint = sana_flow.Joint(sana_models.load(trained / "model")).eval()
    encode = sana_text.Encoder(trained / "model" / "tokenizer", LENGTH)
    text = "a red cube left of a blue ball"
    x, sigmas = torch.randn(1, 32, 2, 2), torch.tensor([0.5])
    for told, instruction in ((1.0, default), (0.0, None)):
        draw = Batches(pool(NOTHING), 1, encode.instruction, WORLD, seed=0, told=told, drop=0.0)
        ids = draw.prompts(torch.from_numpy(encode([text])).long())
        with torch.inference_mode():
            states, mask, _, _ = pipe.encode_prompt(text, device="cpu", complex_human_instruction=instruction)
            theirs = pipe.transformer(
                x, encoder_hidden_states=states, encoder_attention_mask=mask, timestep=sigmas * 1000, return_dict=False
            )[0]
            ours = joint.velocity(x, sigmas, joint.states(ids), ids)
        assert states.shape[1] == 300
        assert torch.allclose(ours, theirs, atol=1e-5)


def test_dropped_prompts_are_the_pipelines_empty_prompt(trained: Path):
    pipe = SanaPipeline.from_pretrained(trained / "model", dtype=torch.float32)
    draw = Batches(pool(NOTHING), 4, 1, WORLD, seed=0, told=0.5, drop=1.0)
    ids = draw.prompts(torch.full((4, LENGTH), 9))
    joint = sana_flow.Joint(sana_models.load(trained / "model")).eval()
    with torch.inference_mode():
        _, _, negative, mask = pipe.encode_prompt("a cone", device="cpu", negative_prompt="")
        states = joint.states(ids)
    assert mask.sum() == 1
    assert (ids != sana_text.PAD).sum(1).tolist() == [1] * 4
    assert torch.allclose(states[:, 0], negative[:, 0].expand(4, -1), atol=1e-5)


def test_the_solver_ends_at_the_picture(trained: Path):
    scheduler = DPMSolverMultistepScheduler.from_pretrained(trained / "model" / "scheduler")
    torch.manual_seed(0)
    x0, noise = torch.randn(2, 32, 8, 8), torch.randn(2, 32, 8, 8)
    scheduler.set_timesteps(20)
    x = noise
    for t in scheduler.timesteps:
        assert torch.allclose(x, flow.interpolate(x0, noise, (t / 1000).expand(2))[0], atol=0.02)
        x = scheduler.step(noise - x0, t, x, return_dict=False)[0]
    assert torch.allclose(x, x0, atol=0.02)


def test_shifted_products_are_the_depthwise_convolution():
    torch.manual_seed(0)
    convolution = nn.Conv2d(6, 6, 3, padding=1, groups=6)
    x = torch.randn(2, 6, 5, 7)
    assert torch.allclose(sana_depthwise.shifted(x, convolution.weight, convolution.bias), convolution(x), atol=1e-6)


def test_windows_of_wide_pictures_take_their_share_of_a_batch():
    narrow, wide, none = (
        pool(torch.full((count, 3, side, side), shade, dtype=torch.uint8))
        for count, side, shade in ((4, 64, 0), (2, 128, 255), (0, 128, 0))
    )
    generator = torch.Generator().manual_seed(0)
    x = sana_vae.batch(narrow, wide, 8, 0.25, generator)
    assert x.shape == (8, 3, 64, 64)
    assert x.amax((1, 2, 3)).tolist() == [1.0] * 2 + [-1.0] * 6
    assert sana_vae.batch(narrow, none, 8, 0.25, generator).max() == -1


def test_the_folder_opens_with_the_unmodified_pipelines(trained: Path):
    pipe = SanaPipeline.from_pretrained(trained / "model", dtype=torch.bfloat16)
    pag = SanaPAGPipeline.from_pretrained(
        trained / "model", dtype=torch.bfloat16, pag_applied_layers="transformer_blocks.1"
    )
    for each in (pipe, pag):
        each.set_progress_bar_config(disable=True)
        picture = each("A red cube", height=64, width=96, num_inference_steps=2, use_resolution_binning=False).images[0]
        assert picture.size == (96, 64)
    # Without a flag the pipeline paints in its 512-pixel bins and resizes.
    assert pipe("A red cube", height=64, width=64, num_inference_steps=1).images[0].size == (64, 64)
    assert 0.05 < pipe.vae.config.scaling_factor < 20


def test_a_run_leaves_its_log_curves_and_sheets(trained: Path):
    rows = read(trained / "logs" / "log.jsonl")
    assert {row["stage"] for row in rows} >= {"start", "render", "vae", "encode", "read", "flow", "samples", "done"}
    assert [row for row in rows if row["stage"] == "flow" and "valid" in row]
    assert (trained / "logs" / "curves.png").stat().st_size > 1000
    sheets = {path.name for path in (trained / "samples").iterdir()}
    assert sheets == {"vae.jpg", "sana.jpg", "low_guidance.jpg", "few_steps.jpg", "pag.jpg", "twice.jpg"}


def test_weights_are_bfloat16_safetensors_in_small_files(trained: Path):
    from safetensors import safe_open

    files = list((trained / "model").rglob("*.safetensors"))
    assert len(files) == 3
    for file in files:
        assert file.stat().st_size < 15 * 2**20
        with safe_open(file, "pt") as stored:
            assert {str(stored.get_tensor(name).dtype) for name in stored.keys()} == {"torch.bfloat16"}  # noqa: SIM118
    assert not list((trained / "model").rglob("*.bin"))


def test_a_folder_can_be_taken_up_again(trained: Path, tmp_path: Path):
    main(["--config", str(SMOKE), "--out", str(tmp_path), "--resume", str(trained / "model"), "--minutes-ae", "0",
          "--minutes-read", "0", "--minutes-flow", "0", "--workers", "1", "--minutes-render", "0.05",
          "--device", "cpu"])  # fmt: skip
    for part in ("transformer", "vae", "text_encoder"):
        old, new = (next((root / "model" / part).glob("*.safetensors")).read_bytes() for root in (trained, tmp_path))
        assert old == new, part
