"""Chats in the policy's template: transformers' own ids, and warnings of what the template does to them."""

import pickle
import threading
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from shopr1_client.wire import Message
from shopr1_client.wire_prompt import PromptOptions, ScoreWarning, WarningCode
from shopr1_service.core import CodecError
from shopr1_service.errors import SettingsError
from shopr1_service.policy.prompts.chat import ChatRenderer, lost_messages, read_templates
from shopr1_service.policy.prompts.tokenizer import PolicyTokenizer
from tests.support.models import NUM_ROWS, byte_level

THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if tools %}{{ tools | tojson }}{% endif %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
    "{% endif %}"
)
"""Like Qwen3's: an argument changes the generation prompt."""
TRIMMING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
DATED = (
    "<|im_start|>system\nToday: "
    "{% if date_string is defined %}{{ date_string }}{% else %}{{ strftime_now('%d %b %Y') }}{% endif %}"
    "<|im_end|>\n" + TRIMMING
)
"""Like Llama 3.2's, whose date is an argument or the clock's."""
NO_SYSTEM = (
    "{% for m in messages if m.role != 'system' %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NO_OLD_THOUGHTS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.split('</think>')[-1] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Like Qwen3's: reasoning of earlier turns is dropped."""
PARTS = (
    "{% for m in messages %}{{ m.role }}:{% for part in m.content %}"
    "{% if part.type == 'text' %}{{ part.text }}{% else %}<image>{% endif %}{% endfor %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
"""Like SmolVLM's and Idefics3's: contents are lists of parts. A string is an image per character."""
ATTRIBUTES = PARTS.replace("part.type == 'text'", "part.text is defined").replace(
    "<image>", "{{ part['no'].x }}"
)
"""Like LLaVA-NeXT's: a string is an error."""

SYSTEM, USER = Message(role="system", content="Be brief."), Message(role="user", content=" Green tea? ")
PREFILL = Message(role="assistant", content='{"rationale": "')


def codec_of(template: Any = None, **options: Any) -> PolicyTokenizer:
    tokenizer = byte_level(**({} if template is None else {"chat_template": template}))
    chat = ChatRenderer(tokenizer, options.pop("templates", None), PromptOptions(**options))
    return PolicyTokenizer(tokenizer, NUM_ROWS, [], chat=chat)


def reference(tokenizer: PreTrainedTokenizerFast, messages: list[Message], **arguments: Any) -> list[int]:
    """The ids as a trainer computes them."""
    chat = [message.model_dump() for message in messages]
    arguments = {"add_generation_prompt": True, **arguments}
    ids = tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False, **arguments)
    return list(ids)


def encoded(
    codec: PolicyTokenizer, messages: list[Message], **options: Any
) -> tuple[list[int], list[ScoreWarning]]:
    warnings: list[ScoreWarning] = []
    ids = codec.encode_chat(messages, PromptOptions(**options), warnings.append)
    return list(ids), warnings


# --- arguments and templates --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        {"enable_thinking": False},
        {"enable_thinking": True},
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]},
        {"documents": [{"title": "t", "text": "x"}], "unknown": 1},
        {},
    ],
)
def test_arguments_reach_the_template(arguments: dict[str, Any]) -> None:
    expected = reference(byte_level(chat_template=THINKING), [USER], **arguments)
    assert encoded(codec_of(THINKING), [USER], chat_template_kwargs=arguments) == (expected, [])
    assert encoded(codec_of(THINKING, chat_template_kwargs=arguments), [USER]) == (expected, [])


def test_arguments_of_a_request_replace_defaults_by_name() -> None:
    defaults = {"enable_thinking": False, "tools": [{"name": "f"}]}
    ids, _ = encoded(
        codec_of(THINKING, chat_template_kwargs=defaults),
        [USER],
        chat_template_kwargs={"enable_thinking": True},
    )
    tokenizer = byte_level(chat_template=THINKING)
    assert ids == reference(tokenizer, [USER], enable_thinking=True, tools=[{"name": "f"}])


def test_templates_are_chosen_by_name_or_exact_text() -> None:
    codec = codec_of(TRIMMING, templates={"think": THINKING})
    expected = reference(byte_level(chat_template=THINKING), [USER])
    assert expected != reference(byte_level(chat_template=TRIMMING), [USER])
    assert encoded(codec, [USER], chat_template="think")[0] == expected
    assert encoded(codec, [USER], chat_template=THINKING)[0] == expected
    assert encoded(codec, [USER])[0] == encoded(codec, [USER], chat_template=TRIMMING)[0] != expected
    default = codec_of(TRIMMING, templates={"think": THINKING}, chat_template="think")
    assert encoded(default, [USER])[0] == expected


