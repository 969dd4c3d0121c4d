"""Checks of new weights before they are loaded."""

import errno
import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import PreTrainedModel

from shopr1_client.errors import InvalidWeightsError, StorageError
from shopr1_service.weights import staging
from shopr1_service.weights import tensors as weights
from shopr1_service.weights.staging import StagedWeights
from shopr1_service.weights.tensors import Weights
from tests.support.models import one_thread, tiny_model
from tests.support.staging import check_equal, content_of, entries_of, full_disk, loaded, stage_of, staged
from tests.support.updating import EMBEDDING, HEAD, NORM, changed_model, weights_of

TIED: dict[str, Any] = {"tie_word_embeddings": True}


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture
def _full(monkeypatch: pytest.MonkeyPatch) -> None:
    full_disk(monkeypatch)


def flaws(model: PreTrainedModel, *tensors: tuple[str, Tensor]) -> dict[str, str]:
    with pytest.raises(InvalidWeightsError) as caught:
        staged(model, *tensors)
    return {each["location"]: each["message"] for each in caught.value.errors}


@pytest.mark.parametrize("given_dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_dtype_becomes_the_models_own(given_dtype: torch.dtype, dtype: torch.dtype) -> None:
    given_model = changed_model()
    nn.Module.to(given_model, dtype=given_dtype)
    model = tiny_model(dtype=dtype)
    loaded(model, *weights_of(given_model).items(), is_partial=False)
    check_equal(model, nn.Module.to(given_model, dtype=dtype))


@given(
    cuts=st.lists(st.integers(0, 4 * 32 * (2 + 48)), max_size=10), piece_bytes=st.sampled_from([8, 64, 4096])
)
def test_blocks_and_pieces_may_be_cut_anywhere(cuts: list[int], piece_bytes: int) -> None:
    names = [NORM, "model.layers.0.mlp.up_proj.weight", "model.layers.0.input_layernorm.weight"]
    given_weights = [(name, changed_model().state_dict()[name]) for name in names]
    content = content_of(given_weights)
    model = tiny_model(dtype=torch.bfloat16)
    with pytest.MonkeyPatch.context() as patch:
        for module in (staging, weights):
            patch.setattr(module, "PIECE_BYTES", piece_bytes)
        stage = stage_of(model)
        stage.expect(entries_of(given_weights))
        ends = [0, *sorted(min(cut, len(content)) for cut in cuts), len(content)]
        for start, end in itertools.pairwise(ends):
            stage.append(memoryview(content[start:end]))
            assert stage.num_bytes == end
        stage.check()
        Weights(model).load(stage.locations, lambda: None)
    for name, tensor in given_weights:
        assert torch.equal(model.state_dict()[name], tensor.bfloat16())


def test_ignored_tensors_are_left_out() -> None:
    """A head that is tied, and one that the model does not have; a tensor of the model is never ignored."""
    model = tiny_model(**TIED)
    given_weights = {**weights_of(changed_model(**TIED)), HEAD: torch.ones(1), "v_head.bias": torch.ones(1)}
    stage = StagedWeights(Weights(model, [HEAD, "v_head.*", NORM]), None, is_partial=False)
    stage.expect(entries_of(list(given_weights.items())))
    stage.append(memoryview(content_of(list(given_weights.items()))))
    stage.check()
    Weights(model).load(stage.locations, lambda: None)
    check_equal(model, changed_model(**TIED))
    with pytest.raises(InvalidWeightsError, match="there are no tensors"):
        StagedWeights(Weights(model, ["v_head.*"]), None, is_partial=True).expect(
            entries_of([("v_head.bias", torch.ones(1))])
        )


# --- refusals --------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [70_000.0, -1e30])
def test_values_too_large_for_the_models_dtype(value: float) -> None:
    tensor = torch.ones(32)
    tensor[-1] = value
    model = tiny_model(dtype=torch.float16)
    assert flaws(model, (NORM, tensor)) == {NORM: "values too large for torch.float16"}
    tensor[-1] = 65_504.0
    loaded(model, (NORM, tensor))
    assert model.state_dict()[NORM][-1] == 65_504.0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [0, 17, 31])
def test_values_that_are_not_finite(value: float, place: int) -> None:
    tensor = torch.ones(32)
    tensor[place] = value
    assert flaws(tiny_model(), (NORM, tensor)) == {NORM: "NaN or infinite values"}


def test_a_tensor_that_is_received_twice() -> None:
    assert flaws(tiny_model(), (NORM, torch.ones(32)), (NORM, torch.ones(32))) == {NORM: "duplicate tensor"}


