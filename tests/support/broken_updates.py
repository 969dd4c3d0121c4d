"""Updates that fail half-way, each in its own manner, against a server on a socket."""

import json
import math
import socket
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import safetensors.torch
from torch import Tensor

from shopr1_client.wire_policy import ADAPTER_CONFIG_KEY
from tests.support.adapters import random_tensors
from tests.support.http import WAIT_S
from tests.support.models import tiny_model

ADAPTER_CONFIG = json.dumps({"peft_type": "LORA", "r": 3, "lora_alpha": 6})
"""The same as `test_lora.CONFIG`."""
_HUGE = 1e38
_UPLOADER = """\
import socket, sys
with socket.create_connection((sys.argv[1], int(sys.argv[2]))) as connection:
    connection.sendall(sys.stdin.buffer.read())
    print("sent", flush=True)
    connection.recv(1)
"""


class Sender:
    """Sends what a server must refuse, and sees that it does.

    Args:
        root: one of the server's `policy_roots`; broken checkpoints are written there.
    """

    def __init__(self, url: str, root: Path) -> None:
        self._url = url
        self._root = root
        self._weights = {name: tensor.clone() for name, tensor in tiny_model().state_dict().items()}
        self._body = safetensors.torch.save(self._weights)
        self._http = httpx.Client(base_url=url, timeout=WAIT_S)

    @property
    def all(self) -> list[Callable[[], None]]:
        return [
            self.nan_at_the_end,
            self.truncated,
            self.reset_in_the_middle,
            self.killed_in_the_middle,
            self.infinite_logits,
            self.wrong_shape,
            self.damaged_checkpoint,
            self.adapter_with_nan,
            self.adapter_with_infinite_logits,
            self.truncated_adapter,
        ]

    def versions(self) -> Any:
        """All that is loaded, with names, numbers and times."""
        state = self._state()
        del state["update"]
        return state

    def nan_at_the_end(self) -> None:
        self._put("/policy/weights", self._body[:-4] + struct.pack("<f", math.nan))

    def truncated(self) -> None:
        self._put("/policy/weights", self._body[:-4])

    def infinite_logits(self) -> None:
        """Only the policy itself can see that, when they have taken the old ones' place."""
        huge = {name: tensor * _HUGE for name, tensor in self._weights.items() if name == "lm_head.weight"}
        self._put("/policy/weights", safetensors.torch.save(self._weights | huge))

    def wrong_shape(self) -> None:
        wrong = {"model.norm.weight": self._weights["model.norm.weight"][:-1].clone()}
        self._put("/policy/weights", safetensors.torch.save(self._weights | wrong))

    def damaged_checkpoint(self) -> None:
        for name, content in (("short", self._body[:-4]), ("header", b"?" * 16 + self._body[16:])):
            directory = self._root / name
            directory.mkdir(exist_ok=True)
            (directory / "model.safetensors").write_bytes(content)
            body = {"path": str(directory), "version": "broken"}
            _check_refused(self._http.post("/policy/update", json=body))

    def reset_in_the_middle(self) -> None:
        with socket.create_connection(self._address) as connection:
            connection.sendall(self._half)
            self._wait_until(is_under_way=True)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._wait_until(is_under_way=False)

    def killed_in_the_middle(self) -> None:
        host, port = self._address
        command = [sys.executable, "-c", _UPLOADER, host, str(port)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as uploader:
            assert uploader.stdin is not None
            assert uploader.stdout is not None
            uploader.stdin.write(self._half)
            uploader.stdin.close()
            assert uploader.stdout.readline() == b"sent\n"
            self._wait_until(is_under_way=True)
            other = self._http.put("/policy/weights", params={"version": "other"}, content=self._body)
            assert (other.status_code, other.json()["code"]) == (409, "update_conflict")
            uploader.kill()
        self._wait_until(is_under_way=False)

    def adapter_with_nan(self) -> None:
        self._put(
            "/policy/adapters/a", _adapter(random_tensors(tiny_model()))[:-4] + struct.pack("<f", math.nan)
        )

    def adapter_with_infinite_logits(self) -> None:
        tensors = random_tensors(tiny_model())
        huge = {name: tensor * _HUGE if "lora_B" in name else tensor for name, tensor in tensors.items()}
        self._put("/policy/adapters/a", _adapter(huge))

    def truncated_adapter(self) -> None:
        self._put("/policy/adapters/b", _adapter(random_tensors(tiny_model()))[:-4])

    def close(self) -> None:
        self._http.close()

    @property
    def _address(self) -> tuple[str, int]:
        parts = urlsplit(self._url)
        return str(parts.hostname), int(parts.port or 80)

    @property
    def _half(self) -> bytes:
        """A request that continues."""
        head = (
            "PUT /policy/weights?version=broken HTTP/1.1\r\nHost: service\r\n"
            f"Content-Type: application/octet-stream\r\nContent-Length: {len(self._body)}\r\n\r\n"
        )
        return head.encode() + self._body[: len(self._body) // 2]

    def _put(self, path: str, body: bytes) -> None:
        _check_refused(self._http.put(path, params={"version": "broken"}, content=body))

    def _state(self) -> Any:
        return self._http.get("/policy").raise_for_status().json()

    def _wait_until(self, *, is_under_way: bool) -> None:
        while (self._state()["update"] is not None) is not is_under_way:
            pass


def _adapter(tensors: dict[str, Tensor]) -> bytes:
    return safetensors.torch.save(tensors, {ADAPTER_CONFIG_KEY: ADAPTER_CONFIG})


def _check_refused(response: httpx.Response) -> None:
    assert response.status_code == 422, response.text
    assert response.json()["code"] == "invalid_weights"