def test_a_tokenizers_own_named_templates_are_chosen_by_name() -> None:
    codec = codec_of({"default": TRIMMING, "tool_use": THINKING})
    assert encoded(codec, [USER], chat_template="tool_use")[0] == reference(
        byte_level(chat_template=THINKING), [USER]
    )
    tools = {"tools": [{"name": "f"}]}
    assert encoded(codec, [USER], chat_template_kwargs=tools)[0] == reference(
        byte_level(chat_template=THINKING), [USER], **tools
    )


@pytest.mark.parametrize("template", ["other", "{{ messages }}", "{% for i in range(9) %}x{% endfor %}", ""])
def test_clients_cannot_send_templates(template: str) -> None:
    codec = codec_of(TRIMMING, templates={"think": THINKING})
    with pytest.raises(
        CodecError, match=r"no chat template .*; the names are: think\. A template is a program"
    ):
        codec.encode_chat([USER], PromptOptions(chat_template=template))


def test_an_unknown_default_template_is_refused() -> None:
    with pytest.raises(CodecError, match="no chat template 'other'; the names are: none"):
        codec_of(TRIMMING, chat_template="other")


def test_templates_are_read_from_files(tmp_path: Path) -> None:
    for name, text in (("think.jinja", THINKING), ("trim.jinja", TRIMMING), ("bad.jinja", "{% for %}")):
        (tmp_path / name).write_text(text, "utf-8")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "trim.txt").write_text("")
    files = [tmp_path / "think.jinja", tmp_path / "trim.jinja"]
    assert read_templates(files) == {"think": THINKING, "trim": TRIMMING}
    for wrong, message in (
        (tmp_path / "bad.jinja", "bad.jinja: "),
        (tmp_path / "none.jinja", "none.jinja: "),
        (tmp_path / "other" / "trim.txt", "two templates are named 'trim'"),
    ):
        with pytest.raises(SettingsError, match=message):
            read_templates([*files, wrong])


# --- the end of the messages --------------------------------------------------------------------------


@pytest.mark.parametrize("template", [THINKING, TRIMMING, DATED])
@pytest.mark.parametrize("content", ['{"rationale": "', "Sure: ", "a\n"])
def test_the_assistants_last_message_is_continued(template: str, content: str) -> None:
    chat = [USER, Message(role="assistant", content=content)]
    arguments = {"date_string": "x"}
    ids, _ = encoded(codec_of(template), chat, continue_final_message=True, chat_template_kwargs=arguments)
    continued = {"add_generation_prompt": False, "continue_final_message": True, **arguments}
    assert ids == reference(byte_level(chat_template=template), chat, **continued)


def test_the_assistants_last_message_is_closed_on_demand_only() -> None:
    codec = codec_of(TRIMMING)
    assert encoded(codec, [USER, PREFILL], continue_final_message=False)[0] == reference(
        byte_level(chat_template=TRIMMING), [USER, PREFILL]
    )
    with pytest.raises(
        CodecError, match=r"messages\[1\], the last one, is the assistant's: set continue_final"
    ):
        codec.encode_chat([USER, PREFILL])


def test_other_last_messages_are_never_continued() -> None:
    codec = codec_of(TRIMMING)
    assert encoded(codec, [USER], continue_final_message=True) == encoded(codec, [USER])


@pytest.mark.parametrize("template", [PARTS, ATTRIBUTES])
@pytest.mark.parametrize("last", [USER, PREFILL])
def test_templates_that_need_parts_get_them(template: str, last: Message) -> None:
    codec = codec_of(template)
    chat: Any = [
        {"role": message.role, "content": [{"type": "text", "text": message.content}]}
        for message in (SYSTEM, last)
    ]
    ids, warnings = encoded(codec, [SYSTEM, last], continue_final_message=True)
    continued: dict[str, Any] = (
        {"continue_final_message": True} if last is PREFILL else {"add_generation_prompt": True}
    )
    assert ids == codec.tokenizer.apply_chat_template(chat, return_dict=False, **continued)
    assert warnings == []


def test_errors_do_not_contain_the_whole_prompt() -> None:
    secret = Message(role="assistant", content="<think>secret</think>" + "x" * 9999)
    codec = codec_of(NO_OLD_THOUGHTS.replace("m.content.split", "m.content[:3].split"))
    with pytest.raises(CodecError) as caught:
        codec.encode_chat([USER, secret], PromptOptions(continue_final_message=True))
    assert len(str(caught.value)) < 400


# --- the clock ----------------------------------------------------------------------------------------


def test_the_clock_in_a_prompt_is_a_warning() -> None:
    before = reference(byte_level(chat_template=DATED), [USER])
    ids, [warning] = encoded(codec_of(DATED), [USER])
    assert ids in (before, reference(byte_level(chat_template=DATED), [USER]))
    assert warning.code is WarningCode.CLOCK_IN_PROMPT


