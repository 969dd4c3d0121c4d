"""What is sent of a module: its tensors under the names of checkpoints, as one safetensors stream.

Tensors are read a piece at a time, wherever they are: what is held in memory beside them is one piece. Torch
is not imported, for whoever has tensors has it: they are used through their own methods.
"""

import ctypes
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from shopr1_client.wire_policy import TensorSpec

Tensor = Any
"""Of torch."""
Module = Any
"""The same."""

PIECE_BYTES = 4 * 2**20
"""What is copied at a time: large enough that sending it takes longer than asking for it."""
DTYPES: Mapping[str, str] = {
    "torch.float64": "F64",
    "torch.float32": "F32",
    "torch.bfloat16": "BF16",
    "torch.float16": "F16",
}
"""What can be sent, as safetensors spells it."""

_ALIGNMENT_BYTES = 8
_WRAPPERS = {"DataParallel", "DistributedDataParallel", "DeepSpeedEngine"}
"""Their `module` is the model."""
_COMPILED = "_orig_mod"
"""What torch.compile calls the module in its own."""
_GATHER = (
    "gather the whole state on all ranks, with accelerator.get_state_dict or torch.distributed's"
    " get_model_state_dict, and give that on one rank instead of the model"
)


@dataclass(frozen=True)
class Weights:
    """Tensors that can be sent.

    Attributes:
        tensors: plain and floating point, one for each storage, by name.
        metadata: what goes along, texts by name.

    Raises:
        ValueError: there are none, or one cannot be sent; it says what to do.
    """

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.tensors:
            raise ValueError("there are no weights to send")
        for name, tensor in self.tensors.items():
            if flaw := _flaw(tensor):
                raise ValueError(f"{name} {flaw}")

    @property
    def specs(self) -> list[TensorSpec]:
        """What the service is told before it gets the tensors in this order."""
        return [
            TensorSpec(name=name, dtype=_dtype(tensor), shape=list(tensor.shape))
            for name, tensor in self.tensors.items()
        ]

    @property
    def num_bytes(self) -> int:
        """Of the tensors."""
        return sum(map(_num_bytes, self.tensors.values()))

    @cached_property
    def header(self) -> bytes:
        """What stands before the tensors in a safetensors file."""
        members: dict[str, Any] = {"__metadata__": dict(self.metadata)} if self.metadata else {}
        start = 0
        for spec, tensor in zip(self.specs, self.tensors.values(), strict=True):
            end = start + _num_bytes(tensor)
            members[spec.name] = {"dtype": spec.dtype, "shape": spec.shape, "data_offsets": [start, end]}
            start = end
        text = json.dumps(members).encode()
        text += b" " * (-len(text) % _ALIGNMENT_BYTES)
        return len(text).to_bytes(8, "little") + text

    def chunks(self) -> Iterator[bytes]:
        """The safetensors file, from its beginning."""
        yield self.header
        for tensor in self.tensors.values():
            yield from _pieces(tensor)


def of_module(module: Module) -> Weights:
    """All of a module's `state_dict()` that is floating point; what is tied under the first of its names.

    Wrappers for data parallelism and compilation leave no trace in the names. Buffers that are not floating
    point are no weights.

    Raises:
        ValueError: parts of it are elsewhere or quantised; it says what to do.
    """
    inner = unwrapped(module)
    buffers = {name for name, _ in inner.named_buffers()}
    return of_tensors(
        {
            name: tensor
            for name, tensor in inner.state_dict().items()
            if hasattr(tensor, "is_floating_point") and (tensor.is_floating_point() or name not in buffers)
        }
    )


def of_tensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Weights:
    """Tensors by the names of checkpoints, such as a state that was gathered.

    Raises:
        ValueError: one cannot be sent; it says what to do.
    """
    # The wide ones first: then each lies in the file as it must lie in memory.
    named = sorted(tensors.items(), key=lambda item: -item[1].element_size())
    return Weights({_plain(name): tensor for name, tensor in _untied(named)}, metadata or {})


def unwrapped(module: Module) -> Module:
    """The module without what data parallelism and compilation put around it.

    Raises:
        ValueError: it is in FSDP's first version, whose weights no rank has.
    """
    while True:
        if type(module).__name__ in _WRAPPERS:
            module = module.module
        elif _COMPILED in getattr(module, "_modules", {}):
            module = getattr(module, _COMPILED)
        else:
            break
    # Its state_dict() would wait for the other ranks, which do not come.
    if any(type(part).__name__ == "FullyShardedDataParallel" for part in module.modules()):
        raise ValueError(f"the model is sharded by FullyShardedDataParallel: {_GATHER}")
    return module


def _plain(name: str) -> str:
    return ".".join(part for part in name.split(".") if part != _COMPILED)


def _untied(named: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    seen = set()
    for name, tensor in named:
        if _is_plain(tensor):  # all others are refused afterwards
            place = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride())
            if place in seen:
                continue
            seen.add(place)
        yield name, tensor.detach()


def _flaw(tensor: Tensor) -> str | None:
    """Why a tensor cannot be sent."""
    if hasattr(tensor, "full_tensor"):
        return f"is sharded over ranks (DTensor): {_GATHER}"
    if tensor.device.type == "meta":
        return "is on no device: load what is offloaded before sending it"
    if tensor.numel() == 0:
        return f"is empty here, as DeepSpeed ZeRO-3 leaves parameters: {_GATHER}"
    if not _is_plain(tensor) or str(tensor.dtype) not in DTYPES:
        kind, known = type(tensor).__name__, ", ".join(DTYPES)
        return f"is a {kind} of {tensor.dtype}, not of {known}: dequantise or convert it first"
    return None


def _is_plain(tensor: Tensor) -> bool:
    """Whether its numbers, and nothing else, are in memory at one place."""
    is_own = type(tensor.detach()).__module__ == "torch"
    is_dense = str(tensor.layout) == "torch.strided" and not tensor.is_quantized
    return is_own and is_dense and tensor.device.type != "meta" and tensor.numel() > 0


def _dtype(tensor: Tensor) -> Any:  # noqa: ANN401  # one of the literals of `TensorSpec.dtype`
    return DTYPES[str(tensor.dtype)]


def _num_bytes(tensor: Tensor) -> int:
    return int(tensor.numel() * tensor.element_size())


def _pieces(tensor: Tensor) -> Iterator[bytes]:
    # A view that is not contiguous is copied where it is: more than a piece, but one tensor at most.
    flat = tensor.contiguous().view(-1)
    for piece in flat.split(PIECE_BYTES // flat.element_size()):
        own = piece.cpu()
        yield ctypes.string_at(own.data_ptr(), _num_bytes(own))
