"""Scoring a file line by line, and going on where a broken run stopped; the service is a function here."""

import hashlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from shopr1_client.errors import InvalidRequestError, TransportError
from shopr1_client.wire import (
    Details,
    GroupScore,
    PolicyRef,
    RecipeRef,
    Reward,
    ScoreRequest,
    ScoreResponse,
    Status,
)
from shopr1_service.cli.score_file import (
    GROUPS_PER_REQUEST,
    InputLine,
    ScoredLine,
    read_input,
    read_output,
    score_lines,
)
from shopr1_service.errors import RolloutFileError
from tests.support.http import answer, group

RECIPE = RecipeRef(name="shop_r1", digest="sha256:1")
POLICY = PolicyRef(model="fake", version="0", number=0)

REWARD = Reward(
    reward=0.5,
    status=Status.SCORED,
    reason=None,
    message=None,
    components={"format": 0.5, "action_type": 0, "attribute": 0, "value": 0, "self_certainty": 0},
    details=Details(
        format_error=None,
        format_message=None,
        predicted_action=None,
        unknown_action_type=False,
        missing_attributes=[],
        extra_keys=[],
        similarity={},
        type_match=False,
        exact_match=False,
        self_certainty_nats=None,
        num_rationale_tokens=0,
    ),
)


class Service:
    """Gives every completion the same reward and remembers what it was asked."""

    def __init__(self, recipe: RecipeRef = RECIPE, policy: PolicyRef = POLICY) -> None:
        self.requests: list[ScoreRequest] = []
        self._recipe = recipe
        self._policy = policy

    @property
    def group_ids(self) -> list[list[str | None]]:
        """The requests that hold a group."""
        return [[group.id for group in request.groups] for request in self.requests if request.groups]

    def __call__(self, request: ScoreRequest) -> ScoreResponse:
        self.requests.append(request)
        groups = [
            GroupScore(policy_version="0", policy_number=0, id=g.id, rewards=[REWARD] * len(g.completions))
            for g in request.groups
        ]
        return ScoreResponse(request_id="r", recipe=self._recipe, policy=self._policy, groups=groups)


def write(path: Path, *lines: Any) -> Path:
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return path


def lines_of(path: Path, num: int) -> list[InputLine]:
    return read_input(write(path, *(group(answer(), id=str(i)) for i in range(num))))


def run(lines: Sequence[InputLine], output: Path, service: Service) -> list[ScoredLine]:
    """As the command does it: what is there is kept, the rest is scored and appended."""
    done = read_output(output, lines)
    with output.open("a") as sink:
        fresh = score_lines(lines[len(done) :], service, None, sink, done[-1] if done else None)
        return [*done, *fresh]


# --- input ------------------------------------------------------------------------------------------


def test_input(tmp_path: Path) -> None:
    first, second = json.dumps(group(answer(), id="a")), json.dumps(group({"token_ids": [1]}, truth="{}"))
    path = write(tmp_path / "in.jsonl", first, "", "  \t", second)
    lines = read_input(path)
    # Blank lines count, as in an editor.
    assert [line.number for line in lines] == [1, 4]
    assert [line.sha256 for line in lines] == [
        hashlib.sha256(s.encode()).hexdigest() for s in (first, second)
    ]
    assert [line.group.id for line in lines] == ["a", None]
    assert lines[1].group.ground_truth == "{}"


@pytest.mark.parametrize("end", ["", "\n", "\r\n", "\n\n\n"])
def test_ends_of_lines_do_not_matter(tmp_path: Path, end: str) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes((json.dumps(group()) + end).encode())
    [line] = read_input(path)
    assert line.sha256 == hashlib.sha256(json.dumps(group()).encode()).hexdigest()


def test_only_ends_of_lines_part_lines(tmp_path: Path) -> None:
    # Python's str.splitlines would cut at each of these, which JSON allows in a string.
    prompt = "\u2028 \u2029 \x85"
    path = tmp_path / "in.jsonl"
    path.write_text(json.dumps(group(prompt=prompt), ensure_ascii=False) + "\n", "utf-8")
    [line] = read_input(path)
    assert line.group.prompt == prompt


def test_an_empty_file_has_no_lines(tmp_path: Path) -> None:
    assert read_input(write(tmp_path / "in.jsonl")) == []


