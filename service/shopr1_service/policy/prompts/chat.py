"""Render chats with the policy's template, and notice prompts that may not be the policy's.

A template is a program, which a sandbox keeps from everything but time and memory. Clients therefore choose
among templates that the operator or the checkpoint provides; they cannot send one.
"""

import logging
import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import _compile_jinja_template

from shopr1_client.wire import Message
from shopr1_client.wire_prompt import PromptOptions, ScoreWarning, WarningCode
from shopr1_service.core import CodecError
from shopr1_service.errors import SettingsError

logger = logging.getLogger(__name__)

Warn = Callable[[ScoreWarning], None]

DEFAULTS = PromptOptions()
ASSISTANT = "assistant"
_MAX_ERROR_CHARS = 300
"""Some errors of transformers contain the whole prompt."""
_MANY = 256
"""Messages for each of which the whole text may be searched and copied."""
_MAX_LOST = 16
_PROBES = ("zqsystem", "zquser", "zqanswer", "zquser2")
"""Contents of messages that no template has in its own text."""


def ignore(_warning: ScoreWarning) -> None:
    """A `Warn` that does nothing."""


@dataclass
class _Clock:
    """The time that templates see: `now`, or the system's if it is None."""

    now: datetime | None
    was_read: bool = False


_clock: ContextVar[_Clock | None] = ContextVar("chat_template_clock", default=None)


def _strftime_now(pattern: str) -> str:
    """`strftime_now` of templates; transformers' own knows only the system's clock."""
    clock = _clock.get()
    if clock is None or clock.now is None:
        if clock is not None:
            clock.was_read = True
        return datetime.now().strftime(pattern)
    return clock.now.strftime(pattern)


@contextmanager
def _clock_at(date: str | None) -> Iterator[_Clock]:
    clock = _Clock(None if date is None else datetime.fromisoformat(date))
    token = _clock.set(clock)
    try:
        yield clock
    finally:
        _clock.reset(token)


class ChatRenderer:
    """A tokenizer's chat templates, and those of the settings.

    Args:
        templates: further templates by name.
        defaults: options for requests that have none.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        templates: Mapping[str, str] | None = None,
        defaults: PromptOptions = DEFAULTS,
    ) -> None:
        self._tokenizer = tokenizer
        own = tokenizer.chat_template
        self._templates: dict[str, str] = {**(own if isinstance(own, dict) else {}), **(templates or {})}
        self._texts = {*self._templates.values(), *([own] if isinstance(own, str) else [])}
        self._defaults = defaults
        self._takes_parts_by_template: dict[str, bool] = {}
        if defaults.chat_template is not None:
            self._named(defaults.chat_template)

    def render(
        self,
        messages: Sequence[Message],
        options: PromptOptions = DEFAULTS,
        warn: Warn = ignore,
    ) -> str:
        """The text of a prompt, with the generation prompt or at the end of the message to be continued.

        Raises:
            CodecError: there is no template, or it refuses the messages; or they end with the assistant's,
                and the options do not say whether to continue it.
        """
        options = options.over(self._defaults)
        continues = continues_answer(messages, options)
        with _clock_at(options.chat_template_date) as clock:
            text = self._apply(messages, options, continue_final_message=continues)
        if clock.was_read:
            warn(_clock_warning())
        for index in lost_messages(text, messages):
            warn(_lost(f"messages[{index}]", messages[index].role))
        return text

    def turn(self, messages: Sequence[Message]) -> str:
        """The text of a whole conversation, without a generation prompt.

        Raises:
            CodecError: there is no template, or it refuses the messages.
        """
        with _clock_at(None):
            return self._apply(messages, self._defaults, add_generation_prompt=False)

    def check(self) -> None:
        """Log what the template does to every prompt: dropped roles, and the date in the prompt."""
        for roles in (("system", "user"), ("user", ASSISTANT, "user")):
            contents = _PROBES if roles[0] == "system" else _PROBES[1:]
            messages = [Message(role=role, content=text) for role, text in zip(roles, contents, strict=False)]
            try:
                self.render(messages, warn=_log)
            except CodecError as error:
                logger.info("messages of %s: %s", ", ".join(roles), error)

    def _apply(
        self,
        messages: Sequence[Message],
        options: PromptOptions,
        *,
        continue_final_message: bool = False,
        add_generation_prompt: bool = True,
    ) -> str:
        template = self._named(options.chat_template)
        arguments = options.chat_template_kwargs or {}
        try:
            template = self._tokenizer.get_chat_template(template, arguments.get("tools"))
            _compile_jinja_template(template).environment.globals["strftime_now"] = _strftime_now
            takes_parts = self._takes_parts(template)
            text: Any = self._tokenizer.apply_chat_template(
                [_dumped(message, takes_parts=takes_parts) for message in messages],
                chat_template=template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt and not continue_final_message,
                continue_final_message=continue_final_message,
                **arguments,
            )
        except Exception as error:  # templates are programs, and can raise anything
            message = str(error)[:_MAX_ERROR_CHARS]
            raise CodecError(f"the policy's chat template refuses the messages: {message}") from error
        return str(text)

    def _takes_parts(self, template: str) -> bool:
        """Whether a template writes contents that are lists of parts, and none that are strings."""
        if template not in self._takes_parts_by_template:
            writes_text, writes_parts = (self._writes(template, takes_parts=form) for form in (False, True))
            self._takes_parts_by_template[template] = writes_parts and not writes_text
        return self._takes_parts_by_template[template]

    def _writes(self, template: str, *, takes_parts: bool) -> bool:
        message = _dumped(Message(role="user", content=_PROBES[0]), takes_parts=takes_parts)
        try:
            with _clock_at(None):  # the probe's reading of the clock is none of the prompt's
                text = self._tokenizer.apply_chat_template([message], chat_template=template, tokenize=False)
        except Exception:  # templates are programs, and can raise anything
            return False
        return _PROBES[0] in str(text)

    def _named(self, name: str | None) -> str | None:
        """The text of a template; None is the tokenizer's choice."""
        if name is None or name in self._texts:
            return name
        if name not in self._templates:
            known = ", ".join(sorted(self._templates)) or "none"
            raise CodecError(
                f"no chat template {reprlib.repr(name)}; the names are: {known}. A template is a program: "
                "only those of the tokenizer and of the setting chat_templates are run"
            )
        return self._templates[name]


