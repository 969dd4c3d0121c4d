"""Ground truths by run and prompt, for trainers that cannot send a label with a rollout.

Each run has a table of its own: labels that one run registers or removes change no reward of another.

The key of a prompt is a digest: of its text, or of the canonical JSON of its messages. A label takes a few
hundred bytes, regardless of the prompt's length. The tables are in memory.
"""

import hashlib
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from shopr1_client.errors import TooLargeError
from shopr1_client.wire import Message
from shopr1_rewards import Action
from shopr1_service.concurrency import checkpoint
from shopr1_service.memory.budget import Account, MemoryBudget

TextPrompt = str | Sequence[Message]

_DIGEST_BYTES = 16  # of 10^6 prompts, two agree with a probability of 10^-27


_LABEL_BYTES = 220
"""A label without its truth: key, object, and their place in the table."""
_LENGTH_BYTES = 40
_TABLE_BYTES = 600


class Label(NamedTuple):
    """The human's action, validated against the recipe that will score it."""

    truth: str
    """The action as canonical JSON: equal for equal actions, and smaller than an object."""
    recipe: str

    @classmethod
    def of(cls, action: Action, recipe: str) -> "Label":
        """The label of an action."""
        truth = json.dumps(action.to_dict(), ensure_ascii=False)
        return cls(truth, sys.intern(recipe))

    def __str__(self) -> str:
        return f"{self.truth:.200} (recipe {self.recipe!r})"


class ContradictionError(ValueError):
    """Two different labels of one prompt in one call.

    Attributes:
        first, second: their positions in the call.
    """

    def __init__(self, first: int, second: int) -> None:
        super().__init__(f"labels {first} and {second} of one prompt differ")
        self.first, self.second = first, second


def prompt_digest(prompt: TextPrompt) -> bytes:
    """Key of a prompt; a text and messages never have the same one."""
    if isinstance(prompt, str):
        hasher, data = _text_hasher(), prompt
    else:
        hasher = hashlib.blake2b(digest_size=_DIGEST_BYTES, person=b"messages")
        data = json.dumps([[m.role, m.content] for m in prompt], ensure_ascii=False)
    hasher.update(data.encode())
    return hasher.digest()


def _text_hasher() -> "hashlib.blake2b":
    return hashlib.blake2b(digest_size=_DIGEST_BYTES, person=b"text")


@dataclass(frozen=True)
class NewLabels:
    """Labels that one call registers: one for each prompt.

    Attributes:
        labels: by `prompt_digest`.
        lengths: of the text prompts, in bytes.
    """

    labels: dict[bytes, Label]
    lengths: frozenset[int]
    num_truth_bytes: int

    @classmethod
    def collect(cls, labels: Iterable[tuple[TextPrompt, Label]]) -> "NewLabels":
        """The labels by prompt. Takes time in proportion to their text: for many, call it on a thread.

        Raises:
            ContradictionError: two labels of one prompt differ.
        """
        new: dict[bytes, Label] = {}
        positions: dict[bytes, int] = {}
        lengths: set[int] = set()
        for i, (prompt, label) in enumerate(labels):
            checkpoint()
            digest = prompt_digest(prompt)
            first = positions.setdefault(digest, i)
            if new.setdefault(digest, label) != label:
                raise ContradictionError(first, i)
            if isinstance(prompt, str):
                lengths.add(len(prompt.encode()))
        return cls(new, frozenset(lengths), sum(map(_truth_bytes, new.values())))


@dataclass
class _Table:
    """Labels of one run."""

    labels: dict[bytes, Label] = field(default_factory=dict)
    lengths: list[int] = field(default_factory=list)  # of the text prompts in bytes, distinct, ascending
    num_truth_bytes: int = 0
    num_bytes: int = 0


class LabelStore:
    """Labels by run and prompt.

    Args:
        max_labels: capacity, of all runs together.
        memory: counts the labels.
    """

    def __init__(self, max_labels: int, memory: MemoryBudget) -> None:
        self._max_labels = max_labels
        self._memory = memory.hold(Account.LABELS)
        self._tables: dict[str, _Table] = {}

    def num_labels(self, run: str) -> int:
        """Number of labels of a run."""
        return len(self._table(run).labels)

    def put(self, run: str, new: NewLabels) -> int:
        """Add labels, replacing those of the same prompts from earlier calls. If it fails, none is added.

        Returns:
            How many labels from earlier calls were replaced by different ones.

        Raises:
            TooLargeError: too many labels, or no memory for them.
        """
        table = self._table(run)
        replaced = {digest: table.labels[digest] for digest in new.labels.keys() & table.labels.keys()}
        num_labels = len(table.labels) + len(new.labels) - len(replaced)
        self._check_capacity(table, num_labels)
        lengths = new.lengths.union(table.lengths)
        num_truth_bytes = (
            table.num_truth_bytes + new.num_truth_bytes - sum(map(_truth_bytes, replaced.values()))
        )
        num_bytes = _table_bytes(num_labels, len(lengths), num_truth_bytes)
        self._memory.grow(num_bytes - table.num_bytes)
        table.labels |= new.labels
        table.lengths = sorted(lengths)
        table.num_truth_bytes, table.num_bytes = num_truth_bytes, num_bytes
        if new.labels:
            self._tables[run] = table
        return sum(new.labels[digest] != label for digest, label in replaced.items())

    def get(self, run: str, prompt: TextPrompt) -> Label | None:
        """The run's label of exactly this prompt."""
        return self._table(run).labels.get(prompt_digest(prompt))

    def split(self, run: str, text: str) -> tuple[str, str, Label] | None:
        """The longest text prompt of a run that `text` begins with, the rest of it, and the prompt's label.

        Hashes `text` once: the digest of each prefix extends that of the shorter one.
        """
        table = self._table(run)
        data = text.encode(errors="surrogatepass")  # prompts are Unicode, a completion may not be
        hasher, done = _text_hasher(), 0
        found: tuple[int, Label] | None = None
        for length in table.lengths:
            if length > len(data):
                break
            hasher.update(data[done:length])
            done = length
            if (label := table.labels.get(hasher.digest())) is not None:
                found = length, label
        if found is None:
            return None
        length, label = found
        return data[:length].decode(), data[length:].decode(errors="surrogatepass"), label

    def clear(self, run: str) -> None:
        """Remove all labels of a run."""
        self._memory.grow(-self._table(run).num_bytes)
        self._tables.pop(run, None)

    def _table(self, run: str) -> _Table:
        """The run's table; a new one, which is not stored, if it has none."""
        return self._tables.get(run) or _Table()

    def _check_capacity(self, table: _Table, num_labels: int) -> None:
        num_others = sum(len(each.labels) for each in self._tables.values()) - len(table.labels)
        if num_others + num_labels > self._max_labels:
            others = f", {num_others} of them of other runs" if num_others else ""
            raise TooLargeError(f"{num_others + num_labels} labels{others}, max_labels = {self._max_labels}")


def _table_bytes(num_labels: int, num_lengths: int, num_truth_bytes: int) -> int:
    if not num_labels:
        return 0
    return _TABLE_BYTES + _LABEL_BYTES * num_labels + _LENGTH_BYTES * num_lengths + num_truth_bytes


def _truth_bytes(label: Label) -> int:
    return sys.getsizeof(label.truth)
