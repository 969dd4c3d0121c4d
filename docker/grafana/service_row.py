"""The dashboard's second row: whether the service is well."""

from grafana_foundation_sdk.models import units
from panels import (
    INSTANCE,
    PROCESS,
    SCORING,
    Panels,
    Query,
    graph,
    mean,
    number,
    quantile,
    quantiles,
    rate,
    total,
)


def state() -> Panels:
    def since(metric: str) -> str:
        return f"time() - {metric}{{{INSTANCE}}}"

    return [
        number(
            "Ready",
            "1: it can score. Sick: 0 for longer than a load takes.",
            Query(f"shopr1_ready{{{INSTANCE}}}", PROCESS),
        ),
        number(
            "Since the engine's last sign",
            "Idle it gives one each second, busy at each pass. Sick: minutes.",
            Query(since("shopr1_engine_heartbeat_timestamp_seconds"), PROCESS),
            units.Seconds,
        ),
        number(
            "Since the policy was loaded",
            "Sick: much longer than the training goes on with other weights.",
            Query(since("shopr1_policy_loaded_timestamp_seconds"), PROCESS),
            units.Seconds,
        ),
        number(
            "Policy version",
            "Sick: instances of one run that differ.",
            Query(
                f"max by (instance, model, version) (shopr1_policy_info{{{INSTANCE}}})",
                "{{instance}}: {{model}} {{version}}",
            ),
        ),
    ]


def requests() -> Panels:
    duration = "shopr1_request_duration_seconds"
    return [
        graph(
            "Requests by status",
            "Sick: 5xx; 429 that stays; 422 from a trainer that is set up wrongly.",
            Query(total("shopr1_requests_total", "status", SCORING), "{{status}}"),
            unit=units.RequestsPerSecond,
        ),
        graph(
            "Time to the answer",
            "Of routes that score. Sick: p90 nears the trainer's own time limit.",
            *quantiles(duration, "job", "", SCORING),
            Query(quantile(0.99, duration, "job", SCORING), "p99"),
            unit=units.Seconds,
        ),
        graph(
            "Time by phase",
            "Mean. Sick: queue is longer than engine. Then the service is too small, not slow.",
            Query(mean("shopr1_phase_duration_seconds", "phase", INSTANCE), "{{phase}}"),
            unit=units.Seconds,
        ),
        graph(
            "Queue",
            "Tokens that wait for the engine, and how many may. Sick: they meet; requests are refused then.",
            Query(f"shopr1_queue_tokens{{{INSTANCE}}}", PROCESS),
            Query(f"shopr1_max_queue_tokens{{{INSTANCE}}}", f"{PROCESS}, most"),
        ),
        graph(
            "Refused, repeated",
            "Requests without room in the queue; those that got a twin's answer. "
            "Sick: refusals that stay; many twins: trainers give up too soon.",
            Query(total("shopr1_rejected_requests_total", "reason", INSTANCE), "{{reason}}"),
            Query(total("shopr1_repeated_requests_total", "how", INSTANCE), "twin {{how}}"),
            unit=units.CountsPerSecond,
        ),
        graph(
            "Tokens",
            "What the engine is given, and what is measured. Sick: it falls while the queue is full.",
            Query(total("shopr1_engine_tokens_total", "instance", INSTANCE), "{{instance}}"),
            Query(
                total("shopr1_measured_tokens_total", "instance", INSTANCE),
                "{{instance}}, measured",
            ),
            unit=units.CountsPerSecond,
        ),
    ]


def engine() -> Panels:
    tokens, hits = "shopr1_prefix_cache_tokens_total", f'{INSTANCE},outcome="hit"'
    return [
        graph(
            "Groups per batch",
            "Mean. Sick: 1 while requests queue up with short prompts.",
            Query(mean("shopr1_batch_groups", "instance", INSTANCE), "{{instance}}"),
        ),
        graph(
            "Prompt tokens from the cache",
            "Share. Sick: near 0 although trainers send prompts again; the cache is too small for them.",
            Query(
                f"{total(tokens, 'instance', hits)} / {total(tokens, 'instance', INSTANCE)}",
                "{{instance}}",
            ),
            unit=units.PercentUnit,
        ),
        graph(
            "Cache",
            "Keys and values of prompts that are kept. Sick: 0 although trainers send prompts again.",
            Query(f"shopr1_prefix_cache_bytes{{{INSTANCE}}}", PROCESS),
            unit=units.BytesIEC,
        ),
        graph(
            "Memory of the process",
            "On the host. Sick: it grows for days.",
            Query(f'process_resident_memory_bytes{{{INSTANCE},job="shopr1"}}', PROCESS),
            unit=units.BytesIEC,
        ),
        graph(
            "Want of device memory",
            "Forwards that failed for it, and pieces of the cache dropped to make room. Sick: any forward; "
            "pieces all the time.",
            Query(rate("shopr1_out_of_memory_total", INSTANCE), f"{PROCESS}, forwards"),
            Query(rate("shopr1_prefix_cache_evicted_chunks_total", INSTANCE), f"{PROCESS}, pieces"),
            unit=units.CountsPerSecond,
        ),
        graph(
            "CPU",
            "Cores in use. Sick on a GPU machine: more than two or three all the time.",
            Query(rate("process_cpu_seconds_total", f'{INSTANCE},job="shopr1"'), PROCESS),
        ),
    ]


def updates() -> Panels:
    changes = "shopr1_policy_updates_total"
    return [
        graph(
            "Versions",
            "Changes of weights and adapters. Sick: it stands still while a training goes on.",
            Query(f"shopr1_policy_number{{{INSTANCE}}}", PROCESS),
            Query(f"shopr1_loaded_adapters{{{INSTANCE}}}", f"{PROCESS}, adapters loaded"),
        ),
        graph(
            "Updates",
            "New weights that came. Sick: any that failed; the old ones score on.",
            Query(total(changes, "outcome", INSTANCE), "{{outcome}}"),
            unit=units.CountsPerSecond,
        ),
        graph(
            "Time of an update",
            "Mean, in all, and the part in which nothing is scored. Sick: the second nears the first.",
            Query(mean("shopr1_policy_update_duration_seconds", "source", INSTANCE), "{{source}}"),
            Query(mean("shopr1_policy_swap_duration_seconds", "source", INSTANCE), "{{source}}, pause"),
            unit=units.Seconds,
        ),
    ]


def panels() -> Panels:
    return [*state(), *requests(), *updates(), *engine()]
