"""A policy with an adapter gives the numbers of a copy in fp64 whose weights have B·A added."""

import json
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from shopr1_service.core import Certainty, CompletionTokens, PromptKey, TokenGroup
from shopr1_service.engine.engine import Engine
from shopr1_service.engine.forward.base import Forward, IndependentForward
from shopr1_service.engine.forward.expanded import ExpandedForward
from shopr1_service.engine.forward.shared_prefix import SharedPrefixForward
from shopr1_service.engine.lm_head import LinearHead, trunk_of
from shopr1_service.engine.prefix_cache import PrefixCache
from shopr1_service.policy.adapters.lora import Adapter, build_adapter, parse_config, unused_layers
from shopr1_service.policy.adapters.lora_config import LoraConfig
from tests.support.adapters import BYPASSED, PREFIX, linear_sizes, merged, random_tensors
from tests.support.models import (
    FAMILIES,
    NUM_TOKENS,
    Reference,
    head_of,
    model_of,
    one_thread,
    policy_of,
    random_ids,
    rules,
    tiny_model,
)

PROMPT = random_ids(21, seed=1)
COMPLETIONS = [
    CompletionTokens(random_ids(9, seed=2), [0, 1, 2]),
    CompletionTokens(random_ids(14, seed=3), [3, 5, 6, 11]),
    CompletionTokens(random_ids(30, seed=5), range(30)),
]
GROUP = TokenGroup(PromptKey(PROMPT), COMPLETIONS)
TOLERANCE = 1e-4
"""Nats, fp32 against fp64."""
CONFIG = LoraConfig(peft_type="LORA", r=3, lora_alpha=6.0)
Q_PROJ = "model.layers.0.self_attn.q_proj"


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture
def model() -> PreTrainedModel:
    return tiny_model()


def engine_of(model: PreTrainedModel, forward: Forward | None = None) -> Engine:
    head = LinearHead(head_of(model).weight)
    forward = forward or IndependentForward(model)
    return Engine(forward, head, max_sequence_tokens=512, num_tokenizer_tokens=NUM_TOKENS)


def chosen_engine(model: PreTrainedModel) -> Engine:
    """With what the service would choose for the model; nothing is kept of prompts."""
    return policy_of(model, prefix_cache_bytes=0).engine


def values_of(engine: Engine) -> list[tuple[float, ...]]:
    [measured] = engine.certainties([GROUP], rules())
    assert all(isinstance(certainty, Certainty) for certainty in measured), measured
    return [certainty.values for certainty in measured if isinstance(certainty, Certainty)]


def check(
    actual: Sequence[Sequence[float]],
    reference: Reference,
    base: Sequence[Sequence[float]],
    tolerance: float = TOLERANCE,
) -> None:
    """As the reference says, and far from what it is without the adapter."""
    for values, before, completion in zip(actual, base, COMPLETIONS, strict=True):
        expected = reference.values(PROMPT, completion.ids, completion.measured, rules())
        assert values == pytest.approx(expected, rel=0, abs=tolerance)
        assert max(abs(a - b) for a, b in zip(before, expected, strict=True)) > 10 * tolerance


# --- numbers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_layer_of_every_family(family: str) -> None:
    model = model_of(family)
    engine = chosen_engine(model)
    tensors = random_tensors(model)
    adapter = build_adapter(model, CONFIG, tensors)
    base = values_of(engine)
    unused = unused_layers(adapter, model, lambda: values_of(engine))
    assert unused == BYPASSED.get(family, [])
    with adapter.applied(model):
        actual = values_of(engine)
    assert values_of(engine) == base
    used = {key: tensor for key, tensor in tensors.items() if not any(name in key for name in unused)}
    tolerance = 1e-5 if family == "rwkv" else TOLERANCE  # its values hardly depend on its weights
    check(actual, merged(model, used), base, tolerance)


FORWARDS = {
    "independent": IndependentForward,
    "expanded": ExpandedForward,
    "shared_prefix": lambda model: SharedPrefixForward(model, PrefixCache(0)),
    "shared_prefix, kept": lambda model: SharedPrefixForward(model, PrefixCache(10**9)),
}


