"""Compare one architecture, as a policy, with fp64."""

import copy
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from benchmarks.engine.tiny_architectures import CAUSES, MAX_TOKENS, NUM_VOCAB, Architecture, build
from shopr1_rewards.recipe import SelfCertaintyRecipe
from shopr1_service.core import Certainty, CompletionTokens, PromptKey, TokenGroup
from shopr1_service.errors import PolicyError
from shopr1_service.policy.architectures import auto_class
from shopr1_service.policy.factory import build_policy
from shopr1_service.settings import Settings

RULES = SelfCertaintyRecipe(alpha=0.005)
PROMPT_TOKENS = (1, 17, 150)
CACHE_BYTES = 200_000
"""Small, so that prompts are evicted."""


@dataclass
class Row:
    """The comparison of one architecture.

    Attributes:
        outcome: `exact`, `ties`, `refused` at load with the reason in the remarks, `not built`, `failed` or
            `wrong`.
        error_nats: worst error of a token's KL(U‖p) against fp64.
        fp32_nats: the same of a plain fp32 forward.
        eager_sdpa_nats: difference of the two attention implementations in fp64; None if it has one only.
    """

    kind: str
    class_name: str
    is_image_text: bool
    outcome: str
    head: str = ""
    forward: str = ""
    error_nats: float | None = None
    fp32_nats: float | None = None
    eager_sdpa_nats: float | None = None
    num_values: int = 0
    load_s: float | None = None
    remarks: list[str] = field(default_factory=list)


def compare(architecture: Architecture) -> Row:
    """Build, load, score and compare."""
    row = Row(architecture.kind, architecture.class_name, architecture.is_image_text, "not built")
    try:
        model = build(architecture)
    except Exception as error:  # sizes that do not fit together
        row.remarks.append(_cause(architecture, error))
        return row
    row.outcome = "failed"
    try:
        auto_class(model.config)  # as the service chooses the class of a checkpoint
        _fill(row, model)
    except PolicyError as error:
        row.outcome = "refused"
        row.remarks.append(str(error))
    except Exception as error:
        row.remarks.append(_cause(architecture, error))
    return row


def _cause(architecture: Architecture, error: Exception) -> str:
    return CAUSES.get(architecture.kind, f"{type(error).__name__}: {error}"[:300])


def _fill(row: Row, model: PreTrainedModel) -> None:
    reference = _Reference(model)
    start_s = time.perf_counter()
    settings = Settings(max_sequence_tokens=MAX_TOKENS, prefix_cache_bytes=CACHE_BYTES)
    policy = build_policy(model, tokenizer(), settings, name=row.kind)
    row.load_s = time.perf_counter() - start_s
    row.head, row.forward = policy.info.head, policy.info.forward
    row.remarks += policy.info.remarks
    errors, plain = [], []
    for batch in batches():
        for group, measured in zip(batch, policy.certainties(batch, RULES), strict=True):
            for completion, certainty in zip(group.completions, measured, strict=True):
                if not isinstance(certainty, Certainty):
                    raise ArithmeticError(f"not scored: {certainty}")
                exact_T, fp32_T = reference.values(group.prompt_ids, completion)
                errors.append((torch.tensor(certainty.values).double() - exact_T).abs())
                plain.append((fp32_T - exact_T).abs())
    row.error_nats, row.fp32_nats = float(torch.cat(errors).max()), float(torch.cat(plain).max())
    row.num_values = len(torch.cat(errors))
    row.eager_sdpa_nats = reference.eager_sdpa_nats()
    row.outcome = _outcome(row.error_nats, row.fp32_nats, row.remarks)


def _outcome(error_nats: float, fp32_nats: float, remarks: Sequence[str]) -> str:
    if error_nats <= max(1e-4, 2 * fp32_nats):
        return "exact"
    return "ties" if any("breaks ties" in remark for remark in remarks) else "wrong"


class _Reference:
    """KL(U‖p) from the full logits of copies of the model in fp64 and fp32, one sequence at a time."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._plain = copy.deepcopy(model)
        self._double = copy.deepcopy(model).double()
        for each in (self._plain, self._double):
            each.set_experts_implementation("eager")  # grouped products know no fp64
        self._known: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}

    def values(self, prompt_ids: Sequence[int], completion: CompletionTokens) -> tuple[Tensor, Tensor]:
        ids = (*prompt_ids, *completion.ids)
        if ids not in self._known:
            self._known[ids] = (_double_certainty(self._double, ids), _certainty(self._plain, ids))
        rows = [len(prompt_ids) + index - 1 for index in completion.measured]
        exact_T, fp32_T = self._known[ids]
        return exact_T[rows], fp32_T[rows]

    def eager_sdpa_nats(self) -> float | None:
        """Difference of the attention implementations; a large one makes the reference doubtful."""
        ids = random_ids(40, seed=3)
        values = []
        for name in ("eager", "sdpa"):
            try:
                self._double.set_attn_implementation(name)
                values.append(_double_certainty(self._double, ids))
            except Exception:  # it has only one
                return None
        return float((values[0] - values[1]).abs().max())


_WIDER = {torch.float32: torch.float64}


class _InDouble(TorchFunctionMode):
    """Computes in fp64 what a model's own code computes in fp32, where the two cannot be mixed."""

    def __torch_function__(
        self,
        func: Any,  # noqa: ANN401  # as torch defines it
        types: Any,  # noqa: ANN401
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        func = Tensor.double if func is Tensor.float else func
        options = {
            name: _WIDER.get(each, each) if name == "dtype" else each for name, each in (kwargs or {}).items()
        }
        return func(
            *(_WIDER.get(each, each) if isinstance(each, torch.dtype) else each for each in args), **options
        )


def _double_certainty(model: PreTrainedModel, ids: Sequence[int]) -> Tensor:
    try:
        return _certainty(model, ids)
    except RuntimeError:  # its own fp32 meets fp64 (inkling2), or fp64's least number does not fit (xglm)
        torch.set_default_dtype(torch.float64)
        try:
            with _InDouble():
                return _certainty(model, ids)
        finally:
            torch.set_default_dtype(torch.float32)


@torch.no_grad()
def _certainty(model: PreTrainedModel, ids: Sequence[int]) -> Tensor:
    logits_T_V: Tensor = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].double()
    return logits_T_V.logsumexp(-1) - logits_T_V.mean(-1) - math.log(logits_T_V.shape[1])


def random_ids(num: int, *, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randint(3, NUM_VOCAB - 60, (num,), generator=generator).tolist())


def batches() -> list[list[TokenGroup]]:
    """New prompts, the same again, grown ones, evicted ones, and several groups together."""
    lead, tail = random_ids(6, seed=11), random_ids(20, seed=12)
    completions = [
        CompletionTokens([*lead, *tail], range(6, 26)),
        CompletionTokens([*lead, *reversed(tail)], [6, 9, 10, 25]),
        CompletionTokens([*lead, *tail[5:8]], range(9)),
        CompletionTokens(tail[:2], [1]),
    ]
    prompts = [random_ids(num, seed=num) for num in PROMPT_TOKENS]
    groups = [TokenGroup(PromptKey(prompt), completions) for prompt in prompts]
    grown = [TokenGroup(PromptKey([*prompt, *tail[:10]]), completions[:2]) for prompt in prompts]
    return [*([group] for group in groups), *([group] for group in groups), grown, [*groups, *grown]]


def tokenizer() -> PreTrainedTokenizerFast:
    """Any tokenizer with fewer tokens than the head has rows: nothing is tokenised."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer, inner.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner)  # type: ignore[no-untyped-call]
