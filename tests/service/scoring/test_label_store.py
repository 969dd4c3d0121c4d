"""Labels by prompt, against a search of all prompts."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shopr1_client.errors import TooLargeError
from shopr1_client.wire import Message
from shopr1_rewards import Action
from shopr1_service.scoring.label_store import (
    ContradictionError,
    Label,
    LabelStore,
    TextPrompt,
    prompt_digest,
)

# Characters of one to four bytes, two of which begin with the same byte, and half a surrogate pair.
ALPHABET = "abéê漢😀"
prompts = st.text(ALPHABET, min_size=1, max_size=6)
texts = st.text(ALPHABET + "\ud83d", max_size=12)


def label(name: str) -> Label:
    return Label.of(Action("click", {"name": name}), "shop_r1")


RUN = "grpo-7"


def table(*known: str, max_labels: int = 1000) -> LabelStore:
    """A store in which each prompt's label of one run is of its own name."""
    table = LabelStore(max_labels)
    table.put(RUN, [(prompt, label(prompt)) for prompt in known])
    return table


@given(st.lists(prompts, max_size=8), texts)
def test_split_finds_the_longest_beginning(known: list[str], text: str) -> None:
    beginnings = [prompt for prompt in known if text.startswith(prompt)]
    longest = max(beginnings, key=len, default=None)
    expected = None if longest is None else (longest, text.removeprefix(longest), label(longest))
    assert table(*known).split(RUN, text) == expected


@given(st.lists(prompts, max_size=8), st.lists(prompts, max_size=8))
def test_get_finds_exactly_what_was_put(known: list[str], others: list[str]) -> None:
    of_known = table(*known)
    assert of_known.num_labels(RUN) == len(set(known))
    for prompt in {*known, *others}:
        assert of_known.get(RUN, prompt) == (label(prompt) if prompt in known else None)


def test_a_label_is_canonical() -> None:
    first = Label.of(Action("click", {"name": "é"}), "mine")
    assert first == Label.of(Action("click", {"name": "é"}), "mine")
    assert json.loads(first.truth) == {"type": "click", "name": "é"}
    assert first.recipe == "mine"
    assert first != Label.of(Action("click", {"name": "e"}), "mine")
    assert first != Label.of(Action("click", {"name": "é"}), "other")


MESSAGES = [Message(role="user", content="a"), Message(role="assistant", content="b")]
# A naive concatenation of the parts would give some of these the same key.
ALIKE: list[TextPrompt] = [
    "",
    "[]",
    [],
    '[["user", "a"], ["assistant", "b"]]',
    MESSAGES,
    MESSAGES[::-1],
    MESSAGES[:1],
    [Message(role="user", content="ab")],
    [Message(role="usera", content="")],
    [Message(role="user", content='a"], ["assistant", "b')],
]


def test_prompts_are_distinguished() -> None:
    assert len({prompt_digest(prompt) for prompt in ALIKE}) == len(ALIKE)
    assert prompt_digest(list(MESSAGES)) == prompt_digest(tuple(MESSAGES))


def test_messages_are_no_beginning_of_a_text() -> None:
    of_messages = LabelStore(9)
    of_messages.put(RUN, [(MESSAGES, label("x"))])
    assert of_messages.split(RUN, '[["user", "a"], ["assistant", "b"]] and more') is None
    assert of_messages.get(RUN, MESSAGES) == label("x")


def test_a_newer_label_takes_the_place_of_the_old() -> None:
    of_a = table("a", "b")
    of_a.put(RUN, [("a", label("new"))])
    assert of_a.num_labels(RUN) == 2
    assert of_a.get(RUN, "a") == label("new")
    assert of_a.split(RUN, "ab") == ("a", "b", label("new"))


def test_two_labels_of_one_prompt_are_refused_as_a_whole() -> None:
    of_a = table("a", "b")
    with pytest.raises(ContradictionError) as caught:
        of_a.put(RUN, [("c", label("c")), ("a", label("old")), ("a", label("new"))])
    assert (caught.value.first, caught.value.second) == (1, 2)
    assert (of_a.num_labels(RUN), of_a.get(RUN, "a"), of_a.get(RUN, "c")) == (2, label("a"), None)
    of_a.put(RUN, [("a", label("new")), ("a", label("new"))])
    assert of_a.get(RUN, "a") == label("new")


def test_too_many_labels_are_refused_as_a_whole() -> None:
    full = table("a", "b", max_labels=3)
    with pytest.raises(TooLargeError, match="4 labels, max_labels = 3"):
        full.put(RUN, [("a", label("new")), ("c", label("c")), ("d", label("d"))])
    assert full.num_labels(RUN) == 2
    assert full.get(RUN, "a") == label("a")
    assert full.split(RUN, "cd") is None
    full.put(RUN, [("c", label("c"))])
    assert full.num_labels(RUN) == 3


def test_clear() -> None:
    cleared = table("a", "ab")
    cleared.clear(RUN)
    assert cleared.num_labels(RUN) == 0
    assert cleared.split(RUN, "abc") is None
    assert cleared.get(RUN, "a") is None
    cleared.put(RUN, [("a", label("a"))])
    assert cleared.split(RUN, "abc") == ("a", "bc", label("a"))


# --- runs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("other", ["", "grpo-8", "grpo"])
def test_runs_have_labels_of_their_own(other: str) -> None:
    store = table("a", "ab")
    assert (store.num_labels(other), store.get(other, "a"), store.split(other, "abc")) == (0, None, None)
    assert store.put(other, [("a", label("theirs"))]) == 0  # replaces none
    assert store.split(other, "abc") == ("a", "bc", label("theirs"))
    assert store.split(RUN, "abc") == ("ab", "c", label("ab"))
    store.clear(other)
    assert (store.num_labels(other), store.num_labels(RUN)) == (0, 2)
    assert store.get(RUN, "a") == label("a")


def test_runs_share_the_capacity() -> None:
    full = table("a", "b", max_labels=3)
    with pytest.raises(TooLargeError, match="4 labels, 2 of them of other runs, max_labels = 3"):
        full.put("other", [("a", label("a")), ("b", label("b"))])
    assert full.num_labels("other") == 0
    full.clear(RUN)
    full.put("other", [(prompt, label(prompt)) for prompt in "abc"])
    assert full.num_labels("other") == 3


def test_a_run_without_labels_takes_no_memory() -> None:
    store = table("a")
    for i in range(100):
        store.put(f"run-{i}", [])
        assert store.get(f"run-{i}", "a") is None
    assert store._tables.keys() == {RUN}
