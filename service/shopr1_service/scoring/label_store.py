"""Ground truths by run and prompt, for trainers that cannot send a label with a rollout.

Each run has a table of its own: labels that one run registers or removes change no reward of another.

The key of a prompt is a digest: of its text, or of the canonical JSON of its messages. A label takes a few
hundred bytes, regardless of the prompt's length. The tables are in memory.
"""

import hashlib
import json
import sys
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from shopr1_client.errors import TooLargeError
from shopr1_client.wire import Message
from shopr1_rewards import Action
from shopr1_service.concurrency import checkpoint

TextPrompt = str | Sequence[Message]

_DIGEST_BYTES = 16  # of 10^6 prompts, two agree with a probability of 10^-27


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


@dataclass
class _Table:
    """Labels of one run."""

    labels: dict[bytes, Label] = field(default_factory=dict)
    lengths: list[int] = field(default_factory=list)  # of the text prompts in bytes, distinct, ascending


class LabelStore:
    """Labels by run and prompt.

    Args:
        max_labels: capacity, of all runs together.
    """

    def __init__(self, max_labels: int) -> None:
        self._max_labels = max_labels
        self._lock = threading.Lock()
        self._tables: dict[str, _Table] = {}

    def num_labels(self, run: str) -> int:
        """Number of labels of a run."""
        return len(self._table(run).labels)

    def put(self, run: str, labels: Iterable[tuple[TextPrompt, Label]]) -> int:
        """Add labels, replacing those of the same prompts from earlier calls. If it fails, none is added.

        Returns:
            How many labels from earlier calls were replaced by different ones.

        Raises:
            ContradictionError: two labels of one prompt differ.
            TooLargeError: too many labels.
        """
        with self._lock:  # large bodies come on threads
            return self._put(run, labels)

    def _put(self, run: str, labels: Iterable[tuple[TextPrompt, Label]]) -> int:
        table = self._table(run)
        new: dict[bytes, Label] = {}
        positions: dict[bytes, int] = {}
        lengths = set(table.lengths)
        for i, (prompt, label) in enumerate(labels):
            checkpoint()
            digest = prompt_digest(prompt)
            first = positions.setdefault(digest, i)
            if new.setdefault(digest, label) != label:
                raise ContradictionError(first, i)
            if isinstance(prompt, str):
                lengths.add(len(prompt.encode()))
        self._check_capacity(table, sum(digest not in table.labels for digest in new))
        num_changed = sum(table.labels.get(digest, label) != label for digest, label in new.items())
        table.labels |= new
        table.lengths = sorted(lengths)
        if new:
            self._tables[run] = table
        return num_changed

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
        self._tables.pop(run, None)

    def _table(self, run: str) -> _Table:
        """The run's table; a new one, which is not stored, if it has none."""
        return self._tables.get(run) or _Table()

    def _check_capacity(self, table: _Table, num_new: int) -> None:
        num_held = sum(len(each.labels) for each in self._tables.values())
        if num_held + num_new > self._max_labels:
            num_others = num_held - len(table.labels)
            others = f", {num_others} of them of other runs" if num_others else ""
            raise TooLargeError(f"{num_held + num_new} labels{others}, max_labels = {self._max_labels}")
