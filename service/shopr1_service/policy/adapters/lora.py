"""LoRA adapters of a policy's linear layers: several are loaded, one is applied per batch.

    y = W·x + b + scale · B·(A·x)

An adapter is applied by forward hooks. The model's modules and parameters keep their names and values, as
updates write into them. The numbers are PEFT's: B·(A·x) is computed in fp32 at least, and the sum is returned
in the dtype of the module's output. Each adapter needs a prefix cache of its own.

Dimensions: I inputs, O outputs, R rank.
"""

import re
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from shopr1_service.engine.lm_head import trunk_of
from shopr1_service.policy.adapters.lora_config import AdapterError, LoraConfig, parse_config
from shopr1_service.weights.conversion import NameConverter

__all__ = [
    "Adapter",
    "AdapterError",
    "LoraConfig",
    "LoraLayer",
    "build_adapter",
    "parse_config",
    "unused_layers",
]

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# In memory PEFT puts the adapter's name after the side; in files it leaves it out.
_NAME = re.compile(
    r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<side>[AB])(?:\.(?P<adapter>[^.]+))?\.weight"
)
_adapted_models: "weakref.WeakSet[PreTrainedModel]" = weakref.WeakSet()


@dataclass(frozen=True, eq=False)
class LoraLayer:
    """Addition to a module's output: scale · (x·Aᵀ)·Bᵀ."""

    a_R_I: Tensor
    b_O_R: Tensor
    scale: float

    def hook(self, _module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """Forward hook: the output with the addition, in the output's dtype."""
        x = inputs[0].to(self.a_R_I.dtype)
        addition = functional.linear(functional.linear(x, self.a_R_I), self.b_O_R) * self.scale
        return (output + addition).to(output.dtype)


@dataclass(frozen=True, eq=False)
class Adapter:
    """An adapter on the policy's device.

    Attributes:
        layers: by the name of the module in the model.
    """

    layers: Mapping[str, LoraLayer]

    @property
    def rank(self) -> int:
        """Largest rank of its layers."""
        return max(layer.a_R_I.shape[0] for layer in self.layers.values())

    @property
    def num_bytes(self) -> int:
        """Memory on the device."""
        tensors = [tensor for layer in self.layers.values() for tensor in (layer.a_R_I, layer.b_O_R)]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    @contextmanager
    def applied(self, model: PreTrainedModel) -> Iterator[None]:
        """Apply the adapter to the model while this lasts.

        Raises:
            RuntimeError: an adapter is applied to the model already.
        """
        if model in _adapted_models:
            raise RuntimeError("an adapter is applied to this model already")
        with ExitStack() as stack:
            _adapted_models.add(model)
            stack.callback(_adapted_models.discard, model)
            for name, layer in self.layers.items():
                stack.callback(model.get_submodule(name).register_forward_hook(layer.hook).remove)
            yield


def build_adapter(model: PreTrainedModel, config: LoraConfig, tensors: Mapping[str, Tensor]) -> Adapter:
    """An adapter for this model.

    Args:
        tensors: as in PEFT's `adapter_model.safetensors`, on the CPU: [R, I] each
            `[base_model.model.]<module>.lora_A[.<adapter>].weight`, and [O, R] the same with `lora_B`. They
            are copied. The module's name is the model's, or one that transformers converts to it.

    Raises:
        AdapterError: not an adapter of this model, or it does not fit the config.
    """
    modules = dict(model.named_modules())
    in_trunk = set(trunk_of(model).modules())
    layers: dict[str, LoraLayer] = {}
    converter = NameConverter(model)
    for given, sides in _by_module(tensors).items():
        first = next(iter(sides.values()))
        name = given if given in modules else _found(converter, given, first)
        if name is None:  # of images, and the policy has the text part only
            continue
        if name in layers:
            raise AdapterError(first, f"it is an adapter of {name!r}, and so is another tensor")
        module = modules[name]
        weight_O_I = _weight(first, module, is_in_trunk=module in in_trunk)
        if len(sides) < 2:
            raise AdapterError(first, f"the other half is missing: {name!r} needs lora_A and lora_B")
        # Patterns match the names of the sender.
        (num_outputs, num_inputs), r = weight_O_I.shape, config.rank(given)
        layers[name] = LoraLayer(
            a_R_I=_matrix(sides["A"], tensors, (r, num_inputs), weight_O_I),
            b_O_R=_matrix(sides["B"], tensors, (num_outputs, r), weight_O_I),
            scale=config.scale(given),
        )
    if not layers:
        raise AdapterError("tensors", "the policy has none of the adapted modules")
    return Adapter(layers)


def unused_layers(adapter: Adapter, model: PreTrainedModel, run: Callable[[], object]) -> list[str]:
    """Layers of the adapter without effect, because `run` does not call their modules.

    Some architectures hand a module's weight to a kernel. An expert that gets no token looks the same. `run`
    is called once, with the adapter applied. The parts of a multimodal model that never see text are left
    out: there an adapter has no effect in the trainer either.
    """
    decoder: nn.Module = model.get_decoder()  # type: ignore[no-untyped-call]
    text_part = set(decoder.modules())
    used: set[nn.Module] = set()
    modules = {name: model.get_submodule(name) for name in adapter.layers}

    def record(module: nn.Module, _inputs: object) -> None:
        used.add(module)

    with ExitStack() as stack:
        for module in modules.values():
            stack.callback(module.register_forward_pre_hook(record).remove)
        stack.enter_context(adapter.applied(model))
        run()
    return [name for name, module in modules.items() if module not in used and module in text_part]


# --- checks -----------------------------------------------------------------------------------------

_FULL_WEIGHTS = "push full weights instead"


def _found(converter: NameConverter, module: str, tensor: str) -> str | None:
    try:
        return converter.find_module(module)
    except KeyError as error:
        raise AdapterError(tensor, error.args[0]) from None


def _by_module(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, str]]:
    """Names of tensors, by module and side."""
    if not tensors:
        raise AdapterError("tensors", "the adapter has none")
    sides: dict[str, dict[str, str]] = {}
    adapters = set()
    for name in tensors:
        match = _NAME.fullmatch(name)
        if match is None:
            raise AdapterError(name, _unsupported_name(name))
        adapters.add(match["adapter"])
        if len(adapters) > 1:
            raise AdapterError(name, "it belongs to another adapter than those before it")
        if sides.setdefault(match["module"], {}).setdefault(match["side"], name) != name:
            raise AdapterError(name, "duplicate tensor, with and without base_model.model")
    return sides


