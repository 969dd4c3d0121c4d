"""Judges every response of the soak: the right reward of a version that the request could get."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.integration.ops.soak.history import History, Target, numbers
from tests.integration.ops.soak.material import (
    ALPHA,
    TOLERANCE_NATS,
    TOO_LONG,
    Action,
    Completion,
    Content,
    Truth,
    rule_terms,
)

MAX_SHOWN = 20


@dataclass(frozen=True)
class Sent:
    """A group as it was sent.

    Attributes:
        prompt: its text, with the chat template.
    """

    prompt: str
    truth: Action
    completions: Sequence[Completion]


@dataclass(frozen=True)
class Window:
    """Changes that were done when a request was sent, and begun when its response came."""

    earliest: int
    latest: int


@dataclass
class Judge:
    """Counts what is right, and keeps what is not."""

    history: History
    truth: Truth = field(default_factory=Truth)
    num_right: int = 0
    num_unscorable: int = 0
    failures: list[str] = field(default_factory=list)
    kinds_of_failure: Counter[str] = field(default_factory=Counter)

    def fail(self, kind: str, message: str) -> None:
        self.kinds_of_failure[kind] += 1
        if len(self.failures) < MAX_SHOWN:
            self.failures.append(f"{kind}: {message}")

    def check_response(self, sent: Sequence[Sent], target: Target, window: Window, body: Any) -> None:
        """A response of `POST /score`."""
        if len(body["groups"]) != len(sent):
            self.fail("lost", f"{len(body['groups'])} groups for {len(sent)}")
        for each, score in zip(sent, body["groups"], strict=False):
            self._check_group(each, target, window, score)
        newest = max(score["policy_number"] for score in body["groups"])
        if body["policy"]["number"] != newest:
            self.fail("wrong", f"policy {body['policy']}, but a group of number {newest}")

    def check_values(
        self, sent: Sequence[Sent], window: Window, rewards: Sequence[float], nats: Sequence[float] | None
    ) -> None:
        """Numbers of a dialect, which name no version: those of any that could score the request."""
        versions = [
            self.history.contents[n] for n in numbers(self.history, {}, window.earliest, window.latest)
        ]
        rollouts = [(each, completion) for each in sent for completion in each.completions]
        if len(rewards) != len(rollouts):
            self.fail("lost", f"{len(rewards)} rewards for {len(rollouts)}")
        for i, (each, completion) in enumerate(rollouts[: len(rewards)]):
            right = [self._expected(each, completion, version) for version in versions]
            is_right = any(
                abs(rewards[i] - reward) <= ALPHA * TOLERANCE_NATS
                and (nats is None or abs(nats[i] - (mean or 0.0)) <= TOLERANCE_NATS)
                for reward, mean in right
            )
            self._record(is_right, f"{completion.text!r}: {rewards[i]}, {nats and nats[i]}; right: {right}")

    def _check_group(self, sent: Sent, target: Target, window: Window, score: Mapping[str, Any]) -> None:
        number = score["policy_number"]
        possible = self.history.possible(target, window.earliest, window.latest)
        name = f"v{number}" if number else "0"
        if number not in possible or score["policy_version"] != name:
            self.fail("wrong", f"version {score['policy_version']}, {number}; possible: {possible}, {target}")
            return
        if len(score["rewards"]) != len(sent.completions):
            self.fail("lost", f"{len(score['rewards'])} rewards for {len(sent.completions)}")
        for completion, reward in zip(sent.completions, score["rewards"], strict=False):
            self._check_reward(sent, completion, self.history.contents[number], reward)

    def _check_reward(
        self, sent: Sent, completion: Completion, version: Content, reward: Mapping[str, Any]
    ) -> None:
        if completion is TOO_LONG:
            is_right = (reward["reward"], reward["reason"]) == (None, "sequence_too_long")
            self._record(is_right, f"too long: {reward}")
            self.num_unscorable += is_right
            return
        terms, details = rule_terms(completion, sent.truth), reward["details"]
        total, mean = self._expected(sent, completion, version)
        is_right = (
            reward["status"] == "scored"
            and abs(reward["reward"] - total) <= ALPHA * TOLERANCE_NATS
            and all(abs(reward["components"][name] - value) <= 1e-9 for name, value in terms.items())
            and (details["self_certainty_nats"] is None) is (mean is None)
            and (mean is None or abs(details["self_certainty_nats"] - mean) <= TOLERANCE_NATS)
            and self._are_right(sent, completion, version, details["tokens"])
        )
        self._record(is_right, f"{version} {sent.prompt[-20:]!r} {reward}; right: {terms}, {mean}")

    def _are_right(
        self, sent: Sent, completion: Completion, version: Content, tokens: Sequence[Any] | None
    ) -> bool:
        values = self.truth.values(version, sent.prompt, completion)
        return tokens is None or (
            len(tokens) == len(values)
            and all(abs(t["value"] - v) <= TOLERANCE_NATS for t, v in zip(tokens, values, strict=True))
        )

    def _expected(self, sent: Sent, completion: Completion, version: Content) -> tuple[float, float | None]:
        """The reward and the self-certainty in nats."""
        mean = self.truth.mean(version, sent.prompt, completion)
        return sum(rule_terms(completion, sent.truth).values()) + ALPHA * (mean or 0.0), mean

    def _record(self, is_right: bool, message: str) -> None:
        if is_right:
            self.num_right += 1
        else:
            self.fail("wrong", message)
