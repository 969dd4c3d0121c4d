"""Weights of a module, or an adapter of PEFT's: tensors by their names in checkpoints, as safetensors.

Tensors are read in pieces on any device, so that only one piece is in memory beside them. Torch is not
imported: tensors are used through their own methods.
"""

import ctypes
import importlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from shopr1_client.wire_policy import ADAPTER_CONFIG_KEY, TensorSpec

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

    Raises:
        ValueError: there are none, or one cannot be sent; the message gives the remedy.
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
        """Description of the tensors, in the order in which they are sent."""
        return [
            TensorSpec(name=name, dtype=_dtype(tensor), shape=list(tensor.shape))
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
        for tensor in self.tensors.values():
            yield from _pieces(tensor)


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
    return Weights({_plain(name): tensor for name, tensor in _untied(named)}, metadata or {})


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


def is_adapted(module: Module) -> bool:
    """Whether a module has adapters of PEFT's."""
    return bool(getattr(unwrapped(module), "peft_config", None))


def active_adapter(module: Module) -> str:
    """Name of the active adapter.

    Raises:
        ValueError: several are active, or none.
    """
    inner = unwrapped(module)
    active = getattr(inner, "active_adapter", None) or inner.active_adapters
    names = active() if callable(active) else active
    if isinstance(names, str):
        return names
    if len(names) != 1:
        raise ValueError(f"one adapter can be sent, and {len(names)} are active: {', '.join(names)}")
    return str(names[0])


def of_adapter(module: Module) -> Weights:
    """The active adapter under PEFT's names, with its config in the metadata.

    Raises:
        ValueError: it is not one adapter, or cannot be sent; the message gives the remedy.
    """
    inner, name = unwrapped(module), active_adapter(module)
    peft = importlib.import_module("peft")  # installed, as the module is PEFT's
    # Without embeddings: PEFT would look for the base model's on its hub.
    tensors = peft.get_peft_model_state_dict(inner, adapter_name=name, save_embedding_layers=False)
    config = json.dumps(inner.peft_config[name].to_dict(), default=_jsonable)
    return of_tensors(tensors, {ADAPTER_CONFIG_KEY: config})


def _plain(name: str) -> str:
    return ".".join(part for part in name.split(".") if part != _COMPILED)


def _untied(named: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    seen = set()
    for name, tensor in named:
        if _is_plain(tensor):  # the others are refused afterwards
            place = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride())
            if place in seen:
                continue
            seen.add(place)
        yield name, tensor.detach()


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


def _dtype(tensor: Tensor) -> Any:  # noqa: ANN401  # one of the literals of `TensorSpec.dtype`
    return DTYPES[str(tensor.dtype)]


def _num_bytes(tensor: Tensor) -> int:
    return int(tensor.numel() * tensor.element_size())


def _pieces(tensor: Tensor) -> Iterator[bytes]:
    # A view that is not contiguous is copied as a whole, on its device.
    flat = tensor.contiguous().view(-1)
    for piece in flat.split(PIECE_BYTES // flat.element_size()):
        own = piece.cpu()
        yield ctypes.string_at(own.data_ptr(), _num_bytes(own))


def _jsonable(value: Any) -> Any:  # noqa: ANN401
    return sorted(value) if isinstance(value, set | frozenset) else str(value)
