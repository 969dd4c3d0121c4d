"""Summary of scored rollouts as a table, by the human's action type."""

import json
from collections.abc import Callable, Iterable, Sequence

from rich.table import Table

from shopr1_client.wire import Group, Reward

_ALL = "all"
_Cell = Callable[[Sequence[Reward]], str]


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
    for label, cell in _rows(columns[_ALL]).items():
        table.add_row(label, *(cell(column) for column in columns.values()))
    return table


def _true_type(group: Group) -> str:
    truth = group.ground_truth
    # int() rejects more than 4,300 digits, which a label may have beside its action.
    fields = json.loads(truth, parse_int=float) if isinstance(truth, str) else truth
    return str(fields["type"])


def _mean(values: Iterable[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{sum(known) / len(known):.4f}" if known else "-"


def _term(name: str) -> _Cell:
    return lambda rewards: _mean(reward.components[name] for reward in rewards if reward.reward is not None)


def _rows(rewards: Sequence[Reward]) -> dict[str, _Cell]:
    """Labels and cells; the recipe's components are the same in all rewards."""
    components = rewards[0].components if rewards else ()
    return {
        "rollouts": lambda column: str(len(column)),
        "unscorable": lambda column: str(sum(reward.reward is None for reward in column)),
        **{name: _term(name) for name in components},
        "reward": lambda column: _mean(reward.reward for reward in column),
        "exact match": lambda column: _mean(float(reward.details.exact_match) for reward in column),
    }
