"""Changes of the policy during the soak, and the versions that a request may get between two of them."""

import random
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import safetensors.torch
import torch

from shopr1_client.wire_policy import ADAPTER_CONFIG_KEY, BASE
from tests.integration.ops.soak.material import (
    ADAPTER_SEEDS,
    WEIGHTS,
    Content,
    adapter_tensors,
    part_of,
    weights_of,
)
from tests.support.broken_updates import ADAPTER_CONFIG

ADAPTERS = ("a", "b")
ADAPTER_VERSIONS = 2
"""The setting `adapter_versions` of the service."""

Target = Mapping[str, Any]
"""Members of a request that say what it is to be scored with."""


@dataclass(frozen=True)
class Loaded:
    """Numbers of the loaded versions after a change."""

    base: int = 0
    adapters: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    default: str | None = None

    def find(self, target: Target) -> int | str:
        """Number of the version that a request gets, or the code of its refusal."""
        name = target.get("adapter") or self.default
        versions = (self.base,) if name in (None, BASE) else self.adapters.get(name, ())
        if not versions:
            return "invalid_request"
        match target.get("policy_version"):
            case {"exact": number}:
                return number if number in versions else "policy_version"
            case {"at_least": number}:
                return versions[-1] if versions[-1] >= number else "policy_version"
        return versions[-1]


class History:
    """All changes so far. A change is begun before it is sent, and done when its response has arrived."""

    def __init__(self) -> None:
        self.states = [Loaded()]
        self.contents = {0: Content("A")}
        self.num_done = 0

    @property
    def num_begun(self) -> int:
        return len(self.states) - 1

    @property
    def newest(self) -> Loaded:
        """State after the last change that is done."""
        return self.states[self.num_done]

    def possible(self, target: Target, earliest: int, latest: int) -> set[int | str]:
        """Numbers and refusals that a request may get that was sent and answered after so many changes."""
        return {state.find(target) for state in self.states[earliest : latest + 1]}

    def begin(self, state: Loaded, content: Content | None) -> int:
        """Number of a change to this state, which brings this content."""
        self.states.append(state)
        if content is not None:
            self.contents[self.num_begun] = content
        return self.num_begun


class Changer:
    """Changes the policy, one change after the other, in an order that the seed decides.

    Args:
        root: the directory with `write_policies`.
        http: a client of the service.
        fail: called for every response that is not the right one.
    """

    def __init__(
        self, seed: int, root: Path, http: httpx.AsyncClient, history: History, fail: Callable[[str], None]
    ) -> None:
        self._random = random.Random(f"{seed}-changes")
        self._root = root
        self._http = http
        self._history = history
        self._fail = fail
        self.num_changes = 0
        self.num_broken = 0

    async def change(self) -> None:
        """Make the next change, or send weights that the service must refuse."""
        kinds: list[Callable[[], Awaitable[None]]] = [
            self._weights,
            self._adapter,
            self._unload,
            self._broken,
        ]
        await self._random.choices(kinds, [4, 5, 1, 2])[0]()

    async def _weights(self) -> None:
        history, randomly = self._history, self._random
        former = history.contents[history.newest.base].weights
        name = randomly.choice([each for each in WEIGHTS if each != former])
        is_part = {former, name} == {"A", "B"} and randomly.random() < 0.6
        number = history.begin(Loaded(base=history.num_begun + 1), Content(name))
        if randomly.random() < 0.5:
            path = str(self._root / (f"{name}-part" if is_part else name))
            body = {"path": path, "version": f"v{number}", "partial": is_part}
            answered = await self._http.post("/policy/update", json=body)
        else:
            content = safetensors.torch.save(part_of(name) if is_part else weights_of(name))
            params: dict[str, str | bool] = {"version": f"v{number}", "partial": is_part}
            answered = await self._http.put("/policy/weights", params=params, content=content)
        self._check(answered, number)

    async def _adapter(self) -> None:
        history, randomly = self._history, self._random
        name, seed = randomly.choice(ADAPTERS), randomly.choice(ADAPTER_SEEDS)
        is_default = randomly.random() < 0.3
        state, number = history.newest, history.num_begun + 1
        kept = (*state.adapters.get(name, ()), number)[-ADAPTER_VERSIONS:]
        default = name if is_default else state.default
        base = history.contents[state.base].weights
        state = replace(state, adapters={**state.adapters, name: kept}, default=default)
        history.begin(state, Content(base, seed))
        version: dict[str, str | bool] = {"version": f"v{number}", "default": is_default}
        if randomly.random() < 0.5:
            body = {"name": name, "path": str(self._root / f"adapter-{seed}"), **version}
            answered = await self._http.post("/policy/adapters", json=body)
        else:
            content = safetensors.torch.save(adapter_tensors(seed), {ADAPTER_CONFIG_KEY: ADAPTER_CONFIG})
            answered = await self._http.put(f"/policy/adapters/{name}", params=version, content=content)
        self._check(answered, number)

    async def _unload(self) -> None:
        history = self._history
        state = history.newest
        if not state.adapters:
            return
        name = self._random.choice(sorted(state.adapters))
        kept = {each: numbers for each, numbers in state.adapters.items() if each != name}
        default = None if state.default == name else state.default
        number = history.begin(replace(state, adapters=kept, default=default), None)
        answered = await self._http.delete(f"/policy/adapters/{name}")
        self._check(answered, number, has_version=False)

    async def _broken(self) -> None:
        """Send what must change nothing: NaN, a cut file, an adapter that is none."""
        weights, adapter = dict(weights_of("C")), adapter_tensors(ADAPTER_SEEDS[0])
        last = sorted(weights)[-1]
        path, content = self._random.choice(
            [
                ("/policy/weights", _with_nan(weights, last)),
                ("/policy/weights", safetensors.torch.save(weights)[:-4]),
                ("/policy/weights", safetensors.torch.save({last: weights[last][:-1].clone()})),
                ("/policy/adapters/a", _with_nan(adapter, sorted(adapter)[-1])),
                ("/policy/adapters/b", b"x" * 100),
            ]
        )
        answered = await self._http.put(path, params={"version": "broken"}, content=content)
        self.num_broken += 1
        if (answered.status_code, _code(answered)) != (422, "invalid_weights"):
            self._fail(f"broken weights: {answered.status_code} {answered.text[:300]}")

    def _check(self, answered: httpx.Response, number: int, *, has_version: bool = True) -> None:
        self._history.num_done = number
        self.num_changes += 1
        current = answered.json()["current"]["number"] if answered.is_success and has_version else None
        if not answered.is_success or current != (number if has_version else None):
            self._fail(f"change {number}: {answered.status_code} {answered.text[:300]}")


def _with_nan(tensors: Mapping[str, torch.Tensor], name: str) -> bytes:
    broken = tensors[name].clone()
    broken.view(-1)[-1] = float("nan")
    metadata = {ADAPTER_CONFIG_KEY: ADAPTER_CONFIG} if "lora" in name else None
    return safetensors.torch.save({**tensors, name: broken}, metadata)


def _code(answered: httpx.Response) -> Any:
    return answered.json().get("code")


def numbers(history: History, target: Target, earliest: int, latest: int) -> Iterator[int]:
    """The versions among `History.possible`."""
    return (each for each in history.possible(target, earliest, latest) if isinstance(each, int))
