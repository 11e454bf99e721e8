"""Which of the LoRA formats a file is in, from its keys alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from engine.errors import CheckpointError
from engine.lora.names import is_foreign

__all__ = ["FORMATS", "LoraFormat", "detect_format", "refuse_other_kinds"]

LoraFormat = Literal["nunchaku", "kohya_diffusers", "peft_bfl", "comfyui", "xlabs", "bfl", "diffusers"]
FORMATS: dict[LoraFormat, str] = {
    "nunchaku": "nunchaku's runtime form, the checkpoint's own factors included",
    "kohya_diffusers": "kohya with diffusers names (lora_transformer_*)",
    "peft_bfl": "PEFT with BFL names (base_model.model.*)",
    "comfyui": "ComfyUI / kohya with BFL names (lora_unet_* or diffusion_model.*)",
    "xlabs": "XLabs (processor.qkv_lora)",
    "bfl": "BFL control LoRA with biases and norms",
    "diffusers": "diffusers / PEFT (transformer.*.lora_A.weight)",
}
_NOT_LOW_RANK = "which is not low-rank and cannot go through the low-rank branch"
_DORA = "a DoRA, whose magnitudes rescale the full weight, which 4-bit weights do not allow"
_OTHER_KINDS = {
    "lokr_": f"a LoKr (Kronecker product), {_NOT_LOW_RANK}",
    "hada_": f"a LoHa (Hadamard product), {_NOT_LOW_RANK}",
    "oft_": "an OFT (orthogonal transform), which changes the 4-bit weights themselves",
    "lora_mid.": "a LoCon in Tucker form, with a third factor between the two of a LoRA",
    "dora_scale": _DORA,
    "lora_magnitude_vector": _DORA,
}
_RUNTIME_MARKS = (".mlp_fc", ".mlp_context_fc", ".qkv_proj", ".out_proj")


def detect_format(keys: Iterable[str]) -> LoraFormat:
    """Tell the format; raises CheckpointError for kinds of adapters that are no plain LoRA, and for no LoRA at all."""
    keys = list(keys)
    if any(key.endswith(".qweight") for key in keys):
        raise CheckpointError("expected a LoRA, found a 4-bit checkpoint; open it with engine.checkpoint")
    refuse_other_kinds(keys)
    if any(mark in key for key in keys for mark in _RUNTIME_MARKS):
        return "nunchaku"
    if keys and all(key.startswith("lora_transformer_") for key in keys):
        return "kohya_diffusers"
    if any(key.startswith("base_model.model.") for key in keys):
        return "peft_bfl"
    if any(".lora_down.weight" in key for key in keys):
        return "comfyui"
    if any("processor" in key for key in keys):
        return "xlabs"
    if any("query_norm.scale" in key for key in keys):
        return "bfl"
    if any(".lora_A." in key or ".lora.down." in key for key in keys):
        return "diffusers"
    raise CheckpointError(f"expected a LoRA, found none of its tensors among {len(keys)}; is it a full checkpoint?")


def refuse_other_kinds(keys: Iterable[str]) -> None:
    """Raise CheckpointError, saying so, when the file holds a LoKr, LoHa, OFT or DoRA of a transformer."""
    for key in keys:
        if is_foreign(key):
            continue
        for mark, what in _OTHER_KINDS.items():
            if mark in key:
                raise CheckpointError(
                    f"this is {what} (it holds {key}); use a plain LoRA, or merge it before quantizing"
                )
