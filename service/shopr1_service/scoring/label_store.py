"""Ground truths by prompt, for trainers that cannot send a label with a rollout.

The key of a prompt is a digest: of its text, or of the canonical JSON of its messages. A label takes a few
hundred bytes, regardless of the prompt's length. The table is in memory and belongs to the event loop.
"""

import hashlib
import json
import sys
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from shopr1_client.errors import TooLargeError
from shopr1_client.wire import Message
from shopr1_rewards import Action

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


class LabelStore:
    """Labels by prompt.

    Args:
        max_labels: capacity.
    """

    def __init__(self, max_labels: int) -> None:
        self._max_labels = max_labels
        self._labels: dict[bytes, Label] = {}
        self._lengths: list[int] = []  # of the text prompts in bytes, distinct, ascending

    def __len__(self) -> int:
        return len(self._labels)

    def put(self, labels: Iterable[tuple[TextPrompt, Label]]) -> int:
        """Add labels, replacing those of the same prompts from earlier calls. If it fails, none is added.

        Returns:
            How many labels from earlier calls were replaced by different ones.

        Raises:
            ContradictionError: two labels of one prompt differ.
            TooLargeError: too many labels.
        """
        new: dict[bytes, Label] = {}
        positions: dict[bytes, int] = {}
        lengths = set(self._lengths)
        for i, (prompt, label) in enumerate(labels):
            digest = prompt_digest(prompt)
            first = positions.setdefault(digest, i)
            if new.setdefault(digest, label) != label:
                raise ContradictionError(first, i)
            if isinstance(prompt, str):
                lengths.add(len(prompt.encode()))
        num_labels = len(self) + sum(digest not in self._labels for digest in new)
        if num_labels > self._max_labels:
            raise TooLargeError(f"{num_labels} labels, max_labels = {self._max_labels}")
        num_changed = sum(self._labels.get(digest, label) != label for digest, label in new.items())
        self._labels |= new
        self._lengths = sorted(lengths)
        return num_changed

    def get(self, prompt: TextPrompt) -> Label | None:
        """The label of exactly this prompt."""
        return self._labels.get(prompt_digest(prompt))

    def split(self, text: str) -> tuple[str, str, Label] | None:
        """The longest text prompt that `text` begins with, the rest of `text`, and the prompt's label.

        Hashes `text` once: the digest of each prefix extends that of the shorter one.
        """
        data = text.encode(errors="surrogatepass")  # prompts are Unicode, a completion may not be
        hasher, done = _text_hasher(), 0
        found: tuple[int, Label] | None = None
        for length in self._lengths:
            if length > len(data):
                break
            hasher.update(data[done:length])
            done = length
            if (label := self._labels.get(hasher.digest())) is not None:
                found = length, label
        if found is None:
            return None
        length, label = found
        return data[:length].decode(), data[length:].decode(errors="surrogatepass"), label

    def clear(self) -> None:
        """Remove all labels."""
        self._labels.clear()
        self._lengths.clear()
