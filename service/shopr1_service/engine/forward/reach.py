"""The sequence length from which every part of a model shows: windows, chunks, chosen keys, RoPE thresholds.

A path that ignores a window of 4,096 tokens is right for 4,096 tokens. The self-check therefore runs longer
sequences than any length that the config names.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from shopr1_service.engine.rope_scaling import has_length_dependent_rope

_SIZES = re.compile(r"(^|_)(window|chunk|block)(_(size|len|length))?$|^local_attention$")
"""Names of sizes of windows, chunks and blocks, in tokens."""
_WITHOUT_WINDOW = {"full_attention", "linear_attention"}
_WINDOWS = {"sliding_window", "attention_chunk_size"}
"""Sizes that `layer_types` may leave unused."""
_LINEAR_CHUNK_TOKENS = 64
"""Chunks of the delta rule, which no config names."""
_CHOICE_MULTIPLE, _MIN_NOT_CHOSEN = 3, 200
"""Keys in the check where some are chosen: among many that are not, some are equally good."""


@dataclass(frozen=True)
class Reach:
    """Lengths that a config names.

    Attributes:
        num_tokens: a longer sequence passes through every kind of computation of the model.
        num_chosen: keys that an indexer chooses for each token; None if every key is used.
        rope_threshold: length from which RoPE rotates differently; None if it never does.
    """

    num_tokens: int
    num_chosen: int | None = None
    rope_threshold: int | None = None

    @classmethod
    def of(cls, model: PreTrainedModel, longest: int | None = None) -> "Reach":
        """The lengths that the model's config names.

        Args:
            longest: tokens of the longest sequence. RoPE that changes in longer ones is static.
        """
        config = model.config.get_text_config()
        num_chosen, threshold = _num_chosen(config), _rope_threshold(config, has_length_dependent_rope(model))
        if threshold is not None and longest is not None and longest <= threshold:
            threshold = None
        sizes = [size for name, size in _named_sizes(config) if not _is_unused(name, config)]
        kinds, names = getattr(config, "layer_types", None) or (), [name for name, _ in _named_sizes(config)]
        if "linear_attention" in kinds and not any("chunk" in name for name in names):
            sizes.append(_LINEAR_CHUNK_TOKENS)
        if num_chosen is not None:
            sizes.append(max(_CHOICE_MULTIPLE * num_chosen, num_chosen + _MIN_NOT_CHOSEN))
        return cls(max([0, *sizes, threshold or 0]), num_chosen, threshold)


def _named_sizes(config: Any) -> Iterator[tuple[str, int]]:  # noqa: ANN401  # every architecture has its own
    for name, value in vars(config).items():
        if _SIZES.search(name):
            yield from ((name, size) for size in _integers(value))
    if (threshold := block_sparse_tokens(config)) is not None:
        yield "block_sparse", threshold
    yield from (("compress_rates", rate) for rate in _integers(getattr(config, "compress_rates", None)))
    if getattr(config, "attn_temperature_tuning", False):  # llama4
        yield from (("floor_scale", size) for size in _integers(getattr(config, "floor_scale", None)))


def block_sparse_tokens(config: Any) -> int | None:  # noqa: ANN401
    """Tokens up to which BigBird's attention to some blocks is impossible, and becomes full attention."""
    if getattr(config, "attention_type", None) != "block_sparse":
        return None
    return int((5 + 2 * config.num_random_blocks) * config.block_size)


def _is_unused(name: str, config: Any) -> bool:  # noqa: ANN401
    kinds = set(getattr(config, "layer_types", None) or ())
    return name in _WINDOWS and bool(kinds) and kinds <= _WITHOUT_WINDOW


def _num_chosen(config: Any) -> int | None:  # noqa: ANN401
    """Tokens that fit into what an indexer chooses: keys, blocks of keys, or compressed keys."""
    blocks = getattr(config, "index_topk_blocks", None)
    if blocks:  # minimax_m3
        return int(blocks) * int(config.index_block_size)
    budget = getattr(config, "indexer_budget", None)
    if budget:  # qwen4
        return int(budget)
    kept = getattr(config, "keep_window_size", None)
    if kept:  # doge
        return int(kept)
    topk = getattr(config, "index_topk", None)
    if not topk:
        return None
    return int(topk) * min([*_integers(getattr(config, "compress_rates", None))] or [1])


def _rope_threshold(config: Any, is_length_dependent: bool) -> int | None:  # noqa: ANN401
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope, *(part for part in rope.values() if isinstance(part, dict))]
    thresholds = [
        kind.get("original_max_position_embeddings")
        or getattr(config, "original_max_position_embeddings", None)
        or getattr(config, "max_position_embeddings", 0)
        for kind in kinds
        if (is_length_dependent and kind.get("rope_type") in ("dynamic", "longrope"))
        or kind.get("llama_4_scaling_beta")
    ]
    return max((int(each) for each in thresholds if each), default=None)


def _integers(value: object) -> list[int]:
    if isinstance(value, dict):
        value = list(value.values())
    values = value if isinstance(value, (list, tuple)) else [value]
    return [each for each in values if isinstance(each, int) and not isinstance(each, bool)]