def _unsupported_name(name: str) -> str:
    if "lora_embedding_" in name:
        return f"embeddings cannot be adapted; {_FULL_WEIGHTS}"
    if "lora_magnitude_vector" in name:
        return "DoRA is not supported"
    return f"only lora_A.weight and lora_B.weight of modules can be applied; {_FULL_WEIGHTS}"


def _weight(name: str, module: nn.Module, *, is_in_trunk: bool) -> Tensor:
    """The module's weight, [O, I]."""
    if not is_in_trunk:
        raise AdapterError(name, f"the head is computed separately and cannot be adapted; {_FULL_WEIGHTS}")
    if not isinstance(module, nn.Linear | Conv1D):
        kind = type(module).__name__
        raise AdapterError(name, f"only linear layers can be adapted, this is {kind}; {_FULL_WEIGHTS}")
    weight = module.weight
    if weight.dtype not in _DTYPES:
        raise AdapterError(name, "quantised layers cannot be adapted")
    return weight.T if isinstance(module, Conv1D) else weight


@torch.inference_mode(mode=False)
def _matrix(name: str, tensors: Mapping[str, Tensor], shape: tuple[int, int], like: Tensor) -> Tensor:
    """A copy on the weight's device, in the dtype that PEFT would give it."""
    tensor = tensors[name]
    if tuple(tensor.shape) != shape:
        message = f"it has shape {list(tensor.shape)}, module and config need {list(shape)}"
        raise AdapterError(name, message)
    if tensor.dtype not in _DTYPES:
        raise AdapterError(name, f"it is {tensor.dtype}, adapters are F64, F32, BF16 or F16")
    dtype = torch.promote_types(like.dtype, torch.float32)
    matrix = tensor.detach().to(dtype, copy=True, memory_format=torch.contiguous_format)
    if not bool(matrix.isfinite().all()):  # an fp64 number may be too large for fp32
        raise AdapterError(name, "it has values that are not finite")
    return matrix.to(like.device)
