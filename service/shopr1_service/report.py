"""Tables for people: what was earned, by the human's action type."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from rich.table import Table
from shopr1_client.wire import Components, Group, Reward

_COMPONENTS = tuple(Components.model_fields)


@dataclass
class _Row:
    rewards: list[Reward] = field(default_factory=list)

    def cells(self) -> list[str]:
        scored = [reward for reward in self.rewards if reward.reward is not None]
        terms = [_mean(getattr(r.components, name) for r in scored) for name in _COMPONENTS]
        reward = _mean(r.reward for r in scored if r.reward is not None)
        exact = _mean(float(r.details.exact_match) for r in self.rewards)
        return [str(len(self.rewards)), str(len(self.rewards) - len(scored)), *terms, reward, exact]


def _mean(values: Iterable[float]) -> str:
    values = list(values)
    return f"{sum(values) / len(values):.4f}" if values else "-"


def summary(groups: Sequence[Group], rewards: Sequence[Sequence[Reward]]) -> Table:
    """Means of the weighted terms over the scored rollouts, by the human's action type."""
    rows: dict[str, _Row] = {}
    for group, group_rewards in zip(groups, rewards, strict=True):
        rows.setdefault(_true_type(group), _Row()).rewards.extend(group_rewards)
    table = Table("action type", title="Mean reward and its terms")
    for name in ("rollouts", "unscorable", *_COMPONENTS, "reward", "exact match"):
        table.add_column(name, justify="right")
    for name, row in sorted(rows.items()):
        table.add_row(name, *row.cells())
    if len(rows) > 1:
        table.add_section()
        table.add_row("all", *_Row([reward for row in rows.values() for reward in row.rewards]).cells())
    return table


def _true_type(group: Group) -> str:
    truth = group.ground_truth
    fields = json.loads(truth) if isinstance(truth, str) else truth
    return str(fields["type"])
