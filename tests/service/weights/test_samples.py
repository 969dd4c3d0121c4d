"""Samples of tensors that are read in pieces, and of the same tensors in memory."""

import itertools
import random

import pytest
import torch

from shopr1_service.weights.samples import MAX_NUMBERS, Sampler, digest_of, sample_of


@pytest.mark.parametrize("num_elements", [1, 7, 1024, 1025, 5000, 100_003])
@pytest.mark.parametrize("num_pieces", [1, 5])
def test_pieces_have_the_sample_of_the_whole(num_elements: int, num_pieces: int) -> None:
    tensor, rng, sampler = torch.arange(num_elements).float(), random.Random(num_elements), Sampler()
    cuts = [0, *sorted(rng.randrange(num_elements) for _ in range(num_pieces - 1)), num_elements]
    pieces = list(itertools.pairwise(cuts))
    rng.shuffle(pieces)  # threads take them in any order
    for first, end in pieces:
        sampler.add("w", tensor[first:end], first, num_elements)
    sample = sampler.sample("w")
    assert sample is not None
    assert torch.equal(sample, sample_of(tensor))
    assert min(num_elements, MAX_NUMBERS // 2) <= len(sample) <= MAX_NUMBERS


def test_sample_is_a_copy() -> None:
    buffer, sampler = torch.zeros(8), Sampler()
    sampler.add("w", buffer, 0, 8)
    buffer.fill_(1)
    sample = sampler.sample("w")
    assert sample is not None
    assert sample.sum() == 0
    assert sampler.sample("other") is None


def test_layout_does_not_matter() -> None:
    tensor = torch.arange(12.0).view(3, 4)
    assert torch.equal(sample_of(tensor.T), sample_of(tensor.T.contiguous()))


def test_digest_depends_on_names_and_numbers() -> None:
    some = {"a": torch.ones(3, dtype=torch.bfloat16), "b": torch.zeros(0)}
    assert digest_of(some) == digest_of(dict(reversed(some.items())))
    others = [{}, {"a": some["a"]}, {"c": some["a"], "b": some["b"]}, {**some, "a": some["a"] * 2}]
    assert len({digest_of(some), *map(digest_of, others)}) == 5
