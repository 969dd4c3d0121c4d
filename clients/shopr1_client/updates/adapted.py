"""Models of PEFT's: their one adapter, or weights with all adapters merged.

An adapter alone is the model only if the forward computes with it and with nothing else that is trained.
Everything else is refused with its cause, or sent merged: a tensor at a time, on a copy of its layer, so that
the model stays as it is. PEFT's own `merge_and_unload` is not used. It adds the adapters of a tied pair to
the one weight twice (`ensure_weight_tying`), and those of replicated layers all to the same weights.
"""

import copy
import importlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from shopr1_client.errors import UnsendableModelError
from shopr1_client.updates.weights import (
    DTYPES,
    Module,
    Tensor,
    Weights,
    dtype_name,
    of_tensors,
    plain_name,
    storage_place,
    unwrapped,
)
from shopr1_client.wire_policy import ADAPTER_CONFIG_KEY, BASE_SAMPLE_KEY, TensorSample

_MERGE = "send merged weights, with merge=True"
_MAX_SCALE_ERROR = 1e-6
"""Relative difference of a factor between layer and config: rounding."""
_MAX_TIE_ERROR = 8
"""Difference of tied tensors, in units of the last place of the largest number."""
_NUM_SAMPLED = 16
"""Numbers of each base weight that are compared: training changes nearly all of them."""
_UNMERGEABLE = ("XLORA", "POLY", "CPT")
"""Kinds whose adapters depend on the input."""


def is_adapted(module: Module) -> bool:
    """Whether a module has adapters of PEFT's."""
    return bool(getattr(unwrapped(module), "peft_config", None))


def active_adapter(module: Module) -> str:
    """Name of the adapter that the forward computes with.

    Raises:
        UnsendableModelError: it computes with several, or none.
    """
    inner = unwrapped(module)
    _check_kind(inner)
    found: dict[str, None] = {}
    for _, layer in _adapted_layers(inner):
        found |= dict.fromkeys(_adapters_of(layer))
    if len(found) == 1:
        return next(iter(found))
    if found:
        raise UnsendableModelError(f"{len(found)} adapters are active, {', '.join(found)}: {_MERGE}")
    raise UnsendableModelError(
        "the model's adapters are disabled, or none is active, so that it computes with its base weights:"
        f" enable one, or {_MERGE}"
    )


def of_adapter(module: Module) -> Weights:
    """The active LoRA adapter under PEFT's names, with its config and a sample of the base in the metadata.

    Raises:
        UnsendableModelError: the model computes with something else, too; the message names it.
        ValueError: it is sharded, offloaded or quantised.
    """
    inner, name = unwrapped(module), active_adapter(module)
    config = inner.peft_config[name]
    if (kind := _kind(config)) != "LORA":
        raise UnsendableModelError(f"adapter {name!r} is {kind}, and only LoRA can be sent: {_MERGE}")
    for path, layer in _adapted_layers(inner):
        _check_layer(path, layer, name, config)
    _check_frozen(inner)
    peft = importlib.import_module("peft")  # installed, as the module is PEFT's
    # Without embeddings: PEFT would look for the base model's on its hub.
    tensors = peft.get_peft_model_state_dict(inner, adapter_name=name, save_embedding_layers=False)
    text = json.dumps(config.to_dict(), default=_jsonable)
    return of_tensors(tensors, {ADAPTER_CONFIG_KEY: text, BASE_SAMPLE_KEY: json.dumps(_base_sample(inner))})


def of_merged(module: Module) -> Weights:
    """All weights that the forward computes with, under the base model's names.

    Merged weights are rounded to the dtype of the base weights.

    Raises:
        UnsendableModelError: an adapter is none of weights; the message names it.
        ValueError: the model is sharded, offloaded or quantised.
    """
    inner = unwrapped(module)
    _check_kind(inner)
    tensors: dict[str, Tensor] = {}
    computed: dict[str, Callable[[], Tensor]] = {}
    for name, tensor, compute in _effective(_base_model(inner), ""):
        tensors[name] = tensor
        if compute is not None:
            computed[name] = compute
    return _weights(tensors, computed)


