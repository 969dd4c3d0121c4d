"""Limits of sequences: stated ones, and those of tables of positions."""

from typing import Any

import pytest

from shopr1_service.errors import PolicyError
from shopr1_service.policy.positions import longest_sequence
from tests.support.models import FAMILIES, byte_level, policy_of, tiny_model

TABLES: dict[str, dict[str, Any]] = {
    name: {**FAMILIES[name].options, "max_position_embeddings": None, "n_positions": 48}
    for name in ("gpt2", "gptj")
}
TABLES["opt"] = {**FAMILIES["opt"].options, "max_position_embeddings": 48}
TABLES["gpt_neo"] = {**FAMILIES["gpt_neo"].options, "max_position_embeddings": 48}


@pytest.mark.parametrize("kind", TABLES)
def test_limit_above_a_table_of_positions_is_refused(kind: str) -> None:
    model = tiny_model(kind, **TABLES[kind])
    with pytest.raises(PolicyError, match=r"max_sequence_tokens is 49, but \w+ has only 48 positions"):
        policy_of(model, max_sequence_tokens=49)
    assert policy_of(model, max_sequence_tokens=48).info.max_sequence_tokens == 48


def test_rotary_positions_have_no_end() -> None:
    model = tiny_model("llama", max_position_embeddings=48)
    assert policy_of(model, max_sequence_tokens=64).info.max_sequence_tokens == 64


def test_a_negative_limit_is_none() -> None:
    """XLNet states -1."""
    model, tokenizer = tiny_model(), byte_level()
    model.config.max_position_embeddings, tokenizer.model_max_length = -1, 300
    assert longest_sequence(model, tokenizer) == 300


def test_positions_behind_the_padding() -> None:
    """RoBERTa's table of 514 rows places 512 tokens."""
    model = tiny_model("roberta", is_decoder=True, max_position_embeddings=66, pad_token_id=1)
    assert longest_sequence(model, byte_level()) == 64
