"""Models of PEFT's that are sent to a service: it scores as their own forward does, or they are refused.

The reference is the sender's forward in fp64, and the definition of self-certainty.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from shopr1_client import Client
from shopr1_client.errors import InvalidWeightsError, UnsendableModelError
from shopr1_client.updates.adapted import active_adapter
from shopr1_client.wire import ScoreRequest, ScoreResponse
from shopr1_rewards.recipe import Divergence
from tests.support.client_updates import Update, both, with_client
from tests.support.http import CLICK, WAIT_S, answer, group, served
from tests.support.models import MIXTURES, MULTIMODAL, naive, one_thread, policy_of, random_ids, tiny_model
from tests.support.policy_server import policy_server
from tests.support.updating import changed

peft: Any = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's own

TOLERANCE_NATS = 1e-4
TIED: dict[str, Any] = {"tie_word_embeddings": True}
LORA = {"target_modules": ["q_proj", "v_proj", "up_proj"], "r": 4, "lora_alpha": 8}
REQUEST = ScoreRequest.model_validate(
    {
        "groups": [
            group(answer(), answer(CLICK, "The blue mug is cheaper."), prompt={"token_ids": random_ids(30)})
        ],
        "include": ["tokens", "token_ids"],
    }
)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def adapted(config: Any = None, base: PreTrainedModel | None = None) -> Any:
    """A model with an adapter that changes its numbers."""
    config = config or peft.LoraConfig(**LORA)
    return disturbed(peft.get_peft_model(base or tiny_model(), config))


@torch.no_grad()
def disturbed(model: Any, seed: int = 0) -> Any:
    """With random numbers on all that is trained."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def lora(**options: Any) -> Any:
    return adapted(peft.LoraConfig(**{**LORA, **options}))


def numbers_of_sender(model: Any, scored: ScoreResponse) -> list[float]:
    """Self-certainty of each token, by the model's own forward in fp64. The model becomes fp64."""
    exact = model.double()
    if hasattr(exact, "set_experts_implementation"):
        exact.set_experts_implementation("eager")  # grouped_mm knows no fp64
    values: list[float] = []
    for scores in scored.groups:
        for reward in scores.rewards:
            prompt, own = scores.prompt_token_ids, reward.details.completion_token_ids
            assert prompt is not None
            assert own is not None
            assert reward.details.tokens
            rows = [len(prompt) + token.index - 1 for token in reward.details.tokens]
            with torch.no_grad():
                logits = exact(input_ids=torch.tensor([[*prompt, *own]]), use_cache=False).logits[0, rows]
            values += naive(logits, Divergence.KL_U_P)
    return values


def numbers(scored: ScoreResponse) -> list[float]:
    rewards = [reward for scores in scored.groups for reward in scores.rewards]
    return [token.value for reward in rewards for token in reward.details.tokens or ()]


