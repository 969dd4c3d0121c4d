"""The policy as the service sees it when it is split over several devices."""

import contextlib
import logging
from collections.abc import Mapping, Sequence
from datetime import timedelta

import torch

from shopr1_client.errors import InvalidRequestError
from shopr1_rewards.recipe import SelfCertaintyRecipe
from shopr1_service.engine import FatalEngineError, TokenGroup
from shopr1_service.errors import PolicyError
from shopr1_service.loaded_policy import LoadedPolicy, Measured
from shopr1_service.lora import Adapter
from shopr1_service.prefix import PrefixCache
from shopr1_service.settings import Settings
from shopr1_service.source import Source
from shopr1_service.startup import Startup
from shopr1_service.tensor_parallel.messages import Load, Measure
from shopr1_service.tensor_parallel.plan import plan_overrides
from shopr1_service.tensor_parallel.ranks import Ranks, RanksHeartbeat
from shopr1_service.versions import Version
from shopr1_service.weights import Stored

logger = logging.getLogger(__name__)

_PRIVATE = {"api_keys", "api_key_file"}
"""Settings that a process which does not serve has no business with."""


class SplitPolicy(LoadedPolicy):
    """A policy that measures on several devices. Its weights do not change.

    Args:
        local: this process's part.
        device: as `/info` shows it.
    """

    def __init__(self, local: LoadedPolicy, ranks: Ranks, device: str) -> None:
        super().__init__(
            local.info.model_copy(update={"device": device}),
            local.codec,
            local.engine,
            RanksHeartbeat(local.heartbeat, ranks),
            local.model,
            PrefixCache(0),  # the engine's own is that of its thread
            renew=lambda: None,
            probe=list,
        )
        self.ranks = ranks

    def certainties(
        self, groups: Sequence[TokenGroup], rules: SelfCertaintyRecipe, version: Version | None = None
    ) -> Measured:
        try:
            measured: Measured = self.ranks.coordinator.run(Measure(groups, rules))[0]
        except FatalEngineError:
            self.close()
            raise
        return measured

    def replace_weights(self, stored: Mapping[str, Stored], name: str) -> Version:
        raise _refusal()

    def add_adapter(
        self, adapter: Adapter, version: Version, *, max_kept: int, is_default: bool
    ) -> list[Version]:
        raise _refusal()

    def close(self) -> None:
        """End the processes of the other devices. Nothing can be measured from then on."""
        self.ranks.close()


def _refusal() -> InvalidRequestError:
    return InvalidRequestError("the policy is split over several devices: it does not change while it serves")


def load_on_all_ranks(source: Source, settings: Settings, startup: Startup) -> SplitPolicy:
    """Start the processes, and load the policy in all of them.

    Raises:
        PolicyError: it cannot be split, or not loaded.
        FatalEngineError: a process has ended.
    """
    overrides = plan_overrides(source, settings)
    num_ranks = settings.tensor_parallel
    ranks = Ranks(num_ranks, timedelta(seconds=settings.engine_timeout_s), startup)
    with contextlib.ExitStack() as on_error:
        on_error.callback(ranks.close)
        num_threads = max(1, torch.get_num_threads() // num_ranks)
        dumped = settings.model_dump(exclude=_PRIVATE)
        infos = ranks.coordinator.run(Load(num_ranks, ranks.port, source, dumped, overrides, num_threads))
        if any(info != infos[0] for info in infos):
            raise PolicyError(f"the devices do not agree on what they have loaded: {infos}")
        assert ranks.participant.policy is not None
        on_error.pop_all()
    logger.info("%s is split over %d devices", source.name, num_ranks)
    return SplitPolicy(ranks.participant.policy, ranks, f"{infos[0].device} × {num_ranks}")
