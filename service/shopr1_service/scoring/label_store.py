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
_BLOCK_BYTES = 256  # the place of an end within a block is one byte

_LABEL_BYTES = 220
"""A label without its truth: key, object, and their place in the table."""
_BLOCKS_BYTES = 150
"""A digest of blocks, and the ends behind them."""
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


class PromptDigest(NamedTuple):
    """Key of a prompt; a text and messages never have the same one.

    Attributes:
        blocks: digest of the whole blocks at the beginning of a text; None of messages.
        end: number of the text's bytes behind these.
    """

    whole: bytes
    blocks: bytes | None = None
    end: int = 0


def prompt_digest(prompt: TextPrompt) -> PromptDigest:
    """Digest of a text, or of the canonical JSON of messages."""
    if not isinstance(prompt, str):
        hasher = hashlib.blake2b(digest_size=_DIGEST_BYTES, person=b"messages")
        hasher.update(json.dumps([[m.role, m.content] for m in prompt], ensure_ascii=False).encode())
        return PromptDigest(hasher.digest())
    hasher, data = _text_hasher(), memoryview(prompt.encode())
    end = len(data) % _BLOCK_BYTES
    hasher.update(data[: len(data) - end])
    blocks = hasher.digest()
    hasher.update(data[len(data) - end :])
    return PromptDigest(hasher.digest(), blocks, end)


def _text_hasher() -> "hashlib.blake2b":
    return hashlib.blake2b(digest_size=_DIGEST_BYTES, person=b"text")


@dataclass(frozen=True)
class NewLabels:
    """Labels that one call registers: one for each prompt.

    Attributes:
        labels: by `PromptDigest.whole`.
        ends: of the text prompts, ascending, by `PromptDigest.blocks`.
    """

    labels: dict[bytes, Label]
    ends: dict[bytes, bytes]
    num_truth_bytes: int

    @classmethod
    def collect(cls, labels: Iterable[tuple[TextPrompt, Label]]) -> "NewLabels":
        """The labels by prompt. Takes time in proportion to their text: for many, call it on a thread.

        Raises:
            ContradictionError: two labels of one prompt differ.
        """
        new: dict[bytes, Label] = {}
        positions: dict[bytes, int] = {}
        ends: dict[bytes, bytes] = {}
        for i, (prompt, label) in enumerate(labels):
            checkpoint()
            digest = prompt_digest(prompt)
            first = positions.setdefault(digest.whole, i)
            if new.setdefault(digest.whole, label) != label:
                raise ContradictionError(first, i)
            if (blocks := digest.blocks) is not None and digest.end not in ends.get(blocks, b""):
                ends[blocks] = bytes(sorted((*ends.get(blocks, b""), digest.end)))
        return cls(new, ends, sum(map(_truth_bytes, new.values())))


@dataclass
class _Table:
    """Labels of one run. Attributes as those of `NewLabels`."""

    labels: dict[bytes, Label] = field(default_factory=dict)
    ends: dict[bytes, bytes] = field(default_factory=dict)
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
        self._num_labels = 0

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
        common = new.ends.keys() & table.ends.keys()
        ends = {
            blocks: bytes(sorted({*new.ends[blocks], *table.ends[blocks]}))
            for blocks in common
            if new.ends[blocks] != table.ends[blocks]
        }
        num_blocks = len(table.ends) + len(new.ends) - len(common)
        num_truth_bytes = (
            table.num_truth_bytes + new.num_truth_bytes - sum(map(_truth_bytes, replaced.values()))
        )
        num_bytes = _table_bytes(num_labels, num_blocks, num_truth_bytes)
        self._memory.grow(num_bytes - table.num_bytes)
        self._num_labels += num_labels - len(table.labels)
        table.labels |= new.labels
        table.ends |= new.ends
        table.ends |= ends
        table.num_truth_bytes, table.num_bytes = num_truth_bytes, num_bytes
        if new.labels:
            self._tables[run] = table
        return sum(new.labels[digest] != label for digest, label in replaced.items())

    def get(self, run: str, prompt: TextPrompt) -> Label | None:
        """The run's label of exactly this prompt."""
        return self._table(run).labels.get(prompt_digest(prompt).whole)

    def split(self, run: str, text: str) -> tuple[str, str, Label] | None:
        """The longest text prompt of a run that `text` begins with, the rest of it, and the prompt's label.

        Hashes `text` once, block by block: how many labels there are does not matter.
        """
        table = self._table(run)
        data = memoryview(text.encode(errors="surrogatepass"))  # prompts are Unicode, a completion may not be
        hasher = _text_hasher()
        found: tuple[int, Label] | None = None
        for start in range(0, len(data) + 1, _BLOCK_BYTES):
            for end in table.ends.get(hasher.digest(), b""):
                whole = hasher.copy()
                whole.update(data[start : start + end])
                label = table.labels.get(whole.digest())
                if label is not None and start + end <= len(data):
                    found = start + end, label
            hasher.update(data[start : start + _BLOCK_BYTES])
        if found is None:
            return None
        length, label = found
        return str(data[:length], "utf-8"), str(data[length:], "utf-8", "surrogatepass"), label

    def clear(self, run: str) -> None:
        """Remove all labels of a run."""
        table = self._tables.pop(run, None) or _Table()
        self._memory.grow(-table.num_bytes)
        self._num_labels -= len(table.labels)

    def _table(self, run: str) -> _Table:
        """The run's table; a new one, which is not stored, if it has none."""
        return self._tables.get(run) or _Table()

    def _check_capacity(self, table: _Table, num_labels: int) -> None:
        num_others = self._num_labels - len(table.labels)
        if num_others + num_labels > self._max_labels:
            others = f", {num_others} of them of other runs" if num_others else ""
            raise TooLargeError(f"{num_others + num_labels} labels{others}, max_labels = {self._max_labels}")


def _table_bytes(num_labels: int, num_blocks: int, num_truth_bytes: int) -> int:
    if not num_labels:
        return 0
    return _TABLE_BYTES + _LABEL_BYTES * num_labels + _BLOCKS_BYTES * num_blocks + num_truth_bytes


def _truth_bytes(label: Label) -> int:
    return sys.getsizeof(label.truth)
