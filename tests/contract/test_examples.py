"""The example sessions: their coverage, and the terms of each rollout, computed by hand."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from shopr1_client.wire import Group
from shopr1_rewards import FormatError, Judgement, judge, load_recipe, read_ground_truth, total

SESSIONS = Path(__file__).parents[2] / "examples" / "sessions.jsonl"
GROUPS = [Group.model_validate_json(line) for line in SESSIONS.read_bytes().splitlines()]
RECIPE = load_recipe("shop_r1")

# Format, type, attribute and value, with the computation of the value in a comment.
EXPECTED_TERMS: dict[str, list[tuple[float, float, float, float]]] = {
    # The human typed "stoneware mug set of 4" (5 words) into nav_bar.search_input (4 words).
    "search": [
        (0.5, 0.3, 0.2, 1000.1),  # 0.1 · 1 + 1000 · 1
        (0.5, 0.3, 0.2, 800.1),  # "… set of 6": 4 of 5 words, 0.8; 0.1 · 1 + 1000 · 0.8
        (0.5, 0.3, 0.2, 1000.0),  # search_button: 3 of 4 words = 0.75, not above the threshold of 0.75
        (0.5, 0.3, 0.2, 0.1),  # "stoneware mug set": 2 · 3 / (3 + 5) = 0.75, not above it either
        (0.5, 0.0, 0.0, 0.0),  # click
        (0.5, 0.3, 0.1, 0.1),  # no text
        (0.0, 0.0, 0.0, 0.0),  # truncated
    ],
    # The human clicked results.blue_stoneware_mug.view_product (6 words).
    "pick": [
        (0.5, 0.3, 0.2, 1000.0),
        (0.5, 0.3, 0.2, 2500 / 3),  # white: 5 of 6 words, 1000 · 5/6
        (0.5, 0.3, 0.2, 0.0),  # add_to_wishlist: 2 · 4 / (7 + 6) = 0.62
        (0.5, 0.3, 0.0, 0.0),  # an empty name
        (0.5, 0.0, 0.0, 0.0),  # terminate
        (0.0, 0.0, 0.0, 0.0),  # text and a fence around the object
        (0.0, 0.0, 0.0, 0.0),  # two rationales
    ],
    # The human left.
    "leave": [
        (0.5, 0.3, 0.0, 0.0),
        (0.5, 0.3, 0.0, 0.0),  # in Chinese
        (0.5, 0.0, 0.0, 0.0),  # click
        (0.5, 0.0, 0.0, 0.0),  # scroll, an unknown action
        (0.5, 0.3, 0.0, 0.0),  # an empty rationale
        (0.0, 0.0, 0.0, 0.0),  # a list as rationale
    ],
}
NO_RATIONALE = ("leave", 4)
"""The only valid rollout without self-certainty."""


def judgements() -> Iterator[tuple[str, int, Judgement]]:
    for group in GROUPS:
        truth = read_ground_truth(group.ground_truth, RECIPE)
        for i, completion in enumerate(group.completions):
            assert isinstance(completion, str)
            yield str(group.id), i, judge(completion, truth, RECIPE)


@pytest.mark.parametrize(
    ("name", "i", "judgement"), [pytest.param(*case, id=f"{case[0]} {case[1]}") for case in judgements()]
)
def test_terms_of_each_rollout(name: str, i: int, judgement: Judgement) -> None:
    assert list(judgement.earned) == ["format", "action_type", "attribute", "value", "self_certainty"]
    assert tuple(judgement.earned.values()) == pytest.approx((*EXPECTED_TERMS[name][i], 0.0), rel=1e-12)
    assert total(judgement.earned) == pytest.approx(sum(EXPECTED_TERMS[name][i]), rel=1e-12)
    has_certainty = judgement.failure is None and (name, i) != NO_RATIONALE
    assert (judgement.certainty_span is not None) is has_certainty


def test_the_table_covers_all_sessions() -> None:
    assert {str(group.id): len(group.completions) for group in GROUPS} == {
        name: len(rows) for name, rows in EXPECTED_TERMS.items()
    }


def test_number_of_examples() -> None:
    assert len({str(group.prompt) for group in GROUPS}) >= 3
    assert sum(len(group.completions) for group in GROUPS) >= 12


def test_every_action_type_is_a_ground_truth() -> None:
    truths = {read_ground_truth(group.ground_truth, RECIPE).type for group in GROUPS}
    assert truths == set(RECIPE.action_space.types)
    assert {type(group.ground_truth) for group in GROUPS} == {dict, str}


def test_every_kind_of_mistake_is_shown() -> None:
    errors, mistakes = set(), set()
    for _, _, judgement in judgements():
        if judgement.failure is not None:
            errors.add(judgement.failure.error)
            continue
        assert judgement.prediction is not None
        attributes = judgement.prediction.action.attributes
        mistakes |= {
            "unknown type" if not judgement.prediction.is_known_type else "",
            "wrong type" if not judgement.is_type_match else "right type",
            *("absent" if n not in attributes else "empty" for n in judgement.prediction.missing_attributes),
            *("unlike" if 0 < s < 0.75 else "" for s in judgement.similarity.values()),
            *("at the threshold" if s == 0.75 else "" for s in judgement.similarity.values()),
            *("alike" if 0.75 < s < 1 else "" for s in judgement.similarity.values()),
            "exact" if judgement.is_exact_match else "",
            "no rationale" if judgement.certainty_span is None else "",
        }
    assert errors == {
        FormatError.INVALID_JSON,
        FormatError.EXTRA_TEXT,
        FormatError.DUPLICATE_KEY,
        FormatError.WRONG_TYPE,
    }
    assert mistakes - {""} == {
        *("unknown type", "wrong type", "right type", "absent", "empty"),
        *("unlike", "at the threshold", "alike", "exact", "no rationale"),
    }
