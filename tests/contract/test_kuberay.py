"""The manifest for KubeRay is consistent with itself. tests/integration/ray loads it with Ray."""

from pathlib import Path

import pytest
import yaml

from shopr1_service.settings import ENV_PREFIX, Settings

MANIFEST = yaml.safe_load((Path(__file__).parents[2] / "docker" / "ray" / "kuberay.yaml").read_text("utf-8"))
CLUSTER = MANIFEST["spec"]["rayClusterConfig"]
ARGS = yaml.safe_load(MANIFEST["spec"]["serveConfigV2"])["applications"][0]["args"]
PODS = {
    "head": CLUSTER["headGroupSpec"]["template"]["spec"],
    **{group["groupName"]: group["template"]["spec"] for group in CLUSTER["workerGroupSpecs"]},
}


@pytest.mark.parametrize("name", PODS)
def test_mounted_volumes_are_declared(name: str) -> None:
    [container] = PODS[name]["containers"]
    mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert set(mounted) == {volume["name"] for volume in PODS[name]["volumes"]}
    for setting in ("policy", "policy_roots", "staging_dir", "api_key_file"):
        assert any(str(ARGS[setting]).startswith(path) for path in mounted.values()), setting


@pytest.mark.parametrize("name", PODS)
def test_variables_of_kubernetes_are_not_read_as_settings(name: str) -> None:
    """Kubernetes sets NAME_PORT, NAME_SERVICE_HOST etc. of each Service in every pod."""
    assert PODS[name]["enableServiceLinks"] is False
    assert not f"{MANIFEST['metadata']['name']}_".upper().startswith(ENV_PREFIX)


def test_nothing_runs_as_root() -> None:
    for pod in PODS.values():
        assert pod["securityContext"] == {"runAsNonRoot": True, "runAsUser": 10001, "fsGroup": 10001}


def test_an_engine_fits_on_a_worker() -> None:
    [container] = PODS["gpu"]["containers"]
    limits = container["resources"]["limits"]
    assert int(limits["nvidia.com/gpu"]) == ARGS["num_gpus"]
    assert int(limits["cpu"]) >= ARGS["num_cpus"]
    [workers] = CLUSTER["workerGroupSpecs"]
    assert (workers["minReplicas"], workers["maxReplicas"]) == (ARGS["num_replicas"], ARGS["max_replicas"])
    assert PODS["gpu"]["terminationGracePeriodSeconds"] > Settings().shutdown_grace_s


def test_keys_are_required() -> None:
    assert ARGS["api_key_file"].startswith("/keys/")
    assert "allow_unauthenticated" not in ARGS
