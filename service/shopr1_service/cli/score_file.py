"""Scores a JSONL file of groups into a JSONL file of rewards; an interrupted run can be resumed.

Input: one group per line, as in `POST /score`. Output: for each line, in order, its number, the SHA-256 of
the line, recipe, policy, and the group's rewards. All input is validated before anything is scored. Existing
output is kept if it belongs to the same input, recipe and policy; a truncated last line is scored again.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from pydantic import BaseModel, ConfigDict, ValidationError

from shopr1_client.errors import InvalidRequestError
from shopr1_client.field_messages import field_path, plain_message
from shopr1_client.json_text import DuplicateKeyError, read_json
from shopr1_client.wire import Group, GroupScore, PolicyRef, RecipeRef, ScoreRequest, ScoreResponse
from shopr1_service.errors import RolloutFileError

GROUPS_PER_REQUEST = 8

ScoreCall = Callable[[ScoreRequest], ScoreResponse]


class ScoredLine(BaseModel):
    """One line of output."""

    model_config = ConfigDict(frozen=True)

    line: int
    input_sha256: str
    recipe: RecipeRef
    policy: PolicyRef
    group: GroupScore


@dataclass(frozen=True)
class InputLine:
    """One line of input; `number` counts from 1, blank lines included."""

    number: int
    sha256: str
    group: Group


@contextmanager
def naming(file: Path | str) -> Iterator[None]:
    """Within this context errors of the file system become a `RolloutFileError` that names the file."""
    try:
        yield
    except OSError as error:
        raise RolloutFileError(f"{file}: {error.strerror or error}") from error


def refuse_if_same(rollouts: Path, output: Path | None) -> None:
    """Refuse to append rewards to the rollouts themselves."""
    if output is not None and output.exists() and output.samefile(rollouts):
        raise RolloutFileError(f"{output}: is the file of the rollouts; name another one for the rewards")


def read_input(path: Path) -> list[InputLine]:
    """All groups of a file.

    Raises:
        RolloutFileError: names the first malformed line and its error.
    """
    with naming(path):
        lines = path.read_bytes().splitlines()
    return [_input_line(path, i, raw) for i, raw in enumerate(lines, 1) if raw.strip()]


def _input_line(path: Path, number: int, raw: bytes) -> InputLine:
    try:
        # Python's json keeps half surrogate pairs, as HTTP bodies do: a policy's output may hold them.
        group = Group.model_validate(read_json(raw))
    except DuplicateKeyError as error:
        raise RolloutFileError(f"{path}:{number}: {error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = "".join(f"{part}: " for part in (field_path(first["loc"]),) if part)
        raise RolloutFileError(f"{path}:{number}: {where}{plain_message(first)}") from None
    except (ValueError, RecursionError) as error:
        raise RolloutFileError(f"{path}:{number}: not JSON: {error}") from None
    return InputLine(number, hashlib.sha256(raw).hexdigest(), group)


def read_output(path: Path, lines: Sequence[InputLine]) -> list[ScoredLine]:
    """Lines that a former run has scored; removes a truncated last line from the file.

    Raises:
        RolloutFileError: the output belongs to another input.
    """
    if not path.is_file():  # nor can a pipe or a device be read
        return []
    with naming(path):
        content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    scored = [_scored_line(path, i, raw) for i, raw in enumerate(whole.splitlines(), 1)]
    if len(scored) > len(lines):
        raise RolloutFileError(f"{path}: has {len(scored)} lines, the input {len(lines)}")
    for i, (done, line) in enumerate(zip(scored, lines, strict=False), 1):
        if done.input_sha256 != line.sha256:
            raise RolloutFileError(f"{path}:{i}: was scored from another input line than {line.number}")
    if len(whole) < len(content):
        with naming(path):
            path.write_bytes(whole)
    return scored


def _scored_line(path: Path, number: int, raw: bytes) -> ScoredLine:
    try:
        return ScoredLine.model_validate_json(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = field_path(first["loc"]) or "the line"
        flaw = f"{where}: {plain_message(first)}"
        raise RolloutFileError(f"{path}:{number}: not an output of this command: {flaw}") from None


def score_lines(
    lines: Sequence[InputLine],
    score: ScoreCall,
    recipe: str | None,
    output: TextIO,
    former: ScoredLine | None = None,
) -> Iterator[ScoredLine]:
    """Score lines, a few per call; each is written to `output` before it is yielded.

    Args:
        former: a line of the existing output; the following ones must have the same recipe and policy.

    Raises:
        RolloutFileError: the service refuses a line, or scores with another recipe or policy than before.
    """
    if former:  # an empty request returns recipe and policy before anything is computed
        _check_same(former, score(ScoreRequest(recipe=recipe, groups=[])))
    for start in range(0, len(lines), GROUPS_PER_REQUEST):
        batch = lines[start : start + GROUPS_PER_REQUEST]
        request = ScoreRequest(recipe=recipe, groups=[line.group for line in batch])
        try:
            response = score(request)
        except InvalidRequestError as error:
            raise RolloutFileError(_name_line(error, batch)) from error
        if former:
            _check_same(former, response)
        for line, group in zip(batch, response.groups, strict=True):
            scored = ScoredLine(
                line=line.number,
                input_sha256=line.sha256,
                recipe=response.recipe,
                policy=response.policy,
                group=group,
            )
            with naming(getattr(output, "name", "the output")):
                output.write(scored.model_dump_json() + "\n")
                output.flush()
            former = scored
            yield scored


def _check_same(former: ScoredLine, response: ScoreResponse) -> None:
    if (former.recipe, former.policy) != (response.recipe, response.policy):
        message = "the output was begun with recipe {} and policy {}; now they are {} and {}"
        parts = (former.recipe, former.policy, response.recipe, response.policy)
        raise RolloutFileError(message.format(*(part.model_dump_json() for part in parts)))


def _name_line(error: InvalidRequestError, batch: Sequence[InputLine]) -> str:
    """The error with the file's line in place of the group's index in a request that the user never saw."""
    for each in error.errors:
        location = each["location"]
        for i, line in enumerate(batch):
            prefix = f"groups[{i}]."
            if location.startswith(prefix):
                return f"line {line.number}: {location.removeprefix(prefix)}: {each['message']}"
    return str(error)
