"""Request router of Ray Serve: `Affinity` ranks the engines, Ray sends to the first that has room."""

from collections.abc import Iterator
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, ReplicaResult, RequestRouter, RunningReplica

from shopr1_service.cluster.messages import Route
from shopr1_service.cluster.prefix_affinity import MAX_KEPT_TOKENS, Affinity, Work
from shopr1_service.core import TokenGroup


class AffinityRouter(RequestRouter):
    """Routes calls with a `TokenGroup` by prefix affinity, others to the engine with the shortest queue."""

    def initialize_state(self, max_kept_tokens: int = MAX_KEPT_TOKENS, missing_weight: int = 1) -> None:
        """Create the router's state. Ray passes `request_router_kwargs`."""
        self._affinity: Affinity[ReplicaID] = Affinity(max_kept_tokens, missing_weight=missing_weight)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Ranks of one replica each; Ray takes the first one that has room."""
        if pending_request is not None:
            # Every replica is in a rank. Without this, Ray would ask again at once if none has room.
            pending_request.routing_context.should_backoff = True
        allowed, work = _allowed(candidate_replicas, pending_request), _work(pending_request)
        if work is None:
            return [allowed]
        by_id = {replica.replica_id: replica for replica in allowed}
        return [[by_id[replica_id]] for replica_id in self._affinity.ranked(work, list(by_id))]

    def on_request_routed(
        self, pending_request: PendingRequest, replica_id: ReplicaID, result: ReplicaResult
    ) -> None:
        if (work := _work(pending_request)) is not None:
            self._affinity.begin(pending_request.metadata.internal_request_id, work, replica_id)

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        self._affinity.end(internal_request_id)

    def update_replicas(self, replicas: list[RunningReplica]) -> Any:  # noqa: ANN401  # as Ray's
        self._affinity.keep_only([replica.replica_id for replica in replicas])
        return super().update_replicas(replicas)


def _allowed(replicas: list[RunningReplica], request: PendingRequest | None) -> list[RunningReplica]:
    """Replicas that the request's `Route` names; all if none of them exists, as each declines for itself."""
    for route in _arguments(request, Route):
        return [
            each for each in replicas if route.among is None or each.replica_id.unique_id in route.among
        ] or replicas
    return replicas


def _work(request: PendingRequest | None) -> Work | None:
    for group in _arguments(request, TokenGroup):
        return Work.of(group.prompt_ids, sum(len(completion.ids) for completion in group.completions))
    return None


def _arguments(request: PendingRequest | None, kind: type) -> Iterator[Any]:
    return (argument for argument in (request.args if request else ()) if isinstance(argument, kind))
