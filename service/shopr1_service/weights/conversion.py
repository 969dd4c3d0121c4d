"""Conversion of a checkpoint's tensors to the model's, by the rules with which transformers loads it.

The tensors of a checkpoint often have other names than the model's, and other shapes: an expert of a mixture
each, a prefix for the text part of a multimodal model, no prefix at all. Transformers renames, stacks, splits
and transposes them (`transformers.conversion_mapping`). The same rules serve the load at start and updates.

A plan needs names and shapes only: operations run on tensors without data first. Knows no files.
"""

import copy
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    dot_natural_key,
    rename_source_key,
)
from transformers.utils.loading_report import LoadStateDictInfo

from shopr1_client.errors import FieldError
from shopr1_service.weights.constants import is_constant

KEY_MAPPING: Mapping[str, str] = {
    r"^(?:(?:module|_orig_mod|_fsdp_wrapped_module|base_model\.model)\.)+": "",
    r"\.(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.": ".",
}
"""Parts of names by data parallelism, torch.compile, FSDP and PEFT: patterns and their replacement."""

Shape = tuple[int, ...]


@dataclass
class Merge:
    """Tensors of the model that an operation computes from tensors of the checkpoint.

    Attributes:
        target: the first of the model's tensors.
        sources: pattern and name of each of the checkpoint's tensors, in the operation's order.
        targets: all of the model's tensors.
    """

    target: str
    sources: Sequence[tuple[str, str]]
    _converter: WeightConverter
    targets: Sequence[str]

    def run(self, model: PreTrainedModel, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """The model's tensors by name.

        Args:
            read: gives a tensor of the checkpoint by its name.
        """
        converter = copy.deepcopy(self._converter)
        for pattern, name in self.sources:
            converter.add_tensor(self.target, name, pattern, cast("Any", read(name)))  # a tensor will do
        converted = converter.convert(self.target, model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in converted.items()}

    def absent(self) -> list[str]:
        """Patterns of the operation that no tensor matches."""
        present = {pattern for pattern, _ in self.sources}
        return [pattern for pattern in self._converter.source_patterns if pattern not in present]

    def gap(self) -> str | None:
        """A list of tensors with a hole, such as experts 0, 1 and 3: transformers would close the gap."""
        by_pattern: dict[str, list[list[str]]] = defaultdict(list)
        for pattern, name in self.sources:
            by_pattern[pattern].append(name.split("."))
        for names in by_pattern.values():
            varying = [set(column) for column in zip(*names, strict=True) if len(set(column)) > 1]
            if len(names) > 1 and varying != [{str(number) for number in range(len(names))}]:
                return f"these are not the {len(names)} tensors from 0 on: {'.'.join(names[0])} …"
        return None


@dataclass
class Conversion:
    """Plan of a conversion.

    Attributes:
        renamed: the model's name of each tensor that is used as it is, by its name in the checkpoint.
        merges: operations.
        ignored: tensors that transformers leaves out at load without a warning.
        constants: the model's name of each tensor that it computes itself, by its name in the checkpoint;
            their numbers must be compared (`contradiction`).
        flaws: tensors that fit nowhere.
    """

    renamed: dict[str, str] = field(default_factory=dict)
    merges: list[Merge] = field(default_factory=list)
    ignored: set[str] = field(default_factory=set)
    constants: dict[str, str] = field(default_factory=dict)
    flaws: list[FieldError] = field(default_factory=list)

    @property
    def targets(self) -> dict[str, str]:
        """A tensor of the model for each tensor of the checkpoint that is used."""
        return self.renamed | {name: merge.target for merge in self.merges for _, name in merge.sources}


def plan_conversion(model: PreTrainedModel, shapes: Mapping[str, Shape]) -> Conversion:
    """Plan for a checkpoint.

    Names and shapes that are all the model's own are used unchanged.

    Args:
        shapes: of the checkpoint's tensors by name; any subset of a checkpoint.
    """
    own: dict[str, Tensor] = model.state_dict()
    if all(name in own and tuple(own[name].shape) == shape for name, shape in shapes.items()):
        return Conversion({name: name for name in shapes})
    return NameConverter(model).plan(shapes)


class NameConverter:
    """Finds a tensor's target like transformers' `convert_and_load_state_dict_in_model`.

    Attributes:
        own: the model's tensors by name.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.own: dict[str, Tensor] = model.state_dict()
        self._model = model
        transforms: list[WeightTransform] = get_model_conversion_mapping(model, dict(KEY_MAPPING))
        self._renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
        self._converters = [each for each in transforms if isinstance(each, WeightConverter)]

    def find(self, name: str) -> tuple[str, str | None]:
        """Name in the model, and the pattern of the operation that computes it, if there is one."""
        found = self._rename(name, self._renamings, self._converters)
        if found[0] in self.own:
            return found
        # Already the model's name, perhaps after a prefix.
        plain = self._rename(name, self._renamings[: len(KEY_MAPPING)], [])
        return plain if plain[0] in self.own else found

    def find_module(self, name: str) -> str | None:
        """Name of a linear module in the model; None if transformers ignores its weight at load.

        Raises:
            KeyError: there is no such module; its argument is the reason.
        """
        target, pattern = self.find(f"{name}.weight")
        if target not in self.own:
            if self._ignored({name: target}) or is_constant(target):
                return None
            raise KeyError(f"the policy has no module {name!r}")
        if pattern or not target.endswith(".weight"):
            raise KeyError(f"the policy has no module {name!r}: it is a part of {target}")
        return target.removesuffix(".weight")

    def plan(self, shapes: Mapping[str, Shape]) -> Conversion:
        """See `plan_conversion`."""
        conversion, sources = Conversion(), defaultdict[str, list[tuple[str, str]]](list)
        unknown: dict[str, str] = {}
        # The order of transformers, in which lists of tensors are stacked.
        for name in sorted(shapes, key=dot_natural_key):
            target, pattern = self.find(name)
            if target not in self.own:
                unknown[name] = target
            elif pattern is not None:
                sources[target].append((pattern, name))
            else:
                conversion.renamed[name] = target
        by_pattern = {pattern: each for each in self._converters for pattern in each.source_patterns}
        conversion.merges = [
            Merge(target, each, by_pattern[each[0][0]], [target]) for target, each in sources.items()
        ]
        conversion.constants = {
            name: target for name, target in unknown.items() if self._must_be_compared(target)
        }
        for name in conversion.constants:
            del unknown[name]
        conversion.ignored = self._ignored(unknown)
        misfits: list[FieldError] = [
            {"location": name, "message": _no_tensor(unknown[name])}
            for name in shapes
            if name in unknown.keys() - conversion.ignored
        ]
        conversion.flaws = [*misfits, *self._wrong_shapes(conversion, shapes), *_duplicates(conversion)]
        return conversion

    def _rename(
        self, name: str, renamings: list[WeightRenaming], converters: list[WeightConverter]
    ) -> tuple[str, str | None]:
        return rename_source_key(name, renamings, converters, self._model.base_model_prefix, self.own)

    def _must_be_compared(self, target: str) -> bool:
        """Whether it is a constant, and none that this model, and not transformers for all, ignores."""
        patterns = self._model._keys_to_ignore_on_load_unexpected or ()
        return is_constant(target) and not any(re.search(pattern, target) for pattern in patterns)

    def _ignored(self, unknown: Mapping[str, str]) -> set[str]:
        """Tensors that are left out silently at load."""
        info = LoadStateDictInfo(
            missing_keys=set(),
            unexpected_keys=set(unknown.values()),
            mismatched_keys=set(),
            conversion_errors={},
            error_msgs=[],
            skipped_pp_keys=set(),
        )
        self._model._adjust_missing_and_unexpected_keys(info)
        return {name for name, target in unknown.items() if target not in info.unexpected_keys}

    def _wrong_shapes(self, conversion: Conversion, shapes: Mapping[str, Shape]) -> list[FieldError]:
        renamed = [
            (name, _shape_flaw(shapes[name], self.own[target])) for name, target in conversion.renamed.items()
        ]
        merged = [(merge.sources[0][1], self._merge_flaw(merge, shapes)) for merge in conversion.merges]
        return [{"location": name, "message": flaw} for name, flaw in (*renamed, *merged) if flaw]

    def _merge_flaw(self, merge: Merge, shapes: Mapping[str, Shape]) -> str | None:
        if gap := merge.gap():
            return f"{merge.target} cannot be made: {gap}"
        try:
            made = merge.run(self._model, lambda name: torch.empty(shapes[name], device="meta"))
        except Exception as error:  # transformers' operations check little
            reason = f"there are no {absent[0]}" if (absent := merge.absent()) else str(error).splitlines()[0]
            return f"{merge.target} cannot be made: {reason}"
        merge.targets = list(made)
        for name, tensor in made.items():
            if name not in self.own:
                return _no_tensor(name)
            if flaw := _shape_flaw(tuple(tensor.shape), self.own[name]):
                return f"with {len(merge.sources) - 1} others it becomes {name}: {flaw}"
        return None


def _no_tensor(name: str) -> str:
    return "the policy has no such tensor" + (
        ": it is an adapter's, or beside one; send the adapter, or merged weights"
        if re.search(r"\.lora_|\.base_layer\.|\.modules_to_save\.", name)
        else ""
    )


def _shape_flaw(shape: Shape, own: Tensor) -> str | None:
    return (
        None if shape == tuple(own.shape) else f"its shape is {list(shape)}, the policy's {list(own.shape)}"
    )


def _duplicates(conversion: Conversion) -> list[FieldError]:
    """Tensors that become the same one; transformers would take the first."""
    first: dict[str, str] = {}
    flaws: list[FieldError] = []
    for name, target in conversion.renamed.items():
        if first.setdefault(target, name) != name:
            flaws.append({"location": name, "message": f"duplicate tensor: it is {first[target]} again"})
    flaws += [
        {"location": first[merge.target], "message": f"duplicate tensor: {merge.sources[0][1]} is part of it"}
        for merge in conversion.merges
        if merge.target in first
    ]
    return flaws
