"""End tokens: from the tokenizer, the model's configurations, the chat template and the settings."""

from typing import Any

import pytest

from shopr1_service.policy.factory import build_policy
from shopr1_service.policy.prompts.chat import ChatRenderer
from shopr1_service.policy.prompts.end_tokens import end_ids, special_texts, template_ends
from shopr1_service.settings import Settings
from tests.support.models import byte_level, ids_of, tiny_model

CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


def special(*texts: str, chat_template: str = CHATML) -> Any:
    """The byte-level tokenizer, whose eos and pad are `<|endoftext|>`, with further special tokens."""
    tokenizer = byte_level(chat_template=chat_template)
    tokenizer.add_special_tokens({"additional_special_tokens": list(texts)})
    tokenizer.eos_token = tokenizer.pad_token = "<|endoftext|>"
    return tokenizer


def ends_of(tokenizer: Any) -> list[str]:
    return template_ends(ChatRenderer(tokenizer), tokenizer)


def answered(end: str, *, header: str = "{{ m.role }}: ", last: str = "") -> str:
    """A template whose assistant's turn ends with `end`, the last one with `last`."""
    return (
        "{% for m in messages %}" + header + "{{ m.content }}"
        "{% if m.role == 'assistant' %}"
        + (f"{{% if loop.last %}}{last}{{% else %}}{end}{{% endif %}}" if last else end)
        + "{% endif %}\n{% endfor %}"
    )


@pytest.mark.parametrize(
    ("template", "specials", "expected"),
    [
        (CHATML, [], {"<|im_end|>"}),
        (answered("<|eot_id|>"), ["<|eot_id|>"], {"<|eot_id|>"}),
        (answered(" <end_of_turn>\n"), ["<end_of_turn>"], {"<end_of_turn>"}),
        (answered("<｜end▁of▁sentence｜>"), ["<｜end▁of▁sentence｜>"], {"<｜end▁of▁sentence｜>"}),
        (answered("<|end|>", last="<|return|>"), ["<|end|>", "<|return|>"], {"<|end|>", "<|return|>"}),
        (answered("", header="<|{{ m.role }}|>"), ["<|user|>"], {"<|user|>"}),  # like GLM-4's
        (answered("</s>"), [], {"</s>"}),  # no token of the tokenizer: several tokens are sampled
        (answered(""), [], set()),
        ("{{ raise_exception('no') }}", [], set()),
        ("{{ messages[0].content }}", [], set()),
        (
            "<|im_start|>{{ messages[0].content }}",
            [],
            set(),
        ),  # the answer is dropped: the beginning is no end
    ],
)
def test_the_template_writes_the_end_of_the_turn(
    template: str, specials: list[str], expected: set[str]
) -> None:
    assert set(ends_of(special(*specials, chat_template=template))) == expected


def test_end_ids_are_those_of_the_configurations() -> None:
    tokenizer, model = special("<|eot|>", "<|eom|>", "<|eos|>"), tiny_model()
    [end, eot, eom, eos] = [
        ids_of(tokenizer, text)[0] for text in ("<|endoftext|>", "<|eot|>", "<|eom|>", "<|eos|>")
    ]
    model.generation_config.eos_token_id = [eot, eom]
    model.config.eos_token_id = eos
    assert end_ids(model, tokenizer) == sorted({end, eot, eom, eos})


def test_an_ordinary_token_is_no_end_token_because_a_class_says_so() -> None:
    tokenizer, model = special(), tiny_model()
    [brace] = ids_of(tokenizer, "}")
    model.generation_config.eos_token_id = model.config.eos_token_id = brace
    assert end_ids(model, tokenizer) == ids_of(tokenizer, "<|endoftext|>")


def test_special_tokens_are_known_by_their_spelling_too() -> None:
    assert set(special_texts(special())) == {"<|endoftext|>", "<|im_start|>", "<|im_end|>"}
    added = special("<|eot|>")
    added.add_tokens(["<|tool|>", "[SEP]", "tea", "   "])
    assert {"<|eot|>", "<|tool|>", "[SEP]"} <= set(special_texts(added))
    assert not {"tea", "   "} & set(special_texts(added))


def test_a_policy_knows_all_of_them(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    tokenizer = special("<|eot|>")
    policy = build_policy(tiny_model(), tokenizer, Settings(end_tokens=("<stop>", "<|eot|>")), name="tiny")
    assert set(policy.codec.end_tokens) == {"<|endoftext|>", "<|im_end|>", "<stop>", "<|eot|>"}
    assert policy.codec.unknown_end("{}<|im_start|><|im_end|>\n") == "<|im_start|>"
    assert policy.codec.unknown_end("{}<|im_end|>") is None
    assert "end tokens after an answer: '<|endoftext|>', '<|im_end|>'" in caplog.text
