"""Comparison of a model with the service that it was sent to: the self-certainty of a probe on both sides.

At each token, with logits z of V rows: KL(U‖p) = logsumexp(z) - mean(z) - ln V, in nats.

Torch is not imported: tensors are used through their own methods.
"""

import contextlib
import importlib
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from shopr1_client import transport as exchange
from shopr1_client.errors import ShopR1Error, VerificationError
from shopr1_client.updates.weights import Module, unwrapped
from shopr1_client.wire import Group, Include, Info, ScoreRequest, ScoreResponse, TokenIds
from shopr1_client.wire_policy import BASE, VersionDemand, VersionInfo

_RECIPE = "shop_r1"
"""Measures KL(U‖p) at temperature 1 over all rows of the head."""
_ANSWER = (
    '{"rationale": "The blue mug is cheaper, it has better reviews than the red one and it arrives on '
    'Friday.", "action": {"type": "terminate"}}'
)
_TRUTH = {"type": "terminate"}
_NUM_PROMPT_TOKENS = 32
_LIMITS_NATS = {"float64": 1e-3, "float32": 1e-3, "float16": 0.02, "bfloat16": 0.1}
"""By the coarser dtype of the two sides: several times the rounding of a small model."""


@dataclass(frozen=True)
class Probe:
    """A comparison.

    Args:
        limit_nats: largest difference at any token; None: by the dtypes of model and service.
    """

    model: Module
    adapter: str | None
    limit_nats: float | None = None

    def check(self, http: httpx.Client, url: str, version: VersionInfo) -> None:
        """Compare with one server.

        Raises:
            VerificationError: the numbers differ.
            ShopR1Error: the server does not score the probe.
        """
        info = _parsed(Info, http, "GET", f"{url}/info")
        body = self._request(info, version).model_dump_json()
        score = _parsed(ScoreResponse, http, "POST", f"{url}/score", content=body)
        [group] = score.groups
        [reward] = group.rewards
        tokens, ids = reward.details.tokens, reward.details.completion_token_ids
        if not tokens or ids is None or group.prompt_token_ids is None:
            raise ShopR1Error(f"{url} cannot score the probe of an update: {reward.message or reward.reason}")
        rows = [len(group.prompt_token_ids) + token.index - 1 for token in tokens]
        expected = self._certainties([*group.prompt_token_ids, *ids], rows)
        actual = [token.value for token in tokens]
        limit_nats = self._limit_nats(info)
        if not all(abs(a - b) <= limit_nats for a, b in zip(expected, actual, strict=True)):
            raise VerificationError(url, expected, actual, limit_nats)

    def _request(self, info: Info, version: VersionInfo) -> ScoreRequest:
        rng, num_ids = random.Random(0), min(info.policy.num_head_rows, info.policy.num_tokenizer_tokens)
        prompt = TokenIds(token_ids=[rng.randrange(num_ids) for _ in range(_NUM_PROMPT_TOKENS)])
        return ScoreRequest(
            recipe=_RECIPE,
            groups=[Group(prompt=prompt, ground_truth=_TRUTH, completions=[_ANSWER])],
            policy_version=VersionDemand(exact=version.number),
            adapter=self.adapter or BASE,
            include=[Include.TOKENS, Include.TOKEN_IDS],
        )

    def _certainties(self, ids: Sequence[int], rows: Sequence[int]) -> list[float]:
        """KL(U‖p) at these rows, by the model's own forward."""
        torch, model = importlib.import_module("torch"), unwrapped(self.model)
        device = model.get_input_embeddings().weight.device
        with torch.no_grad(), _evaluating(model):
            logits_T_V = model(input_ids=torch.tensor([ids], device=device), use_cache=False).logits[0, rows]
        logits_T_V = logits_T_V.double()
        values_T = logits_T_V.logsumexp(dim=1) - logits_T_V.mean(dim=1) - math.log(logits_T_V.shape[1])
        return [float(value) for value in values_T.tolist()]

    def _limit_nats(self, info: Info) -> float:
        if self.limit_nats is not None:
            return self.limit_nats
        own = str(unwrapped(self.model).get_input_embeddings().weight.dtype).removeprefix("torch.")
        return max(_LIMITS_NATS.get(name, 0.1) for name in (own, info.policy.dtype))


@contextlib.contextmanager
def _evaluating(model: Module) -> Iterator[None]:
    """The model without dropout; afterwards every part is in its former mode."""
    training = [part for part in model.modules() if part.training]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True


def _parsed(model: Any, http: httpx.Client, method: str, url: str, **options: Any) -> Any:  # noqa: ANN401
    try:
        response = http.request(method, url, **options)
    except httpx.RequestError as error:
        raise exchange.failure(f"{method} {url}", error) from error
    return exchange.parse(model, response)
