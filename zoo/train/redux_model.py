"""The networks that turn a picture into prompt embeddings, and the folder that FluxPriorReduxPipeline opens.

A SigLIP vision tower without its pooling head, and diffusers' ReduxImageEncoder. Text encoders and tokenizers are those
of the base: the folder links to them, so that the pipeline pads with the small models' own empty prompt.
Shapes: B pictures, P = (size / patch)^2 picture tokens, L text tokens, D the base's joint_attention_dim.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import diffusers
import torch
import torch.nn.functional as F
from diffusers.pipelines.flux.modeling_flux import ReduxImageEncoder
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import SiglipVisionConfig, SiglipVisionModel

from zoo.train.captions import LABELS

TEXT_LENGTH = 512  # tokens that the prior pipeline pads the empty prompt to
_CLASSES = {
    "image_encoder": ("transformers", "SiglipVisionModel"),
    "feature_extractor": ("transformers", "SiglipImageProcessor"),
    "image_embedder": ("diffusers", "ReduxImageEncoder"),
    "text_encoder": ("transformers", "CLIPTextModel"),
    "tokenizer": ("transformers", "CLIPTokenizer"),
    "text_encoder_2": ("transformers", "T5EncoderModel"),
    "tokenizer_2": ("transformers", "T5TokenizerFast"),
}
LINKED = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")


class Redux(nn.Module):
    """Vision tower and embedder, and two heads, which are training aids: one says what each of the tower's tokens sees,
    one names objects from embeddings, mixed ones too."""

    def __init__(self, vision: dict, width: int) -> None:
        super().__init__()
        self.tower = SiglipVisionModel(SiglipVisionConfig(vision_use_head=False, **vision))
        self.embedder = ReduxImageEncoder(redux_dim=vision["hidden_size"], txt_in_features=width)
        self.place = Seeing(vision["hidden_size"])
        self.head = Naming(width)

    @property
    def size(self) -> int:
        return self.tower.config.image_size

    @property
    def tokens(self) -> int:
        """Tokens along a side of the picture; P is its square."""
        return self.size // self.tower.config.patch_size

    def look(self, pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Pictures (B, 3, s, s) in [-1, 1] to the tower's states (B, P, hidden) and embeddings (B, P, D)."""
        states = self.tower(pixel_values=pictures).last_hidden_state
        return states, self.embedder(states).image_embeds

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        """Pictures (B, 3, s, s) in [-1, 1] to embeddings (B, P, D)."""
        return self.look(pictures)[1]

    def begin_like(self, states: torch.Tensor, sample: torch.Tensor) -> None:
        """Scale and move the embedder's output so that it starts with the mean and spread of text states (n, D)."""
        with torch.no_grad():
            now = self(sample).flatten(0, 1).float()
            last = self.embedder.redux_down
            last.weight.mul_(states.std(0).mean() / now.std(0).mean().clamp(min=1e-6))
            last.bias.zero_()
            last.bias.add_(states.mean(0) - self(sample).flatten(0, 1).float().mean(0))


