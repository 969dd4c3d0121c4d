"""The Triton kernels in Triton's interpreter, on the CPU, against softmax in fp64: `make test-triton`.

The interpreter runs a kernel's arithmetic and masks in NumPy. It knows nothing of a GPU's rounding of exp, of
memory or of speed; and it has no bfloat16 products.
"""

import importlib.util
import math
import os
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from shopr1_rewards.recipe import Divergence
from shopr1_rewards.self_certainty import divergences
from shopr1_service.engine.fused_head.choice import ReducedHead, fastest_head, reductions
from shopr1_service.engine.lm_head import LinearHead
from tests.support.models import naive

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed: make test-triton", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("TRITON_INTERPRET is not 1: make test-triton", allow_module_level=True)

from shopr1_service.engine.fused_head import kernels
from shopr1_service.engine.fused_head import reductions as reductions_module

# The interpreter's NumPy warns where a GPU gives NaN or infinity.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

NAMES = pytest.mark.parametrize("name", ["written", "fused"])
DIVERGENCES = pytest.mark.parametrize("divergence", [Divergence.KL_U_P, Divergence.KL_P_U])
TILE = 16
HEADS: Mapping[str, Mapping[str, Any]] = {
    "plain": {},
    "bias_and_scale": {"has_bias": True, "scale": 0.25},
    "softcap": {"has_bias": True, "scale": 2.0, "softcap": 3.0},
}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles that a tiny vocabulary does not fill, and parts of two tiles."""
    for name in ("TILE_TOKENS", "TILE_ROWS", "TILE_HIDDEN", "TILE_COLUMNS"):
        monkeypatch.setattr(kernels, name, TILE)
    monkeypatch.setattr(reductions_module, "CUDA_CHUNK_ROWS", 2 * TILE)
    monkeypatch.setattr(reductions_module, "NUM_PROGRAMS", 2)


def random(*sizes: int, seed: int = 0) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed))


def head_with(
    name: str,
    weight_V_H: Tensor,
    bias_V: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
) -> ReducedHead:
    return ReducedHead(weight_V_H, bias_V, scale, softcap, reduction_name=name, reduction=reductions()[name])


def exact_logits(head: LinearHead, hidden_T_H: Tensor, num_rows: int) -> Tensor:
    z_T_V = hidden_T_H.double() @ head.weight_V_H[:num_rows].double().T
    if head.bias_V is not None:
        z_T_V = z_T_V + head.bias_V[:num_rows].double()
    z_T_V = z_T_V * head.scale
    return z_T_V if head.softcap is None else head.softcap * torch.tanh(z_T_V / head.softcap)


def check(head: ReducedHead, hidden_T_H: Tensor, divergence: Divergence, **options: Any) -> None:
    num_vocab = options.get("num_vocab", head.num_rows)
    z_T_V = exact_logits(head, hidden_T_H, num_vocab) / options.get("temperature", 1.0)
    expected_T = torch.tensor(naive(z_T_V, divergence))
    assert_close(
        divergences(hidden_T_H, head, divergence, **options), expected_T.double(), rtol=1e-6, atol=1e-5
    )


@NAMES
@DIVERGENCES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("kind", HEADS)
def test_equals_fp64(name: str, divergence: Divergence, dtype: torch.dtype, kind: str) -> None:
    """19 tokens, 23 hidden numbers and 71 rows: none fills its tiles, and the last part has 7 rows."""
    options = dict(HEADS[kind])
    bias_V = random(71, seed=2).to(dtype) if options.pop("has_bias", False) else None
    head = head_with(name, random(71, 23).to(dtype), bias_V, **options)
    check(head, random(19, 23, seed=1).to(dtype), divergence, temperature=0.6)


@NAMES
@DIVERGENCES
@pytest.mark.parametrize("num_rows", [1, 16, 17, 33, 64])
def test_rows_beyond_the_vocabulary_do_not_count(name: str, divergence: Divergence, num_rows: int) -> None:
    # The head has more rows, and these have large logits.
    weight_V_H = random(64, 8)
    weight_V_H[num_rows:] = 100.0
    check(head_with(name, weight_V_H), random(3, 8, seed=1).abs(), divergence, num_vocab=num_rows)


@NAMES
@DIVERGENCES
@pytest.mark.parametrize("level", [-10.0, -200.0, 300.0])
def test_columns_of_the_last_tile_are_no_logits_of_zero(
    name: str, divergence: Divergence, level: float
) -> None:
    """All logits are near `level`: one of 0 would have all the weight, or the maximum would stay at 0."""
    num_rows = 2 * TILE + 1
    head = head_with(name, random(num_rows, 8), torch.full((num_rows,), level))
    check(head, random(3, 8, seed=1), divergence)


@NAMES
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_the_maximum_may_come_in_any_tile(name: str, softcap: float | None) -> None:
    """A logit far above all others, in the first, a middle and the last tile."""
    bias_V = torch.zeros(70)
    for place in (0, 20, 69):
        bias_V[place] = 40.0
        for divergence in (Divergence.KL_U_P, Divergence.KL_P_U):
            check(
                head_with(name, random(70, 8), bias_V.clone(), softcap=softcap),
                random(2, 8, seed=1),
                divergence,
            )
        bias_V[place] = -40.0


@NAMES
def test_uniform_is_zero(name: str) -> None:
    head = head_with(name, torch.zeros(37, 8), torch.full((37,), -7.0))
    for divergence in Divergence:
        assert divergences(random(2, 8), head, divergence).tolist() == pytest.approx([0, 0], abs=1e-6)


@NAMES
@DIVERGENCES
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_token_that_is_not_finite_stays_alone(name: str, divergence: Divergence, value: float) -> None:
    hidden_T_H = random(5, 8, seed=1)
    hidden_T_H[2, 3] = value
    values_T = divergences(hidden_T_H, head_with(name, random(40, 8)), divergence)
    assert values_T.isfinite().tolist() == [True, True, False, True, True]


@NAMES
@DIVERGENCES
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 39])
def test_a_logit_that_is_not_finite_shows(
    name: str, divergence: Divergence, value: float, place: int
) -> None:
    bias_V = torch.zeros(40)
    bias_V[place] = value
    values_T = divergences(random(2, 8, seed=1), head_with(name, random(40, 8), bias_V), divergence)
    assert values_T.isfinite().tolist() == [False, False]


@pytest.mark.parametrize("fastest", ["linear", "linear_written", "linear_fused"])
def test_the_check_at_load_lets_both_pass(fastest: str) -> None:
    head = LinearHead(random(50, 8), random(50, seed=3), softcap=4.0)

    def time_s_of(way: LinearHead) -> float:
        return 1.0 if way.name == fastest else 2.0

    assert fastest_head(head, reductions(), random(4, 8, seed=1), time_s_of).name == fastest