def _base_sample(inner: Module) -> dict[str, Any]:
    """Some numbers of every base weight: the service refuses the adapter if it has others."""
    samples = {}
    for name, tensor, _ in _effective(_base_model(inner), ""):
        if storage_place(tensor) and str(tensor.dtype) in DTYPES:  # the others are quantised
            step = max(1, tensor.numel() // _NUM_SAMPLED)
            values = tensor.detach().reshape(-1)[::step][:_NUM_SAMPLED].tolist()
            sample = TensorSample(
                dtype=dtype_name(tensor), shape=list(tensor.shape), step=step, values=values
            )
            samples[plain_name(name)] = sample.model_dump()
    return samples


# --- checks -----------------------------------------------------------------------------------------


def _check_kind(inner: Module) -> None:
    for name, config in inner.peft_config.items():
        if getattr(config, "is_prompt_learning", False) or getattr(config, "is_adaption_prompt", False):
            raise UnsendableModelError(
                f"adapter {name!r} is {_kind(config)}: it adds virtual tokens, and only weights can be sent"
            )
        if _kind(config) in _UNMERGEABLE:
            raise UnsendableModelError(
                f"adapter {name!r} is {_kind(config)}: its weights depend on the input"
            )
        if getattr(config, "layer_replication", None):
            raise UnsendableModelError(
                f"adapter {name!r} has layer_replication: the model has other layers than the policy"
            )


def _kind(config: Any) -> str:  # noqa: ANN401  # PEFT's config
    return str(getattr(config.peft_type, "value", config.peft_type))


def _check_layer(path: str, layer: Module, name: str, config: Any) -> None:  # noqa: ANN401  # PEFT's config
    """
    Raises:
        UnsendableModelError: the layer computes with more or less than this adapter.
    """
    if not _is_tuner(layer):
        if _adapters_of(layer):
            raise UnsendableModelError(
                f"{path} is trained beside the adapter, and LoRA does not have it: {_MERGE}"
            )
        return
    if layer.merged_adapters:
        raise UnsendableModelError(
            f"{path} has its adapter merged into its weights in place: unmerge it first, or {_MERGE}"
        )
    if name not in _available(layer):
        return
    if (parameter := getattr(layer, "parameter_name", None)) is not None:  # PEFT makes these of `w1`, too
        place = path.replace(".base_layer", "")
        raise UnsendableModelError(
            f"{place} has an adapter of its parameter {parameter}, as PEFT makes for stacked experts, and "
            f"services apply adapters to modules only: {_MERGE}"
        )
    if name not in _adapters_of(layer):
        raise UnsendableModelError(f"{path} computes without its adapter {name!r}: {_MERGE}")
    actual, expected = getattr(layer, "scaling", {}).get(name), _scale(path, name, layer, config)
    if actual is not None and not math.isclose(float(actual), expected, rel_tol=_MAX_SCALE_ERROR):
        raise UnsendableModelError(
            f"{path} multiplies its adapter by {actual:g}, and the adapter's config by {expected:g}: {_MERGE}"
        )


def _scale(path: str, name: str, layer: Module, config: Any) -> float:  # noqa: ANN401  # PEFT's config
    """Factor of B·A by the config, as PEFT computes it."""
    pattern_key = importlib.import_module("peft.utils.other").get_pattern_key
    patterns = config.alpha_pattern or {}
    alpha = patterns.get(pattern_key(patterns.keys(), path), config.lora_alpha)
    rank = layer.r[name]
    return float(alpha / (math.sqrt(rank) if config.use_rslora else rank))


def _check_frozen(inner: Module) -> None:
    """
    Raises:
        UnsendableModelError: a tensor that is no part of an adapter is trained.
    """
    own = {id(each) for _, layer in _adapted_layers(inner) for each in _adapter_parameters(layer)}
    trained = [name for name, each in inner.named_parameters() if each.requires_grad and id(each) not in own]
    if trained:
        others = f" and {len(trained) - 1} more" if len(trained) > 1 else ""
        raise UnsendableModelError(
            f"{plain_name(trained[0])}{others} are trained, and no part of the adapter: {_MERGE}"
        )


# --- layers -----------------------------------------------------------------------------------------


def _is_tuner(layer: Module) -> bool:
    return hasattr(type(layer), "adapter_layer_names") and "base_layer" in layer._modules


def _is_adapted(layer: Module) -> bool:
    """Whether PEFT has wrapped a layer: with an adapter, or with a copy that is trained."""
    children = layer._modules
    is_copy = "modules_to_save" in children or "token_adapter" in children
    return hasattr(type(layer), "adapter_layer_names") and (is_copy or "base_layer" in children)


def _adapted_layers(inner: Module) -> Iterator[tuple[str, Module]]:
    """All of PEFT's layers with the names of the layers that they replace."""
    return ((name, each) for name, each in _base_model(inner).named_modules() if _is_adapted(each))


def _base_model(inner: Module) -> Module:
    """The adapted model without PEFT's wrappers around it; transformers adapts models in place."""
    peft = importlib.import_module("peft")
    return inner.base_model.model if isinstance(inner, peft.PeftModel | peft.PeftMixedModel) else inner


def _adapter_parameters(layer: Module) -> Iterator[Tensor]:
    for container in (*layer.adapter_layer_names, *layer.other_param_names):
        held = _attribute(layer, container)
        if hasattr(held, "parameters"):
            yield from held.parameters()


def _attribute(layer: Module, path: str) -> Any:  # noqa: ANN401  # a container of modules or parameters
    for part in path.split("."):
        layer = getattr(layer, part, None)
    return layer


def _available(layer: Module) -> set[str]:
    """Names of the adapters that a layer has."""
    containers = (_attribute(layer, name) for name in layer.adapter_layer_names)
    return {str(name) for each in containers if hasattr(each, "keys") for name in each.keys()}  # noqa: SIM118


def _adapters_of(layer: Module) -> list[str]:
    """Names of the adapters that a layer computes with."""
    if layer.disable_adapters:
        return []
    merged = list(getattr(layer, "merged_adapters", ()))
    available = _available(layer)
    return merged or [name for name in layer.active_adapters if name in available]


# --- merged weights ---------------------------------------------------------------------------------

_Named = tuple[str, Tensor, Callable[[], Tensor] | None]


def _effective(module: Module, prefix: str) -> Iterator[_Named]:
    """A module's weights: name, tensor of the base, and a function for the merged one where it differs."""
    if not _is_adapted(module):
        for name, tensor in _own_weights(module):
            yield f"{prefix}{name}", tensor, None
        for name, child in module.named_children():
            yield from _effective(child, f"{prefix}{name}.")
        return
    layer, base = _split(module)
    if any(map(_is_adapted, base.modules())):
        raise UnsendableModelError(f"{prefix[:-1]} has an adapter inside of what another one replaces")
    is_merged = all(map(_is_plain, _chain(layer)))
    for part, inside in base.named_modules():
        for own, tensor in _own_weights(inside):
            name = f"{part}.{own}" if part else own
            yield f"{prefix}{name}", tensor, None if is_merged else partial(_merged, layer, prefix, name)


def _own_weights(module: Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and floating-point buffers of the module itself, as in `state_dict()`."""
    yield from module.named_parameters(recurse=False, remove_duplicate=False)
    for name, tensor in module.named_buffers(recurse=False, remove_duplicate=False):
        if tensor.is_floating_point() and name not in module._non_persistent_buffers_set:
            yield name, tensor


def _split(module: Module) -> tuple[Module, Module]:
    """The outermost layer with adapters, if there is one, and the module that the forward begins with."""
    children = module._modules
    if "modules_to_save" in children:
        names = module.active_adapters
        is_used = names and not module.disable_adapters and all(name in _available(module) for name in names)
        used = children["modules_to_save"][names[0]] if is_used else children["original_module"]
        return used, used
    layer = children.get("token_adapter", module)
    return layer, layer.get_base_layer()


def _chain(layer: Module) -> Iterator[Module]:
    """A layer with adapters, and those that it wraps."""
    while "base_layer" in layer._modules:
        yield layer
        layer = layer.base_layer


def _is_plain(layer: Module) -> bool:
    """Whether the base weights are what the layer computes with."""
    if layer.disable_adapters:  # its forward unmerges
        return not layer.merged_adapters
    return bool(layer.merged_adapters) or not _adapters_of(layer)


def _merged(layer: Module, prefix: str, name: str) -> Tensor:
    own = _copied(layer)
    try:
        for each in _chain(own):
            if not _is_plain(each):
                each.unmerge() if each.disable_adapters else each.merge()
    except Exception as error:  # some methods depend on the input; PEFT raises several kinds
        raise UnsendableModelError(f"PEFT cannot merge the adapter of {prefix[:-1]}: {error}") from error
    return own.get_base_layer().state_dict()[name]


def _copied(layer: Module) -> Module:
    """A deep copy; tied adapters hold views of each other, which `deepcopy` alone refuses."""
    new = importlib.import_module("torch").nn.Parameter
    memo = {id(each): new(each.detach().clone(), requires_grad=False) for each in layer.parameters()}
    options = [vars(each).get("kwargs") for each in layer.modules()]
    return copy.deepcopy(layer, memo | {id(each): each for each in options})


def _weights(tensors: Mapping[str, Tensor], computed: Mapping[str, Callable[[], Tensor]]) -> Weights:
    """Tied tensors once, if they are equal with their adapters, too; else the service decides."""
    first: dict[Any, str] = {}
    kept = {}
    for name, tensor in tensors.items():
        other = first.setdefault(storage_place(tensor) or name, name)
        if other == name or not _is_equal(other, name, computed):
            kept[name] = tensor.detach()
    named = sorted(kept.items(), key=lambda item: -item[1].element_size())
    return Weights(
        {plain_name(name): tensor for name, tensor in named},
        computed={plain_name(name): computed[name] for name in kept if name in computed},
    )


def _is_equal(one: str, other: str, computed: Mapping[str, Callable[[], Tensor]]) -> bool:
    """Whether two tensors with the same base are equal, except for rounding."""
    if one not in computed and other not in computed:
        return True
    if one not in computed or other not in computed:
        return False
    a, b = computed[one](), computed[other]()
    limit = _MAX_TIE_ERROR * float(a.abs().max()) * importlib.import_module("torch").finfo(a.dtype).eps
    return bool((a - b).abs().max() <= limit)


def _jsonable(value: Any) -> Any:  # noqa: ANN401
    return sorted(value) if isinstance(value, set | frozenset) else str(value)
