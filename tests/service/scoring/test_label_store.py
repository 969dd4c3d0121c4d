"""Labels by prompt, against a search of all prompts."""

import contextlib
import gc
import json
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shopr1_client.errors import TooLargeError
from shopr1_client.wire import Message
from shopr1_rewards import Action
from shopr1_service.memory.budget import Account, MemoryBudget
from shopr1_service.scoring.label_store import (
    ContradictionError,
    Label,
    LabelStore,
    NewLabels,
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
    table = LabelStore(max_labels, MemoryBudget())
    table.put(RUN, NewLabels.collect([(prompt, label(prompt)) for prompt in known]))
    return table


@given(st.lists(prompts, max_size=8), texts)
def test_split_finds_the_longest_beginning(known: list[str], text: str) -> None:
    beginnings = [prompt for prompt in known if text.startswith(prompt)]
    longest = max(beginnings, key=len, default=None)
    expected = None if longest is None else (longest, text.removeprefix(longest), label(longest))
    assert table(*known).split(RUN, text) == expected


@given(
    st.lists(st.tuples(st.sampled_from(["", "a", "é"]), st.integers(0, 3), st.integers(-2, 2)), max_size=8),
    st.integers(0, 1000),
)
def test_split_finds_prompts_of_several_blocks(
    places: list[tuple[str, int, int]], num_characters: int
) -> None:
    """Prompts that end near the end of a block, and a text of the same characters."""
    known = [
        begin + "a" * (256 * num_blocks + offset - len(begin.encode()))
        for begin, num_blocks, offset in places
        if 256 * num_blocks + offset > len(begin.encode())
    ]
    store = table(*known[::2])
    store.put(RUN, NewLabels.collect([(prompt, label(prompt)) for prompt in known[1::2]]))
    for begin in ("", "a", "é"):
        text = begin + "a" * num_characters
        longest = max((prompt for prompt in known if text.startswith(prompt)), key=len, default=None)
        expected = None if longest is None else (longest, text.removeprefix(longest), label(longest))
        assert store.split(RUN, text) == expected


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
    of_messages = LabelStore(9, MemoryBudget())
    of_messages.put(RUN, NewLabels.collect([(MESSAGES, label("x"))]))
    assert of_messages.split(RUN, '[["user", "a"], ["assistant", "b"]] and more') is None
    assert of_messages.get(RUN, MESSAGES) == label("x")


def test_a_newer_label_takes_the_place_of_the_old() -> None:
    of_a = table("a", "b")
    of_a.put(RUN, NewLabels.collect([("a", label("new"))]))
    assert of_a.num_labels(RUN) == 2
    assert of_a.get(RUN, "a") == label("new")
    assert of_a.split(RUN, "ab") == ("a", "b", label("new"))


def test_two_labels_of_one_prompt_are_refused_as_a_whole() -> None:
    of_a = table("a", "b")
    with pytest.raises(ContradictionError) as caught:
        of_a.put(RUN, NewLabels.collect([("c", label("c")), ("a", label("old")), ("a", label("new"))]))
    assert (caught.value.first, caught.value.second) == (1, 2)
    assert (of_a.num_labels(RUN), of_a.get(RUN, "a"), of_a.get(RUN, "c")) == (2, label("a"), None)
    of_a.put(RUN, NewLabels.collect([("a", label("new")), ("a", label("new"))]))
    assert of_a.get(RUN, "a") == label("new")


def test_too_many_labels_are_refused_as_a_whole() -> None:
    full = table("a", "b", max_labels=3)
    with pytest.raises(TooLargeError, match="4 labels, max_labels = 3"):
        full.put(RUN, NewLabels.collect([("a", label("new")), ("c", label("c")), ("d", label("d"))]))
    assert full.num_labels(RUN) == 2
    assert full.get(RUN, "a") == label("a")
    assert full.split(RUN, "cd") is None
    full.put(RUN, NewLabels.collect([("c", label("c"))]))
    assert full.num_labels(RUN) == 3


def test_clear() -> None:
    cleared = table("a", "ab")
    cleared.clear(RUN)
    assert cleared.num_labels(RUN) == 0
    assert cleared.split(RUN, "abc") is None
    assert cleared.get(RUN, "a") is None
    cleared.put(RUN, NewLabels.collect([("a", label("a"))]))
    assert cleared.split(RUN, "abc") == ("a", "bc", label("a"))


# --- runs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("other", ["", "grpo-8", "grpo"])
def test_runs_have_labels_of_their_own(other: str) -> None:
    store = table("a", "ab")
    assert (store.num_labels(other), store.get(other, "a"), store.split(other, "abc")) == (0, None, None)
    assert store.put(other, NewLabels.collect([("a", label("theirs"))])) == 0  # replaces none
    assert store.split(other, "abc") == ("a", "bc", label("theirs"))
    assert store.split(RUN, "abc") == ("ab", "c", label("ab"))
    store.clear(other)
    assert (store.num_labels(other), store.num_labels(RUN)) == (0, 2)
    assert store.get(RUN, "a") == label("a")


def test_runs_share_the_capacity() -> None:
    full = table("a", "b", max_labels=3)
    with pytest.raises(TooLargeError, match="4 labels, 2 of them of other runs, max_labels = 3"):
        full.put("other", NewLabels.collect([("a", label("a")), ("b", label("b"))]))
    assert full.num_labels("other") == 0
    full.clear(RUN)
    full.put("other", NewLabels.collect([(prompt, label(prompt)) for prompt in "abc"]))
    assert full.num_labels("other") == 3


def test_a_run_without_labels_takes_no_memory() -> None:
    store = table("a")
    for i in range(100):
        store.put(f"run-{i}", NewLabels.collect([]))
        assert store.get(f"run-{i}", "a") is None
    assert store._tables.keys() == {RUN}


# --- memory -----------------------------------------------------------------------------------------


def test_memory_is_counted() -> None:
    memory = MemoryBudget()
    texts = [(f"prompt {i}" + "a" * i, label(f"name {i}" * 3)) for i in range(2000)]
    gc.collect()
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    store = LabelStore(10**6, memory)
    for start in range(0, 2000, 500):
        made = [
            (prompt, Label.of(Action("click", {"name": f"{prompt:.20}"}), "shop_r1"))
            for prompt, _ in texts[start : start + 500]
        ]
        store.put(RUN, NewLabels.collect(made))
        del made
    gc.collect()
    taken = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert 0.8 <= memory.num_bytes(Account.LABELS) / taken <= 1.6
    store.clear(RUN)
    assert memory.num_bytes(Account.LABELS) == 0


PUTS = st.lists(
    st.tuples(st.sampled_from(["", RUN]), st.dictionaries(prompts, texts, max_size=6), st.booleans()),
    max_size=12,
)


@given(puts=PUTS)
def test_any_changes_are_counted_as_the_tables_that_they_leave(
    puts: list[tuple[str, dict[str, str], bool]],
) -> None:
    memory = MemoryBudget(40_000)
    store = LabelStore(20, memory)
    held: dict[str, dict[str, str]] = {"": {}, RUN: {}}
    for run, names, is_cleared in puts:
        if is_cleared:
            store.clear(run)
            held[run] = {}
        with contextlib.suppress(TooLargeError):
            store.put(run, NewLabels.collect([(prompt, label(name)) for prompt, name in names.items()]))
            held[run] |= names
        fresh_memory = MemoryBudget()
        fresh = LabelStore(100, fresh_memory)
        for each, own in held.items():
            fresh.put(each, NewLabels.collect([(prompt, label(name)) for prompt, name in own.items()]))
        assert memory.num_bytes(Account.LABELS) == fresh_memory.num_bytes(Account.LABELS)


def test_labels_without_memory_are_refused_as_a_whole() -> None:
    memory = MemoryBudget(4000)
    store = LabelStore(100, memory)
    store.put(RUN, NewLabels.collect([("a", label("a"))]))
    held = memory.num_bytes(Account.LABELS)
    with pytest.raises(TooLargeError, match="max_client_memory_bytes = 4000"):
        store.put(RUN, NewLabels.collect([("b", label("b")), ("c", label("c" * 3000))]))
    assert (store.num_labels(RUN), store.get(RUN, "b"), memory.num_bytes(Account.LABELS)) == (1, None, held)
