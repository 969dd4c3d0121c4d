"""Limits on the size of a request body. The timeouts are tested over a socket, with the connection."""

import json
from collections.abc import AsyncIterator

import httpx
import pytest

from tests.support.http import (
    problem,
    running,
)

pytestmark = pytest.mark.anyio


def padded(num_bytes: int) -> bytes:
    return json.dumps({"groups": []}).encode().ljust(num_bytes)


async def in_chunks(content: bytes, size: int) -> AsyncIterator[bytes]:
    for start in range(0, len(content), size):
        yield content[start : start + size]


@pytest.mark.parametrize("size", [None, 1, 64, 1000])
async def test_size_of_the_body(size: int | None) -> None:
    async with running(max_body_bytes=100) as client:

        async def send(content: bytes) -> httpx.Response:
            sent = content if size is None else in_chunks(content, size)
            return await client.post("/score", content=sent, headers={"Content-Type": "application/json"})

        assert (await send(padded(100))).status_code == 200
        for num_bytes in (101, 5000):
            problem(await send(padded(num_bytes)), 413, "too_large")


async def test_an_announced_body_is_not_read() -> None:
    chunks: list[bytes] = []

    async def body() -> AsyncIterator[bytes]:
        chunks.append(b" ")
        yield b" "

    async with running(max_body_bytes=100) as client:
        response = await client.post("/score", content=body(), headers={"Content-Length": "101"})
        assert "101" in problem(response, 413, "too_large")["detail"]
    assert not chunks


async def test_a_stream_is_not_read_to_its_end() -> None:
    chunks: list[bytes] = []

    async def endless() -> AsyncIterator[bytes]:
        for _ in range(10_000):
            chunks.append(b" " * 10)
            yield b" " * 10

    async with running(max_body_bytes=100) as client:
        response = await client.post(
            "/score", content=endless(), headers={"Content-Type": "application/json"}
        )
    problem(response, 413, "too_large")
    assert len(chunks) == 11


@pytest.mark.parametrize("announced", ["-1", "1e9", "0x10", "", "９９９"])
async def test_a_length_that_is_no_number_is_not_trusted(announced: str) -> None:
    async with running(max_body_bytes=100) as client:
        headers = {b"Content-Length": announced.encode(), b"Content-Type": b"application/json"}
        response = await client.post("/score", content=padded(101), headers=headers)
    problem(response, 413, "too_large")
