"""The dashboard's first row: whether trainings are well."""

from grafana_foundation_sdk.models import units
from panels import (
    HALF,
    INSTANCE,
    RUN,
    Panels,
    Query,
    graph,
    heat,
    matrix,
    mean,
    quantile,
    quantiles,
    share,
    total,
)


def rewards() -> Panels:
    return [
        graph(
            "Reward by the human's action",
            "Sick: it falls, or it stays at 0.5, which is valid JSON and nothing right.",
            Query(mean("shopr1_reward", "run, action_type"), "{{run}} {{action_type}}"),
        ),
        heat(
            "Rewards",
            "A band per step: 0 invalid; to 0.75 the format alone; to 0.99 the type; to 1.5 type and "
            "attributes; above 750 a value that is alike; above 1000 the very one. Sick: upper bands fade.",
            "shopr1_reward",
        ),
        graph(
            "Terms of the reward",
            "Weighted. Sick: self_certainty grows and value does not.",
            Query(mean("shopr1_reward_component", "component, action_type"), "{{component}} {{action_type}}"),
        ),
    ]


def actions() -> Panels:
    by = "run, action_type"
    return [
        graph(
            "Exact matches by the human's action",
            "Share of scored rollouts that do exactly what the human did. Sick: it falls.",
            Query(
                f"{total('shopr1_exact_matches_total', by)} / {total('shopr1_reward_count', by)}",
                "{{run}} {{action_type}}",
            ),
            unit=units.PercentUnit,
        ),
        graph(
            "Action types, predicted and true",
            "Shares. Sick: a predicted type leaves its true share, above all terminate; invalid grows.",
            Query(share("shopr1_actions_total", "predicted_type"), "{{predicted_type}}"),
            Query(share("shopr1_actions_total", "true_type"), "{{true_type}}, true"),
            unit=units.PercentUnit,
        ),
        matrix(
            "Predicted action by true action",
            "Rollouts in the time range. Sick: a column that is full whatever the row.",
            f"sum by (true_type, predicted_type) (increase(shopr1_actions_total{{{RUN}}}[$__range]))",
            rows="true_type",
            columns="predicted_type",
        ),
    ]


def rationales() -> Panels:
    certainty = "shopr1_self_certainty_nats"
    return [
        graph(
            "Self-certainty",
            "In nats. Sick: it climbs while exact matches fall. The policy is sure of empty words.",
            *quantiles(certainty, "run", "{{run}}"),
            Query(mean(certainty, "run, action_type"), "mean {{run}} {{action_type}}"),
        ),
        heat(
            "Self-certainties",
            "In nats. Sick: all rollouts gather in one band far up.",
            certainty,
        ),
        graph(
            "Rationale length",
            "In tokens. Sick: it doubles within hours, or goes to nothing.",
            *quantiles("shopr1_rationale_tokens", "run", "{{run}}"),
            Query(mean("shopr1_rationale_tokens", "run"), "mean {{run}}"),
        ),
        graph(
            "Repetition in rationales",
            "Share of 4-grams that occurred before in the same rationale. Sick: above 0.2.",
            Query(quantile(0.9, "shopr1_rationale_repetition_ratio", "run"), "p90 {{run}}"),
            Query(mean("shopr1_rationale_repetition_ratio", "run"), "mean {{run}}"),
            unit=units.PercentUnit,
        ),
        graph(
            "Format errors",
            "Share of scored rollouts. Sick: it rises; invalid_json is mostly a completion that is cut off.",
            Query(share("shopr1_format_errors_total", "error"), "{{error}}"),
            unit=units.PercentUnit,
        ),
        graph(
            "Rollouts without a reward",
            "By reason, and the numbers that trainers were given instead. Sick: anything above 0.",
            Query(
                total("shopr1_rollouts_total", "run, reason", f'{RUN},status="unscorable"'),
                "{{run}} {{reason}}",
            ),
            Query(
                total("shopr1_fallback_rewards_total", "dialect, reason", INSTANCE),
                "{{dialect}} was given a number: {{reason}}",
            ),
            unit=units.CountsPerSecond,
        ),
        graph(
            "Rollouts scored",
            "Sick: a run that should go on is at 0.",
            Query(total("shopr1_rollouts_total", "run", f'{RUN},status="scored"'), "{{run}}"),
            unit=units.CountsPerSecond,
            width=HALF,
        ),
        graph(
            "Since a run was scored last",
            "Sick: longer than a step of the training takes.",
            Query(
                f'time() - max by (run) (shopr1_last_scored_timestamp_seconds{{run=~"$run",{INSTANCE}}})',
                "{{run}}",
            ),
            unit=units.Seconds,
            width=HALF,
        ),
    ]


def panels() -> Panels:
    return [*rewards(), *actions(), *rationales()]
