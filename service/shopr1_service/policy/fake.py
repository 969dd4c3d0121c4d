"""A policy whose numbers can be computed by hand, for tests of the code around the engine.

Every character is a token, its id the code point. The self-certainty of token number i of a completion is
`base_nats + i · step_nats`.
"""

import json
from collections.abc import Callable, Sequence

from shopr1_client.wire import Message, PolicyInfo, Reason
from shopr1_client.wire_prompt import PromptOptions
from shopr1_rewards.recipe import SelfCertaintyRecipe
from shopr1_service.core import (
    Certainty,
    CompletionTokens,
    EngineStats,
    TokenGroup,
    Tokens,
    Unmeasurable,
    Version,
)
from shopr1_service.engine.heartbeat import Heartbeat
from shopr1_service.policy.prompts.chat import DEFAULTS, Warn, continues_answer, ignore
from shopr1_service.policy.versions import VersionTable

_NUM_CODE_POINTS = 0x110000
_UNKNOWN_END = "<special>"


class CharacterCodec:
    """A character is a token. The chat template writes its arguments, as JSON, before the messages."""

    num_ids = _NUM_CODE_POINTS
    end_tokens = ("<end>",)

    def encode_text(self, text: str) -> Tokens:
        return Tokens(text, [ord(char) for char in text], [(i, i + 1) for i in range(len(text))])

    def encode_ids(self, text: str) -> Sequence[int]:
        return self.encode_text(text).ids

    def encode_prompt(
        self, text: str, options: PromptOptions = DEFAULTS, warn: Warn = ignore
    ) -> Sequence[int]:
        return self.encode_ids(text)

    def encode_chat(
        self, messages: Sequence[Message], options: PromptOptions = DEFAULTS, warn: Warn = ignore
    ) -> list[int]:
        text = "".join(f"{m.role}: {m.content}\n" for m in messages)
        text = text.removesuffix("\n") if continues_answer(messages, options) else text
        arguments = options.chat_template_kwargs
        return list(self.encode_ids(f"{json.dumps(arguments)}\n{text}" if arguments else text))

    def unknown_end(self, text: str) -> str | None:
        return _UNKNOWN_END if text.endswith(_UNKNOWN_END) else None

    def decode(self, ids: Sequence[int]) -> Tokens:
        return self.encode_text("".join(map(chr, ids)))


class FakePolicy:
    """A policy without a model.

    Args:
        base_nats: self-certainty of a completion's first token.
        step_nats: increment per further token.
        max_sequence_tokens: longest prompt with completion.
        before_scoring: called before every batch, for tests that block the engine.
    """

    def __init__(
        self,
        base_nats: float = 26.0,
        step_nats: float = 0.0,
        *,
        max_sequence_tokens: int = 4096,
        before_scoring: Callable[[], None] = lambda: None,
    ) -> None:
        self.codec = CharacterCodec()
        self.info = PolicyInfo(
            model="fake",
            version="0",
            number=0,
            architecture="FakePolicy",
            dtype="float64",
            device="cpu",
            num_head_rows=_NUM_CODE_POINTS,
            num_tokenizer_tokens=_NUM_CODE_POINTS,
            max_sequence_tokens=max_sequence_tokens,
            head="fake",
            forward="fake",
        )
        self.versions = VersionTable.starting_with(Version("0"))
        self.stats = EngineStats()
        self.heartbeat = Heartbeat()
        self._base_nats = base_nats
        self._step_nats = step_nats
        self._before_scoring = before_scoring

    def certainties(
        self, groups: Sequence[TokenGroup], rules: SelfCertaintyRecipe, version: Version | None = None
    ) -> list[list[Certainty | Unmeasurable]]:
        self._before_scoring()
        return [[self._certainty(group, c) for c in group.completions] for group in groups]

    def _certainty(self, group: TokenGroup, completion: CompletionTokens) -> Certainty | Unmeasurable:
        num_tokens = len(group.prompt_ids) + completion.measured[-1]
        if num_tokens > self.info.max_sequence_tokens:
            return Unmeasurable(Reason.SEQUENCE_TOO_LONG, f"{num_tokens} tokens are needed")
        return Certainty(tuple(self._base_nats + i * self._step_nats for i in completion.measured))
