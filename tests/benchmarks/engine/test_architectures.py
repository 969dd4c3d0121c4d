"""Rows of the table of architectures: compared, refused, without sizes, and out of time."""

import pytest

from benchmarks.engine.architecture_row import Row, compare
from benchmarks.engine.architectures import run, table
from benchmarks.engine.tiny_architectures import Architecture, architectures

LLAMA = Architecture("llama", "LlamaForCausalLM")


def test_all_architectures_are_named_once() -> None:
    kinds = [each.kind for each in architectures()]
    assert len(kinds) == len(set(kinds)) > 200
    assert {"llama", "gpt2", "qwen2_5_vl"} <= set(kinds)


def test_an_exact_one() -> None:
    row = compare(LLAMA)
    assert (row.outcome, row.head, row.forward) == ("exact", "linear", "shared_prefix")
    assert row.error_nats is not None
    assert row.error_nats < 1e-4
    assert row.num_values > 100


@pytest.mark.parametrize(
    ("architecture", "outcome", "remark"),
    [
        (Architecture("cpmant", "CpmAntForCausalLM"), "refused", "CpmAntForCausalLM is not causal"),
        (Architecture("no_such_kind", "NoSuchClass"), "not built", "ValueError"),
    ],
)
def test_others_say_why(architecture: Architecture, outcome: str, remark: str) -> None:
    row = compare(architecture)
    assert row.outcome == outcome
    assert row.remarks[0].startswith(remark)


def test_a_row_that_takes_too_long_is_given_up() -> None:
    row = run(LLAMA, limit_s=0.0)
    assert (row.outcome, row.remarks) == ("failed", ["no result after 0 s"])


def test_table() -> None:
    exact = Row("b", "B", False, "exact", "linear", "packed", 1e-6, 2e-6, 1e-3, 450, 1.25, ["x | y"])
    text = table([Row("a", "A", True, "not built"), exact])
    assert "2 architectures: 1 not built, 1 exact." in text
    assert text.splitlines()[-2:] == [
        "| b | exact | packed, linear | 1.0e-06 | 2.0e-06 | 1.2 | "
        "x \\| y; eager and sdpa differ by 1.0e-03 nats in fp64 |",
        "| a (text of image-text) | not built |  |  |  |  |  |",
    ]
