"""Tensors that former versions of transformers saved, and that models compute from their config.

Models have no place for them any more: rotary frequencies, causal masks, positions, sines. They are left out,
but not unread: one with other numbers is of a model with another config, so other logits.
"""

import re
from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel

_NAMES = re.compile(
    r"(^|\.)(inv_freq|original_inv_freq|position_ids|masked_bias|causal_mask)$"  # rotations, positions, −∞
    r"|(^|\.)embed_positions\.weights$"  # XGLM's sines; learned positions are a `weight`
    r"|\.attn_rot_embd\.weight$"  # rotary embeddings of old GGUF files
    r"|\.(attn|attention)\.bias$"  # causal masks of GPT-2 and its kin
)
_MASKED = -9e3
"""Greatest logit of a masked position: −10,000 in bfloat16 is −9,984."""
_COMPUTED_TOLERANCE = 1e-5
"""Relative; powers in fp32 differ by a few units in the last place between versions of torch."""
_SINE_TOLERANCE = 1e-3
"""Absolute: the angle of position 2,048 has an error of 1e-4 in fp32."""


def is_constant(name: str) -> bool:
    """Whether former versions of transformers saved a tensor that models compute from their config.

    Such a name says nothing where the model has a tensor of this name.
    """
    return bool(_NAMES.search(name))


def contradiction(model: PreTrainedModel, name: str, given: Tensor) -> str | None:
    """Why a stored constant is not the one that the model computes; None if it is, up to rounding.

    Args:
        name: the tensor's, as the model would name it.
    """
    own = dict(model.named_buffers()).get(name)
    kind = name.rpartition(".")[2]
    if kind in ("bias", "causal_mask"):
        return _unless(_is_mask(given, own), "it is not the model's causal mask, or no mask")
    if kind == "masked_bias":
        return _unless(bool((given <= _MASKED).all()), "it does not mask")
    if kind == "position_ids":
        is_right = given.dim() > 0 and bool((given.cpu() == torch.arange(given.shape[-1])).all())
        return _unless(is_right, "these are not the positions from 0 on")
    if kind == "weights":
        return _unless(own is not None and _is_part(given, own), "these are not the sines of the positions")
    message = "the config gives other rotary frequencies (rope_theta, rope_parameters, head_dim …)"
    return _unless(any(_is_close(given, each) for each in _frequencies(model, own)), message)


def _unless(is_right: bool, message: str) -> str | None:
    return None if is_right else message


def _is_mask(given: Tensor, own: Tensor | None) -> bool:
    """Whether positions see those up to their own, or those of the model's mask: 1, else 0; or 0, else −∞."""
    num_positions = given.shape[-1] if given.dim() else 0
    if given.dim() < 2 or given.shape[-2] != num_positions or given.numel() != num_positions**2:
        return False
    mask = given.cpu().double().view(num_positions, num_positions)
    seen = torch.ones(num_positions, num_positions, dtype=torch.bool).tril()
    if own is not None:
        known = own.cpu().bool().view(own.shape[-2:])[:num_positions, :num_positions]
        seen[: len(known), : len(known)] = known
    seen_value, hidden_values = (1, mask == 0) if mask[0, 0] == 1 else (0, mask <= _MASKED)
    return bool(torch.where(seen, mask == seen_value, hidden_values).all())


def _is_part(given: Tensor, own: Tensor) -> bool:
    """Whether the rows that both have are equal."""
    num_rows = min(len(given), len(own))
    rows = own[:num_rows].cpu().double()
    return given.shape[1:] == own.shape[1:] and torch.allclose(
        given[:num_rows].cpu().double(), rows, rtol=0, atol=max(_SINE_TOLERANCE, _epsilon(given))
    )


def _frequencies(model: PreTrainedModel, own: Tensor | None) -> Iterator[Tensor]:
    """Frequencies that the model has, and had in versions that scaled the positions in their place."""
    buffers = [each for name, each in model.named_buffers() if name.endswith("inv_freq")]
    for frequencies in buffers if own is None else [own]:
        yield frequencies
        for factor in _linear_factors(model.config.get_text_config().to_dict()):
            yield frequencies * factor


def _linear_factors(config: object) -> Iterator[float]:
    if isinstance(config, dict):
        if config.get("rope_type") == "linear":
            yield config["factor"]
        for value in config.values():
            yield from _linear_factors(value)


def _is_close(given: Tensor, own: Tensor) -> bool:
    if given.shape != own.shape or not given.is_floating_point():
        return False
    tolerance = max(_COMPUTED_TOLERANCE, 2 * _epsilon(given), 2 * _epsilon(own))
    # The smallest numbers of FP16 are rounded to multiples of one.
    multiple = max(torch.finfo(each.dtype).tiny * _epsilon(each) for each in (given, own))
    return torch.allclose(given.cpu().double(), own.cpu().double(), rtol=tolerance, atol=multiple)


def _epsilon(tensor: Tensor) -> float:
    return torch.finfo(tensor.dtype).eps if tensor.is_floating_point() else 0.0
