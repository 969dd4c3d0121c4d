"""An update takes little memory beside the weights: where large ones serve, a second copy would not fit."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.http import WAIT_S, answer, group
from tests.support.models import byte_level, tiny_model
from tests.support.process import EMBEDDED, Process, process

NUM_LARGE_TENSORS = 24
MAX_GROWTH = 0.2
"""Share of the weights' size."""
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


@pytest.mark.parametrize(("turn", "way"), list(enumerate([by_path, by_upload, by_path])))
def test_growth(service: Process, directory: Path, turn: int, way: Any) -> None:
    """The first has to write down what was there before."""
    num_bytes = (directory / "model.safetensors").stat().st_size
    forget_peak(service)
    before_bytes = service.rss_bytes()
    assert before_bytes > num_bytes  # they are in memory indeed
    number = way(service, directory).raise_for_status().json()["current"]["number"]
    assert number == turn + 1
    assert peak_bytes(service) - before_bytes < MAX_GROWTH * num_bytes
