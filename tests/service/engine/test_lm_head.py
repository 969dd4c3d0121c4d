import math
from collections.abc import Callable
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from shopr1_rewards.recipe import Divergence
from shopr1_rewards.self_certainty import Head, divergences
from shopr1_service.engine import lm_head as head_module
from shopr1_service.engine.lm_head import (
    LinearHead,
    ModuleHead,
    UnsupportedModelError,
    choose_head,
    trunk_of,
)
from tests.support.models import (
    NUM_ROWS,
    NUM_TOKENS,
    head_of,
    model_of,
    naive,
    random_ids,
    tiny_model,
)

IDS = torch.tensor([random_ids(10, seed=1)])


@torch.no_grad()
def trunk_and_logits(model: PreTrainedModel, ids: Tensor = IDS) -> tuple[Tensor, Tensor]:
    """Hidden states [T, H] and the model's own logits [T, V]."""
    hidden_T_H = trunk_of(model)(input_ids=ids, use_cache=False).last_hidden_state[0]
    return hidden_T_H, model(input_ids=ids, use_cache=False).logits[0]


@torch.no_grad()
def logits_of(head: Head, hidden_T_H: Tensor, num_rows: int | None = None) -> Tensor:
    return torch.cat(list(head.logit_chunks(hidden_T_H, num_rows or head.num_rows)), dim=1)


def on_logits(monkeypatch: pytest.MonkeyPatch, change: Callable[[Tensor, Tensor], Tensor]) -> PreTrainedModel:
    """A model that changes its logits in a way that its config does not state."""
    model = tiny_model()
    original = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        output.logits = change(output.logits, kwargs["input_ids"])
        return output

    monkeypatch.setattr(model, "forward", forward)
    return model


# --- the linear head --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "differs"),
    [
        ("llama", set()),
        ("llama_tied", set()),
        ("phi", {"bias_V"}),
        ("gptj", {"bias_V"}),
        ("granite", {"scale"}),
        ("cohere", {"scale"}),
        ("falcon_h1", {"scale"}),
        ("gemma2", {"softcap"}),
    ],
)
def test_linear_head_gives_the_models_logits(family: str, differs: set[str]) -> None:
    model = model_of(family)
    hidden_T_H, expected_T_V = trunk_and_logits(model)
    head = choose_head(model, IDS)
    assert isinstance(head, LinearHead)
    assert head.num_rows == NUM_ROWS
    assert_close(logits_of(head, hidden_T_H), expected_T_V, rtol=0, atol=1e-5)
    found = {"bias_V": head.bias_V is not None, "scale": head.scale != 1, "softcap": head.softcap is not None}
    assert {name for name, is_there in found.items() if is_there} == differs
    # Without bias, scale or softcap the logits differ: the comparison above would notice.
    plain_T_V = logits_of(LinearHead(head.weight_V_H), hidden_T_H)
    assert torch.allclose(plain_T_V, expected_T_V, rtol=0, atol=1e-2) == (not differs)


