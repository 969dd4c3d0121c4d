r"""Pre-tokenizers of GGUF files: the expressions that split text before merges are applied.

A GGUF file only names its pre-tokenizer (`tokenizer.ggml.pre`); the expressions are llama.cpp's
(`src/llama-vocab.cpp`). Transformers knows some of the names, and splits text like GPT-2 where it does not
know one: ids then differ from those that the policy was trained on, for example for digits behind spaces.

Several expressions are applied in turn, each to the parts that those before have left. Parts between two
matches stay parts.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any, cast

from tokenizers import Regex, pre_tokenizers
from transformers import PreTrainedTokenizerBase
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from shopr1_service.errors import PolicyError

logger = logging.getLogger(__name__)

MODEL_KEY = "tokenizer.ggml.model"
PRE_KEY = "tokenizer.ggml.pre"
_BYTE_LEVEL = "gpt2"
"""Value of `MODEL_KEY` for byte-level BPE, the only kind with a pre-tokenizer."""

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_END_OF_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_HAN_AND_HANGUL = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_END_OF_SPACES}"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_SEED_CODER = _QWEN2.replace(r" ?[^\s\p{L}\p{N}]+[\r\n]*", r" ?[^\s\p{L}\p{N}\r\n]+")
_BAILING = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
_WORDS_AND_PUNCTUATION = " ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"
_DEEPSEEK_V3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_END_OF_SPACES}"
)

_KINDS: Mapping[tuple[str, ...], Sequence[str]] = {
    ("default",): [r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"],
    (
        *("gpt-2", "phi-2", "jina-es", "jina-de", "jina-v1-en", "jina-v2-es", "jina-v2-de", "jina-v2-code"),
        *("gigachat", "a.x-4.0", "mellum", "modern-bert", "roberta-bpe", "mpt", "olmo", "jais", "trillion"),
        *("granite-docling", "exaone4"),
    ): [_GPT2],
    ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"): [
        r"\p{N}",
        _GPT2,
    ],
    ("falcon",): [r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]"],
    ("glm4", "glm5", "chatglm-bpe"): [_LLAMA3],
    ("stablelm2", "hunyuan", "solar-open", "grok-2", "ufakzeka"): [_QWEN2],
    ("deepseek-coder",): [r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _HAN_AND_HANGUL, r"\p{N}"],
    ("deepseek-v3", "hunyuan-dense", "joyai-llm"): [
        *(r"\p{N}{1,3}", "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+", _DEEPSEEK_V3),
    ],
    ("poro-chat", "bloom", "gpt3-finnish"): [_WORDS_AND_PUNCTUATION],
    ("viking",): [_WORDS_AND_PUNCTUATION, r"\p{N}"],
    ("bailingmoe", "bailingmoe2", "llada-moe"): [_BAILING],
    ("seed-coder",): [_SEED_CODER],
}
SPLITS = {name: expressions for names, expressions in _KINDS.items() for name in names}
"""Expressions by the names that transformers does not know."""

_WHOLE_WORDS = frozenset(
    {
        *("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
        *("jina-v5-nano", "tekken", "glm4", "glm5"),
    }
)
"""Pre-tokenizers of vocabularies whose words are tokens even where no merges lead to them."""


def complete_tokenizer(tokenizer: PreTrainedTokenizerBase, metadata: Mapping[str, Any]) -> None:
    """Split text as the pre-tokenizer that a GGUF file names, in place.

    A file without a name gets llama.cpp's default, with a warning: it may not be what the policy was trained
    with.

    Args:
        metadata: of the GGUF file.

    Raises:
        PolicyError: the name is unknown here.
    """
    if metadata.get(MODEL_KEY) != _BYTE_LEVEL:
        return
    name = metadata.get(PRE_KEY)
    if not name:
        name = "default"
        logger.warning(
            "the GGUF file does not name its pre-tokenizer (%s): text is split by llama.cpp's default; "
            "token ids may differ from those that the policy was trained on",
            PRE_KEY,
        )
    if name not in SPLITS and name not in GGUF_PRE_TOKENIZER_SPLITS:
        raise PolicyError(
            f"the pre-tokenizer {name!r} of the GGUF file ({PRE_KEY}) is unknown: token ids would be wrong. "
            "Load the safetensors checkpoint with its tokenizer.json instead"
        )
    backend = cast("Any", tokenizer).backend_tokenizer
    if name in SPLITS:
        backend.pre_tokenizer = _pre_tokenizer(SPLITS[name])
    if name in _WHOLE_WORDS:
        backend.model.ignore_merges = True


def _pre_tokenizer(expressions: Sequence[str]) -> pre_tokenizers.PreTokenizer:
    splits = [pre_tokenizers.Split(Regex(expression), behavior="isolated") for expression in expressions]
    return pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
