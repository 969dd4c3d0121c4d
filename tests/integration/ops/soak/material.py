"""Prompts, completions and policies of the soak, and the right reward of each in fp64.

Nothing here uses the service or its rules: the terms are computed from what each completion was made of.
"""

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor
from transformers import PreTrainedModel

from shopr1_rewards import Span, load_recipe
from tests.support.adapters import merged, random_tensors
from tests.support.broken_updates import ADAPTER_CONFIG
from tests.support.completions import slow_f1
from tests.support.http import CLICK, SEARCH, TERMINATE, answer
from tests.support.models import Reference, byte_level, ids_of, slow_overlapping, tiny_model, token_bytes

TOLERANCE_NATS = 1e-4
"""Fp32 against fp64."""
ALPHA = 0.005
MAX_SEQUENCE_TOKENS = 512
WEIGHTS = ("A", "B", "C")
"""Checkpoints. B is A with one layer changed: a partial update leads from one to the other."""
PART = "model.layers.1."
ADAPTER_SEEDS = (4, 5, 10)
RULES = load_recipe("shop_r1").self_certainty

Action = Mapping[str, str]


# --- completions and their rewards ------------------------------------------------------------------


@dataclass(frozen=True)
class Completion:
    """A text with what it says.

    Attributes:
        action: None if the format is invalid.
        span: the rationale's characters, None if the format is invalid.
    """

    text: str
    action: Action | None = field(default=None, compare=False)
    span: Span | None = None

    @classmethod
    def of(cls, action: Action, rationale: str, end: str = "") -> "Completion":
        text = answer(action, rationale)
        return cls(text + end, action, Span(15, text.rindex('", "action"')))


_RATIONALES = [
    "I want no more.",
    "The blue mug is cheaper.",
    "3 € is too much",
    'He said "no" \\ twice',
    "茶🍵",
]
_ACTIONS: list[Action] = [
    CLICK,
    TERMINATE,
    SEARCH,
    {**SEARCH, "text": "green tea cups"},
    {"type": "click", "name": "add_to_cart.buy_later"},
    {"type": "click", "name": ""},
    {"type": "swipe", "name": "left"},
]
COMPLETIONS = [
    *(Completion.of(action, _RATIONALES[i % 5]) for i, action in enumerate(_ACTIONS * 2)),
    Completion.of(CLICK, ""),
    Completion.of(TERMINATE, "Enough", "<|im_end|>"),
    Completion(""),
    Completion("I would rather not say."),
    Completion(answer(CLICK, "cut off")[:-3]),
]
TOO_LONG = Completion.of(CLICK, "again and " * MAX_SEQUENCE_TOKENS)
TRUTHS: list[Action] = [CLICK, TERMINATE, SEARCH]

_SESSION = "A shop for tea and mugs. You may search, click or end the session. So far: search, click. "
PROMPTS = [f"{_SESSION}Page {i}: {'blue mug, ' * i}\n" for i in range(12)]


def rule_terms(completion: Completion, truth: Action) -> dict[str, float]:
    """Table 1 of the paper, without self-certainty."""
    terms = dict.fromkeys(("format", "action_type", "attribute", "value"), 0.0)
    if completion.action is None:
        return terms
    terms["format"] = 0.5
    if completion.action["type"] != truth["type"]:
        return terms
    weights = {
        "click": {"name": (0.2, 1000.0)},
        "type_and_submit": {"name": (0.1, 0.1), "text": (0.1, 1000.0)},
    }
    terms["action_type"] = 0.3
    for name, (presence, value) in weights.get(truth["type"], {}).items():
        similarity = slow_f1(_words(completion.action[name]), _words(truth[name]))
        terms["attribute"] += presence if completion.action[name] else 0.0
        terms["value"] += value * float(similarity) if similarity > Fraction(3, 4) else 0.0
    return terms


def _words(text: str) -> list[str]:
    return re.findall("[a-z0-9]+", text.lower())


# --- policies ---------------------------------------------------------------------------------------


@functools.cache
def tokenizer() -> Any:
    return byte_level()


def templated(prompt: str) -> str:
    """The prompt as a chat of one message."""
    return f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"


@functools.cache
def weights_of(name: str) -> dict[str, Tensor]:
    prefix, seed = {"A": ("none", 0), "B": (PART, 2), "C": ("", 11)}[name]
    generator = torch.Generator().manual_seed(seed)
    changed = {}
    for key, tensor in tiny_model().state_dict().items():
        noise = 0.3 * torch.randn(tensor.shape, generator=generator)
        changed[key] = tensor + noise if key.startswith(prefix) else tensor.clone()
    return changed


def model_of(name: str) -> PreTrainedModel:
    model = tiny_model()
    model.load_state_dict(weights_of(name))
    return model


def part_of(name: str) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in weights_of(name).items() if key.startswith(PART)}


def adapter_tensors(seed: int) -> dict[str, Tensor]:
    return random_tensors(tiny_model(), seed=seed)


def write_policies(root: Path) -> None:
    """All checkpoints, partial ones and adapters."""
    for name in WEIGHTS:
        model_of(name).save_pretrained(root / name)
        tokenizer().save_pretrained(root / name)
        (root / f"{name}-part").mkdir()
        safetensors.torch.save_file(part_of(name), root / f"{name}-part" / "model.safetensors")
    for seed in ADAPTER_SEEDS:
        (root / f"adapter-{seed}").mkdir()
        path = root / f"adapter-{seed}"
        safetensors.torch.save_file(adapter_tensors(seed), path / "adapter_model.safetensors")
        (path / "adapter_config.json").write_text(ADAPTER_CONFIG)


@dataclass(frozen=True)
class Content:
    """Weights of a version, and the seed of the adapter on them."""

    weights: str
    adapter_seed: int | None = None


@dataclass
class Truth:
    """Self-certainty by the model's full logits in fp64, one sequence at a time."""

    _references: dict[Content, Reference] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.values = functools.lru_cache(maxsize=2**15)(self._values)

    def mean(self, content: Content, prompt: str, completion: Completion) -> float | None:
        """None: nothing is measured."""
        values = self.values(content, prompt, completion)
        return sum(values) / len(values) if values else None

    def _values(self, content: Content, prompt: str, completion: Completion) -> Sequence[float]:
        if completion.span is None:
            return []
        ids = ids_of(tokenizer(), completion.text)
        measured = slow_overlapping(token_bytes(tokenizer(), ids), completion.text, completion.span)
        if not measured:
            return []
        reference = self._reference(content)
        values = reference.values(ids_of(tokenizer(), prompt), ids, measured, RULES)
        reference.forget()
        return values

    def _reference(self, content: Content) -> Reference:
        if content not in self._references:
            model, seed = model_of(content.weights), content.adapter_seed
            self._references[content] = (
                Reference(model) if seed is None else merged(model, adapter_tensors(seed))
            )
        return self._references[content]
