"""The error that rounding explains, measured on the model itself.

In 16 bits, two exact ways to compute the same thing differ by several percent after some dozen layers, and by
far more where a router's choice of experts is close. No fixed tolerance suits all models. A pass is therefore
repeated with the rounding of every layer's output disturbed by up to half a unit in its last place, which is
what another order of sums does.

Dimensions: T positions, H hidden size.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

SIXTEEN_BITS = (torch.bfloat16, torch.float16)
_FIXED = {torch.float64: 1e-9, torch.float32: 1e-4}
"""Relative error of hidden states that rounding explains; a lost prompt gives errors around 1."""
_TYPICAL_MULTIPLE, _WORST_MULTIPLE = 1.25, 2.0
"""Accepted multiples of the measured errors. Other orders of sums reach about half of these; the worst of few
positions varies."""
_ROWS_AT_A_TIME = 1024


@dataclass(frozen=True)
class Tolerance:
    """Accepted relative errors of hidden states.

    Attributes:
        worst: of any position.
        typical: of the median position. Where experts are chosen, single positions differ by far more.
    """

    worst: float
    typical: float

    def allows(self, error_T: Tensor) -> bool:
        return bool(error_T.max() <= self.worst) and bool(error_T.median() <= self.typical)


def tolerance_of(
    trunk: nn.Module, exact_T_H: Tensor, run: Callable[[], Tensor], *, num_draws: int
) -> Tolerance:
    """The tolerance for comparisons with states of such passes.

    Args:
        exact_T_H: the hidden states of an undisturbed pass.
        run: takes the same pass again.
        num_draws: disturbed passes to take, in 16 bits.
    """
    if exact_T_H.dtype not in SIXTEEN_BITS:
        return Tolerance(_FIXED[exact_T_H.dtype], _FIXED[exact_T_H.dtype])
    errors = []
    for seed in range(num_draws):
        with disturbed_rounding(trunk, seed):
            errors.append(relative_errors(run(), exact_T_H))
    error_T = torch.cat(errors)
    return Tolerance(_WORST_MULTIPLE * float(error_T.max()), _TYPICAL_MULTIPLE * float(error_T.median()))


def relative_errors(actual_T_H: Tensor, expected_T_H: Tensor) -> Tensor:
    """‖actual − expected‖ / ‖expected‖ at each position, [T], in fp64."""
    halves = (torch.split(states_T_H, _ROWS_AT_A_TIME) for states_T_H in (actual_T_H, expected_T_H))
    parts = zip(*halves, strict=True)
    return torch.cat([_relative(actual.double(), expected.double()) for actual, expected in parts])


def _relative(actual_T_H: Tensor, expected_T_H: Tensor) -> Tensor:
    smallest = torch.finfo(torch.float32).tiny  # a state of zeros equals itself
    norm_T: Tensor = torch.linalg.vector_norm(expected_T_H, dim=-1)
    error_T: Tensor = torch.linalg.vector_norm(actual_T_H - expected_T_H, dim=-1)
    return error_T / norm_T.clamp_min(smallest)


@contextmanager
def disturbed_rounding(module: nn.Module, seed: int) -> Iterator[None]:
    """Disturb every output of the module's layers by up to half a unit in its last place."""
    leaves = [layer for layer in module.modules() if not any(True for _ in layer.children())]
    generators: dict[torch.device, torch.Generator] = {}

    def disturb(_layer: nn.Module, _args: Any, output: Any) -> Any:  # noqa: ANN401
        if not (isinstance(output, Tensor) and output.is_floating_point()):
            return output
        if output.device not in generators:
            generators[output.device] = torch.Generator(output.device).manual_seed(seed)
        noise = torch.rand(output.shape, generator=generators[output.device], device=output.device) - 0.5
        return (output * (1 + torch.finfo(output.dtype).eps * noise)).to(output.dtype)

    handles = [leaf.register_forward_hook(disturb) for leaf in leaves]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def describe(errors: Sequence[Tensor], tolerance: Tolerance) -> str:
    """The errors beside those that rounding explains, in words."""
    error_T = torch.cat(list(errors))
    return (
        f"hidden states differ by {float(error_T.median()):.2g} (at worst {float(error_T.max()):.2g}), "
        f"rounding explains {tolerance.typical:.2g} (at worst {tolerance.worst:.2g})"
    )
