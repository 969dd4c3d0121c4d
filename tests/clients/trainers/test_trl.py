"""TRL's prompts: the ids that the policy saw, or the options with which the service makes them.

`tests/integration/trainers/test_trl.py` compares them with those that a real trainer generates from.
"""

from types import SimpleNamespace
from typing import Any

import pytest

from shopr1_client.grouping import Rollout
from shopr1_client.trainers.trl import _rollouts
from shopr1_client.wire import Message, TokenIds

CHAT = [{"role": "user", "content": "page"}]


class Trainer(SimpleNamespace):
    """The part of TRL's trainers that the shim uses."""

    def log(self, name: str, value: float) -> None: ...


def rollout(prompt: Any, trainer: Trainer | None = None, **columns: Any) -> Rollout:
    log_metric = trainer.log if trainer else None
    [only] = _rollouts([prompt], ["x"], ["{}"], [[7]], log_metric, columns)
    assert only.completion == TokenIds(token_ids=[7])
    return only


def tokenising(images: Any = None, **more: Any) -> Trainer:
    return Trainer(_tokenize_prompts=lambda prompts: ([[1, 2]] * len(prompts), images, {}), **more)


@pytest.mark.parametrize("prompt", ["page", CHAT])
def test_the_trainers_own_ids_are_used(prompt: Any) -> None:
    assert rollout(prompt, tokenising(rollout_func=None)).prompt == TokenIds(token_ids=[1, 2])


def test_a_column_of_ids_comes_first() -> None:
    ids = TokenIds(token_ids=[5])
    assert rollout("page", prompt_ids=[[5]]).prompt == ids
    assert rollout("page", tokenising(), prompt_ids=[(5,)]).prompt == ids
    assert rollout("page", tokenising(rollout_func=print), prompt_ids=[[5]]).prompt == ids
    assert rollout("page", prompt_ids=[None]).prompt == "page"


def test_a_rollout_function_names_its_ids_so_that_trl_hands_them_over() -> None:
    own = rollout("page", tokenising(rollout_func=print), policy_prompt_ids=[[5]], prompt_ids=[[6]])
    assert own.prompt == TokenIds(token_ids=[5])


@pytest.mark.parametrize("trainer", [None, Trainer(), tokenising(rollout_func=print)])
def test_otherwise_the_service_tokenises_as_trl_would(trainer: Trainer | None) -> None:
    own = rollout("page", trainer)
    assert (own.prompt, own.options.given()) == (
        "page",
        {"add_special_tokens": True, "continue_final_message": False},
    )
    assert rollout(CHAT, trainer).prompt == [Message(role="user", content="page")]


def test_arguments_of_the_template_are_the_trainers_and_the_rows() -> None:
    trainer = Trainer(chat_template_kwargs={"x": 1, "y": 1})
    assert rollout(CHAT, trainer).options.chat_template_kwargs == {"x": 1, "y": 1}
    for row in ({"y": 2, "z": None}, '{"y": 2}'):
        options = rollout(CHAT, trainer, chat_template_kwargs=[row]).options
        assert options.chat_template_kwargs == {"x": 1, "y": 2}
    assert rollout(CHAT, chat_template_kwargs=[None]).options.chat_template_kwargs is None


def test_images_are_refused() -> None:
    with pytest.raises(ValueError, match="the prompts have images, which the service does not see"):
        rollout(CHAT, tokenising(images=[["image"]]))
