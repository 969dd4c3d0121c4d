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


def table(*known: str, max_labels: int = 1000) -> LabelStore:
    """A table in which each prompt's label is of its own name."""
    table = LabelStore(max_labels)
    table.put([(prompt, label(prompt)) for prompt in known])
    return table


@given(st.lists(prompts, max_size=8), texts)
def test_split_finds_the_longest_beginning(known: list[str], text: str) -> None:
    beginnings = [prompt for prompt in known if text.startswith(prompt)]
    longest = max(beginnings, key=len, default=None)
    expected = None if longest is None else (longest, text.removeprefix(longest), label(longest))
    assert table(*known).split(text) == expected


@given(st.lists(prompts, max_size=8), st.lists(prompts, max_size=8))
def test_get_finds_exactly_what_was_put(known: list[str], others: list[str]) -> None:
    of_known = table(*known)
    assert len(of_known) == len(set(known))
    for prompt in {*known, *others}:
        assert of_known.get(prompt) == (label(prompt) if prompt in known else None)


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
    of_messages.put([(MESSAGES, label("x"))])
    assert of_messages.split('[["user", "a"], ["assistant", "b"]] and more') is None
    assert of_messages.get(MESSAGES) == label("x")


def test_a_newer_label_takes_the_place_of_the_old() -> None:
    of_a = table("a", "b")
    of_a.put([("a", label("new"))])
    assert len(of_a) == 2
    assert of_a.get("a") == label("new")
    assert of_a.split("ab") == ("a", "b", label("new"))


def test_two_labels_of_one_prompt_are_refused_as_a_whole() -> None:
    of_a = table("a", "b")
    with pytest.raises(ContradictionError) as caught:
        of_a.put([("c", label("c")), ("a", label("old")), ("a", label("new"))])
    assert (caught.value.first, caught.value.second) == (1, 2)
    assert (len(of_a), of_a.get("a"), of_a.get("c")) == (2, label("a"), None)
    of_a.put([("a", label("new")), ("a", label("new"))])
    assert of_a.get("a") == label("new")


def test_too_many_labels_are_refused_as_a_whole() -> None:
    full = table("a", "b", max_labels=3)
    with pytest.raises(TooLargeError, match="4 labels, max_labels = 3"):
        full.put([("a", label("new")), ("c", label("c")), ("d", label("d"))])
    assert len(full) == 2
    assert full.get("a") == label("a")
    assert full.split("cd") is None
    full.put([("c", label("c"))])
    assert len(full) == 3


def test_clear() -> None:
    cleared = table("a", "ab")
    cleared.clear()
    assert len(cleared) == 0
    assert cleared.split("abc") is None
    assert cleared.get("a") is None
    cleared.put([("a", label("a"))])
    assert cleared.split("abc") == ("a", "bc", label("a"))
