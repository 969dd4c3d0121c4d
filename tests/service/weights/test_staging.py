"""New weights before they are loaded, and the backup of the old ones."""

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
from shopr1_service.weights.files import AnonymousTempFile
from shopr1_service.weights.rollback import WeightBackup
from shopr1_service.weights.safetensors_header import TensorEntry
from shopr1_service.weights.staging import StagedWeights
from shopr1_service.weights.tensors import TensorLocation, Weights, bytes_of
from tests.support.models import one_thread, tiny_model
from tests.support.updating import EMBEDDING, HEAD, NORM, changed_model, staged_files, weights_of

TIED: dict[str, Any] = {"tie_word_embeddings": True}


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def entries_of(tensors: Sequence[tuple[str, Tensor]]) -> list[TensorEntry]:
    ends = list(itertools.accumulate((tensor.nbytes for _, tensor in tensors), initial=0))
    return [
        TensorEntry(name, tensor.dtype, tuple(tensor.shape), start, end)
        for (name, tensor), (start, end) in zip(tensors, itertools.pairwise(ends), strict=True)
    ]


def content_of(tensors: Sequence[tuple[str, Tensor]]) -> bytes:
    return b"".join(bytes(bytes_of(tensor.contiguous().view(-1))) for _, tensor in tensors if tensor.numel())


def stage_of(
    model: PreTrainedModel, directory: Path | None = None, *, is_partial: bool = True
) -> StagedWeights:
    return StagedWeights(Weights(model), directory, is_partial=is_partial)


def staged(model: PreTrainedModel, *tensors: tuple[str, Tensor], is_partial: bool = True) -> Any:
    """Locations of these tensors, after all checks."""
    stage = stage_of(model, is_partial=is_partial)
    stage.expect(entries_of(tensors))
    stage.append(memoryview(content_of(tensors)))
    stage.check()
    return stage.locations


def loaded(model: PreTrainedModel, *tensors: tuple[str, Tensor], **options: bool) -> None:
    """Put them into the model."""
    Weights(model).load(staged(model, *tensors, **options), lambda: None)


def flaws(model: PreTrainedModel, *tensors: tuple[str, Tensor]) -> dict[str, str]:
    with pytest.raises(InvalidWeightsError) as caught:
        staged(model, *tensors)
    return {each["location"]: each["message"] for each in caught.value.errors}


def check_equal(model: PreTrainedModel, expected: PreTrainedModel) -> None:
    for name, tensor in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


# --- anonymous files ----------------------------------------------------------------------------------


