"""A policy that a test can block."""

import threading
from collections.abc import Sequence

from shopr1_rewards.recipe import SelfCertaintyRecipe
from shopr1_service.core import Certainty, TokenGroup, Unmeasurable, Version
from shopr1_service.policy.fake import FakePolicy
from tests.support.http import WAIT_S


class Held(FakePolicy):
    """Blocks until the gate opens; records the first character of each prompt."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()
        self.has_begun = threading.Event()
        self.prompts: list[str] = []

    def certainties(
        self, groups: Sequence[TokenGroup], rules: SelfCertaintyRecipe, version: Version | None = None
    ) -> list[list[Certainty | Unmeasurable]]:
        self.prompts += [chr(each.prompt_ids[0]) for each in groups]
        self.has_begun.set()
        assert self.gate.wait(WAIT_S)
        return super().certainties(groups, rules, version)


class Loader:
    """Loads a policy once `may_go_on` is set."""

    def __init__(self) -> None:
        self.may_go_on = threading.Event()

    def __call__(self) -> FakePolicy:
        assert self.may_go_on.wait(WAIT_S)
        return FakePolicy()
