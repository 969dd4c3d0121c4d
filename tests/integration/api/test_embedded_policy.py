"""The embedded policy, SmolLM2-135M-Instruct: loaded once from its GGUF file, with its real tokenizer."""

import pytest
import torch

from shopr1_client.wire import Message
from shopr1_rewards import Span
from shopr1_service.core import Certainty, CompletionTokens, PromptKey, TokenGroup, Tokens
from shopr1_service.policy.loaded_policy import LoadedPolicy
from shopr1_service.policy.loading import load_policy
from shopr1_service.policy.prompts.tokenizer import PolicyTokenizer
from shopr1_service.settings import DType, Settings
from tests.support.models import naive, rules, slow_overlapping, token_bytes


@pytest.fixture(scope="module")
def embedded() -> LoadedPolicy:
    return load_policy(Settings(dtype=DType.FLOAT32, device="cpu"))


def test_embedded_policy(embedded: LoadedPolicy) -> None:
    policy, info = embedded, embedded.info
    assert (info.model, info.architecture) == ("SmolLM2-135M-Instruct", "LlamaForCausalLM")
    assert (info.num_head_rows, info.num_tokenizer_tokens, info.max_sequence_tokens) == (49152, 49152, 8192)
    assert (info.dtype, info.head, info.forward) == ("float32", "linear", "shared_prefix")
    assert policy.codec.end_tokens == ("<|im_end|>",)
    prompt_ids = policy.codec.encode_chat([Message(role="user", content="Is green tea cheap?")])
    tokens = policy.codec.encode_text('{"rationale": "便宜 tea"}')
    measured = range(len(tokens.ids))
    group = TokenGroup(PromptKey(prompt_ids), [CompletionTokens(tokens.ids, measured)])
    [[certainty]] = policy.certainties([group], rules())
    with torch.no_grad():
        logits_T_V = policy.model(input_ids=torch.tensor([[*prompt_ids, *tokens.ids]])).logits[0].double()
    expected = naive(logits_T_V[len(prompt_ids) - 1 : -1], rules().divergence)
    assert isinstance(certainty, Certainty)
    assert certainty.values == pytest.approx(expected, rel=0, abs=1e-3)
    assert all(0 < value < 100 for value in certainty.values)


# --- its tokenizer ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm2(embedded: LoadedPolicy) -> PolicyTokenizer:
    return embedded.codec


def owners(tokens: Tokens) -> list[list[int]]:
    """The tokens of each character."""
    return [tokens.overlapping(Span(i, i + 1)) for i in range(len(tokens.text))]


@pytest.mark.parametrize(
    "text",
    [
        "plain words",
        " leading and trailing ",
        "便宜的茶更好",
        "お茶を買いたい。",
        "🍵🛒👩‍👩‍👧‍👦🇩🇪",
        "Größe – 3 €, c\u0327a\u0301",
        '{"rationale": "\\u00e9 \\"茶\\" \\ud83c\\udf75", "action": {}}<|im_end|>\n',
    ],
)
def test_embedded_tokenizer(smollm2: PolicyTokenizer, text: str) -> None:
    tokens = smollm2.encode_text(text)
    assert tokens.text == text
    assert smollm2.decode(tokens.ids) == tokens
    spelt = token_bytes(smollm2.tokenizer, tokens.ids)
    assert owners(tokens) == [slow_overlapping(spelt, text, Span(i, i + 1)) for i in range(len(text))]


LLAMA_CPP = {
    '  <button name="add">   $12.99 </button>\n    <span>  1234 items</span>': [
        *(216, 2067, 13046, 1462, 2671, 2104, 15889, 256, 1885, 33, 34, 30, 41, 41, 22577, 13046, 46, 472),
        *(2067, 19674, 46, 256, 33, 34, 35, 36, 3723, 9617, 19674, 46),
    ],
    "price: 24.50\n\t\t- 3 stars": [17517, 42, 216, 34, 36, 30, 37, 32, 3354, 197, 29, 216, 35, 5703],
    "It's 2024 ½ ²  x  12": [
        *(1589, 506, 216, 34, 32, 34, 36, 216, 16738, 216, 19133, 216, 1792, 256, 33, 34),
    ],
    "Größe – 3 €, c\u0327a\u0301 ٣٤ Ⅷ": [
        *(27302, 7466, 34878, 85, 816, 216, 35, 24927, 28, 265, 151, 117, 81, 151, 219, 216, 164, 113, 164),
        *(114, 216, 173, 223, 117),
    ],
}
"""Ids of this file's tokenizer in llama.cpp (package xllamacpp 2026.10)."""


@pytest.mark.parametrize("text", LLAMA_CPP)
def test_embedded_ids_are_those_of_llama_cpp(smollm2: PolicyTokenizer, text: str) -> None:
    assert list(smollm2.encode_ids(text)) == LLAMA_CPP[text]


def test_embedded_tokenizer_cuts_characters(smollm2: PolicyTokenizer) -> None:
    # Else the test above would show little.
    tokens = smollm2.encode_text("便🛒")
    assert [len(indices) > 1 for indices in owners(tokens)] == [True, True]
    assert smollm2.end_tokens == ("<|im_end|>",)


def test_embedded_chat(smollm2: PolicyTokenizer) -> None:
    ids = smollm2.encode_chat([Message(role="system", content="Shop."), Message(role="user", content="茶?")])
    assert smollm2.decode(ids).text == (
        "<|im_start|>system\nShop.<|im_end|>\n<|im_start|>user\n茶?<|im_end|>\n<|im_start|>assistant\n"
    )
