"""Wire models of versions and updates: accepted and rejected requests, and their defaults."""

from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from shopr1_client import wire_policy
from shopr1_client.wire_policy import AdapterRequest, TransferRequest, UpdateRequest, VersionDemand

TENSOR = {"name": "w", "dtype": "BF16", "shape": [2, 0]}
TRANSFER = {"version": "1", "host": "h", "port": 1, "tensors": [TENSOR]}


def locations(model: type[BaseModel], value: Any) -> list[tuple[str | int, ...]]:
    with pytest.raises(ValidationError) as caught:
        model.model_validate(value)
    return [error["loc"] for error in caught.value.errors()]


@pytest.mark.parametrize("key", ["exact", "at_least"])
@pytest.mark.parametrize("version", ["7", 7, ""])
def test_a_demand_names_a_version_or_its_number(key: str, version: str | int) -> None:
    demand = VersionDemand.model_validate({key: version})
    assert getattr(demand, key) == version
    assert type(getattr(demand, key)) is type(version)
    assert demand.wait_s == 0.0


@pytest.mark.parametrize(
    ("value", "location"),
    [
        ({}, ()),
        ({"exact": "1", "at_least": "1"}, ()),
        ({"exact": True}, ("exact",)),
        ({"exact": 1.0}, ("exact",)),
        ({"at_least": 1, "wait_s": -1}, ("wait_s",)),
        ({"at_least": 1, "wait_s": float("inf")}, ("wait_s",)),
    ],
)
def test_invalid_demands(value: Any, location: tuple[str, ...]) -> None:
    assert locations(VersionDemand, value) == [location]


def test_defaults() -> None:
    assert not UpdateRequest(path="p", version="1").partial
    adapter = AdapterRequest(name="a", path="p")
    assert (adapter.version, adapter.default) == (None, False)
    transfer = TransferRequest.model_validate(TRANSFER)
    assert (transfer.partial, transfer.backend, transfer.timeout_s) == (False, "gloo", 300.0)


@pytest.mark.parametrize("name", ["", "a/b", "a b", "ä", "a" * 129, "a\n"])
def test_invalid_names_of_adapters(name: str) -> None:
    assert locations(AdapterRequest, {"name": name, "path": "p"}) == [("name",)]


@pytest.mark.parametrize("version", ["", "v" * 257, "\ud83d", 7])
def test_invalid_names_of_versions(version: Any) -> None:
    assert locations(UpdateRequest, {"path": "p", "version": version}) == [("version",)]


@pytest.mark.parametrize(
    ("changes", "location"),
    [
        ({"tensors": []}, ("tensors",)),
        ({"tensors": [TENSOR | {"dtype": "I8"}]}, ("tensors", 0, "dtype")),
        ({"tensors": [TENSOR | {"shape": [-1]}]}, ("tensors", 0, "shape", 0)),
        ({"tensors": [TENSOR | {"shape": [2.0]}]}, ("tensors", 0, "shape", 0)),
        ({"port": 0}, ("port",)),
        ({"port": 65536}, ("port",)),
        ({"backend": "mpi"}, ("backend",)),
        ({"timeout_s": 0}, ("timeout_s",)),
        ({"timeout_s": 3601}, ("timeout_s",)),
        ({"rank": 1}, ("rank",)),
    ],
)
def test_invalid_transfers(changes: dict[str, Any], location: tuple[str | int, ...]) -> None:
    assert locations(TransferRequest, TRANSFER | changes) == [location]


@pytest.mark.parametrize(
    "model", [wire_policy.PolicyState, wire_policy.PolicyUpdate, wire_policy.AdapterUpdate], ids=str
)
def test_answers_are_frozen_and_open(model: type[BaseModel]) -> None:
    """An older client must read a newer server's answer."""
    assert model.model_config["frozen"]
    assert model.model_config.get("extra", "ignore") == "ignore"
