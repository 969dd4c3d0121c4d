"""Rollouts from a trainer's request: the common input side of the dialects."""

from dataclasses import dataclass, field
from typing import Annotated, NamedTuple

from pydantic import BaseModel, ConfigDict, Tag

from shopr1_client.errors import FieldError
from shopr1_client.wire import Completion, Message, TokenIds
from shopr1_client.wire import Prompt as AnyPrompt
from shopr1_client.wire_base import IN_PIECES, MESSAGES, STRING, UnicodeText, by_type
from shopr1_client.wire_prompt import PromptOptions
from shopr1_service.concurrency import checkpoint
from shopr1_service.dialects.ground_truth import LabelError, is_missing, parse_label
from shopr1_service.field_errors import raise_if_any
from shopr1_service.http.state import State
from shopr1_service.monitoring.logs import current_run
from shopr1_service.scoring.label_store import Label

Prompt = str | list[Message]


class TrainerRequest(BaseModel):
    """Body that a trainer sends: fields that a later version of it adds are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore")


AS_TEMPLATED = PromptOptions(add_special_tokens=False)
"""For trainers that tokenise their templated prompts without special tokens, as all of these do."""

TextOrMessages = Annotated[
    Annotated[UnicodeText, Tag(STRING)] | Annotated[list[Message], IN_PIECES, Tag(MESSAGES)],
    by_type({STRING: str, MESSAGES: list}, "prompt_kind", "must be a string or a list of messages"),
]
"""A prompt: a string is used as it is, messages go through the policy's chat template."""


def run_name(run: str) -> str:
    """A run in a message about labels: each has its own."""
    return f"run {run!r}" if run else "the run without an id"


class Paths(NamedTuple):
    """The fields of the trainer's request that hold a rollout, for errors."""

    prompt: str
    completion: str
    label: str


@dataclass(frozen=True)
class Rollout:
    """A completion and what is needed to score it."""

    prompt: AnyPrompt
    completion: Completion
    label: Label
    paths: Paths
    options: PromptOptions = AS_TEMPLATED

    @property
    def ground_truth(self) -> str:
        return self.label.truth


@dataclass
class RolloutReader:
    """Rollouts of one request. Every error in it is collected before it is refused."""

    state: State
    rollouts: list[Rollout] = field(default_factory=list)
    errors: list[FieldError] = field(default_factory=list)

    def add_error(self, location: str, message: str) -> None:
        """Add an error, for which the request will be refused."""
        self.errors.append({"location": location, "message": message})

    def add(
        self,
        prompt: Prompt,
        completion: str,
        label: object,
        paths: Paths,
        *,
        ids: tuple[TokenIds, TokenIds] | None = None,
        options: PromptOptions = AS_TEMPLATED,
    ) -> None:
        """Add a rollout with the label that the trainer sent, or else the registered one.

        Args:
            ids: of prompt and completion, as the policy saw and sampled them, if the trainer sends them.
        """
        checkpoint()
        found = self._label(label, prompt, paths.label)
        if found is not None:
            sent = ids or (prompt, completion)
            self.rollouts.append(Rollout(sent[0], sent[1], found, paths, options))

    def _label(self, label: object, prompt: Prompt, path: str) -> Label | None:
        if is_missing(label):
            run = current_run.get()
            found = self.state.labels.get(run, prompt)
            if found is None:
                self.add_error(path, f"no label, and {run_name(run)} has none for the prompt (PUT /labels)")
            return found
        try:
            return parse_label(label, self.state.recipes)
        except LabelError as error:
            self.add_error(path + error.path, str(error))
            return None

    def finish(self) -> list[Rollout]:
        """The rollouts.

        Raises:
            InvalidRequestError: there are errors. Nothing is scored then.
        """
        for rollout in self.rollouts[1:]:
            first = self.rollouts[0]
            if rollout.label.recipe != first.label.recipe:
                message = (
                    f"recipe {rollout.label.recipe!r}, but {first.label.recipe!r} in {first.paths.label}"
                )
                self.add_error(rollout.paths.label, message)
        raise_if_any(self.errors)
        return self.rollouts