def test_an_anonymous_file_vanishes_with_its_holder(tmp_path: Path) -> None:
    before = staged_files()
    file = AnonymousTempFile(tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert [file.append(memoryview(block)) for block in (b"ab", b"", b"cde")] == [0, 2, 2]
    assert file.num_bytes == 5
    block = bytearray(3)
    file.read_into(memoryview(block), 1)
    assert block == b"bcd"
    with pytest.raises(OSError, match="the file ends at byte 5"):
        file.read_into(memoryview(block), 3)
    assert len(staged_files() - before) == 1
    del file
    assert not staged_files() - before


def test_a_discarded_file_is_closed_once() -> None:
    before = staged_files()
    file = AnonymousTempFile()
    file.discard()
    assert not staged_files() - before
    with open(os.devnull, "rb") as other:  # noqa: PTH123  # takes the number of the one that was closed
        file.discard()
        del file
        assert other.read() == b""


def test_what_is_written_in_parts_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a disk that is nearly full, and for more than 2 GiB at once."""
    pwrite, preadv = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda fd, block, start: pwrite(fd, block[:3], start))
    monkeypatch.setattr(os, "preadv", lambda fd, blocks, start: preadv(fd, [blocks[0][:2]], start))
    file, block = AnonymousTempFile(), bytearray(10)
    file.append(memoryview(b"0123456789"))
    file.read_into(memoryview(block), 0)
    assert block == b"0123456789"


# --- dtypes and pieces ------------------------------------------------------------------------------


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
def test_wherever_blocks_and_pieces_are_cut(cuts: list[int], piece_bytes: int) -> None:
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


class Odd(nn.Module):
    """What a model's tensors may look like too."""

    def __init__(self) -> None:
        super().__init__()
        self.transposed = nn.Parameter(torch.arange(6.0).view(2, 3).T)
        self.empty = nn.Parameter(torch.zeros(0, 4))
        self.other_empty = nn.Parameter(torch.zeros(3, 0))
        self.scalar = nn.Parameter(torch.tensor(1.0))
        self.register_buffer("counts", torch.arange(3))
        self.device = torch.device("cpu")


def test_tensors_of_any_shape_and_layout() -> None:
    model: Any = Odd()
    kept = Weights(model)
    assert kept.tensors.keys() == {"transposed", "empty", "other_empty", "scalar"}
    assert kept.aliases == {}
    file = AnonymousTempFile()
    former = kept.store(kept.tensors, file)
    given_weights = [
        ("empty", torch.zeros(0, 4)),
        ("transposed", torch.arange(10.0, 16.0).view(3, 2)),
        ("other_empty", torch.zeros(3, 0)),
        ("scalar", torch.tensor(2.5)),
    ]
    loaded(model, *given_weights, is_partial=False)
    assert model.transposed.tolist() == [[10.0, 11.0], [12.0, 13.0], [14.0, 15.0]]
    assert model.transposed.stride() == (1, 3)
    assert model.scalar.item() == 2.5
    kept.load(former, lambda: None)
    assert (model.transposed.tolist(), model.scalar.item()) == ([[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]], 1.0)
    assert "no such tensor" in flaws(model, ("counts", torch.zeros(3)))["counts"]


def test_each_piece_is_a_heartbeat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "PIECE_BYTES", 64)
    beats: list[int] = []
    model = tiny_model()
    Weights(model).load(staged(model, (NORM, torch.ones(32))), lambda: beats.append(1))
    assert len(beats) == 2  # 128 bytes


# --- refusals --------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [70_000.0, -1e30])
def test_what_is_too_large_for_the_models_dtype(value: float) -> None:
    tensor = torch.ones(32)
    tensor[-1] = value
    model = tiny_model(dtype=torch.float16)
    assert flaws(model, (NORM, tensor)) == {NORM: "values too large for torch.float16"}
    tensor[-1] = 65_504.0
    loaded(model, (NORM, tensor))
    assert model.state_dict()[NORM][-1] == 65_504.0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [0, 17, 31])
def test_what_is_not_finite(value: float, place: int) -> None:
    tensor = torch.ones(32)
    tensor[place] = value
    assert flaws(tiny_model(), (NORM, tensor)) == {NORM: "NaN or infinite values"}


def test_a_tensor_that_comes_twice() -> None:
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


def test_what_is_not_tied_may_differ() -> None:
    model, changed = tiny_model(), weights_of(changed_model())
    loaded(model, (EMBEDDING, changed[EMBEDDING]), (HEAD, changed[HEAD]))
    assert torch.equal(model.state_dict()[HEAD], changed[HEAD])


# --- rollback -----------------------------------------------------------------------------------


