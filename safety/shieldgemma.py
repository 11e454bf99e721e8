"""ShieldGemma: one forward pass a policy, and the probability that the answer starts with "Yes, it violates".

Gated under the Gemma terms. Model card: google/shieldgemma-2b, whose tokenizer carries a chat template that takes
the policy as `guideline`. The policies here are our own wording of the four harms that the model was trained on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from safety.verdict import SafetyError, Verdict, worst
from safety.weights import OPTIONS, WEIGHTS, escape_markers, load, pick_device, worst_of

__all__ = ["POLICIES", "ShieldGemma"]

HUB_ID = "google/shieldgemma-2b"
THRESHOLD = 0.2

POLICIES = {
    "sexual": '"No Sexually Explicit Information": The prompt shall not ask for pornographic or sexually graphic '
    "content, nor for any sexual content that involves minors.",
    "dangerous": '"No Dangerous Content": The prompt shall not seek content that harms oneself or others, such as '
    "making weapons or explosives, promoting terrorism, or encouraging suicide and self-harm.",
    "hate": '"No Hate Speech": The prompt shall not seek content that dehumanizes, vilifies or calls for harm against '
    "people for their race, religion, origin, sex, orientation, disability or another protected trait.",
    "harassment": '"No Harassment": The prompt shall not seek malicious, intimidating, bullying or abusive content '
    "aimed at a person, such as threats or the mocking of victims of violence.",
}


@dataclass(frozen=True)
class ShieldGemma:
    """A loaded model; a prompt is refused when P(Yes) of any policy reaches `threshold`."""

    tokenizer: Any
    model: Any
    threshold: float = THRESHOLD
    name: str = "shieldgemma"

    @classmethod
    def load(cls, path: str | None = None, *, device: str = "auto", threshold: float = THRESHOLD) -> ShieldGemma:
        """Load from a folder or hub id. Raises SafetyError when that fails."""
        target = pick_device(device)
        source = path or HUB_ID

        def open_model() -> ShieldGemma:
            tokenizer = AutoTokenizer.from_pretrained(source, **OPTIONS)
            _verify(source, tokenizer)
            model: Any = AutoModelForCausalLM.from_pretrained(source, **WEIGHTS)
            return cls(tokenizer, model.to(target).eval(), threshold)

        return load(source, open_model)

    def check(self, prompt: str) -> Verdict:
        """Judge `prompt` by each policy; the score is the highest P(Yes)."""
        return worst_of(self.name, prompt, self._judge)

    def _judge(self, text: str) -> Verdict:
        return worst([self._verdict(category, self._probability(text, POLICIES[category])) for category in POLICIES])

    def _verdict(self, category: str, score: float) -> Verdict:
        if score < self.threshold:
            return Verdict(True, None, score, self.name, "The safety model found no violation of its policies.")
        reason = f"The safety model sees a violation of its policy on {category} content ({score:.0%} sure)."
        return Verdict(False, category, score, self.name, reason)

    @torch.inference_mode()
    def _probability(self, text: str, policy: str) -> float:
        """P(Yes) / (P(Yes) + P(No)) for the first token of the answer."""
        asked = _render(self.tokenizer, escape_markers(text, self.tokenizer), policy)
        inputs = self.tokenizer([asked], return_tensors="pt", add_special_tokens=False).to(self.model.device)
        logits = self.model(**inputs, logits_to_keep=1).logits[0, -1]
        yes_no = logits[[self.tokenizer.vocab["Yes"], self.tokenizer.vocab["No"]]]
        return torch.softmax(yes_no.float(), dim=0)[0].item()


def _render(tokenizer: Any, text: str, policy: str) -> str:
    messages = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(messages, guideline=policy, tokenize=False, add_generation_prompt=True)


def _verify(source: str, tokenizer: Any) -> None:
    """A model of another family would give probabilities that mean nothing; say so at the start."""
    missing = [word for word in ("Yes", "No") if word not in tokenizer.vocab]
    if missing or not tokenizer.chat_template:
        what = "chat template" if not missing else f"token {missing[0]!r}"
        raise SafetyError(f"{source} has no {what}, so it is no ShieldGemma model.")
    if "a policy" not in _render(tokenizer, "a prompt", "a policy"):
        raise SafetyError(f"The chat template of {source} takes no guideline, so it is no ShieldGemma model.")
