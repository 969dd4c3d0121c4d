"""Weights of a module: tensors by their names in checkpoints, as safetensors.

Tensors are read in pieces on any device, so that only one piece is in memory beside them. Torch is not
imported: tensors are used through their own methods.
"""

import ctypes
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from shopr1_client.wire_policy import TensorSpec

Tensor = Any
"""`torch.Tensor`."""
Module = Any
"""`torch.nn.Module`."""

PIECE_BYTES = 4 * 2**20
"""Copied at a time: large enough that sending it takes longer than requesting it."""
DTYPES: Mapping[str, str] = {
    "torch.float64": "F64",
    "torch.float32": "F32",
    "torch.bfloat16": "BF16",
    "torch.float16": "F16",
}
"""Supported dtypes, as safetensors spells them."""

_ALIGNMENT_BYTES = 8
_WRAPPERS = {"DataParallel", "DistributedDataParallel", "DeepSpeedEngine"}
"""Classes whose `module` is the model."""
_COMPILED = "_orig_mod"
"""Name that torch.compile gives to the original module."""
_GATHER = (
    "gather the whole state on all ranks, with accelerator.get_state_dict or torch.distributed's"
    " get_model_state_dict, and give that on one rank instead of the model"
)


@dataclass(frozen=True)
class Weights:
    """Tensors that can be sent.

    Attributes:
        tensors: dense, floating-point ones by name, each storage once.
        metadata: of the safetensors file.
        computed: functions that give the numbers to send instead of a tensor's, in its shape.

    Raises:
        ValueError: there are none, or one cannot be sent; the message gives the remedy.
    """

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str] = field(default_factory=dict)
    computed: Mapping[str, Callable[[], Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.tensors:
            raise ValueError("there are no weights to send")
        for name, tensor in self.tensors.items():
            if flaw := _flaw(tensor):
                raise ValueError(f"{name} {flaw}")

    @property
    def specs(self) -> list[TensorSpec]:
        """Description of the tensors, in the order in which they are sent."""
        return [
            TensorSpec(name=name, dtype=dtype_name(tensor), shape=list(tensor.shape))
            for name, tensor in self.tensors.items()
        ]

    @property
    def num_bytes(self) -> int:
        """Size of the tensors."""
        return sum(map(_num_bytes, self.tensors.values()))

    @cached_property
    def header(self) -> bytes:
        """Header of the safetensors file, with its length."""
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
        """The safetensors file."""
        yield self.header
        for tensor in self.values():
            yield from _pieces(tensor)

    def values(self) -> Iterator[Tensor]:
        """The tensors to send, in order; computed ones one at a time."""
        for name, tensor in self.tensors.items():
            compute = self.computed.get(name)
            yield tensor if compute is None else compute().to(tensor.dtype)


def of_module(module: Module) -> Weights:
    """Floating-point tensors of a module's `state_dict()`; tied ones under the first of their names.

    Names do not show wrappers for data parallelism and compilation. Integer buffers are not sent.

    Raises:
        ValueError: it is sharded, offloaded or quantised; the message gives the remedy.
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
    """Tensors by their names in checkpoints, such as a gathered state.

    Raises:
        ValueError: one cannot be sent; the message gives the remedy.
    """
    # The widest dtypes first, so that each tensor is aligned in the file.
    named = sorted(tensors.items(), key=lambda item: -item[1].element_size())
    return Weights({plain_name(name): tensor for name, tensor in _untied(named)}, metadata or {})


def unwrapped(module: Module) -> Module:
    """The module without wrappers for data parallelism and compilation.

    Raises:
        ValueError: it is sharded by FSDP 1.
    """
    while True:
        if type(module).__name__ in _WRAPPERS:
            module = module.module
        elif _COMPILED in getattr(module, "_modules", {}):
            module = getattr(module, _COMPILED)
        else:
            break
    # Its state_dict() would wait for the other ranks.
    if any(type(part).__name__ == "FullyShardedDataParallel" for part in module.modules()):
        raise ValueError(f"the model is sharded by FullyShardedDataParallel: {_GATHER}")
    return module


def plain_name(name: str) -> str:
    """A name without torch.compile's wrappers."""
    return ".".join(part for part in name.split(".") if part != _COMPILED)


def _untied(named: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    seen = set()
    for name, tensor in named:
        if place := storage_place(tensor):
            if place in seen:
                continue
            seen.add(place)
        yield name, tensor.detach()


def storage_place(tensor: Tensor) -> tuple[Any, ...] | None:
    """The same of two tensors if they are tied; None of tensors that cannot be sent."""
    if not _is_plain(tensor):
        return None
    return tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride()


def _flaw(tensor: Tensor) -> str | None:
    """Reason why a tensor cannot be sent."""
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
    """Whether it is a dense tensor of torch itself whose data are in memory."""
    is_own = type(tensor.detach()).__module__ == "torch"
    is_dense = str(tensor.layout) == "torch.strided" and not tensor.is_quantized
    return is_own and is_dense and tensor.device.type != "meta" and tensor.numel() > 0


def dtype_name(tensor: Tensor) -> Any:  # noqa: ANN401  # one of the literals of `TensorSpec.dtype`
    """A tensor's dtype as safetensors spells it."""
    return DTYPES[str(tensor.dtype)]


def _num_bytes(tensor: Tensor) -> int:
    return int(tensor.numel() * tensor.element_size())


def _pieces(tensor: Tensor) -> Iterator[bytes]:
    # A view that is not contiguous is copied as a whole, on its device.
    flat = tensor.contiguous().view(-1)
    for piece in flat.split(PIECE_BYTES // flat.element_size()):
        own = piece.cpu()
        yield ctypes.string_at(own.data_ptr(), _num_bytes(own))
