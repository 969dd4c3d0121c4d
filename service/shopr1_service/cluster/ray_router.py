"""Ray Serve's request router, by prefix affinity: `Affinity` ranks, Ray sends to the first that has room."""

from collections.abc import Sequence
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, ReplicaResult, RequestRouter, RunningReplica

from shopr1_service.cluster.prefix_affinity import MAX_KEPT_TOKENS, Affinity, Work
from shopr1_service.cluster.routing_view import Route
from shopr1_service.core import TokenGroup


class AffinityRouter(RequestRouter):
    """See the module. Calls whose first argument is no `TokenGroup` go to whoever has least to do."""

    def initialize_state(self, max_kept_tokens: int = MAX_KEPT_TOKENS, missing_weight: int = 1) -> None:
        """Called by Ray with `request_router_kwargs`."""
        self._affinity: Affinity[ReplicaID] = Affinity(max_kept_tokens, missing_weight=missing_weight)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Ranks of one, of which Ray takes the first that has room."""
        if pending_request is not None:
            # All are among those that are given. Otherwise Ray would ask again at once, and again.
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
    """Those that the request's `Route` names; all, if none of them is there: they refuse for themselves."""
    routes = [argument for argument in request.args if isinstance(argument, Route)] if request else []
    among = routes[0].among if routes else None
    allowed = [replica for replica in replicas if among is None or replica.replica_id.unique_id in among]
    return allowed or replicas


def _work(request: PendingRequest | None) -> Work | None:
    arguments: Sequence[Any] = request.args if request else ()
    if not arguments or not isinstance(arguments[0], TokenGroup):
        return None
    group = arguments[0]
    return Work.of(group.prompt_ids, sum(len(completion.ids) for completion in group.completions))