def check_scores(model: Any, base: PreTrainedModel | None = None, **options: Any) -> None:
    """Send the model to a service of its base; it gives the model's numbers, which are not the base's."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with served(policy_of(base or tiny_model())) as url, Client(url, timeout_s=WAIT_S) as client:
        old = numbers(client.score(REQUEST))
        client.update_policy(model, "1", **options)
        scored = client.score(REQUEST)
    after = model.state_dict()  # nothing was merged in place
    assert all(torch.equal(before[name], after[name]) for name in before.keys() | after.keys())
    expected = numbers_of_sender(model, scored)
    assert numbers(scored) == pytest.approx(expected, rel=0, abs=TOLERANCE_NATS)
    assert old != pytest.approx(expected, rel=0, abs=0.01)


def check_refused(model: Any, cause: str, **options: Any) -> None:
    with policy_server() as server, Client(server.url) as client:
        with pytest.raises(UnsendableModelError, match=cause):
            client.update_policy(model, "1", **options)
        assert server.received == []


# --- an adapter alone -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.*v_proj": 3}}],
    ids=["plain", "rslora", "patterns"],
)
def test_an_adapter(options: dict[str, Any]) -> None:
    check_scores(lora(**options))


def test_the_active_one_of_several_adapters() -> None:
    model = lora()
    model.add_adapter("ref", peft.LoraConfig(**LORA))
    check_scores(model)
    model.set_adapter("ref")
    check_scores(disturbed(model, seed=5))


def test_another_adapter_of_other_layers() -> None:
    model = lora()
    model.add_adapter("ref", peft.LoraConfig(r=2, target_modules=["o_proj", "q_proj"]))
    check_scores(model)
    model = lora()
    model.add_adapter("ref", peft.LoraConfig(r=2, target_modules=["o_proj", "q_proj"]))
    model.set_adapter("ref")
    check_scores(disturbed(model, seed=6))


def test_an_adapter_of_transformers_own_integration() -> None:
    model = tiny_model()
    model.add_adapter(peft.LoraConfig(**LORA), adapter_name="mine")
    disturbed(model)
    assert active_adapter(model) == "mine"
    check_scores(model)


def test_a_model_in_training_mode() -> None:
    check_scores(lora(lora_dropout=0.5))


@pytest.mark.parametrize("name", MULTIMODAL)
def test_a_multimodal_model_and_its_adapter(name: str, tmp_path: Path) -> None:
    """The policy may be its text part; adapters of the vision tower do not matter."""
    MULTIMODAL[name]().save_pretrained(tmp_path)

    def policy() -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(tmp_path)

    check_scores(changed(MULTIMODAL[name]()), policy())
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"])
    check_scores(adapted(config, MULTIMODAL[name]()), policy())
    check_scores(adapted(config, MULTIMODAL[name]()), policy(), merge=True)


# --- more than an adapter ---------------------------------------------------------------------------


def with_trained_norms() -> Any:
    model = lora()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad or "norm" in name)
    return disturbed(model, seed=3)


def with_two_active() -> Any:
    model = lora()
    model.add_adapter("other", peft.LoraConfig(**{**LORA, "target_modules": ["q_proj", "o_proj"]}))
    model.base_model.set_adapter(["default", "other"])
    return disturbed(model, seed=4)


def with_two_active_in_different_layers() -> Any:
    """Neither is active in all of its layers."""
    model = lora()
    model.add_adapter("other", peft.LoraConfig(**LORA))
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and "layers.1" in name:
            module.set_adapter(["other"])
    return disturbed(model, seed=4)


def disabled() -> Any:
    model = with_trained_norms()
    model.base_model.disable_adapter_layers()
    return model


def merged_in_place() -> Any:
    model = lora()
    model.merge_adapter()
    return model


def merged_and_disabled() -> Any:
    """Its forward would unmerge it."""
    model = with_two_active()
    model.merge_adapter(["other"])
    return model


def with_another_scale() -> Any:
    model = lora()
    for module in model.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("default", 0.3)
    return model


def with_a_changed_config() -> Any:
    """After the layers were made; they do not follow."""
    model = lora()
    model.peft_config["default"].lora_alpha = 32
    return model


def with_a_layer_off() -> Any:
    model = lora()
    model.base_model.model.model.layers[0].self_attn.q_proj.enable_adapters(False)
    return model


MORE: dict[str, tuple[Callable[[], Any], str]] = {
    "trained norms": (
        with_trained_norms,
        r"model\.layers\.0\.input_layernorm\.weight and 4 more are trained",
    ),
    "two active": (with_two_active, "2 adapters are active, default, other"),
    "two in different layers": (with_two_active_in_different_layers, "2 adapters are active"),
    "disabled": (disabled, "adapters are disabled"),
    "merged in place": (merged_in_place, "merged into its weights in place"),
    "one of two merged": (merged_and_disabled, "adapters are active"),
    "another scale": (with_another_scale, r"multiplies its adapter by 0\.6, and the adapter's config by 2"),
    "changed config": (with_a_changed_config, "multiplies its adapter by 2, and the adapter's config by 8"),
    "a layer off": (with_a_layer_off, r"layers\.0\.self_attn\.q_proj computes without its adapter"),
    "head saved": (lambda: lora(modules_to_save=["lm_head"]), "lm_head is trained beside the adapter"),
    "norms saved": (lambda: lora(modules_to_save=["input_layernorm"]), "input_layernorm is trained beside"),
    "tokens": (lambda: lora(trainable_token_indices=[5, 6, 7, 40]), "embed_tokens is trained beside"),
    "biases": (
        lambda: adapted(peft.LoraConfig(**LORA, bias="all"), tiny_model("qwen2")),
        "bias and .* trained",
    ),
    "IA3": (
        lambda: adapted(
            peft.IA3Config(target_modules=["v_proj", "down_proj"], feedforward_modules=["down_proj"])
        ),
        "is IA3, and only LoRA can be sent",
    ),
    "LoHa": (lambda: adapted(peft.LoHaConfig(target_modules=["q_proj"], r=4)), "is LOHA"),
    "OFT": (lambda: adapted(peft.OFTConfig(target_modules=["q_proj"], oft_block_size=8)), "is OFT"),
}


@pytest.mark.parametrize("name", MORE)
def test_more_than_an_adapter_is_refused(name: str) -> None:
    make, cause = MORE[name]
    check_refused(make(), cause)


@pytest.mark.parametrize("name", MORE)
def test_merged_weights_score_as_the_sender(name: str) -> None:
    model = MORE[name][0]()
    base = tiny_model("qwen2") if name == "biases" else tiny_model()
    check_scores(model, base, merge=True)


@pytest.mark.parametrize(
    "options",
    [
        {"use_dora": True},
        {"init_lora_weights": "pissa"},
        {"target_modules": ["embed_tokens", "lm_head", "q_proj"]},
        {"target_modules": "all-linear", "use_rslora": True},
    ],
    ids=lambda options: next(iter(options)),
)
def test_merged_weights_of_what_the_service_cannot_apply(options: dict[str, Any]) -> None:
    check_scores(lora(**options), merge=True)


EXPERTS: dict[str, dict[str, Any]] = {
    # One wrapped into the other.
    "qwen2_moe": {
        "target_modules": ["q_proj"],
        "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
    },
    # Modules of experts that are parameters now: PEFT makes adapters of these, with other ranks and factors.
    "olmoe": {"target_modules": ["q_proj", "gate_proj", "up_proj", "down_proj"]},
    "mixtral": {"target_modules": ["w1", "w2", "w3"]},
}


def with_experts(kind: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A base, and a copy with an adapter of its stacked experts."""
    options = MIXTURES[kind].options
    config = peft.LoraConfig(r=4, **EXPERTS[kind])
    return tiny_model(kind, **options), adapted(config, tiny_model(kind, **options))


