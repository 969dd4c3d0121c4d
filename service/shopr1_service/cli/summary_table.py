"""Tables for people: what was earned, by the human's action type."""

import json
from collections.abc import Callable, Iterable, Sequence

from rich.table import Table

from shopr1_client.wire import Components, Group, Reward

_ALL = "all"


def summary(groups: Sequence[Group], rewards: Sequence[Sequence[Reward]]) -> Table:
    """Counts, and means of the weighted terms over the scored rollouts, a column per action type."""
    columns: dict[str, list[Reward]] = {}
    for group, group_rewards in zip(groups, rewards, strict=True):
        columns.setdefault(_true_type(group), []).extend(group_rewards)
    columns = dict(sorted(columns.items()))
    columns[_ALL] = [reward for column in columns.values() for reward in column]
    table = Table("human's action", title="Mean of each weighted term")
    for name in columns:
        table.add_column(name, justify="right")
    for label, cell in _ROWS.items():
        table.add_row(label, *(cell(column) for column in columns.values()))
    return table


def _true_type(group: Group) -> str:
    truth = group.ground_truth
    fields = json.loads(truth) if isinstance(truth, str) else truth
    return str(fields["type"])


def _mean(values: Iterable[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{sum(known) / len(known):.4f}" if known else "-"


def _term(name: str) -> Callable[[Sequence[Reward]], str]:
    return lambda rewards: _mean(
        getattr(reward.components, name) for reward in rewards if reward.reward is not None
    )


_ROWS: dict[str, Callable[[Sequence[Reward]], str]] = {
    "rollouts": lambda rewards: str(len(rewards)),
    "unscorable": lambda rewards: str(sum(reward.reward is None for reward in rewards)),
    **{name: _term(name) for name in Components.model_fields},
    "reward": lambda rewards: _mean(reward.reward for reward in rewards),
    "exact match": lambda rewards: _mean(float(reward.details.exact_match) for reward in rewards),
}
