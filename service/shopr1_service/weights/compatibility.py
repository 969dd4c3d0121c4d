"""Check that a checkpoint is of the same policy: equal config, and a tokenizer that gives the same ids."""

import json
import logging
import random
import re
import reprlib
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from shopr1_client.errors import FieldError, InvalidWeightsError, summary
from shopr1_service.field_errors import field_problem
from shopr1_service.weights.checkpoint import CheckpointDirectory
from shopr1_service.weights.files import storage_errors

logger = logging.getLogger(__name__)

CONFIG, TOKENIZER = "config.json", "tokenizer.json"
MAX_FILE_BYTES = 256 * 2**20
_TOKENIZER_FILES = (
    *(CONFIG, TOKENIZER, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "chat_template.json", "vocab.json", "vocab.txt", "merges.txt"),
    *("tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
)
"""Files that transformers reads to build a tokenizer."""
_OPTIONS = (CONFIG, "tokenizer_config.json", "special_tokens_map.json")
_NAMES_FILES = re.compile(r"vocab|merges|init_inputs|(.*_)?files?")
"""Keys of these by which transformers may open further files, wherever they are."""
_MAX_DIFFERENCES = 64
_MAX_KEY_CHARACTERS = 200

_NUM_PROBES = 64
_NUM_PROBE_TOKENS = 32
_SEED = 0

_IRRELEVANT_KEYS = frozenset(
    {
        *("_name_or_path", "name_or_path", "architectures", "transformers_version", "dtype", "torch_dtype"),
        *("use_cache", "initializer_range", "quantization_config", "task_specific_params", "problem_type"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id"),
        *("id2label", "label2id", "finetuning_task", "is_decoder"),
        *("return_dict", "output_hidden_states", "output_attentions", "chunk_size_feed_forward"),
    }
)
"""Keys of a config that no logit depends on."""


def check_compatible(
    checkpoint: CheckpointDirectory,
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    staging_dir: Path | None = None,
) -> None:
    """Compare `config.json` and `tokenizer.json`, if the checkpoint has them, with the policy's.

    Transformers reads files by path, so it gets copies in `staging_dir` of the files as they were opened.

    Raises:
        InvalidWeightsError: names what differs.
        CheckpointError: a file cannot be read.
    """
    errors: list[FieldError] = []
    with ExitStack() as stack:
        with storage_errors("copies of the checkpoint's config and tokenizer"):
            copies = stack.enter_context(tempfile.TemporaryDirectory(prefix="shopr1-", dir=staging_dir))
            _copy(checkpoint, Path(copies))
        if checkpoint.has(CONFIG):
            errors += _config_flaws(_read(AutoConfig, copies, CONFIG), config)
        if checkpoint.has(TOKENIZER):
            errors += _tokenizer_flaws(
                _read(AutoTokenizer, copies, TOKENIZER, mistral_format=False), tokenizer
            )
    if errors:
        detail = f"the checkpoint is of another policy: {summary(errors)}"
        raise InvalidWeightsError(detail, errors=errors)


def _copy(checkpoint: CheckpointDirectory, copies: Path) -> None:
    for name in _TOKENIZER_FILES:
        if checkpoint.has(name):
            content = checkpoint.read(name, MAX_FILE_BYTES)
            copies.joinpath(name).write_bytes(_confined(content) if name in _OPTIONS else content)


def _confined(content: bytes) -> bytes:
    """Options without keys that name further files."""
    try:
        fields = json.loads(content)
    except (ValueError, RecursionError):  # no JSON, or damaged: transformers says so
        return content
    if not isinstance(fields, dict) or not any(map(_NAMES_FILES.fullmatch, fields)):
        return content
    kept = {key: value for key, value in fields.items() if not _NAMES_FILES.fullmatch(key)}
    return json.dumps(kept).encode()


def _read(reader: Any, directory: str, name: str, **options: Any) -> Any:  # noqa: ANN401  # transformers' factories
    try:
        return reader.from_pretrained(directory, trust_remote_code=False, local_files_only=True, **options)
    except Exception as error:  # damaged files raise anything; the text may quote them
        logger.warning("%s of a checkpoint cannot be read: %s", name, error)
        raise field_problem(
            InvalidWeightsError, name, f"{name} cannot be read: {type(error).__name__}"
        ) from error


def _config_flaws(given: PretrainedConfig, own: PretrainedConfig) -> list[FieldError]:
    try:
        if given.model_type != own.model_type:  # as at load: of some multimodal models, only the text part
            given = given.get_text_config()
        differences = list(islice(_differences(given.to_dict(), own.to_dict()), _MAX_DIFFERENCES))
    except Exception as error:  # of keys that are names of methods, of deep nesting
        raise field_problem(InvalidWeightsError, CONFIG, f"{CONFIG} cannot be compared") from error
    # The checkpoint's value is left out: errors show no more of a file than its keys.
    return [
        {
            "location": f"{CONFIG}: {_printable(key)}",
            "message": f"it differs from the policy's, {reprlib.repr(ours)}",
        }
        for key, ours in differences
    ]


def _printable(key: str) -> str:
    """At most so many characters, all of which an answer can hold."""
    return key[:_MAX_KEY_CHARACTERS].encode(errors="backslashreplace").decode()


def _differences(given: Any, own: Any, path: str = "") -> Iterator[tuple[str, Any]]:  # noqa: ANN401
    """Keys whose values differ, and the policy's value."""
    if not (isinstance(given, dict) and isinstance(own, dict)):
        if given != own:
            yield path, own
        return
    for key in sorted({*given, *own}, key=str):
        if key in _IRRELEVANT_KEYS or str(key).endswith("dropout"):
            continue
        yield from _differences(given.get(key), own.get(key), f"{path}.{key}".removeprefix("."))


def _tokenizer_flaws(given: PreTrainedTokenizerBase, own: PreTrainedTokenizerBase) -> list[FieldError]:
    if given.get_vocab() != own.get_vocab():
        return [{"location": TOKENIZER, "message": "its vocabulary is not the policy's"}]
    for text in _probe_texts(own):
        if _ids(given, text) != _ids(own, text):
            message = f"it splits text differently from the policy's, for example {text[:40]!r}"
            return [{"location": TOKENIZER, "message": message}]
    if given.chat_template != own.chat_template:
        logger.warning("the checkpoint has another chat template; the one loaded at start is kept")
    return []


def _probe_texts(tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Texts of random tokens: any merge may occur in them."""
    rng = random.Random(_SEED)
    for _ in range(_NUM_PROBES):
        ids = [rng.randrange(len(tokenizer)) for _ in range(_NUM_PROBE_TOKENS)]
        yield str(tokenizer.decode(ids))


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
