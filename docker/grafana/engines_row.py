"""The dashboard's third row: engines behind Ray Serve, one by one. A server alone has one, without a name."""

from grafana_foundation_sdk.models import units
from panels import INSTANCE, PROCESS, Panels, Query, graph, total

_EACH = "instance, engine"


def panels() -> Panels:
    tokens, hits = "shopr1_prefix_cache_tokens_total", f'{INSTANCE},outcome="hit"'
    return [
        graph(
            "Engines by version",
            "Sick: two versions for longer than an update takes.",
            Query(f"count by (version) (shopr1_policy_info{{{INSTANCE}}})", "{{version}}"),
        ),
        graph(
            "Version of each engine",
            "Number of the last change. Sick: lines that stay apart.",
            Query(f"max by ({_EACH}) (shopr1_policy_number{{{INSTANCE}}})", PROCESS),
        ),
        graph(
            "Queue of each engine",
            "Tokens that wait. Sick: one line high and the others low: prompts are not spread.",
            Query(f"max by ({_EACH}) (shopr1_queue_tokens{{{INSTANCE}}})", PROCESS),
        ),
        graph(
            "Tokens of each engine",
            "What it is given. Sick: one at 0 while others have a queue.",
            Query(total("shopr1_engine_tokens_total", _EACH, INSTANCE), PROCESS),
            unit=units.CountsPerSecond,
        ),
        graph(
            "Prompt tokens from each engine's cache",
            "Share. Sick: near 0 although sessions go on: their steps do not reach the engine that has them.",
            Query(f"{total(tokens, _EACH, hits)} / {total(tokens, _EACH, INSTANCE)}", PROCESS),
            unit=units.PercentUnit,
        ),
        graph(
            "Memory of each process",
            "On its host; of the HTTP side, too, which has no engine's name. Sick: it grows for days.",
            Query(f'process_resident_memory_bytes{{{INSTANCE},job="shopr1"}}', PROCESS),
            unit=units.BytesIEC,
        ),
    ]
