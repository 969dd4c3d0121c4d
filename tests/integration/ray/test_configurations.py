"""The shipped configurations for Ray Serve and KubeRay are valid for Ray and for the application."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError
from ray.serve.schema import ServeDeploySchema

from shopr1_service.cluster.application import ENGINES, build
from shopr1_service.errors import SettingsError

FOLDER = Path(__file__).parents[3] / "docker" / "ray"


def configurations() -> dict[str, Any]:
    kuberay = yaml.safe_load((FOLDER / "kuberay.yaml").read_text())
    return {
        "serve.yaml": yaml.safe_load((FOLDER / "serve.yaml").read_text()),
        "kuberay.yaml": yaml.safe_load(kuberay["spec"]["serveConfigV2"]),
    }


@pytest.mark.parametrize("name", configurations())
def test_ray_and_the_application_accept_it(name: str) -> None:
    [application] = ServeDeploySchema.model_validate(configurations()[name]).applications
    assert application.import_path == f"{build.__module__}:{build.__name__}"
    build(application.args)


def test_kuberay_uses_the_tested_version_of_ray() -> None:
    manifest = yaml.safe_load((FOLDER / "kuberay.yaml").read_text())
    constraints = (FOLDER.parents[1] / "constraints.txt").read_text()
    assert f"ray=={manifest['spec']['rayClusterConfig']['rayVersion']}" in constraints.splitlines()


def test_max_replicas_turns_autoscaling_on() -> None:
    ingress = build({"num_replicas": 2, "max_replicas": 5, "target_queued_tokens": 100})
    engines = ingress._bound_deployment.init_args[0]._bound_deployment
    assert engines.name == ENGINES
    config = engines._deployment_config.autoscaling_config
    assert (config.min_replicas, config.max_replicas) == (2, 5)
    fixed = build({"num_replicas": 2})._bound_deployment.init_args[0]._bound_deployment
    assert fixed._deployment_config.autoscaling_config is None
    assert fixed.num_replicas == 2


def test_wrong_options_are_named() -> None:
    with pytest.raises(SettingsError, match="num_replica"):
        build({"num_replica": 2})
    with pytest.raises(ValidationError, match="num_replicas"):
        build({"num_replicas": 0})