@pytest.mark.parametrize("date", ["2026-02-03", "2026-02-03T04:05:06", "2026-02-03T04:05:06+09:00"])
def test_the_date_is_an_option(date: str) -> None:
    expected = reference(byte_level(chat_template=DATED), [USER], date_string="03 Feb 2026")
    assert encoded(codec_of(DATED), [USER], chat_template_date=date) == (expected, [])
    assert encoded(codec_of(DATED, chat_template_date=date), [USER]) == (expected, [])


def test_a_date_as_an_argument_of_the_template_needs_no_clock() -> None:
    arguments = {"date_string": "03 Feb 2026"}
    expected = reference(byte_level(chat_template=DATED), [USER], **arguments)
    assert encoded(codec_of(DATED), [USER], chat_template_kwargs=arguments) == (expected, [])


def test_threads_have_their_own_dates() -> None:
    codec = codec_of(DATED)
    wrong: list[int] = []

    def work(year: int) -> None:
        expected = reference(byte_level(chat_template=DATED), [USER], date_string=f"01 Jan {year}")
        wrong.extend(
            year
            for _ in range(20)
            if encoded(codec, [USER], chat_template_date=f"{year}-01-01") != (expected, [])
        )

    threads = [threading.Thread(target=work, args=(2000 + i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_engines_in_other_processes_render_the_same() -> None:
    codec = codec_of(DATED, templates={"think": THINKING}, chat_template_date="2026-02-03")
    copy: PolicyTokenizer = pickle.loads(pickle.dumps(codec))
    for options in ({}, {"chat_template": "think"}, {"chat_template_date": "2025-01-01"}):
        assert encoded(copy, [USER], **options) == encoded(codec, [USER], **options)
    assert copy.end_tokens == codec.end_tokens
    assert copy.unknown_end("{}<|im_end|>") == codec.unknown_end("{}<|im_end|>") == "<|im_end|>"


def test_other_users_of_the_template_keep_the_systems_clock() -> None:
    tokenizer = byte_level(chat_template=DATED)
    ChatRenderer(tokenizer).render([USER], PromptOptions(chat_template_date="2001-01-01"))
    text = tokenizer.apply_chat_template([USER.model_dump()], tokenize=False)
    assert str(datetime.now().year) in str(text)


# --- content that the template drops ------------------------------------------------------------------


def codes_and_paths(warnings: list[ScoreWarning]) -> list[tuple[str, bool]]:
    return [(warning.code.value, "messages[0]" in warning.message) for warning in warnings]


def test_dropped_and_rewritten_messages_are_warnings() -> None:
    _, warnings = encoded(codec_of(NO_SYSTEM), [SYSTEM, USER])
    assert codes_and_paths(warnings) == [("content_not_in_prompt", True)]
    thought = Message(role="assistant", content="<think>hm</think>Buy it.")
    _, warnings = encoded(codec_of(NO_OLD_THOUGHTS), [thought, USER])
    assert codes_and_paths(warnings) == [("content_not_in_prompt", True)]
    _, warnings = encoded(codec_of(TRIMMING.replace("trim", "upper")), [SYSTEM, USER])
    assert codes_and_paths(warnings) == [("content_not_in_prompt", True), ("content_not_in_prompt", False)]


def test_white_space_around_a_message_does_not_count() -> None:
    assert encoded(codec_of(TRIMMING), [SYSTEM, USER, Message(role="user", content=" \n")])[1] == []


@pytest.mark.parametrize(
    ("text", "contents", "lost"),
    [
        ("a b", ["a", "b"], []),
        ("b a", ["a", "b"], []),  # some templates move the system message
        ("tea", ["tea", "tea"], [1]),
        ("tea tea", ["tea", "tea"], []),
        ("green tea", ["tea", "green tea"], [0]),
        ("green tea, tea", ["tea", "green tea"], []),
        ("", ["", " \n"], []),
        ("", ["x"], [0]),
    ],
)
def test_each_message_needs_a_place_of_its_own(text: str, contents: list[str], lost: list[int]) -> None:
    assert lost_messages(text, [Message(role="user", content=content) for content in contents]) == lost


def test_the_first_lost_ones_of_many_messages() -> None:
    messages = [Message(role="user", content=f"<{i}>") for i in range(1000)]
    text = "".join(message.content for message in messages)
    assert lost_messages(text, messages) == []
    assert lost_messages(text.replace("<300>", "").replace("<999>", ""), messages) == [300, 999]
    assert lost_messages("", messages) == list(range(16))


def test_a_check_at_the_start_names_what_the_template_does(caplog: pytest.LogCaptureFixture) -> None:
    ChatRenderer(byte_level(chat_template=NO_SYSTEM)).check()
    assert "drops or rewrites the text of messages[0], of role 'system'" in caplog.text
    caplog.clear()
    ChatRenderer(byte_level(chat_template=DATED)).check()
    assert "writes the service's date into the prompt" in caplog.text
    caplog.clear()
    ChatRenderer(byte_level(chat_template=THINKING)).check()
    assert caplog.text == ""
