"""A probe of a model is compared with the service that it was sent to."""

import math
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from shopr1_client import Client, MixedVersionsError
from shopr1_client.errors import VerificationError
from tests.support.client_updates import Update, both, with_client
from tests.support.http import WAIT_S, served
from tests.support.models import one_thread, policy_of, tiny_model
from tests.support.updating import changed_model

peft: Any = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@torch.no_grad()
def adapted(base: Any) -> Any:
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["q_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.normal_(std=0.2)
    return model


@both
def test_equal_models(update: Update) -> None:
    with served(policy_of(tiny_model())) as url:
        update(url, changed_model(), "1", verify=True)
        update(url, adapted(changed_model()), "2", verify=True)
        update(url, adapted(tiny_model()), "3", merge=True, verify=1e-4)


@torch.no_grad()
def on_another_base() -> Any:
    """An adapter on weights that differ from the policy's only where no sample is taken."""
    base = tiny_model()
    base.model.norm.weight[1::2] *= 3
    return adapted(base)


@both
def test_an_adapter_on_another_base(update: Update) -> None:
    model = on_another_base()
    with served(policy_of(tiny_model())) as url, pytest.raises(VerificationError) as caught:
        update(url, model, "1", verify=True)
    error = caught.value
    assert str(error).startswith(f"{url} scores with another model than the one that was sent: token ")
    assert len(error.expected) == len(error.actual) > 1
    assert not all(math.isclose(a, b) for a, b in zip(error.expected, error.actual, strict=True))
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_the_second_of_two_servers() -> None:
    model = on_another_base()
    first, second = policy_of(on_another_base().unload()), policy_of(tiny_model())
    with served(first) as one, served(second) as two, pytest.raises(MixedVersionsError) as caught:
        with_client([one, two], model, "1", verify=True)
    assert caught.value.updated == [one]
    assert isinstance(caught.value.__cause__, VerificationError)


def test_the_model_keeps_its_modes() -> None:
    model = changed_model()
    model.train()
    model.model.layers[0].eval()
    modes = [part.training for part in model.modules()]
    with served(policy_of(tiny_model())) as url, Client(url, timeout_s=WAIT_S) as client:
        client.update_policy(model, "1", verify=True)
    assert [part.training for part in model.modules()] == modes


def test_bfloat16() -> None:
    """Random weights as large as these round coarsely."""
    model = nn.Module.to(changed_model(), torch.bfloat16)
    with served(policy_of(tiny_model())) as url, Client(url, timeout_s=WAIT_S) as client:
        client.update_policy(model, "1", verify=1.0)
        with pytest.raises(VerificationError, match=r"limit 1e-06"):
            client.update_policy(model, "2", verify=1e-6)


@pytest.mark.parametrize("source", ["/models/7", {"weight": torch.ones(2)}, nn.Linear(2, 2)])
def test_only_a_model_has_a_forward(source: Any) -> None:
    with (
        Client("http://127.0.0.1:1") as client,
        pytest.raises(ValueError, match="only a model of transformers' can be verified"),
    ):
        client.update_policy(source, "1", verify=True)
