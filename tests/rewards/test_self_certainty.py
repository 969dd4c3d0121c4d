import math
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from shopr1_rewards.recipe import Divergence
from shopr1_rewards.self_certainty import divergences

DIVERGENCES = pytest.mark.parametrize("divergence", list(Divergence))


@dataclass
class GivenLogits:
    """A head whose hidden states are the logits themselves."""

    num_rows: int
    chunk: int = 7
    max_tokens: int = 4
    is_backwards: bool = False

    knows_mean: bool = False

    def mean_logits(self, hidden_T_H: Tensor, num_rows: int) -> Tensor | None:
        return hidden_T_H[:, :num_rows].double().mean(dim=1) if self.knows_mean else None

    def logit_chunks(self, hidden_T_H: Tensor, num_rows: int) -> Iterator[Tensor]:
        assert hidden_T_H.shape[0] <= self.max_tokens
        chunks = torch.split(hidden_T_H[:, :num_rows], self.chunk, dim=1)
        return reversed(chunks) if self.is_backwards else iter(chunks)


def measure(logits_T_V: Tensor, **options: Any) -> dict[Divergence, Tensor]:
    """Every divergence of these logits; options of the head and of `divergences` alike."""
    of_divergences = {key: options.pop(key) for key in ("temperature", "num_vocab") if key in options}
    head = GivenLogits(logits_T_V.shape[1], **options)
    return {each: divergences(logits_T_V, head, each, **of_divergences) for each in Divergence}


def naive(logits_T_V: Tensor) -> tuple[Tensor, Tensor]:
    """KL(U‖p) and KL(p‖U) from all the logits, as they are defined, in fp64."""
    ln_p_T_V = logits_T_V.double().log_softmax(dim=1)
    ln_u = -math.log(logits_T_V.shape[1])
    return (ln_u - ln_p_T_V).mean(dim=1), (ln_p_T_V.exp() * (ln_p_T_V - ln_u)).sum(dim=1)