@pytest.mark.parametrize("kind", EXPERTS)
def test_an_adapter_of_stacked_experts_is_refused(kind: str) -> None:
    cause = r"mlp\.experts has an adapter of its parameter \w+, as .* stacked experts, .* merge=True$"
    check_refused(with_experts(kind)[1], cause)


@pytest.mark.parametrize("kind", EXPERTS)
def test_merged_experts(kind: str) -> None:
    base, model = with_experts(kind)
    check_scores(model, base, merge=True)


def test_merged_adapters_of_a_broadcast() -> None:
    check_scores(with_two_active(), merge=True, transport="gloo", host="127.0.0.1")


# --- ties -------------------------------------------------------------------------------------------


def test_tied_adapters() -> None:
    """PEFT's own merge adds both to the one weight."""
    config = peft.LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True)
    model = adapted(config, tiny_model(**TIED))
    check_scores(model, tiny_model(**TIED), merge=True)


def test_an_adapter_of_one_of_two_tied_weights() -> None:
    config = peft.LoraConfig(r=4, target_modules=["embed_tokens"])
    model = adapted(config, tiny_model(**TIED))
    with served(policy_of(tiny_model(**TIED))) as url, Client(url, timeout_s=WAIT_S) as client:
        before = client.score(REQUEST)
        with pytest.raises(InvalidWeightsError, match="the policy has one tensor for both"):
            client.update_policy(model, "1", merge=True)
        assert numbers(client.score(REQUEST)) == numbers(before)


def test_a_tied_copy_that_is_trained() -> None:
    """The embedding is trained and its tied head is not: two tensors, and the policy has one."""
    model = adapted(peft.LoraConfig(**LORA, modules_to_save=["embed_tokens"]), tiny_model(**TIED))
    refused = pytest.raises(InvalidWeightsError, match="the policy has one tensor for both")
    with served(policy_of(tiny_model(**TIED))) as url, refused:
        with_client(url, model, "1", merge=True)


# --- models that cannot be sent ---------------------------------------------------------------------


def prompt_tuning() -> Any:
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    return peft.get_peft_model(tiny_model(), config)


def prefix_tuning() -> Any:
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    return peft.get_peft_model(tiny_model(), config)


def with_replicated_layers() -> Any:
    return lora(layer_replication=[[0, 2], [1, 2]])


@both
@pytest.mark.parametrize("options", [{}, {"merge": True}], ids=["adapter", "merge"])
@pytest.mark.parametrize(
    ("make", "cause"),
    [
        (prompt_tuning, "is PROMPT_TUNING: it adds virtual tokens"),
        (prefix_tuning, "is PREFIX_TUNING: it adds virtual tokens"),
        (with_replicated_layers, "has layer_replication"),
    ],
)
def test_models_that_cannot_be_sent(
    make: Callable[[], Any], cause: str, options: dict[str, Any], update: Update
) -> None:
    with policy_server() as server:
        with pytest.raises(UnsendableModelError, match=cause):
            update(server.url, make(), "1", **options)
        assert server.received == []


def test_a_method_that_depends_on_the_input() -> None:
    model = lora(alora_invocation_tokens=[5])
    refused = pytest.raises(UnsendableModelError, match=r"cannot merge the adapter of model\.layers\.0")
    with policy_server() as server, refused:
        with_client(server.url, model, "1", merge=True)


def test_merge_needs_adapters_of_no_name() -> None:
    with policy_server() as server, Client(server.url) as client:
        with pytest.raises(ValueError, match="no adapter in it"):
            client.update_policy(lora(), "1", merge=True, adapter="mine")
        client.update_policy(nn.Linear(2, 2), "1", merge=True)  # nothing to merge
    assert len(server.received) == 1
