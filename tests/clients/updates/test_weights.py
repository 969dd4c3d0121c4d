"""Safetensors files of modules, read by the format's own library."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import Replicate, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from shopr1_client.updates.weights import PIECE_BYTES, Weights, of_module, of_tensors
from tests.support.models import tiny_model

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def loaded(weights: Weights) -> dict[str, Tensor]:
    return safetensors.torch.load(b"".join(weights.chunks()))


def header(weights: Weights) -> dict[str, Any]:
    num_bytes = int.from_bytes(weights.header[:8], "little")
    assert len(weights.header) == 8 + num_bytes
    return dict(json.loads(weights.header[8:]))


def assert_same(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype
        assert torch.equal(actual[name], tensor), name


# --- the stream -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_model(dtype: torch.dtype) -> None:
    model = tiny_model("qwen2", dtype)
    weights = of_module(model)
    assert_same(loaded(weights), model.state_dict())
    assert weights.num_bytes == sum(tensor.nbytes for tensor in model.state_dict().values())
    assert sum(map(len, weights.chunks())) == len(weights.header) + weights.num_bytes


def test_a_tied_head_is_sent_once() -> None:
    model = tiny_model(tie_word_embeddings=True)
    expected = model.state_dict()
    assert torch.equal(expected["lm_head.weight"], expected.pop("model.embed_tokens.weight"))
    assert_same(
        loaded(of_module(model)), {"model.embed_tokens.weight": expected.pop("lm_head.weight"), **expected}
    )


def test_equal_numbers_are_not_tied() -> None:
    tensors = {"a": torch.ones(3), "b": torch.ones(3)}
    assert_same(loaded(of_tensors(tensors)), tensors)


def test_views_of_one_storage_are_not_tied() -> None:
    whole = torch.arange(6.0).view(2, 3)
    tensors = {"whole": whole, "turned": whole.T, "row": whole[1], "flat": whole.view(-1)}
    assert_same(loaded(of_tensors(tensors)), tensors)


def test_pieces() -> None:
    """A tensor of two pieces and a half, and one that is not contiguous."""
    num = PIECE_BYTES // 4
    long = torch.arange(5 * num // 2, dtype=torch.float32)
    turned = torch.arange(3.0 * num).view(3, num).T
    weights = of_tensors({"long": long, "turned": turned})
    sizes = [len(chunk) for chunk in weights.chunks()][1:]
    assert sizes == [PIECE_BYTES, PIECE_BYTES, PIECE_BYTES // 2, *[PIECE_BYTES] * 3]
    assert_same(loaded(weights), {"long": long, "turned": turned})


@given(
    st.dictionaries(
        st.text(min_size=1, max_size=20).filter(lambda name: name != "__metadata__"),
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(1, 4), max_size=3)),
        min_size=1,
        max_size=8,
    ),
    st.dictionaries(st.text(min_size=1, max_size=5), st.text(max_size=20), max_size=2),
)
def test_any_tensors(
    given_tensors: dict[str, tuple[torch.dtype, list[int]]], metadata: dict[str, str]
) -> None:
    tensors = {name: torch.randn(shape).to(dtype) for name, (dtype, shape) in given_tensors.items()}
    weights = of_tensors(tensors, metadata)
    read = header(weights)
    assert read.pop("__metadata__", {}) == metadata
    assert_same(loaded(weights), tensors)
    assert len(weights.header) % 8 == 0
    ends = [0]
    for spec in weights.specs:  # in order, without holes, and where a tensor of its dtype may lie
        start, end = read[spec.name]["data_offsets"]
        assert start == ends[-1]
        assert start % tensors[spec.name].element_size() == 0
        ends.append(end)
    assert ends[-1] == weights.num_bytes
    assert all(start < end for start, end in pairwise(ends))


# --- modules ----------------------------------------------------------------------------------------


class Masked(nn.Module):
    """Has a buffer of every kind beside its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.arange(6.0).view(2, 3))
        self.register_buffer("mean", torch.tensor(0.5))
        self.register_buffer("mask", torch.ones(2, dtype=torch.bool))
        self.register_buffer("cache", torch.ones(2), persistent=False)


def test_buffers() -> None:
    expected = {"weight": torch.arange(6.0).view(2, 3), "mean": torch.tensor(0.5)}
    assert_same(loaded(of_module(Masked())), expected)


@contextmanager
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", init_method="tcp://127.0.0.1:0", rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_wrappers_leave_no_trace() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert_same(loaded(of_module(nn.DataParallel(model))), expected)
    with one_rank():
        parallel = DistributedDataParallel(model)
        assert_same(loaded(of_module(parallel)), expected)
        assert_same(loaded(of_module(torch.compile(parallel))), expected)
    compiled: Any = torch.compile(model.pop(1))
    model.append(compiled)
    assert_same(loaded(of_module(model)), expected)
    assert_same(loaded(of_module(torch.compile(model))), expected)


def test_a_submodule_called_module_is_no_wrapper() -> None:
    model = nn.Module()
    model.module = nn.Linear(1, 1, bias=False)
    assert of_module(model).tensors.keys() == {"module.weight"}


# --- refusals ---------------------------------------------------------------------------------------


def refusal(tensor: Tensor) -> str:
    with pytest.raises(ValueError, match=r"^layer\.weight ") as caught:
        of_tensors({"layer.weight": tensor})
    return str(caught.value)


def test_sharded_tensors() -> None:
    with one_rank():
        mesh = init_device_mesh("cpu", (1,))
        assert "get_model_state_dict" in refusal(distribute_tensor(torch.ones(2, 2), mesh, [Replicate()]))


@pytest.mark.filterwarnings("ignore:FSDP")
def test_sharded_modules() -> None:
    with one_rank():
        sharded = FullyShardedDataParallel(nn.Linear(2, 2), device_id=torch.device("cpu"))
        with pytest.raises(ValueError, match="get_model_state_dict"):
            of_module(nn.Sequential(sharded))


def test_weights_that_a_rank_lacks() -> None:
    assert "ZeRO-3" in refusal(torch.empty(0))
    assert "offloaded" in refusal(torch.ones(2, device="meta"))


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn, torch.int64], ids=str)
def test_quantised_weights(dtype: torch.dtype) -> None:
    assert f"of {dtype}" in refusal(torch.ones(2).to(dtype))
    module = nn.Module()
    module.weight = nn.Parameter(torch.ones(2).to(dtype), requires_grad=False)
    with pytest.raises(ValueError, match="dequantise"):
        of_module(module)


class Packed(Tensor):
    """Claims to be a float, as quantising libraries' tensors do."""


def test_tensors_of_other_kinds() -> None:
    assert "is a Packed" in refusal(torch.ones(2).as_subclass(Packed))
    assert "dequantise or convert" in refusal(torch.eye(2).to_sparse())


def test_nothing() -> None:
    with pytest.raises(ValueError, match="no weights"):
        of_module(nn.ReLU())