def random_logits(T: int, V: int, *, seed: int = 0, scale: float = 3.0, offset: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(T, V, generator=generator, dtype=torch.float64) * scale + offset


def values(result: dict[Divergence, Tensor]) -> Tensor:
    """KL(U‖p) and KL(p‖U), [2, T]."""
    return torch.stack([result[Divergence.KL_U_P], result[Divergence.KL_P_U]])


# --- by hand ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("chunk", [1, 2])
def test_three_to_one(dtype: torch.dtype, chunk: int) -> None:
    # Logits ln 3 and 0: p = ¾, ¼.  KL(U‖p) = ½ ln(½ / ¾) + ½ ln(½ / ¼) = ½ ln(4/3);
    # KL(p‖U) = ¾ ln(¾ / ½) + ¼ ln(¼ / ½) = ¾ ln 3 − ln 2;  Eq. 3 divides it by V = 2.
    result = measure(torch.tensor([[math.log(3), 0.0]], dtype=dtype), chunk=chunk)
    kl_p_u = 0.75 * math.log(3) - math.log(2)
    assert result[Divergence.KL_U_P].item() == pytest.approx(0.5 * math.log(4 / 3), abs=1e-7)
    assert result[Divergence.KL_P_U].item() == pytest.approx(kl_p_u, abs=1e-7)
    assert result[Divergence.EQ3].item() == pytest.approx(kl_p_u / 2, abs=1e-7)


@pytest.mark.parametrize("height", [50.0, 100.0, 1e4])
@pytest.mark.parametrize("place", [0, 6, 7, 99])
def test_one_hot(height: float, place: int) -> None:
    # All of p on one of V = 100 tokens: lse = height, mean = height/100, H(p) = 0.
    logits_T_V = torch.zeros(1, 100)
    logits_T_V[0, place] = height
    result = measure(logits_T_V)
    assert result[Divergence.KL_U_P].item() == pytest.approx(height * 0.99 - math.log(100), rel=1e-12)
    assert result[Divergence.KL_P_U].item() == pytest.approx(math.log(100), rel=1e-12)


@pytest.mark.parametrize("logit", [0.0, 3.7, -120.0, 1e4])
@pytest.mark.parametrize("V", [1, 2, 97, 9_170, 49_152, 151_936])
def test_uniform_is_zero(V: int, logit: float) -> None:
    # Except for the rounding of 1/V to fp32 in the fused softmax.
    result = values(measure(torch.full((2, V), logit), chunk=4096))
    assert result.ge(0).all()
    assert result.le(2**-23).all()


# --- against the naive formula ----------------------------------------------------------------------

SEEDS = st.integers(0, 2**32 - 1)
OFFSETS = st.sampled_from([0.0, -120.0, 1e4, -1e4])
SHAPES = {
    "T": st.integers(1, 9),
    "V": st.integers(1, 80),
    "chunk": st.integers(1, 90),
    "max_tokens": st.integers(1, 10),
}


@given(seed=SEEDS, scale=st.sampled_from([0.01, 1.0, 10.0, 100.0]), offset=OFFSETS, **SHAPES)
@example(seed=0, scale=3.0, offset=0.0, T=3, V=13, chunk=4, max_tokens=2)
def test_equals_the_naive_formula(
    seed: int, scale: float, offset: float, T: int, V: int, chunk: int, max_tokens: int
) -> None:
    logits_T_V = random_logits(T, V, seed=seed, scale=scale, offset=offset)
    result = measure(logits_T_V, chunk=chunk, max_tokens=max_tokens)
    # In fp64 the offset costs the logits' own rounding: 1e4 · 2⁻⁵³.
    assert_close(values(result), torch.stack(naive(logits_T_V)), rtol=1e-11, atol=1e-11)


@given(seed=SEEDS, scale=st.sampled_from([0.01, 1.0, 10.0, 100.0]), offset=OFFSETS, **SHAPES)
def test_fp32_logits_lose_no_more_than_their_rounding(
    seed: int, scale: float, offset: float, T: int, V: int, chunk: int, max_tokens: int
) -> None:
    logits_T_V = random_logits(T, V, seed=seed, scale=scale, offset=offset).float()
    result = measure(logits_T_V, chunk=chunk, max_tokens=max_tokens)
    assert result[Divergence.KL_U_P].dtype == result[Divergence.KL_P_U].dtype == torch.float64
    # The reference takes the same rounded logits. Only their distance from the largest is computed in
    # fp32 and rounded; it is below 10 standard deviations.
    tolerance = 1e-6 + 10 * scale * 2**-23
    assert_close(values(result), torch.stack(naive(logits_T_V)), rtol=0, atol=tolerance)


@pytest.mark.parametrize("offset", [0.0, -10.0, -120.0, 1e4])
def test_chunk_of_a_real_size(offset: float) -> None:
    # V is no multiple of the chunk; columns that are not there must not count as logits of 0.
    logits_T_V = random_logits(3, 10_007, offset=offset).float()
    result = measure(logits_T_V, chunk=4096, max_tokens=2)
    assert_close(values(result), torch.stack(naive(logits_T_V)), rtol=0, atol=1e-5)


@given(seed=SEEDS, offset=OFFSETS, **SHAPES)
def test_chunks_and_their_order_do_not_matter(
    seed: int, offset: float, T: int, V: int, chunk: int, max_tokens: int
) -> None:
    logits_T_V = random_logits(T, V, seed=seed, offset=offset)
    whole = measure(logits_T_V, chunk=V, max_tokens=T)
    for is_backwards in (False, True):
        cut = measure(logits_T_V, chunk=chunk, max_tokens=max_tokens, is_backwards=is_backwards)
        assert_close(values(cut), values(whole), rtol=1e-12, atol=1e-12)


@given(seed=SEEDS, scale=st.sampled_from([1e-6, 1.0, 50.0, 1e3]), offset=OFFSETS, **SHAPES)
def test_bounds(seed: int, scale: float, offset: float, T: int, V: int, chunk: int, max_tokens: int) -> None:
    logits_T_V = random_logits(T, V, seed=seed, scale=scale, offset=offset).float()
    result = measure(logits_T_V, chunk=chunk, max_tokens=max_tokens)
    assert result[Divergence.KL_U_P].isfinite().all()
    assert result[Divergence.KL_U_P].ge(0).all()
    assert result[Divergence.KL_P_U].ge(0).all()
    assert result[Divergence.KL_P_U].le(math.log(V) + 1e-6).all()


# --- temperature ------------------------------------------------------------------------------------


@given(seed=SEEDS, temperature=st.sampled_from([0.1, 0.6, 1.0, 2.5]), **SHAPES)
def test_temperature_divides_the_logits(
    seed: int, temperature: float, T: int, V: int, chunk: int, max_tokens: int
) -> None:
    logits_T_V = random_logits(T, V, seed=seed)
    result = measure(logits_T_V, temperature=temperature, chunk=chunk, max_tokens=max_tokens)
    assert_close(values(result), torch.stack(naive(logits_T_V / temperature)), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("temperature", [1e-3, 1e3])  # the bounds of a recipe
@pytest.mark.parametrize("scale", [1e-3, 10.0, 1e5])
def test_divergences_are_right_at_the_bounds_of_the_temperature(temperature: float, scale: float) -> None:
    logits_T_V = random_logits(5, 50, scale=scale).float()
    result = values(measure(logits_T_V, temperature=temperature))
    assert_close(result, torch.stack(naive(logits_T_V.double() / temperature)), rtol=1e-5, atol=1e-6)


def test_lower_temperature_is_more_certain() -> None:
    logits_T_V = random_logits(5, 50)
    cold, warm = (values(measure(logits_T_V, temperature=temperature)) for temperature in (0.6, 1.0))
    assert cold.gt(warm).all()


# --- V ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_vocab", [1, 6, 7, 8, 13, 29, 30])
@pytest.mark.parametrize("padding", [0.0, 1e4, -1e4, math.inf, math.nan])
def test_rows_beyond_the_vocabulary_do_not_count(num_vocab: int, padding: float) -> None:
    logits_T_V = random_logits(5, 30)
    padded_T_V = logits_T_V.clone()
    padded_T_V[:, num_vocab:] = padding
    result = measure(padded_T_V, num_vocab=num_vocab)
    assert_close(values(result), torch.stack(naive(logits_T_V[:, :num_vocab])), rtol=1e-12, atol=1e-12)


def test_all_rows_of_the_head_count_by_default() -> None:
    logits_T_V = random_logits(5, 30)
    assert values(measure(logits_T_V)).equal(values(measure(logits_T_V, num_vocab=30)))


def test_eq3_divides_by_the_vocabulary_that_counts() -> None:
    result = measure(random_logits(5, 30), num_vocab=20)
    assert result[Divergence.EQ3].equal(result[Divergence.KL_P_U] / 20)


@given(seed=SEEDS, temperature=st.sampled_from([0.6, 1.0]), num_vocab=st.integers(1, 30), offset=OFFSETS)
def test_a_mean_that_the_head_knows_gives_the_same(
    seed: int, temperature: float, num_vocab: int, offset: float
) -> None:
    logits_T_V = random_logits(5, 30, seed=seed, offset=offset)
    options = {"temperature": temperature, "num_vocab": num_vocab}
    known = measure(logits_T_V, knows_mean=True, **options)
    assert_close(values(known), values(measure(logits_T_V, **options)), rtol=1e-11, atol=1e-11)


# --- tokens -----------------------------------------------------------------------------------------


@DIVERGENCES
def test_no_tokens(divergence: Divergence) -> None:
    selected_T = measure(torch.empty(0, 30))[divergence]
    assert (selected_T.shape, selected_T.dtype) == ((0,), torch.float64)


@pytest.mark.parametrize("max_tokens", [1, 2, 3, 5, 6, 100])
def test_tokens_do_not_touch_each_other(max_tokens: int) -> None:
    logits_T_V = random_logits(5, 30).float()
    together = measure(logits_T_V, max_tokens=max_tokens)
    alone = torch.cat([values(measure(logits_T_V[t : t + 1])) for t in range(5)], dim=1)
    assert_close(values(together), alone, rtol=1e-6, atol=1e-6)


@DIVERGENCES
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("columns", [[0], [6], [7], [29], [3, 20], list(range(7, 14)), list(range(30))])
def test_bad_logit_spoils_its_own_token_and_no_other(
    bad: float, columns: list[int], divergence: Divergence
) -> None:
    clean_T_V = random_logits(6, 30)
    bad_T_V = clean_T_V.clone()
    bad_T_V[2, columns] = bad
    bad_T_V[5, columns] = bad
    selected_T = measure(bad_T_V)[divergence]
    assert selected_T.isfinite().tolist() == [True, True, False, True, True, False]
    expected_T = measure(clean_T_V)[divergence]
    assert selected_T[[0, 1, 3, 4]].equal(expected_T[[0, 1, 3, 4]])


# --- refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, -1.0, -math.inf, math.nan])
def test_temperature_must_be_positive(temperature: float) -> None:
    with pytest.raises(ValueError, match=f"temperature must be positive, not {temperature}"):
        measure(torch.zeros(1, 30), temperature=temperature)


@pytest.mark.parametrize("num_vocab", [0, -1, 31])
def test_vocabulary_must_be_one_that_the_head_has(num_vocab: int) -> None:
    with pytest.raises(ValueError, match=f"num_vocab must be in 1 … 30, not {num_vocab}"):
        measure(torch.zeros(1, 30), num_vocab=num_vocab)


def test_arguments_are_checked_without_tokens_too() -> None:
    with pytest.raises(ValueError, match="temperature"):
        measure(torch.empty(0, 30), temperature=0.0)


class Mute:
    num_rows = 30
    max_tokens = 4

    def mean_logits(self, hidden_T_H: Tensor, num_rows: int) -> None:
        return None

    def logit_chunks(self, hidden_T_H: Tensor, num_rows: int) -> Iterator[Tensor]:
        return iter(())


def test_head_must_give_logits() -> None:
    with pytest.raises(ValueError, match="the head did not give 30 logits"):
        divergences(torch.zeros(1, 2), Mute(), Divergence.KL_P_U)


# --- memory -----------------------------------------------------------------------------------------


class LargestResult(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own
    """Notes the number of elements of the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.num_elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.num_elements = max(self.num_elements, *sizes, 0)
        return result


class LinearHead:
    def __init__(self, weight_V_H: Tensor, chunk: int, max_tokens: int) -> None:
        self.weight_V_H = weight_V_H
        self.num_rows = weight_V_H.shape[0]
        self.chunk = chunk
        self.max_tokens = max_tokens

    def mean_logits(self, hidden_T_H: Tensor, num_rows: int) -> Tensor:
        return hidden_T_H @ self.weight_V_H[:num_rows].mean(dim=0)

    def logit_chunks(self, hidden_T_H: Tensor, num_rows: int) -> Iterator[Tensor]:
        for first in range(0, num_rows, self.chunk):
            weight_C_H = self.weight_V_H[first : min(first + self.chunk, num_rows)]
            yield hidden_T_H @ weight_C_H.T


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("divergence", [Divergence.KL_U_P, Divergence.KL_P_U])
def test_no_tensor_of_tokens_by_vocabulary_is_ever_made(divergence: Divergence, temperature: float) -> None:
    T, H, V, chunk, max_tokens = 50, 2, 1_003, 110, 20
    hidden_T_H, weight_V_H = random_logits(T, H), random_logits(V, H, seed=1)
    head = LinearHead(weight_V_H, chunk, max_tokens)
    with LargestResult() as largest:
        result_T = divergences(hidden_T_H, head, divergence, temperature=temperature)
    # 20 tokens times 110 logits, of 50 times 1,003.
    assert largest.num_elements == chunk * max_tokens
    kl_u_p_T, kl_p_u_T = naive(hidden_T_H @ weight_V_H.T / temperature)
    expected_T = kl_u_p_T if divergence is Divergence.KL_U_P else kl_p_u_T
    assert_close(result_T, expected_T, rtol=1e-11, atol=1e-11)


def test_the_package_itself_needs_no_torch() -> None:
    code = "import sys, shopr1_rewards; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
