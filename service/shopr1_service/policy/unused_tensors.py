"""Tensors of a checkpoint that the policy would not compute with, or with others in their place.

Transformers only warns of them, or says nothing, yet they change the numbers: biases that the config denies,
more layers than it has, an `lm_head` of its own where the config ties it to the embedding, experts 0, 1 and 3
of which the last is taken for the third. They are refused; the setting `ignored_tensors` allows unused ones.
"""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence

from torch import Tensor
from transformers import PreTrainedModel

from shopr1_service.errors import PolicyError
from shopr1_service.weights.constants import contradiction, is_constant
from shopr1_service.weights.conversion import Shape, plan_conversion
from shopr1_service.weights.tensors import is_ignored

logger = logging.getLogger(__name__)

_MAX_SHOWN = 8


def refuse_unused(names: Iterable[str], ignored: Sequence[str]) -> None:
    """Refuse tensors that were not loaded.

    Args:
        ignored: patterns of the setting `ignored_tensors`.

    Raises:
        PolicyError: names them.
    """
    unused = sorted(name for name in names if not is_constant(name))
    refused = [name for name in unused if not is_ignored(name, ignored)]
    if refused:
        shown = ", ".join(refused[:_MAX_SHOWN]) + (" …" if len(refused) > _MAX_SHOWN else "")
        raise PolicyError(
            f"the policy would not compute with {len(refused)} tensors of the checkpoint: {shown}. Its "
            "config may be of another model (fewer layers, no biases); if they are not meant to be used, "
            "name them in `ignored_tensors`"
        )
    if unused:
        logger.warning("ignored tensors of the checkpoint: %s", ", ".join(unused))


def refuse_misplaced(
    model: PreTrainedModel,
    shapes: Mapping[str, Shape],
    read: Callable[[str], Tensor],
    ignored: Sequence[str],
) -> None:
    """Refuse tensors that transformers loads into the wrong place, or drops although they change the numbers.

    Quantised checkpoints are not checked: their tensors have other shapes than the model's.

    Args:
        shapes: of the checkpoint's tensors by name.
        read: gives one of them.
        ignored: patterns of the setting `ignored_tensors`.

    Raises:
        PolicyError: names the first.
    """
    if getattr(model, "hf_quantizer", None) is not None:
        return
    plan = plan_conversion(model, shapes)
    # Tensors without a place in the model are `refuse_unused`'s.
    for flaw in plan.flaws:
        if flaw["location"] in plan.targets:
            raise PolicyError(f"tensor {flaw['location']} of the checkpoint: {flaw['message']}")
    for name, target in plan.constants.items():
        if not is_ignored(name, ignored) and (reason := contradiction(model, target, read(name))):
            raise PolicyError(
                f"tensor {name} of the checkpoint: {reason}; its config may be of another model; if the "
                "tensor is not meant to be used, name it in `ignored_tensors`"
            )


def resolve_ties(model: PreTrainedModel, ignored: Sequence[str]) -> None:
    """Refuse tensors that the config ties to others and the checkpoint has with other numbers.

    Transformers unties them. Ignored ones are tied again.

    Raises:
        PolicyError: names them.
    """
    wanted = model.get_expanded_tied_weights_keys(all_submodels=True)
    untied = {name: owner for name, owner in wanted.items() if name not in model.all_tied_weights_keys}
    for name, owner in untied.items():
        if not is_ignored(name, ignored):
            raise PolicyError(
                f"the config ties {name} to {owner} (tie_word_embeddings), but the checkpoint has both, with "
                "different numbers: set tie_word_embeddings to false in its config.json to use both, or name "
                f"{name} in `ignored_tensors` to leave it out"
            )
        logger.warning("ignored %s of the checkpoint: the config ties it to %s", name, owner)
    if untied:
        model.tie_weights()
