"""Pre-tokenizers of GGUF files, against llama.cpp's own (package xllamacpp 2026.10).

A vocabulary that was trained without a pre-tokenizer shows every border of its parts in its ids: those of 420
texts were equal to llama.cpp's for each name in `SPLITS`. One text of them is kept here.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.integrations.gguf.reader import read_gguf_metadata

from shopr1_service.errors import PolicyError
from shopr1_service.policy.gguf.pre_tokenizer import SPLITS, complete_tokenizer
from tests.support.gguf_files import llama_metadata, llama_tensors, write_gguf
from tests.support.models import NUM_TOKENS, byte_level, byte_level_json, ids_of, tiny_model

TEXT = "  Tea 1234 for $5.67,\n\tit's 3\u00a0茶。"
PARTS = {
    "default": " | Tea| |123|4| for| |$|5|.|67|,|\n|\t|it|'|s| |3|\xa0|茶|。",
    "gpt-2": " | Tea| 1234| for| $|5|.|67|,|\n|\t|it|'s| 3|\xa0|茶|。",
    "smollm": " | Tea| |1|2|3|4| for| $|5|.|6|7|,|\n|\t|it|'s| |3|\xa0|茶|。",
    "falcon": " | Tea| |123|4| for| |$|5|.|67|,|\n|\t|it|'|s| 3|\xa0|茶|。",
    "glm4": " | Tea| |123|4| for| $|5|.|67|,\n|\tit|'s| |3|\xa0茶|。",
    "stablelm2": " | Tea| |1|2|3|4| for| $|5|.|6|7|,\n|\tit|'s| |3|\xa0茶|。",
    "deepseek-coder": " | Tea| |1|2|3|4| for| $|5|.|6|7|,|\n|\tit|'|s| |3|\xa0|茶|。",
    "deepseek-v3": " | Tea| |123|4| for| $|5|.|67|,\n|\tit|'s| |3|\xa0|茶|。",
    "poro-chat": " | Tea| 1234| for| $5|.|67|,\n\t|it's| 3|\xa0|茶|。",
    "viking": " | Tea| |1|2|3|4| for| $|5|.|6|7|,\n\t|it's| |3|\xa0|茶|。",
    "bailingmoe": " | Tea| |1|2|3|4| for| $|5|.|6|7|,\n|\tit|'s| |3|\xa0茶|。",
    "seed-coder": " | Tea| |1|2|3|4| for| $|5|.|6|7|,|\n|\tit|'s| |3|\xa0茶|。",
}


def completed(pre: str | None, kind: str = "gpt2") -> PreTrainedTokenizerFast:
    tokenizer = byte_level()
    pre_key = {} if pre is None else {"tokenizer.ggml.pre": pre}
    complete_tokenizer(tokenizer, {"tokenizer.ggml.model": kind, **pre_key})
    return tokenizer


def parts(tokenizer: PreTrainedTokenizerFast, text: str) -> str:
    """The parts of a text in which merges are applied."""
    pre_tokenizer: Any = tokenizer.backend_tokenizer.pre_tokenizer
    return "|".join(text[start:end] for _, (start, end) in pre_tokenizer.pre_tokenize_str(text))


@pytest.mark.parametrize("pre", SPLITS)
def test_parts(pre: str) -> None:
    kinds = [name for name in PARTS if SPLITS[name] == SPLITS[pre]]
    assert [PARTS[kind] for kind in kinds] == [parts(completed(pre), TEXT)]


def test_name_that_transformers_knows_is_left_to_it() -> None:
    assert parts(completed("qwen2"), TEXT) == parts(byte_level(), TEXT)


@pytest.mark.parametrize("pre", [None, ""])
def test_missing_name_is_the_default_with_a_warning(
    pre: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    assert parts(completed(pre), TEXT) == PARTS["default"]
    assert "does not name its pre-tokenizer (tokenizer.ggml.pre)" in caplog.text


def test_unknown_name_is_refused() -> None:
    with pytest.raises(PolicyError, match=r"pre-tokenizer 'mine' of the GGUF file \(tokenizer\.ggml\.pre\)"):
        completed("mine")


def test_other_kinds_have_none() -> None:
    assert parts(completed("mine", kind="llama"), TEXT) == parts(byte_level(), TEXT)


@pytest.mark.parametrize(("pre", "is_whole"), [("llama-bpe", True), ("tekken", True), ("qwen2", False)])
def test_words_that_no_merges_lead_to(tmp_path: Path, pre: str, is_whole: bool) -> None:
    """Llama 3's vocabulary has such words, and its tokenizer.json says `ignore_merges`."""
    tokenizer = json.loads(byte_level_json())
    tokenizer["model"]["vocab"]["Ġzyzzyva"] = NUM_TOKENS
    model = tiny_model(vocab_size=NUM_TOKENS + 1)
    write_gguf(
        tmp_path / "tiny.gguf",
        llama_tensors(model),
        llama_metadata(model),
        pre=pre,
        tokenizer=json.dumps(tokenizer),
    )
    read: Any = AutoTokenizer.from_pretrained(tmp_path, gguf_file="tiny.gguf")
    complete_tokenizer(read, read_gguf_metadata(str(tmp_path / "tiny.gguf"))[0])
    assert (ids_of(read, "x zyzzyva")[1:] == [NUM_TOKENS]) == is_whole
