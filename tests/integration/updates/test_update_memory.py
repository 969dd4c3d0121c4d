"""An update takes little memory beside the weights: where large ones serve, a second copy would not fit."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import safetensors.torch
import torch

from shopr1_client.wire_policy import ADAPTER_CONFIG_KEY
from tests.support.http import WAIT_S, answer, group
from tests.support.models import byte_level, tiny_model
from tests.support.process import EMBEDDED, Process, process

NUM_LARGE_TENSORS = 24
MAX_GROWTH = 0.2
"""Share of the weights' size."""
MAX_ADAPTER_GROWTH = 2.0
"""Share of the adapter's size: it stays loaded itself, and the allocator keeps some (1.3 to 1.6 in all)."""
RANK = 256
_PIECE_BYTES = 2**20


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy of some 450 MB, most of it in tensors of 16 MiB."""
    directory = tmp_path_factory.mktemp("large")
    model = tiny_model(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=NUM_LARGE_TENSORS // 3,
        num_attention_heads=16,
        num_key_value_heads=1,
        initializer_range=0.02,
    )
    assert sum(tensor.nbytes == 2**24 for tensor in model.state_dict().values()) == NUM_LARGE_TENSORS
    model.save_pretrained(directory)
    byte_level().save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def service(directory: Path) -> Iterator[Process]:
    settings = {
        "SHOPR1_POLICY": str(directory),
        "SHOPR1_POLICY_ROOTS": str(directory),
        "SHOPR1_STAGING_DIR": str(directory),
        "SHOPR1_DTYPE": "float32",
    }
    with process(*EMBEDDED, **settings) as running:
        # The first request allocates memory, too.
        body = {"groups": [group(answer())]}
        httpx.post(f"{running.url}/score", json=body, timeout=WAIT_S).raise_for_status()
        yield running


def by_path(service: Process, directory: Path) -> httpx.Response:
    body = {"path": str(directory), "version": "path"}
    return httpx.post(f"{service.url}/policy/update", json=body, timeout=WAIT_S)


def by_upload(service: Process, directory: Path) -> httpx.Response:
    url = f"{service.url}/policy/weights?version=upload"
    return httpx.put(url, content=_pieces(directory / "model.safetensors"), timeout=WAIT_S)


def _pieces(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while piece := file.read(_PIECE_BYTES):
            yield piece


def forget_peak(service: Process) -> None:
    """From now on a new one counts."""
    Path(f"/proc/{service._pipes.pid}/clear_refs").write_text("5")


def peak_bytes(service: Process) -> int:
    """The most memory that it has had in use."""
    lines = Path(f"/proc/{service._pipes.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


@pytest.fixture(scope="module")
def adapter(directory: Path) -> Path:
    """An adapter of some 126 MB."""
    file, sizes = directory / "adapter.safetensors", {"gate": (4096, 1024), "down": (1024, 4096)}
    tensors = {
        f"base_model.model.model.layers.{layer}.mlp.{part}_proj.lora_{side}.weight": torch.zeros(shape)
        for layer in range(NUM_LARGE_TENSORS // 3)
        for part, (num_outputs, num_inputs) in {**sizes, "up": sizes["gate"]}.items()
        for side, shape in (("A", (RANK, num_inputs)), ("B", (num_outputs, RANK)))
    }
    config = json.dumps({"peft_type": "LORA", "r": RANK, "lora_alpha": RANK})
    safetensors.torch.save_file(tensors, file, {ADAPTER_CONFIG_KEY: config})
    return file


def test_growth_by_an_adapter(service: Process, adapter: Path) -> None:
    """The adapter is in memory, and not the file that was sent beside it."""
    num_bytes = adapter.stat().st_size
    forget_peak(service)
    before_bytes = service.rss_bytes()
    url = f"{service.url}/policy/adapters/lora"
    update = httpx.put(url, content=_pieces(adapter), timeout=WAIT_S).raise_for_status().json()
    assert update["num_bytes"] > 0.99 * num_bytes
    assert peak_bytes(service) - before_bytes < MAX_ADAPTER_GROWTH * num_bytes


@pytest.mark.parametrize("way", [by_path, by_upload, by_path], ids=["path", "upload", "path again"])  # noqa: PT014
def test_growth(service: Process, directory: Path, way: Any) -> None:
    """The first has to write down what was there before."""
    num_bytes = (directory / "model.safetensors").stat().st_size
    forget_peak(service)
    before_bytes = service.rss_bytes()
    assert before_bytes > num_bytes  # they are in memory indeed
    state = httpx.get(f"{service.url}/policy").raise_for_status().json()
    last = max(version["number"] for version in (state["base"], *state["adapters"]))
    number = way(service, directory).raise_for_status().json()["current"]["number"]
    assert number == last + 1
    assert peak_bytes(service) - before_bytes < MAX_GROWTH * num_bytes