class Seeing(nn.Module):
    """What does each token see? Shape or nothing (5), colour (8), size (2) and material (2) from states."""

    PARTS = (5, 8, 2, 2)

    def __init__(self, width: int) -> None:
        super().__init__()
        self.out = nn.Linear(width, sum(self.PARTS))

    def loss(self, states: torch.Tensor, kinds: torch.Tensor) -> torch.Tensor:
        """Cross-entropy of states (B, P, hidden) against `redux_cases.kinds` (B, P), a 0-d tensor."""
        logits = self.out(states).float().flatten(0, 1).split(self.PARTS, 1)
        kinds, nothing = kinds.flatten(), kinds.flatten() < 0
        answers = (kinds // 32, kinds // 4 % 8, kinds // 2 % 2, kinds % 2)
        total = F.cross_entropy(logits[0], torch.where(nothing, 4, answers[0]))
        for part, answer in zip(logits[1:], answers[1:], strict=True):
            wrong = F.cross_entropy(part, torch.where(nothing, -100, answer), reduction="sum", ignore_index=-100)
            total = total + wrong / (~nothing).sum().clamp(min=1)
        return total


class Naming(nn.Module):
    """Which objects do embeddings hold? A query for each label looks over them: (B, P, D) to logits (B, 128)."""

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(LABELS, width) * 0.02)
        self.keys, self.values = nn.Linear(width, width), nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.weight = nn.Parameter(torch.randn(LABELS, width) * width**-0.5)
        self.bias = nn.Parameter(torch.full((LABELS,), -3.0))
        self.heads = heads

    def forward(self, embeddings: torch.Tensor) -> torch.Tensor:
        x = self.norm(embeddings)
        split = lambda t: t.unflatten(-1, (self.heads, -1)).transpose(-2, -3)  # noqa: E731
        queries = split(self.queries.to(x.dtype).expand(len(x), -1, -1))
        seen = F.scaled_dot_product_attention(queries, split(self.keys(x)), split(self.values(x)))
        seen = seen.transpose(1, 2).flatten(2)  # (B, 128, D)
        return (seen * self.weight).sum(-1).float() + self.bias


def save(redux: Redux, folder: Path) -> int:
    """Write tower, processor and embedder in BF16 and the pipeline's index. Returns the bytes of the weights.

    The tower's tensors carry the prefix that transformers before 5 demands and later ones take.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tower, embedder = folder / "image_encoder", folder / "image_embedder"
    redux.tower.config.dtype = "bfloat16"
    redux.tower.config.architectures = ["SiglipVisionModel"]
    redux.tower.config.save_pretrained(tower)
    named = {
        f"vision_model.{name.removeprefix('vision_model.')}": value for name, value in redux.tower.state_dict().items()
    }
    _write(named, tower / "model.safetensors")
    redux.embedder.save_config(embedder)
    _write(redux.embedder.state_dict(), embedder / "diffusion_pytorch_model.safetensors")
    processor = {
        "image_processor_type": "SiglipImageProcessor", "do_convert_rgb": True, "do_resize": True, "do_rescale": True,
        "do_normalize": True, "size": {"height": redux.size, "width": redux.size}, "resample": 3,
        "rescale_factor": 1 / 255, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
    }  # fmt: skip
    (folder / "feature_extractor").mkdir(exist_ok=True)
    (folder / "feature_extractor" / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")
    index = {"_class_name": "FluxPriorReduxPipeline", "_diffusers_version": diffusers.__version__}
    index |= {name: list(value) for name, value in _CLASSES.items()}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors") if path.parent in (tower, embedder))


def _write(state: dict[str, torch.Tensor], path: Path) -> None:
    """Beside the target first, then into place: an interrupted run leaves the last whole file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    save_file({name: value.detach().to("cpu", torch.bfloat16).contiguous() for name, value in state.items()}, part,
              {"format": "pt"})  # fmt: skip
    os.replace(part, path)


def link(folder: Path, base: Path) -> None:
    """Point the folder's text encoders and tokenizers at a base's, by relative links; again after either was moved."""
    for name in LINKED:
        source, target = (Path(base) / name).resolve(), Path(folder) / name
        if not source.is_dir():
            raise FileNotFoundError(f"{base} has no {name}: it is not a FLUX folder")
        if target.is_symlink():
            target.unlink()
        try:
            target.symlink_to(os.path.relpath(source, target.parent.resolve()), target_is_directory=True)
        except OSError:  # a file system without links
            shutil.copytree(source, target, dirs_exist_ok=True)


def restore(redux: Redux, folder: Path) -> None:
    """Read back what `save` wrote; the naming head stays as it is."""
    state = load_file(Path(folder) / "image_encoder" / "model.safetensors")
    own = {name.removeprefix("vision_model."): name for name in redux.tower.state_dict()}
    redux.tower.load_state_dict(
        {own[name.removeprefix("vision_model.")]: value.float() for name, value in state.items()}
    )
    embedder = load_file(Path(folder) / "image_embedder" / "diffusion_pytorch_model.safetensors")
    redux.embedder.load_state_dict({name: value.float() for name, value in embedder.items()})
