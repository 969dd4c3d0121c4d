"""Metrics of the service in `GET /metrics`."""

from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from shopr1_service.core import CacheStats, EngineStats
from shopr1_service.monitoring.metrics import Metrics
from shopr1_service.policy.fake import FakePolicy
from tests.support.http import CLICK, answer, group, metric, post, running, score, write_recipe

pytestmark = pytest.mark.anyio


async def names(client: httpx.AsyncClient) -> set[str]:
    return {family.name for family in text_string_to_metric_families((await client.get("/metrics")).text)}


async def routes(client: httpx.AsyncClient) -> set[str]:
    families = text_string_to_metric_families((await client.get("/metrics")).text)
    return {s.labels["route"] for family in families for s in family.samples if "route" in s.labels}


async def test_rollouts_by_outcome() -> None:
    # A prompt of 4 and 18 characters before the rationale's last make 22 tokens, with "abcdefgh" 26.
    async with running(FakePolicy(max_sequence_tokens=24)) as client:
        await score(client, group(answer(), answer(), "nonsense"), group(answer(rationale="abcdefgh"), ""))
        scored = await metric(client, "shopr1_rollouts_total", recipe="shop_r1", status="scored", reason="")
        too_long = await metric(
            client, "shopr1_rollouts_total", status="unscorable", reason="sequence_too_long"
        )
        total = await metric(client, "shopr1_rollouts_total")
        errors = [
            await metric(client, "shopr1_format_errors_total", recipe="shop_r1", error=error)
            for error in ("invalid_json", "empty", "extra_text")
        ]
    assert (scored, too_long, total) == (4, 1, 5)
    assert errors == [1, 1, 0]


async def test_sums_of_terms_are_over_scored_rollouts() -> None:
    async with running(FakePolicy(26.0, max_sequence_tokens=200)) as client:
        await score(client, group(answer(CLICK), answer({"type": "click", "name": "x"}), "{", truth=CLICK))
        await score(client, group(answer(), prompt="p" * 200))
        sums = [
            await metric(client, "shopr1_reward_component_sum", recipe="shop_r1", component=component)
            for component in ("format", "action_type", "attribute", "value", "self_certainty")
        ]
        count = await metric(client, "shopr1_reward_component_count", component="value")
        tokens = await metric(client, "shopr1_measured_tokens_total")
    # Twice 0.5, 0.3 and 0.2, once 1000, twice 0.13; the broken one counts with zeros, the long one does not.
    assert sums == pytest.approx([1.0, 0.6, 0.4, 1000.0, 0.26])
    assert count == 3
    assert tokens == 2 * len("abcd")


async def test_requests_by_route_and_status() -> None:
    async with running(max_groups=1) as client:
        await post(client, {"groups": []})
        await post(client, {"groups": []})
        await post(client, {})
        await post(client, b"{")
        await post(client, {"groups": [group(), group()]})
        await client.get("/recipes/shop_r1")
        await client.get("/recipes/nope")
        counts = {
            (route, status): await metric(client, "shopr1_requests_total", route=route, status=status)
            for route, status in [
                ("/score", "200"),
                ("/score", "422"),
                ("/score", "400"),
                ("/score", "413"),
                ("/recipes/{name}", "200"),
                ("/recipes/{name}", "404"),
            ]
        }
        timed = await metric(client, "shopr1_request_duration_seconds_count", route="/score")
    assert list(counts.values()) == [2, 1, 1, 1, 1, 1]
    assert timed == 5


async def test_unknown_paths_are_one_route() -> None:
    async with running() as client:
        known = await routes(client)
        for path in ("/a", "/b", "/recipes/a/b", "/%00"):
            await client.get(path)
        await client.get("/recipes/a")
        assert await routes(client) - known == {"unknown", "/recipes/{name}", "/metrics"}
        assert await metric(client, "shopr1_requests_total", route="unknown") == 4


async def test_unknown_methods_share_one_label() -> None:
    async with running() as client:
        for i in range(50):
            await client.request(f"BREW{i}", "/score")
        families = text_string_to_metric_families((await client.get("/metrics")).text)
        methods = {s.labels["method"] for family in families for s in family.samples if "method" in s.labels}
    assert len(methods) < 10


async def test_phases() -> None:
    async with running() as client:
        # The engine is asked for groups that have something to measure.
        groups = [group(answer()), group(answer(), answer(), prompt="another"), group("nonsense"), group()]
        await score(client, *groups)
        counts = {
            phase: await metric(client, "shopr1_phase_duration_seconds_count", phase=phase)
            for phase in ("prepare", "queue", "engine")
        }
        batches = [await metric(client, f"shopr1_batch_groups_{what}") for what in ("count", "sum")]
        tokens = await metric(client, "shopr1_engine_tokens_total")
    assert counts == {"prepare": 1, "queue": 2, "engine": 1}
    assert batches == [1, 2]  # both were short enough to go together
    assert tokens == len("page") + len("another") + 3 * len(answer())


async def test_recipes_have_series_of_their_own(tmp_path: Path) -> None:
    async with running(recipe=write_recipe(tmp_path)) as client:
        await score(client, group(answer()), recipe="shop_r1")
        await score(client, group(answer(), answer()))
        counts = [await metric(client, "shopr1_rollouts_total", recipe=name) for name in ("shop_r1", "mine")]
    assert counts == [1, 2]


async def test_policy() -> None:
    async with running() as client:
        labels = {"model": "fake", "version": "0", "dtype": "float64", "head": "fake", "forward": "fake"}
        assert await metric(client, "shopr1_policy_info", **labels) == 1
        assert await metric(client, "shopr1_policy_info") == 1


async def test_applications_do_not_share_counters() -> None:
    async with running() as one, running() as other:
        await score(one, group(answer()))
        assert await metric(one, "shopr1_rollouts_total") == 1
        assert await metric(other, "shopr1_rollouts_total") == 0


async def test_names_and_form() -> None:
    async with running() as client:
        response = await client.get("/metrics")
        assert response.headers["Content-Type"].startswith("text/plain; version=")
        assert await names(client) >= {
            "shopr1_requests",
            "shopr1_request_duration_seconds",
            "shopr1_phase_duration_seconds",
            "shopr1_rollouts",
            "shopr1_reward_component",
            "shopr1_format_errors",
            "shopr1_measured_tokens",
            "shopr1_policy_info",
        }


async def test_the_engines_counts_are_added() -> None:
    metrics = Metrics()
    cache = CacheStats(num_hit_tokens=3, num_missed_tokens=5, num_bytes=70, num_evicted_chunks=1)
    stats = EngineStats(cache, num_out_of_memory=2)
    metrics.record_engine(stats)
    cache.num_hit_tokens, cache.num_bytes, stats.num_out_of_memory = 10, 50, 5
    metrics.record_engine(stats)
    values = {
        (sample.name, *sample.labels.values()): sample.value
        for family in metrics.registry.collect()
        for sample in family.samples
    }
    assert values["shopr1_prefix_cache_tokens_total", "hit"] == 10
    assert values["shopr1_prefix_cache_tokens_total", "miss"] == 5
    assert values[("shopr1_prefix_cache_evicted_chunks_total",)] == 1
    assert values[("shopr1_prefix_cache_bytes",)] == 50
    assert values[("shopr1_out_of_memory_total",)] == 5


async def test_the_version_and_the_room_of_the_queue() -> None:
    async with running(max_queue_tokens=1234) as client:
        assert await metric(client, "shopr1_build_info", version="0.1.0") == 1
        assert await metric(client, "shopr1_max_queue_tokens") == 1234
        assert await metric(client, "process_resident_memory_bytes") > 2**20