@pytest.mark.parametrize("way", FORWARDS.values(), ids=FORWARDS.keys())
def test_every_forward_in_fp64(way: Any) -> None:
    model = tiny_model(dtype=torch.float64)
    tensors = {name: tensor.double() for name, tensor in random_tensors(model).items()}
    adapter = build_adapter(model, CONFIG, tensors)
    with adapter.applied(model):
        engine = engine_of(model, way(model))
        first, again = values_of(engine), values_of(engine)
    base = values_of(engine_of(model))
    # Fp32 numbers in fp64: what is left is rounding in fp64.
    check(first, merged(model, tensors), base, 1e-9)
    check(again, merged(model, tensors), base, 1e-9)


def test_two_adapters_take_turns(model: PreTrainedModel) -> None:
    engine = chosen_engine(model)
    tensors = [random_tensors(model, seed=1), random_tensors(model, {Q_PROJ: 3}, seed=2)]
    adapters = [build_adapter(model, CONFIG, own) for own in tensors]
    base = values_of(engine)
    seen: list[list[Any]] = [[], []]
    for i in (0, 1, 1, 0):
        with adapters[i].applied(model):
            seen[i].append(values_of(engine))
        assert values_of(engine) == base
    for own, [actual, again] in zip(tensors, seen, strict=True):
        assert actual == again
        check(actual, merged(model, own), base)


def test_weights_may_change_under_an_adapter(model: PreTrainedModel) -> None:
    engine = chosen_engine(model)
    tensors = random_tensors(model)
    adapter = build_adapter(model, CONFIG, tensors)
    before = values_of(engine)
    with torch.no_grad():
        for _, parameter in trunk_of(model).named_parameters():
            parameter.mul_(1.1)
    with adapter.applied(model):
        actual = values_of(engine)
    check(actual, merged(model, tensors), before)


def test_names_and_parameters_stay(model: PreTrainedModel) -> None:
    names, modules = list(model.state_dict()), dict(model.named_modules())
    with build_adapter(model, CONFIG, random_tensors(model)).applied(model):
        assert list(model.state_dict()) == names
        assert dict(model.named_modules()) == modules


@pytest.mark.parametrize("use_rslora", [False, True])
def test_ranks_and_scales_of_patterns(model: PreTrainedModel, use_rslora: bool) -> None:
    k_proj, up_proj = "model.layers.1.self_attn.k_proj", "model.layers.1.mlp.up_proj"
    text = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 8,
        "rank_pattern": {"k_proj": 1, r"layers\.1\.mlp\..*": 9},
        "alpha_pattern": {"up_proj": 3},
        "use_rslora": use_rslora,
    }
    tensors = random_tensors(model, {Q_PROJ: 4, k_proj: 1, up_proj: 9})
    adapter = build_adapter(model, parse_config(json.dumps(text)), tensors)
    scales = {Q_PROJ: 8 / 2 if use_rslora else 8 / 4, k_proj: 8.0, up_proj: 3 / 3 if use_rslora else 3 / 9}
    engine = chosen_engine(model)
    base = values_of(engine)
    with adapter.applied(model):
        actual = values_of(engine)
    check(actual, merged(model, tensors, scales), base)
    assert adapter.rank == 9
    # q: 32 → 32, k: 32 → 16, up: 32 → 48; fp32.
    assert adapter.num_bytes == 4 * (4 * (32 + 32) + 1 * (32 + 16) + 9 * (32 + 48))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtype_of_the_file(model: PreTrainedModel, dtype: torch.dtype) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in random_tensors(model).items()}
    adapter = build_adapter(model, CONFIG, tensors)
    assert {layer.a_R_I.dtype for layer in adapter.layers.values()} == {torch.float32}
    engine = chosen_engine(model)
    base = values_of(engine)
    with adapter.applied(model):
        actual = values_of(engine)
    check(actual, merged(model, tensors), base)


