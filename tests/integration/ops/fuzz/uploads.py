"""Fuzzes the upload of weights: accepted files are read like by the safetensors library."""

import random
import sys
from typing import Any

import atheris
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

with atheris.instrument_imports(
    include=["shopr1_service.weights.safetensors_stream", "shopr1_service.weights.staging"]
):
    from shopr1_service.weights.safetensors_stream import SafetensorsStream
    from shopr1_service.weights.staging import StagedWeights

import safetensors.torch

from shopr1_client.errors import InvalidWeightsError
from shopr1_service.weights.tensors import TensorLocation, Weights, bytes_of
from tests.integration.ops.fuzz.harness import fuzz


class Model(PreTrainedModel):  # type: ignore[no-untyped-call]
    """Two tensors, one of them under two names."""

    def __init__(self) -> None:
        super().__init__(PretrainedConfig())
        self.a = nn.Parameter(torch.zeros(3))
        self.b = nn.Parameter(torch.zeros(2, 2, dtype=torch.bfloat16))
        self.c = self.a


WEIGHTS = Weights(Model())
A, B = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([[0.25, 3.0], [-1.0, 7.0]])
SEEDS = tuple(
    safetensors.torch.save(tensors)
    for tensors in (
        {"a": A, "b": B},
        {"a": A, "b": B.bfloat16(), "c": A.double()},
        {"b": B.half()},
        {"c": A, "b": B.double()},
        {"a": A, "b": B * float("nan")},
        {"a": A.reshape(3, 1), "d": B},
        {},
    )
)
GRAFTS = (b"", b"\0", b"\xff" * 4, b"\x7f\x80\0\0", b"1", b'"', b"{", b"F16", b" ")


def check(data: bytes) -> None:
    source = atheris.FuzzedDataProvider(data)
    is_partial = source.ConsumeBool()
    cuts = source.ConsumeIntListInRange(source.ConsumeIntInRange(0, 4), 1, 64)
    file = source.ConsumeBytes(2**16) if source.ConsumeBool() else grafted(source)
    stage = StagedWeights(WEIGHTS, None, is_partial=is_partial)
    try:
        stored = taken(file, cuts, stage)
    except InvalidWeightsError as error:
        check_message(error)
        return
    check_stored(stored, safetensors.torch.load(file), is_partial=is_partial)


def check_message(error: InvalidWeightsError) -> None:
    """Assert that the message can be sent in a response."""
    assert str(error).encode()


def grafted(source: Any) -> bytes:  # atheris has no types
    """A valid file, usually with a damaged place."""
    file: bytes = source.PickValueInList(list(SEEDS))
    graft: bytes = source.PickValueInList(list(GRAFTS))
    place, num_dropped = source.ConsumeIntInRange(0, len(file)), source.ConsumeIntInRange(0, 4)
    return file[:place] + graft + file[place + num_dropped :]


def taken(file: bytes, cuts: list[int], stage: StagedWeights) -> dict[str, TensorLocation]:
    rest = memoryview(bytearray(file))
    upload = SafetensorsStream(lambda header: stage.expect(header.entries), stage.append)
    for length in cuts:
        upload.feed(rest[:length])
        rest = rest[length:]
    upload.feed(rest)
    upload.finish()
    stage.check()
    return stage.locations


def check_stored(
    stored: dict[str, TensorLocation], read: dict[str, torch.Tensor], *, is_partial: bool
) -> None:
    given = {WEIGHTS.aliases.get(name, name): tensor for name, tensor in read.items()}
    assert stored.keys() == given.keys()
    assert is_partial or stored.keys() == WEIGHTS.tensors.keys()
    for name, place in stored.items():
        kept = torch.empty(WEIGHTS.tensors[name].numel(), dtype=place.dtype)
        place.file.read_into(bytes_of(kept), place.start)
        own = kept.to(WEIGHTS.tensors[name].dtype)
        assert own.isfinite().all()
        assert torch.equal(own, given[name].to(own.dtype).view(-1))


def main() -> int:
    fuzz(check, [random.Random(number).randbytes(64) for number in range(50)])
    return 0


if __name__ == "__main__":
    sys.exit(main())