def _dumped(message: Message, *, takes_parts: bool) -> dict[str, Any]:
    """A message as templates take it. Those of many models for images take lists of parts only."""
    content = [{"type": "text", "text": message.content}] if takes_parts else message.content
    return {"role": message.role, "content": content}


def continues_answer(messages: Sequence[Message], options: PromptOptions) -> bool:
    """Whether the completion continues the last message.

    Raises:
        CodecError: the last message is the assistant's, and the options do not say so.
    """
    if not messages or messages[-1].role != ASSISTANT:
        return False
    if options.continue_final_message is None:
        raise CodecError(
            f"messages[{len(messages) - 1}], the last one, is the assistant's: set continue_final_message, "
            "true if the completion continues it, false if it is closed and the completion is another one"
        )
    return options.continue_final_message


def lost_messages(text: str, messages: Sequence[Message]) -> list[int]:
    """Indices of the messages whose content is not in the text, each in a place of its own.

    White space around a content does not count, since most templates remove it. Of many messages, the places
    must have their order, and only the first lost ones are found: the time stays linear.
    """
    contents = [message.content.strip() for message in messages]
    if len(contents) > _MANY:
        return list(islice(_lost_in_order(text, contents), _MAX_LOST))
    lost = []
    # A short content must not take a place inside a longer one.
    for index in sorted(range(len(contents)), key=lambda i: len(contents[i]), reverse=True):
        start = text.find(contents[index])
        if start < 0:
            lost.append(index)
        else:
            text = f"{text[:start]}\0{text[start + len(contents[index]) :]}"
    return sorted(lost)


def _lost_in_order(text: str, contents: Sequence[str]) -> Iterator[int]:
    start = 0
    for index, content in enumerate(contents):
        place = text.find(content, start)
        if place < 0:
            yield index
        else:
            start = place + len(content)


def _lost(path: str, role: str) -> ScoreWarning:
    return ScoreWarning(
        code=WarningCode.CONTENT_NOT_IN_PROMPT,
        message=f"the chat template drops or rewrites the text of {path}, of role {reprlib.repr(role)}",
    )


def _clock_warning() -> ScoreWarning:
    return ScoreWarning(
        code=WarningCode.CLOCK_IN_PROMPT,
        message="the chat template writes the service's date into the prompt; set chat_template_date",
    )


def _log(warning: ScoreWarning) -> None:
    logger.warning("%s: %s", warning.code.value, warning.message)


def read_templates(files: Sequence[Path]) -> dict[str, str]:
    """Chat templates by name, the file's without its suffix.

    Raises:
        SettingsError: a file that cannot be read or is not a template, or two of the same name.
    """
    templates: dict[str, str] = {}
    for file in files:
        if file.stem in templates:
            raise SettingsError(f"chat_templates: two templates are named {file.stem!r}")
        try:
            templates[file.stem] = file.read_text("utf-8")
            _compile_jinja_template(templates[file.stem])
        except Exception as error:  # of the file system, or of the parser
            raise SettingsError(f"chat_templates: {file}: {error}") from error
    return templates
