"""Qwen3Guard-Gen: a small language model that answers "Safety: Unsafe / Categories: Violent".

Apache-2.0, not gated, 119 languages. Model card: Qwen/Qwen3Guard-Gen-0.6B. It is asked through its own chat
template and decodes greedily, so the same prompt gets the same verdict.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from safety.verdict import SafetyError, Verdict
from safety.weights import OPTIONS, WEIGHTS, escape_markers, load, pick_device, worst_of

__all__ = ["Qwen3Guard", "parse"]

HUB_ID = "Qwen/Qwen3Guard-Gen-0.6B"
ANSWER_TOKENS = 64  # two short lines

_SAFETY = re.compile(r"Safety:\s*(Safe|Controversial|Unsafe)\b")
_CATEGORIES = re.compile(r"Categories:[ \t]*([^\n]*)")
_SCORE = {"Safe": 0.0, "Controversial": 0.5, "Unsafe": 1.0}


def parse(answer: str) -> tuple[str, str | None] | None:
    """The label and the categories of the model's answer; None when there is no label to read."""
    label = _SAFETY.search(answer)
    if label is None:
        return None
    named = _CATEGORIES.search(answer)
    categories = named[1].strip() if named else ""
    return label[1], None if categories in ("", "None") else categories


@dataclass(frozen=True)
class Qwen3Guard:
    """A loaded model. `strict` refuses what the model calls controversial, too."""

    tokenizer: Any
    model: Any
    strict: bool = False
    name: str = "qwen3guard"

    @classmethod
    def load(cls, path: str | None = None, *, device: str = "auto", strict: bool = False) -> Qwen3Guard:
        """Load from a folder or hub id. Raises SafetyError when that fails."""
        target = pick_device(device)
        source = path or HUB_ID

        def open_model() -> Qwen3Guard:
            tokenizer = AutoTokenizer.from_pretrained(source, **OPTIONS)
            if not tokenizer.chat_template:
                raise SafetyError(f"{source} has no chat template, so it is no Qwen3Guard model.")
            model: Any = AutoModelForCausalLM.from_pretrained(source, **WEIGHTS)
            return cls(tokenizer, model.to(target).eval(), strict)

        return load(source, open_model)

    def check(self, prompt: str) -> Verdict:
        """Judge `prompt`; an answer that cannot be read counts as a refusal."""
        return worst_of(self.name, prompt, self._judge)

    def _judge(self, text: str) -> Verdict:
        parsed = parse(self._answer(text))
        if parsed is None:
            reason = "The safety model gave no answer that can be read, so the prompt is refused."
            return Verdict(False, "unreadable", 1.0, self.name, reason)
        label, categories = parsed
        allowed = label == "Safe" or (label == "Controversial" and not self.strict)
        reason = f"The safety model calls the prompt {label.lower()}" + (f": {categories}." if categories else ".")
        return Verdict(allowed, categories, _SCORE[label], self.name, reason)

    @torch.inference_mode()
    def _answer(self, text: str) -> str:
        messages = [{"role": "user", "content": escape_markers(text, self.tokenizer)}]
        asked = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        inputs = self.tokenizer([asked], return_tensors="pt", add_special_tokens=False).to(self.model.device)
        ids = self.model.generate(**inputs, max_new_tokens=ANSWER_TOKENS, do_sample=False)
        return self.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
