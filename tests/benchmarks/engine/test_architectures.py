"""Rows of the table of architectures: compared, refused, without sizes, and out of time."""

import sys
from pathlib import Path

import pytest

from benchmarks.engine import architectures as command
from benchmarks.engine.architecture_row import Row, compare
from benchmarks.engine.architectures import TABLE, run, table, table_lines
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
        (
            Architecture("xlnet", "XLNetLMHeadModel"),
            "refused",
            "architecture 'xlnet' has no next-token logits",
        ),
        (Architecture("no_such_kind", "NoSuchClass"), "not built", "ValueError"),
        (Architecture("evolla", "EvollaForProteinText2Text", True), "not built", "transformers lists it"),
    ],
)
def test_others_say_why(architecture: Architecture, outcome: str, remark: str) -> None:
    row = compare(architecture)
    assert row.outcome == outcome
    assert row.remarks[0].startswith(remark)


def test_a_row_that_takes_too_long_is_given_up() -> None:
    row = run(LLAMA, limit_s=0.0)
    assert (row.outcome, row.remarks) == ("failed", ["no result after 0 s"])


EXACT = Row("b", "B", False, "exact", "linear", "expanded", 1e-6, 2e-6, 1e-3, 450, 1.25, ["x | y"])
LINES = {
    "a (text of image-text)": "| a (text of image-text) | not built |  |  |  |  |  |\n",
    "b": "| b | exact | expanded, linear | 1.0e-06 | 2.0e-06 | 1.2 | "
    "x \\| y; eager and sdpa differ by 1.0e-03 nats in fp64 |\n",
}


def test_table() -> None:
    assert command._line(EXACT) == LINES["b"]
    text = table(LINES.values())
    assert "2 architectures: 1 not built, 1 exact." in text
    assert text.endswith(LINES["b"] + LINES["a (text of image-text)"])
    assert table_lines(text) == LINES


def test_single_rows_are_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "table.md"
    file.write_text(table([*LINES.values(), "| llama | failed |  |  |  |  | no |\n"]), "utf-8")
    monkeypatch.setattr(command, "TABLE", file)
    monkeypatch.setattr(
        command, "run", lambda each, _limit_s: Row(each.kind, each.class_name, False, "exact")
    )
    monkeypatch.setattr(sys, "argv", ["architectures", "llama"])
    command.main()
    assert table_lines(file.read_text("utf-8")) == {**LINES, "llama": "| llama | exact |  |  |  |  |  |\n"}


def test_the_committed_table_has_a_row_for_each_and_no_wrong_one() -> None:
    text = TABLE.read_text("utf-8")
    lines = table_lines(text)
    assert lines.keys() == {command._name(Row(a.kind, "", a.is_image_text, "")) for a in architectures()}
    assert table(lines.values()) == text
    assert {command._outcome(line) for line in lines.values()} <= {
        "exact",
        "ties",
        "refused",
        "not built",
        "failed",
    }
