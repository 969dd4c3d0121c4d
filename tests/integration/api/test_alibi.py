"""Falcon with ALiBi, written out: transformers' attention implementations and the service against it.

    score of query i and key j of head h = (q_i · k_j + m_h · j) / √d,    m_h = 2^(−8 (h + 1) / A)

(Press et al., arXiv 2108.12409; Falcon divides the bias by √d, too.) With A = 4 heads.
"""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from shopr1_service.core import Certainty, CompletionTokens, PromptKey, TokenGroup
from tests.support.models import policy_of, random_ids, rules, tiny_model

A = 4
PROMPT, COMPLETION = random_ids(40, seed=1), random_ids(12, seed=2)


@pytest.fixture(scope="module")
def falcon() -> PreTrainedModel:
    return tiny_model("falcon", alibi=True, new_decoder_architecture=False, multi_query=True)


def attention(layer: Any, hidden_T_H: Tensor) -> Tensor:
    """Heads with keys and values in common, in loops."""
    T, D = len(hidden_T_H), hidden_T_H.shape[1] // A
    fused = layer.query_key_value(hidden_T_H).view(T, A + 2, D)
    query, key, value = fused[:, :A], fused[:, A], fused[:, A + 1]
    out = torch.zeros(T, A, D, dtype=hidden_T_H.dtype)
    for head in range(A):
        slope = 2.0 ** (-8 * (head + 1) / A)
        for i in range(T):
            bias = slope * torch.arange(i + 1, dtype=hidden_T_H.dtype)
            scores = (key[: i + 1] @ query[i, head] + bias) / math.sqrt(D)
            out[i, head] = torch.softmax(scores, 0) @ value[: i + 1]
    return layer.dense(out.flatten(1))  # type: ignore[no-any-return]


@torch.no_grad()
def written_out(model: PreTrainedModel, ids: list[int]) -> Tensor:
    """Logits in fp64, [T, V]."""
    trunk: Any = model.double().transformer
    hidden_T_H = trunk.word_embeddings(torch.tensor(ids))
    for block in trunk.h:
        normed_T_H = block.input_layernorm(hidden_T_H)
        inner = nn.functional.gelu(block.mlp.dense_h_to_4h(normed_T_H))
        hidden_T_H = hidden_T_H + attention(block.self_attention, normed_T_H) + block.mlp.dense_4h_to_h(inner)
    return model.lm_head(trunk.ln_f(hidden_T_H))  # type: ignore[no-any-return]


def copy_with(model: PreTrainedModel, implementation: str) -> PreTrainedModel:
    """The model in fp64, with this attention."""
    copied = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
        model.config, dtype=torch.float64, attn_implementation=implementation
    )
    copied.load_state_dict(model.state_dict())
    copied.train(False)
    return copied  # type: ignore[no-any-return]


def test_both_implementations_are_the_formula(falcon: PreTrainedModel) -> None:
    ids = [*PROMPT, *COMPLETION]
    models = {name: copy_with(falcon, name) for name in ("sdpa", "eager")}
    expected = written_out(copy_with(falcon, "sdpa"), ids)
    with torch.no_grad():
        errors = {
            name: float((model(input_ids=torch.tensor([ids])).logits[0] - expected).abs().max())
            for name, model in models.items()
        }
    assert max(errors.values()) < 1e-9, errors


def test_self_certainty_is_that_of_the_formula(falcon: PreTrainedModel) -> None:
    policy = policy_of(tiny_model("falcon", alibi=True, new_decoder_architecture=False, multi_query=True))
    group = TokenGroup(PromptKey(PROMPT), [CompletionTokens(COMPLETION, range(len(COMPLETION)))])
    [[certainty]] = policy.certainties([group], rules())
    assert isinstance(certainty, Certainty)
    logits_T_V = written_out(copy_with(falcon, "sdpa"), [*PROMPT, *COMPLETION])[len(PROMPT) - 1 : -1]
    log_p_T_V = torch.log_softmax(logits_T_V, -1)
    expected = -log_p_T_V.mean(-1) - math.log(log_p_T_V.shape[-1])
    assert certainty.values == pytest.approx(expected.tolist(), rel=0, abs=1e-4)