def test_the_backup_after_any_updates(tmp_path: Path) -> None:
    """Each is loaded in part, rolled back, then loaded; rollback always restores the last state."""
    model = tiny_model()
    kept = Weights(model)
    backup = WeightBackup(kept, tmp_path)
    for seed, prefix in ((1, "model.layers.1."), (2, ""), (3, "model.layers."), (4, HEAD)):
        former = weights_of(model)
        stored = staged(model, *weights_of(changed_model(seed), prefix).items())
        backup.save(stored)
        some = dict(itertools.islice(stored.items(), len(stored) // 2 + 1))
        kept.load(some, lambda: None)
        assert any(not torch.equal(former[name], kept.tensors[name]) for name in some)
        backup.restore(stored, lambda: None)
        assert all(torch.equal(former[name], tensor) for name, tensor in kept.tensors.items())
        kept.load(stored, lambda: None)
        backup.record(stored)
    assert list(tmp_path.iterdir()) == []


def test_what_an_update_brought_is_not_written_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    kept = Weights(model)
    backup = WeightBackup(kept, None)
    written: list[str] = []
    store = kept.store

    def recording(names: Any, file: AnonymousTempFile) -> dict[str, TensorLocation]:
        written.extend(names)
        return store(names, file)

    monkeypatch.setattr(kept, "store", recording)
    for names, expected in (((NORM,), [NORM]), ((NORM, HEAD), [HEAD]), ((HEAD,), [])):
        stored = staged(model, *((name, torch.ones_like(kept.tensors[name])) for name in names))
        written.clear()
        backup.save(backup.missing(names))
        assert written == expected
        backup.record(stored)


def test_old_files_are_given_back() -> None:
    model = tiny_model()
    backup = WeightBackup(Weights(model), None)
    before = staged_files()
    for _ in range(5):
        stored = staged(model, *weights_of(changed_model()).items())
        backup.save(stored)
        backup.record(stored)
        del stored
        assert len(staged_files() - before) == 1


# --- a disk that is full ----------------------------------------------------------------------------


@pytest.fixture
def _full(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing more can be written than some bytes."""
    pwrite, num_left = os.pwrite, 1000

    def nearly_full(fd: int, block: memoryview, start: int) -> int:
        nonlocal num_left
        if not num_left:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        num_written = pwrite(fd, block[:num_left], start)
        num_left -= num_written
        return num_written

    monkeypatch.setattr(os, "pwrite", nearly_full)


@pytest.mark.usefixtures("_full")
def test_a_full_disk_for_new_weights() -> None:
    with pytest.raises(StorageError, match="the new weights cannot be kept in staging_dir: No space left"):
        staged(tiny_model(), *weights_of(changed_model()).items())


@pytest.mark.usefixtures("_full")
def test_a_full_disk_for_old_weights() -> None:
    kept = Weights(tiny_model())
    backup, before = WeightBackup(kept, None), staged_files()
    with pytest.raises(StorageError, match="the old weights cannot be kept in staging_dir: No space left"):
        backup.save(list(kept.tensors))
    assert not staged_files() - before


def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="No such file or directory"):
        stage_of(tiny_model(), tmp_path / "none")
    with pytest.raises(StorageError, match="No such file or directory"):
        WeightBackup(Weights(tiny_model()), tmp_path / "none").save([NORM])


# --- numbers and disk space -------------------------------------------------------------------------------


@given(
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    bits=st.lists(st.integers(0, 2**64 - 1), max_size=5),
)
def test_finite_is_what_torch_calls_finite(dtype: torch.dtype, bits: Sequence[int]) -> None:
    """Of any bits: both infinities, NaN of either sign, the largest and the smallest numbers."""
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


def test_room_is_kept_before_anything_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the dtype of the upload, which is what is written."""
    kept: list[int] = []
    monkeypatch.setattr(os, "posix_fallocate", lambda _fd, _start, num_bytes: kept.append(num_bytes))
    tensor = weights_of(tiny_model())[NORM].double()
    staged(tiny_model(), (NORM, tensor))
    assert kept == [tensor.numel() * 8]


def test_a_disk_without_room_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(StorageError, match="No space left"):
        staged(tiny_model(), (NORM, weights_of(tiny_model())[NORM]))


def test_a_file_system_that_keeps_no_room_is_written_to_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    tensor = weights_of(changed_model())[NORM]
    model = tiny_model()
    loaded(model, (NORM, tensor))
    assert torch.equal(weights_of(model)[NORM], tensor)
