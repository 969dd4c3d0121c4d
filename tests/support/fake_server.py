"""`shopr1 serve` with a fake policy that reports over pipes. The beginning of a prompt selects the report.

HELD     prints `held`, and scores after a line on standard input
CENSUS   prints the number of asyncio tasks

`MAX_OPEN_FILES` in the environment limits its file descriptors.
"""

import asyncio
import gc
import os
import resource
import sys
from collections.abc import Sequence
from unittest import mock

from shopr1_rewards.recipe import SelfCertaintyRecipe
from shopr1_service.core import Certainty, TokenGroup, Unmeasurable, Version
from shopr1_service.policy.fake import FakePolicy
from shopr1_service.scheduling.local_engine import LocalEngine
from shopr1_service.server import uvicorn_server as server
from shopr1_service.settings import load_settings

HELD, CENSUS = "hold this", "count the tasks"


class Reporting(FakePolicy):
    def certainties(
        self, groups: Sequence[TokenGroup], rules: SelfCertaintyRecipe, version: Version | None = None
    ) -> list[list[Certainty | Unmeasurable]]:
        for group in groups:
            self._report(self.codec.decode(group.prompt_ids).text)
        return super().certainties(groups, rules, version)

    def _report(self, prompt: str) -> None:
        if prompt.startswith(HELD):
            say("held")
            sys.stdin.readline()
        if prompt.startswith(CENSUS):
            say(str(num_tasks()))


def num_tasks() -> int:
    gc.collect()
    return sum(isinstance(value, asyncio.Task) and not value.done() for value in gc.get_objects())


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main() -> int:
    if max_files := os.environ.get("MAX_OPEN_FILES"):
        resource.setrlimit(resource.RLIMIT_NOFILE, (int(max_files), int(max_files)))
    gc.collect()
    gc.freeze()  # excludes objects of the imports from every count
    with (
        mock.patch.object(server, "UpdatableEngine", LocalEngine),
        mock.patch.object(server, "load_policy", return_value=Reporting()),
    ):
        return server.serve(load_settings())


if __name__ == "__main__":
    sys.exit(main())
