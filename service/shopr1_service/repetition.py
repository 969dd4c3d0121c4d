"""How much a text repeats itself."""

from collections.abc import Sequence

NGRAM = 4


def repetition_ratio(ids: Sequence[int]) -> float:
    """Share of the 4-grams of tokens that occurred before in the text.

        1 − distinct 4-grams / all 4-grams

    Range 0 … 1: 0 where all differ, and where there are fewer than four tokens, so that there is none.

    >>> repetition_ratio([7, 8, 7, 8, 7, 8])  # 7878, 8787, and 7878 again
    0.33333333333333337
    """
    num_ngrams = len(ids) - NGRAM + 1
    if num_ngrams < 1:
        return 0.0
    distinct = set(zip(*(ids[k:] for k in range(NGRAM)), strict=False))
    return 1.0 - len(distinct) / num_ngrams