def test_half_surrogate_pairs_are_kept(tmp_path: Path) -> None:
    [line] = read_input(write(tmp_path / "in.jsonl", group("\ud83d")))
    assert line.group.completions == ["\ud83d"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON: "),
        ("{} {}", "not JSON: "),
        ("'x'", "not JSON: "),
        ("[" * 100_000, "not JSON: "),
        ("{}", "prompt: it is missing"),
        (json.dumps(group(truth=3)), "ground_truth: must be an object or a JSON string"),
        (json.dumps(group("x", 3)), "completions[1]: must be"),
        (json.dumps(group({"token_ids": [1, -1]})), "completions[0].token_ids[1]: must be at least 0"),
        (json.dumps(group(prompt=[{"role": "user"}])), "prompt[0].content: it is missing"),
        (json.dumps(group(reward=1)), "reward: unknown field"),
        (json.dumps({"groups": []}), "prompt: it is missing"),
        ('{"id": "a", "id": "b"}', "id: the key occurs twice"),
        ("[]", ":3: must be an object"),
        ("3", ":3: must be an object"),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = write(tmp_path / "in.jsonl", group(), "", line, "{")
    with pytest.raises(RolloutFileError) as caught:
        read_input(path)
    assert str(caught.value).startswith(f"{path}:3: ")
    assert message in str(caught.value)


@pytest.mark.parametrize("raw", [b"\xff\n", b'{"prompt": "\xe9"}\n'])
def test_a_line_that_is_not_utf_8(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(raw)
    with pytest.raises(RolloutFileError, match=r"in\.jsonl:1: not JSON: "):
        read_input(path)


# --- scoring ----------------------------------------------------------------------------------------


def test_lines_are_scored_a_few_at_a_time(tmp_path: Path) -> None:
    lines, service, sink = (
        lines_of(tmp_path / "in.jsonl", 2 * GROUPS_PER_REQUEST + 1),
        Service(),
        io.StringIO(),
    )
    scored = list(score_lines(lines, service, "mine", sink))
    ids = [str(i) for i in range(2 * GROUPS_PER_REQUEST + 1)]
    assert service.group_ids == [ids[:8], ids[8:16], ids[16:]]
    assert {request.recipe for request in service.requests} == {"mine"}
    assert [ScoredLine.model_validate_json(line) for line in sink.getvalue().splitlines()] == scored
    assert [line.line for line in scored] == list(range(1, 18))
    assert [line.group.id for line in scored] == ids
    assert [line.input_sha256 for line in scored] == [line.sha256 for line in lines]
    assert {line.recipe.name for line in scored} == {"shop_r1"}


def test_lines_are_written_before_the_next_are_asked_for(tmp_path: Path) -> None:
    lines, service, out = lines_of(tmp_path / "in.jsonl", 20), Service(), tmp_path / "out.jsonl"
    with out.open("w") as sink:
        fresh = score_lines(lines, service, None, sink)
        for num_written in (1, 2, 3):
            next(fresh)
            # In the file, not in a buffer: this is what a broken run leaves.
            assert out.read_text().count("\n") == num_written
    assert len(service.requests) == 1


@pytest.mark.parametrize(
    ("location", "expected"),
    [
        ("groups[0].prompt", "line 10: prompt: bad"),
        ("groups[1].ground_truth.name", "line 11: ground_truth.name: bad"),
        ("groups[7].completions[12].token_ids[3]", "line 17: completions[12].token_ids[3]: bad"),
        ("recipe", "recipe: bad"),
    ],
)
def test_a_refused_line_is_named(tmp_path: Path, location: str, expected: str) -> None:
    lines = lines_of(tmp_path / "in.jsonl", 30)[9:]

    def refuse(_request: ScoreRequest) -> ScoreResponse:
        raise InvalidRequestError(f"{location}: bad", errors=[{"location": location, "message": "bad"}])

    with pytest.raises(RolloutFileError) as caught:
        list(score_lines(lines, refuse, None, io.StringIO()))
    assert str(caught.value) == expected


def test_other_errors_are_raised_and_scored_groups_are_kept(tmp_path: Path) -> None:
    lines, service, sink = lines_of(tmp_path / "in.jsonl", 20), Service(), io.StringIO()

    def break_off(request: ScoreRequest) -> ScoreResponse:
        if service.requests:
            raise TransportError("reset")
        return service(request)

    with pytest.raises(TransportError, match="reset"):
        list(score_lines(lines, break_off, None, sink))
    assert sink.getvalue().count("\n") == GROUPS_PER_REQUEST


# --- going on ---------------------------------------------------------------------------------------


def test_no_output_yet(tmp_path: Path) -> None:
    lines = lines_of(tmp_path / "in.jsonl", 3)
    assert read_output(tmp_path / "out.jsonl", lines) == []
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize("num_kept", [0, 1, 7, 8, 19, 20])
@pytest.mark.parametrize("torn", ["", "{", '{"line": 8, "input'])
def test_an_interrupted_run_is_resumed_where_it_stopped(tmp_path: Path, num_kept: int, torn: str) -> None:
    lines, out = lines_of(tmp_path / "in.jsonl", 20), tmp_path / "out.jsonl"
    whole_run = run(lines, out, Service())
    whole = out.read_text()
    out.write_text("".join(whole.splitlines(keepends=True)[:num_kept]) + torn)
    service = Service()
    assert run(lines, out, service) == whole_run
    assert out.read_text() == whole
    assert sum(map(len, service.group_ids)) == 20 - num_kept


@pytest.mark.parametrize("num_cut", [1, 2, 40])
def test_the_last_line_may_be_torn_anywhere(tmp_path: Path, num_cut: int) -> None:
    lines, out = lines_of(tmp_path / "in.jsonl", 3), tmp_path / "out.jsonl"
    run(lines, out, Service())
    whole = out.read_bytes()
    out.write_bytes(whole[:-num_cut])
    service = Service()
    run(lines, out, service)
    assert out.read_bytes() == whole
    assert service.group_ids == [["2"]]


def test_the_input_may_have_grown(tmp_path: Path) -> None:
    out, service = tmp_path / "out.jsonl", Service()
    run(lines_of(tmp_path / "in.jsonl", 3), out, Service())
    assert len(run(lines_of(tmp_path / "in.jsonl", 5), out, service)) == 5
    assert service.group_ids == [["3", "4"]]


def test_output_of_another_input_is_refused_and_stays(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    run(lines_of(tmp_path / "in.jsonl", 3), out, Service())
    whole = out.read_text()
    changed = write(tmp_path / "b.jsonl", group(answer(), id="0"), "", group("", id="1"), group("", id="2"))
    with pytest.raises(RolloutFileError, match=r"out\.jsonl:2: was scored from another input line than 3"):
        read_output(out, read_input(changed))
    with pytest.raises(RolloutFileError, match=r"out\.jsonl: has 3 lines, the input 2"):
        read_output(out, lines_of(tmp_path / "in.jsonl", 2))
    assert out.read_text() == whole


@pytest.mark.parametrize("line", ["{}", "no", '{"line": 1}', ""])
def test_other_files_are_refused_and_stay(tmp_path: Path, line: str) -> None:
    out = write(tmp_path / "out.jsonl", line)
    with pytest.raises(RolloutFileError, match=r"out\.jsonl:1: not an output of this command"):
        read_output(out, lines_of(tmp_path / "in.jsonl", 3))
    assert out.read_text() == f"{line}\n"


@pytest.mark.parametrize("content", ["no\nprecious", "notes\n\nlast words"])
def test_a_refused_file_loses_nothing(tmp_path: Path, content: str) -> None:
    """A last line without an end is torn only in a file that this command has written."""
    out = tmp_path / "out.jsonl"
    out.write_text(content)
    with pytest.raises(RolloutFileError):
        read_output(out, lines_of(tmp_path / "in.jsonl", 3))
    assert out.read_text() == content


OTHERS = [
    Service(recipe=RecipeRef(name="mine", digest="sha256:1")),
    Service(recipe=RecipeRef(name="shop_r1", digest="sha256:2")),
    Service(policy=PolicyRef(model="fake", version="1", number=0)),
    Service(policy=PolicyRef(model="other", version="0", number=0)),
]


@pytest.mark.parametrize("other", OTHERS)
def test_output_of_another_recipe_or_policy_is_refused(tmp_path: Path, other: Service) -> None:
    lines, out = lines_of(tmp_path / "in.jsonl", 5), tmp_path / "out.jsonl"
    run(lines[:3], out, Service())
    whole = out.read_text()
    with pytest.raises(RolloutFileError, match="the output was begun with recipe") as caught:
        run(lines, out, other)
    assert out.read_text() == whole
    assert '"sha256:1"' in str(caught.value)


@pytest.mark.parametrize("other", OTHERS)
def test_the_policy_must_not_change_on_the_way(tmp_path: Path, other: Service) -> None:
    """A file whose lines come of different weights is as wrong as one that was resumed with them."""
    lines, sink, first = lines_of(tmp_path / "in.jsonl", 20), io.StringIO(), Service()

    def changing(request: ScoreRequest) -> ScoreResponse:
        return (other if first.requests else first)(request)

    with pytest.raises(RolloutFileError, match="the output was begun with recipe"):
        list(score_lines(lines, changing, None, sink))
    assert sink.getvalue().count("\n") == GROUPS_PER_REQUEST
