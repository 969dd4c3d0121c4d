"""Only admin keys may change the policy, with any spelling of the path."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.http import answer, group, problem, running
from tests.support.models import one_thread, tiny_model
from tests.support.updating import adapter_file, changed_model, done, file_of, updatable

pytestmark = pytest.mark.anyio

KEYS = {scope: f"{scope}-key-0123456789" for scope in ("score", "metrics", "admin")}
SETTINGS: dict[str, Any] = {"api_keys": tuple(f"{scope}:{key}" for scope, key in KEYS.items())}
ADMIN = [
    ("POST", "/policy/update"),
    ("PUT", "/policy/weights"),
    ("POST", "/policy/transfer"),
    ("POST", "/policy/adapters"),
    ("PUT", "/policy/adapters/a"),
    ("DELETE", "/policy/adapters/a"),
    ("POST", "/update_weights_from_disk"),
    ("POST", "/pause_generation"),
    ("POST", "/continue_generation"),
    ("POST", "/flush_cache"),
    ("GET", "/flush_cache"),
    ("POST", "/load_lora_adapter"),
    ("POST", "/unload_lora_adapter"),
    ("POST", "/v1/load_lora_adapter"),
    ("POST", "/v1/unload_lora_adapter"),
]
READING = [("GET", "/policy"), ("GET", "/model_info")]
NEW = file_of(changed_model())


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def bearer(scope: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {KEYS[scope]}"}


async def test_no_route_is_missing_here() -> None:
    async with updatable() as service:
        documented = service.app.openapi()["paths"]
    found = {
        (method.upper(), path.replace("{name}", "a"))
        for path, operations in documented.items()
        for method, operation in operations.items()
        if {"policy", "engines"} & set(operation["tags"])
    }
    assert found == {*ADMIN, *READING}


@pytest.mark.parametrize(("method", "path"), ADMIN)
@pytest.mark.parametrize("prefix", ["", "/run/x", "/run/x/run/y", "/run/"])
async def test_changing_the_policy(method: str, path: str, prefix: str) -> None:
    async with running(**SETTINGS) as client:
        problem(await client.request(method, prefix + path), 401, "unauthenticated")
        for scope in ("score", "metrics"):
            refused = await client.request(method, prefix + path, headers=bearer(scope))
            assert "not for admin" in problem(refused, 403, "forbidden")["detail"]
        taken = await client.request(method, prefix + path, headers=bearer("admin"))
        assert taken.status_code in (200, 422)  # by the route: there is no body, or no run's id


@pytest.mark.parametrize(("method", "path"), READING)
async def test_reading_loaded_versions(method: str, path: str) -> None:
    async with running(**SETTINGS) as client:
        problem(await client.request(method, path), 401, "unauthenticated")
        problem(await client.request(method, path, headers=bearer("metrics")), 403, "forbidden")
        for scope in ("score", "admin"):
            for prefix in ("", "/run/x", f"/key/{KEYS[scope]}", f"/key/{KEYS[scope]}/run/x"):
                headers = {} if "key" in prefix else bearer(scope)
                done(await client.request(method, prefix + path, headers=headers))


async def test_metrics_behind_a_run() -> None:
    async with running(**SETTINGS) as client:
        problem(await client.get("/run/x/metrics", headers=bearer("score")), 403, "forbidden")
        assert (await client.get("/run/x/metrics", headers=bearer("metrics"))).status_code == 200


@pytest.mark.parametrize(
    "prefix",
    ["", "/run/x", "/key/{key}", "/key/{key}/run/x", "/key/{key}/run/x/run/y", "/key/other/key/{key}"],
)
async def test_weights_come_by_any_of_these(prefix: str) -> None:
    async with updatable(**SETTINGS, max_body_bytes=1000) as service:
        headers = {} if "key" in prefix else bearer("admin")
        url = f"{prefix.format(key=KEYS['admin'])}/policy"
        done(await service.http.put(f"{url}/weights?version=1", content=NEW, headers=headers))
        done(await service.http.put(f"{url}/adapters/a", content=adapter_file(), headers=headers))


@pytest.mark.parametrize(
    "prefix",
    [
        "/key/{score}",
        "/key/{score}/run/x",
        "/key/{admin}/key/{score}",
        "/run/x/key/{admin}",
        "/key/x",
        "/run/x",
    ],
)
async def test_and_by_none_of_these(prefix: str) -> None:
    async with updatable(tiny_model(), **SETTINGS) as service:
        url = f"{prefix.format(**KEYS)}/policy/weights?version=1"
        refused = await service.http.put(url, content=NEW)
        assert refused.status_code in (401, 403)
        assert service.policy.versions.num_changes == 0


async def test_a_key_that_scores_may_choose_versions() -> None:
    async with updatable(**SETTINGS) as service:
        body = {"groups": [group(answer())], "policy_version": {"exact": 0}, "adapter": "base"}
        done(await service.http.post("/score", json=body, headers=bearer("score")))
