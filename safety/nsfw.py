"""A ViT classifier that tells explicit pictures from others (Falconsai/nsfw_image_detection, Apache-2.0, not gated).

The processor is the PIL one, so that torchvision is not needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForImageClassification

try:  # transformers 5 names the processor without torchvision so; in 4 it is the plain name
    from transformers import ViTImageProcessorPil
except ImportError:
    from transformers import ViTImageProcessor as ViTImageProcessorPil

from safety.verdict import SafetyError, Verdict
from safety.weights import WEIGHTS, load, pick_device

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["NsfwClassifier"]

HUB_ID = "Falconsai/nsfw_image_detection"
THRESHOLD = 0.85  # what public demos of large image models use with this classifier
LABEL = "nsfw"


@dataclass(frozen=True)
class NsfwClassifier:
    """A loaded classifier; a picture is refused when P(nsfw) reaches `threshold`."""

    processor: Any
    model: Any
    threshold: float = THRESHOLD
    name: str = "nsfw"

    @classmethod
    def load(cls, path: str | None = None, *, device: str = "auto", threshold: float = THRESHOLD) -> NsfwClassifier:
        """Load from a folder or hub id. Raises SafetyError when that fails."""
        target = pick_device(device)
        source = path or HUB_ID

        def open_model() -> NsfwClassifier:
            processor = ViTImageProcessorPil.from_pretrained(source)
            model = AutoModelForImageClassification.from_pretrained(source, **WEIGHTS).to(target).eval()
            if LABEL not in model.config.label2id:
                labels = ", ".join(map(str, model.config.label2id))
                raise SafetyError(f"{source} has no label {LABEL!r} (it has {labels}), so it cannot judge pictures.")
            return cls(processor, model, threshold)

        return load(source, open_model)

    @torch.inference_mode()
    def check_image(self, image: Image) -> Verdict:
        """Judge `image`; the score is P(nsfw)."""
        pixels = self.processor(image.convert("RGB"), return_tensors="pt")["pixel_values"]
        logits = self.model(pixels.to(self.model.device, self.model.dtype)).logits[0]
        score = torch.softmax(logits.float(), dim=0)[self.model.config.label2id[LABEL]].item()
        if score < self.threshold:
            return Verdict(True, None, score, self.name, "The picture check found nothing.")
        reason = f"The picture was withheld: the picture check finds it explicit ({score:.0%} sure)."
        return Verdict(False, "sexual", score, self.name, reason)