def test_every_flaw_is_named_and_three_are_shown() -> None:
    with pytest.raises(InvalidWeightsError) as caught:
        staged(tiny_model(), *((name, torch.ones(2)) for name in "abcde"))
    assert [each["location"] for each in caught.value.errors] == [*"abcde"]
    assert caught.value.detail.endswith("c: the policy has no such tensor; and 2 more")


# --- ties -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [(EMBEDDING,), (HEAD,), (EMBEDDING, HEAD), (HEAD, EMBEDDING)])
@pytest.mark.parametrize("is_partial", [False, True])
def test_of_tied_tensors_one_is_enough(names: Sequence[str], is_partial: bool) -> None:
    model, changed = tiny_model(**TIED), changed_model(**TIED)
    all_weights = weights_of(changed)
    given_weights = {name: tensor for name, tensor in all_weights.items() if name not in (EMBEDDING, HEAD)}
    given_weights |= {name: all_weights[name] for name in names}
    stored = staged(model, *given_weights.items(), is_partial=is_partial)
    assert len(stored) == len(all_weights) - 1
    Weights(model).load(stored, lambda: None)
    check_equal(model, changed)
    assert model.state_dict()[HEAD].data_ptr() == model.state_dict()[EMBEDDING].data_ptr()


@pytest.mark.parametrize("piece_bytes", [64, weights.PIECE_BYTES])
@pytest.mark.parametrize("place", [0, -1])
def test_tied_tensors_must_not_differ(place: int, piece_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "PIECE_BYTES", piece_bytes)
    model = tiny_model(**TIED)
    embedding = weights_of(changed_model(**TIED))[EMBEDDING]
    other = embedding.clone()
    other.view(-1)[place] += 1
    message = f"it differs from {EMBEDDING}, and the policy has one tensor for both"
    assert flaws(model, (EMBEDDING, embedding), (HEAD, other)) == {HEAD: message}
    assert flaws(model, (HEAD, embedding), (EMBEDDING, other)) == {HEAD: message}
    # In the model's dtype they are the same.
    nearly = embedding.double()
    nearly.view(-1)[place] *= 1 + 1e-12
    loaded(model, (EMBEDDING, embedding), (HEAD, nearly))


def test_untied_tensors_may_differ() -> None:
    model, changed = tiny_model(), weights_of(changed_model())
    loaded(model, (EMBEDDING, changed[EMBEDDING]), (HEAD, changed[HEAD]))
    assert torch.equal(model.state_dict()[HEAD], changed[HEAD])


@pytest.mark.usefixtures("_full")
def test_a_full_disk_for_new_weights() -> None:
    with pytest.raises(StorageError, match="the new weights cannot be kept in staging_dir: No space left"):
        staged(tiny_model(), *weights_of(changed_model()).items())


def test_a_directory_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="No such file or directory"):
        stage_of(tiny_model(), tmp_path / "none")


# --- numbers and disk space -------------------------------------------------------------------------------


@given(
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    bits=st.lists(st.integers(0, 2**64 - 1), max_size=5),
)
def test_finite_values_are_those_of_torch_isfinite(dtype: torch.dtype, bits: Sequence[int]) -> None:
    """Any bits: both infinities, NaN of either sign, the largest and the smallest numbers."""
    content = b"".join(
        (each >> (64 - 8 * dtype.itemsize)).to_bytes(dtype.itemsize, "little") for each in bits
    )
    values = torch.frombuffer(bytearray(content), dtype=dtype) if content else torch.empty(0, dtype=dtype)
    assert staging._is_finite(values) == bool(values.isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_edges_of_the_finite(dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    finite = torch.tensor([info.max, info.min, info.tiny, -0.0, 0.0], dtype=dtype)
    assert staging._is_finite(finite)
    for value in (float("inf"), float("-inf"), float("nan"), -float("nan")):
        assert not staging._is_finite(torch.cat([finite, torch.tensor([value], dtype=dtype)]))


def test_space_is_reserved_before_data_arrive(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the dtype of the upload, which is what is written."""
    kept: list[int] = []
    monkeypatch.setattr(os, "posix_fallocate", lambda _fd, _start, num_bytes: kept.append(num_bytes))
    tensor = weights_of(tiny_model())[NORM].double()
    staged(tiny_model(), (NORM, tensor))
    assert kept == [tensor.numel() * 8]


def test_a_disk_without_room_is_reported_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(StorageError, match="No space left"):
        staged(tiny_model(), (NORM, weights_of(tiny_model())[NORM]))


def test_a_file_system_that_cannot_reserve_space(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    tensor = weights_of(changed_model())[NORM]
    model = tiny_model()
    loaded(model, (NORM, tensor))
    assert torch.equal(weights_of(model)[NORM], tensor)
