"""Whether a checkpoint is of the same policy: its tokenizer must read as ours, its config compute as ours."""

import logging
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from shopr1_client.errors import FieldError, InvalidWeightsError

logger = logging.getLogger(__name__)

_NUM_PROBES = 64
_NUM_PROBE_TOKENS = 32
_SEED = 0

_IDLE_KEYS = frozenset(
    {
        *("_name_or_path", "name_or_path", "architectures", "transformers_version", "dtype", "torch_dtype"),
        *("use_cache", "initializer_range", "quantization_config", "task_specific_params", "problem_type"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id"),
        *("id2label", "label2id", "finetuning_task", "is_decoder"),
        *("return_dict", "output_hidden_states", "output_attentions", "chunk_size_feed_forward"),
    }
)
"""Keys of a config that no logit depends on."""


def check_compatible(directory: Path, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Compare what of both lies in a checkpoint's directory; neither need be there.

    Raises:
        InvalidWeightsError: names what differs.
    """
    errors: list[FieldError] = []
    if (directory / "config.json").is_file():
        errors += _config_flaws(_read(AutoConfig, directory, "config.json"), config)
    if (directory / "tokenizer.json").is_file():
        errors += _tokenizer_flaws(_read(AutoTokenizer, directory, "tokenizer.json"), tokenizer)
    if errors:
        detail = "; ".join(f"{error['location']}: {error['message']}" for error in errors)
        raise InvalidWeightsError(f"it is another policy's checkpoint: {detail}", errors=errors)


def _read(reader: Any, directory: Path, name: str) -> Any:  # noqa: ANN401  # transformers' factories
    try:
        return reader.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # damaged files raise whatever their reader stumbles over
        message = f"it cannot be read: {type(error).__name__}: {error}"
        raise InvalidWeightsError(
            f"{name}: {message}", errors=[{"location": name, "message": message}]
        ) from error


def _config_flaws(given: PretrainedConfig, own: PretrainedConfig) -> list[FieldError]:
    return [
        {"location": f"config.json: {key}", "message": f"it is {theirs!r}, the policy's {ours!r}"}
        for key, theirs, ours in _differences(given.to_dict(), own.to_dict())
    ]


def _differences(given: Any, own: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:  # noqa: ANN401
    if not (isinstance(given, dict) and isinstance(own, dict)):
        if given != own:
            yield path, given, own
        return
    for key in sorted({*given, *own}, key=str):
        if key in _IDLE_KEYS or str(key).endswith("dropout"):
            continue
        yield from _differences(given.get(key), own.get(key), f"{path}.{key}".removeprefix("."))


def _tokenizer_flaws(given: PreTrainedTokenizerBase, own: PreTrainedTokenizerBase) -> list[FieldError]:
    if given.get_vocab() != own.get_vocab():
        return [{"location": "tokenizer.json", "message": "its vocabulary is not the policy's"}]
    for text in _probes(own):
        if _ids(given, text) != _ids(own, text):
            message = f"it cuts text otherwise than the policy's, as {text[:40]!r}"
            return [{"location": "tokenizer.json", "message": message}]
    if given.chat_template != own.chat_template:
        logger.warning("the checkpoint has another chat template; the one that was loaded at start stays")
    return []


def _probes(tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Texts that any merge may occur in: what random tokens mean, one after the other."""
    chance = random.Random(_SEED)
    for _ in range(_NUM_PROBES):
        ids = [chance.randrange(len(tokenizer)) for _ in range(_NUM_PROBE_TOKENS)]
        yield str(tokenizer.decode(ids))


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