@pytest.mark.parametrize("logits_scaling", [0.25, 1.0, 1.004, 3.0])
@pytest.mark.parametrize(("kind", "sign"), [("granite", -1), ("hyperclovax", 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_scaling_is_a_factor_or_a_divisor(
    kind: str, sign: int, logits_scaling: float, dtype: torch.dtype
) -> None:
    head = choose_head(tiny_model(kind, dtype, logits_scaling=logits_scaling), IDS)
    assert isinstance(head, LinearHead)
    assert head.scale == pytest.approx(logits_scaling**sign)


def test_order_is_bias_scale_softcap() -> None:
    head = LinearHead(torch.tensor([[2.0]]), bias_V=torch.tensor([1.0]), scale=0.5, softcap=4.0)
    # softcap(0.5 · (3 · 2 + 1)) = 4 tanh(3.5 / 4)
    assert logits_of(head, torch.tensor([[3.0]])).item() == pytest.approx(4 * math.tanh(3.5 / 4))


@pytest.mark.parametrize("num_rows", [1, 99, 100, 101, NUM_ROWS])
@pytest.mark.parametrize("chunk_rows", [1, 7, 100, NUM_ROWS, 10_000])
def test_chunks_do_not_change_the_logits(
    monkeypatch: pytest.MonkeyPatch, chunk_rows: int, num_rows: int
) -> None:
    monkeypatch.setattr(head_module, "CHUNK_ROWS", chunk_rows)
    model = model_of("gemma2")
    hidden_T_H, expected_T_V = trunk_and_logits(model)
    head = choose_head(model, IDS)
    chunks = list(head.logit_chunks(hidden_T_H, num_rows))
    full, rest = divmod(num_rows, chunk_rows)
    assert [chunk.shape[1] for chunk in chunks] == [chunk_rows] * full + [rest] * (rest > 0)
    assert_close(torch.cat(chunks, dim=1), expected_T_V[:, :num_rows], rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_weights_are_multiplied_in_fp32(dtype: torch.dtype) -> None:
    model = tiny_model(hidden_size=64, dtype=dtype)
    hidden_T_H, own_T_V = trunk_and_logits(model, torch.tensor([random_ids(64)]))
    head = choose_head(model, IDS)
    assert isinstance(head, LinearHead)
    logits_T_V = logits_of(head, hidden_T_H)
    # The exact product of these hidden states and weights, which are rounded already.
    truth_T_V = hidden_T_H.double() @ head.weight_V_H.double().T
    assert logits_T_V.dtype is torch.float32
    assert own_T_V.dtype is dtype
    error, own_error = ((x - truth_T_V).abs().max().item() for x in (logits_T_V, own_T_V))
    assert error < 1e-5
    assert own_error > 100 * error


def test_fp64_stays_fp64() -> None:
    model = tiny_model(dtype=torch.float64)
    hidden_T_H, expected_T_V = trunk_and_logits(model)
    logits_T_V = logits_of(choose_head(model, IDS), hidden_T_H)
    assert logits_T_V.dtype is torch.float64
    assert_close(logits_T_V, expected_T_V, rtol=0, atol=1e-12)


class LargestTensor(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the size of the largest tensor that any operation returned, in elements."""

    num_elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.num_elements = max([self.num_elements, *sizes])
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tensor_holds_all_logits(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    T, H, V, C = 90, 16, 1000, 50
    monkeypatch.setattr(head_module, "CHUNK_ROWS", C)
    generator = torch.Generator().manual_seed(0)
    weight_V_H = torch.randn(V, H, generator=generator).to(dtype)
    hidden_T_H = torch.randn(T, H, generator=generator).to(dtype)
    head = LinearHead(weight_V_H, torch.zeros(V), scale=2.0, softcap=30.0)
    with torch.inference_mode(), LargestTensor() as largest:  # type: ignore[no-untyped-call]
        divergences(hidden_T_H, head, Divergence.KL_P_U, temperature=0.6)
    # The weight itself, V·H, is only read through views of C rows.
    assert largest.num_elements == T * C


# --- the model's own head ---------------------------------------------------------------------------


def test_an_unknown_change_of_logits_needs_the_module_head(monkeypatch: pytest.MonkeyPatch) -> None:
    model = on_logits(monkeypatch, lambda logits, _ids: logits * 3 + 1)
    hidden_T_H, expected_T_V = trunk_and_logits(model)
    head = choose_head(model, IDS)
    assert isinstance(head, ModuleHead)
    assert head.num_rows == NUM_ROWS
    assert torch.equal(logits_of(head, hidden_T_H), expected_T_V)
    assert torch.equal(logits_of(head, hidden_T_H, 17), expected_T_V[:, :17])


SMALLER = {"is_decoder": True, "type_vocab_size": 2}
NARROW_HEADS: dict[str, dict[str, Any]] = {
    "rembert": {"output_embedding_size": 16, "input_embedding_size": 24, **SMALLER},
    "electra": {"embedding_size": 16, **SMALLER},
}


@pytest.mark.parametrize("kind", NARROW_HEADS)
def test_a_head_narrower_than_the_hidden_states_needs_the_module_head(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_model(kind, **NARROW_HEADS[kind])
    hidden_T_H, expected_T_V = trunk_and_logits(model)
    head = choose_head(model, IDS)
    assert isinstance(head, ModuleHead)
    assert "LinearHead fails: RuntimeError" in head.reason
    assert head.reason in caplog.text
    assert_close(logits_of(head, hidden_T_H), expected_T_V, rtol=0, atol=1e-5)


class DoubledLinear(nn.Linear):
    """A linear layer that is more than its weight, like an adapted or quantised layer."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return 2 * super().forward(input)


def test_a_head_that_is_more_than_its_weight_needs_the_module_head() -> None:
    model = tiny_model()
    layer = DoubledLinear(32, NUM_ROWS, bias=False)
    layer.weight = head_of(model).weight
    model.set_output_embeddings(layer)  # type: ignore[no-untyped-call]
    hidden_T_H, expected_T_V = trunk_and_logits(model)
    head = choose_head(model, IDS)
    assert isinstance(head, ModuleHead)
    assert torch.equal(logits_of(head, hidden_T_H), expected_T_V)


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi", "gpt2", "recurrent_gemma", "mamba"])
def test_module_head_gives_the_models_logits(family: str) -> None:
    model = model_of(family)
    ids = torch.tensor([random_ids(40, seed=2)])
    hidden_T_H, expected_T_V = trunk_and_logits(model, ids)
    head = ModuleHead(model, NUM_ROWS)
    blocks = torch.split(hidden_T_H, head.max_tokens)
    logits_T_V = torch.cat([logits_of(head, block_T_H) for block_T_H in blocks])
    assert_close(logits_T_V, expected_T_V, rtol=0, atol=1e-5)


def test_module_head_does_not_change_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    hidden_T_H, expected_T_V = trunk_and_logits(model)
    head = ModuleHead(model, NUM_ROWS)
    logits_of(head, hidden_T_H.flip(0))
    with monkeypatch.context() as patch:
        patch.setattr(head_of(model), "forward", _fail)
        with pytest.raises(ZeroDivisionError):
            logits_of(head, hidden_T_H.flip(0))
    assert torch.equal(trunk_and_logits(model)[1], expected_T_V)


def _fail(*_args: Any) -> Tensor:
    raise ZeroDivisionError


def test_module_head_gives_fp32() -> None:
    model = tiny_model(dtype=torch.bfloat16)
    hidden_T_H, expected_T_V = trunk_and_logits(model)
    logits_T_V = logits_of(ModuleHead(model, NUM_ROWS), hidden_T_H)
    assert logits_T_V.dtype is torch.float32
    assert torch.equal(logits_T_V, expected_T_V.float())


# --- neither ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda logits, ids: logits + ids[0, :, None], id="logits_depend_on_the_token"),
        pytest.param(lambda logits, _ids: logits * math.nan, id="nan"),
        pytest.param(lambda logits, _ids: logits / 0, id="infinite"),
        pytest.param(
            lambda logits, _ids: logits.index_fill(1, torch.tensor([5]), math.nan), id="one_token_is_nan"
        ),
    ],
)
def test_logits_that_no_head_gives_are_an_error(
    monkeypatch: pytest.MonkeyPatch, change: Callable[[Tensor, Tensor], Tensor]
) -> None:
    model = on_logits(monkeypatch, change)
    with pytest.raises(
        UnsupportedModelError, match="logits of LlamaForCausalLM cannot be made from its hidden states"
    ):
        choose_head(model, IDS)


@pytest.mark.parametrize("mask", [-math.inf, torch.finfo(torch.float32).min])
def test_rows_that_the_model_masks_stay_masked(monkeypatch: pytest.MonkeyPatch, mask: float) -> None:
    # Some models mask rows that have no token.
    padding = torch.arange(NUM_TOKENS, NUM_ROWS)
    model = on_logits(monkeypatch, lambda logits, _ids: logits.index_fill(2, padding, mask))
    hidden_T_H, expected_T_V = trunk_and_logits(model)
    head = choose_head(model, IDS)
    assert isinstance(head, ModuleHead)
    assert torch.equal(logits_of(head, hidden_T_H), expected_T_V)
    # Over all rows nothing can be scored; the tokenizer's rows are not affected.
    expected = naive(expected_T_V[:, :NUM_TOKENS].double(), Divergence.KL_U_P)
    of_tokenizer = divergences(hidden_T_H, head, Divergence.KL_U_P, num_vocab=NUM_TOKENS)
    assert of_tokenizer.tolist() == pytest.approx(expected, abs=1e-4)
    assert (divergences(hidden_T_H, head, Divergence.KL_U_P) > 1e30).all()


@pytest.mark.parametrize("error", [TypeError("missing 'pixel_values'"), ValueError("pixel_values is None")])
def test_a_model_that_asks_for_images_is_an_error(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    model = tiny_model()
    monkeypatch.setattr(model, "forward", Mock(side_effect=error))
    message = "LlamaForCausalLM does not compute logits from token ids alone: .*pixel_values"
    with pytest.raises(UnsupportedModelError, match=message):
        choose_head(model, IDS)


def test_model_without_a_trunk_is_an_error() -> None:
    trunk = trunk_of(tiny_model())
    assert isinstance(trunk, PreTrainedModel)
    with pytest.raises(UnsupportedModelError, match="LlamaModel has no trunk apart from its head"):
        trunk_of(trunk)
