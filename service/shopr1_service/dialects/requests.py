"""From a trainer's request to rollouts: what the dialects have in common on the way in."""

from dataclasses import dataclass, field
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Discriminator, Tag

from shopr1_client.errors import FieldError
from shopr1_client.wire import Message
from shopr1_client.wire_base import UnicodeText
from shopr1_service.dialects.ground_truth import LabelError, is_missing, parse_label
from shopr1_service.field_errors import refuse_if_any
from shopr1_service.http.state import State
from shopr1_service.scoring.label_store import Label

Prompt = str | list[Message]

# The tags that `wire.is_union_tag` knows, which keep them out of the paths in errors.
STRING, LIST = "<string>", "<messages>"


class TrainerRequest(BaseModel):
    """A body that a trainer wrote: fields that it adds in a later version do no harm."""

    model_config = ConfigDict(frozen=True, extra="ignore")


def kind(value: object) -> str | None:
    """The discriminator of unions of a string and a list."""
    match value:
        case str():
            return STRING
        case list():
            return LIST
        case _:
            return None


TextOrMessages = Annotated[
    Annotated[UnicodeText, Tag(STRING)] | Annotated[list[Message], Tag(LIST)],
    Discriminator(
        kind,
        custom_error_type="prompt_kind",
        custom_error_message="must be a string or a list of messages",
    ),
]
"""A prompt: a string is used as it is, messages go through the policy's chat template."""


@dataclass(frozen=True)
class Rollout:
    """A completion with all that is needed to score it. The paths are those of the trainer's request."""

    prompt: Prompt
    completion: str
    label: Label
    prompt_path: str
    completion_path: str
    label_path: str

    @property
    def ground_truth(self) -> str:
        return self.label.truth


@dataclass
class Reading:
    """Rollouts of one request. All that is wrong with it is collected before it is refused."""

    state: State
    rollouts: list[Rollout] = field(default_factory=list)
    errors: list[FieldError] = field(default_factory=list)

    def refuse(self, location: str, message: str) -> None:
        """Note what is wrong."""
        self.errors.append({"location": location, "message": message})

    def add(
        self,
        prompt: Prompt,
        completion: str,
        label: object,
        *,
        prompt_path: str,
        completion_path: str,
        label_path: str,
    ) -> None:
        """Add a rollout with the label that the trainer sent, or none."""
        found = self._label(label, prompt, label_path)
        if found is not None:
            self.rollouts.append(Rollout(prompt, completion, found, prompt_path, completion_path, label_path))

    def _label(self, label: object, prompt: Prompt, path: str) -> Label | None:
        if is_missing(label):
            found = self.state.labels.get(prompt)
            if found is None:
                self.refuse(path, "no label, and none is registered for the prompt (PUT /labels)")
            return found
        try:
            return parse_label(label, self.state.recipes)
        except LabelError as error:
            self.refuse(path + error.path, str(error))
            return None

    def done(self) -> list[Rollout]:
        """The rollouts.

        Raises:
            InvalidRequestError: something is wrong. Nothing is scored then.
        """
        for rollout in self.rollouts[1:]:
            first = self.rollouts[0]
            if rollout.label.recipe != first.label.recipe:
                message = f"recipe {rollout.label.recipe!r}, but {first.label.recipe!r} in {first.label_path}"
                self.refuse(rollout.label_path, message)
        refuse_if_any(self.errors)
        return self.rollouts
