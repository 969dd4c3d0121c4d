"""The choice of a kernel. Kernels of CUDA are replaced by those of the CPU, some of them wrong."""

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from shopr1_service.engine.attention import choice as choice_module
from shopr1_service.engine.attention import kernels
from shopr1_service.engine.attention.choice import TOLERANCE, KernelChoice, kernel_error
from shopr1_service.engine.attention.kernels import CPU_FLASH, EFFICIENT, FLASH, OPEN

HEADS = pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (4, 2), (6, 1)])


@HEADS
@pytest.mark.parametrize("kernel", [CPU_FLASH, OPEN])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_kernels_of_the_cpu_are_right(
    kernel: str, num_heads: int, num_kv_heads: int, dtype: torch.dtype
) -> None:
    error = kernel_error(kernel, num_heads, num_kv_heads, 16, torch.empty(0, dtype=dtype))
    assert error <= TOLERANCE[dtype]


def broken(kind: str) -> kernels._Fused:
    """A kernel with a defect that real ones have had."""

    def run(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float | None,
        is_causal: bool,
        mask_R_W: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        if kind == "raises":
            raise RuntimeError("no kernel for this head size")
        if kind == "not causal":
            is_causal = False
        if kind == "other heads":  # key-value heads in the order of tiles instead of groups
            num_groups = query.shape[1] // key.shape[1]
            key, value = key.repeat(1, num_groups, 1, 1), value.repeat(1, num_groups, 1, 1)
        out, lse = kernels._cpu_flash(query, key, value, scale, is_causal, mask_R_W)
        changes = {"lse of base 2": lse / 0.6931, "lse with an axis": lse[..., None], "nan": lse * torch.nan}
        return out, changes.get(kind, lse)

    return run


@pytest.mark.parametrize(
    "kind", ["raises", "not causal", "other heads", "lse of base 2", "lse with an axis", "nan"]
)
def test_a_wrong_kernel_is_not_used(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    assert chosen(monkeypatch, {FLASH: broken(kind), EFFICIENT: kernels._cpu_flash}, flash=0.1) == EFFICIENT
    assert chosen(monkeypatch, {FLASH: broken(kind), EFFICIENT: broken("raises")}, flash=0.1) is None


def test_the_faster_of_the_right_kernels_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    both = {FLASH: kernels._cpu_flash, EFFICIENT: kernels._cpu_flash}
    assert chosen(monkeypatch, both, flash=0.1) == FLASH
    assert chosen(monkeypatch, both, flash=9.0) == EFFICIENT


def chosen(
    monkeypatch: pytest.MonkeyPatch, fused: Mapping[str, kernels._Fused], *, flash: float
) -> str | None:
    """The kernel that would be chosen on CUDA, if `flash` took so long and `efficient` 1 s."""
    times_s = iter([flash, 1.0] if kernel_is_right(fused[FLASH]) else [1.0])
    monkeypatch.setattr(kernels, "_FUSED", fused)
    monkeypatch.setattr(choice_module, "device_time_s", lambda _call: next(times_s))
    return choice_module.fastest_kernel((FLASH, EFFICIENT), torch.ones(1, 4, 1, 16), 2)


def kernel_is_right(kernel: kernels._Fused) -> bool:
    return kernel is kernels._cpu_flash


def test_each_shape_of_heads_is_chosen_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, ...]] = []

    def choose(query: Tensor, key: Tensor) -> str:
        asked.append((query.shape[1], key.shape[1], query.shape[3]))
        return "large" if query.shape[3] > 8 else "small"

    monkeypatch.setattr(choice_module, "_choose", choose)
    choice = KernelChoice()
    assert choice.name == ""
    for num_tokens, head_size in ((3, 8), (5, 8), (3, 16), (1, 8)):
        query, key = torch.empty(1, 4, num_tokens, head_size), torch.empty(1, 2, num_tokens, head_size)
        assert choice.of(query, key) == ("large" if head_size == 16 else "small")
    assert asked == [(4, 2, 8), (4, 2, 16)]
    assert choice.name == "large, small"


def test_on_a_cpu_there_is_nothing_to_choose() -> None:
    choice = KernelChoice()
    choice.of(torch.empty(1, 4, 3, 8), torch.empty(1, 2, 3, 8))
    assert choice.name == CPU_FLASH