def test_the_sum_is_rounded_once() -> None:
    # In bf16 256 + 0.25 is 256: neither x·A nor the sum is made in it.
    model = tiny_model(dtype=torch.bfloat16)
    tensors = random_tensors(model, {Q_PROJ: 1})
    a_R_I, b_O_R = tensors.values()
    a_R_I.fill_(1.0)
    b_O_R.fill_(1.0)
    x = torch.tensor([256.0] + [0.25] * 31, dtype=torch.bfloat16)
    module = model.get_submodule(Q_PROJ)
    before = module(x)
    with build_adapter(model, LoraConfig(peft_type="LORA", r=1, lora_alpha=0.5), tensors).applied(model):
        after = module(x)
    assert after.dtype == torch.bfloat16
    assert torch.equal(after, (before.float() + 0.5 * (256 + 31 * 0.25)).bfloat16())


@pytest.mark.parametrize(
    ("old", "new"),
    [("base_model.model.", ""), (".weight", ".default.weight"), (".weight", ".weight.weight")],
)
def test_other_spellings(model: PreTrainedModel, old: str, new: str) -> None:
    tensors = random_tensors(model)
    respelt = {name.replace(old, new): tensor for name, tensor in tensors.items()}
    plain, other = build_adapter(model, CONFIG, tensors), build_adapter(model, CONFIG, respelt)
    assert plain.layers.keys() == other.layers.keys() == linear_sizes(model).keys()
    for name, layer in plain.layers.items():
        assert torch.equal(layer.a_R_I, other.layers[name].a_R_I)
        assert torch.equal(layer.b_O_R, other.layers[name].b_O_R)


def test_tensors_are_copied(model: PreTrainedModel) -> None:
    tensors = random_tensors(model, {Q_PROJ: 3})
    layer = build_adapter(model, CONFIG, tensors).layers[Q_PROJ]
    expected = layer.a_R_I.clone()
    tensors[f"{PREFIX}{Q_PROJ}.lora_A.weight"].zero_()
    assert torch.equal(layer.a_R_I, expected)


# --- applying ---------------------------------------------------------------------------------------


def num_hooks(model: PreTrainedModel) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_one_at_a_time(model: PreTrainedModel) -> None:
    adapter = build_adapter(model, CONFIG, random_tensors(model))
    other = build_adapter(model, CONFIG, random_tensors(model, seed=1))
    for second in (adapter, other):
        with (
            adapter.applied(model),
            pytest.raises(RuntimeError, match="already"),
            second.applied(model),
        ):
            pytest.fail("two at a time")
        assert num_hooks(model) == 0
    with adapter.applied(model), adapter.applied(tiny_model()):  # another model is another matter
        pass


def test_nothing_stays_after_an_error(model: PreTrainedModel) -> None:
    adapter = build_adapter(model, CONFIG, random_tensors(model))
    with pytest.raises(ZeroDivisionError), adapter.applied(model):
        raise ZeroDivisionError
    assert num_hooks(model) == 0
    broken = Adapter({**adapter.layers, "model.no_such": adapter.layers[Q_PROJ]})
    for _ in range(2):
        with pytest.raises(AttributeError), broken.applied(model):
            pytest.fail("there is no such module")
        assert num_hooks(model) == 0
    with pytest.raises(ZeroDivisionError):
        unused_layers(adapter, model, lambda: 1 // 0)
    assert num_hooks(model) == 0


def test_layers_that_are_not_called(model: PreTrainedModel) -> None:
    adapter = build_adapter(model, CONFIG, random_tensors(model, 3))
    first_mlp = model.get_submodule("model.layers.0.mlp")
    ids = torch.tensor([PROMPT])
    with torch.no_grad():
        names = unused_layers(adapter, model, lambda: first_mlp(torch.ones(1, 32)))
        assert names == [name for name in linear_sizes(model) if ".0.mlp." not in name]
        assert unused_layers(adapter, model, lambda: model(input_ids=ids)) == []


def test_layers_are_looked_for_with_the_adapter_applied(model: PreTrainedModel) -> None:
    adapter = build_adapter(model, CONFIG, random_tensors(model))
    engine, seen = engine_of(model), []
    assert unused_layers(adapter, model, lambda: seen.append(values_of(engine))) == []
    with adapter.applied(model):
        assert seen == [values_of(engine)]
    assert seen != [values_of(engine)]
