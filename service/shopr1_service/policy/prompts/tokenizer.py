"""Convert text to token ids and back, with the characters of each token.

A token belongs to a span of characters if it overlaps the span. A token that carries only part of a
character's bytes overlaps that character. Text is tokenised on its own, without special tokens. Ids are
never re-tokenised: their characters are found by decoding. Both directions give the same offsets to a
completion that decodes to itself.

The library's own bookkeeping does not follow this rule (tokenizers 0.23.3; `test_tokenizer.py` has the
cases):

- `Encoding.offsets` are right for byte-level BPE without `trim_offsets`. A prepended `▁` gets the first
  character. Unigram gives all bytes of a run of unknown characters the whole run. Word-piece offsets leave
  out the space that decoding gives to the next word. They are used only where the tokenizer normalises the
  text, so that it cannot be decoded.
- `Tokenizer.decode` and `Tokenizer.encode` hold the GIL; their batch methods release it.
- `DecodeStream` reports a character when its last byte arrives, and does not say which token has which part
  of that text. It reports nothing for an incomplete last character, raises for bytes that are no character
  (byte fallback), and takes quadratic time for a long run of them.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Protocol

from transformers import PreTrainedTokenizerBase

from shopr1_client.wire import Message
from shopr1_client.wire_prompt import PromptOptions, ScoreWarning, WarningCode
from shopr1_rewards.completion import strip_end
from shopr1_service.concurrency import checkpoint
from shopr1_service.core import CodecError, Tokens
from shopr1_service.policy.prompts.byte_runs import REPLACEMENT, ByteVocabulary, run_offsets
from shopr1_service.policy.prompts.chat import DEFAULTS, ChatRenderer, Warn, ignore
from shopr1_service.policy.prompts.end_tokens import special_texts

_MAX_WINDOW = 8
"""Tokens after which incomplete bytes are taken as broken: UTF-8 needs 4 bytes at most."""
_MAX_PREFIXES = 4096
"""Tokens of which every prefix may be decoded, which takes quadratic time and memory."""
_SHORT = 256
"""Tokens or characters that the library may convert without releasing the GIL, which has a price too."""


class Codec(Protocol):
    """The policy's tokenizer as the service uses it."""

    @property
    def num_ids(self) -> int:
        """Token ids are in 0 … num_ids − 1."""
        ...

    @property
    def end_tokens(self) -> tuple[str, ...]:
        """Texts of end-of-turn and padding tokens, which are ignored after an answer."""
        ...

    def encode_text(self, text: str) -> Tokens:
        """Tokenise text on its own, without special tokens."""
        ...

    def encode_ids(self, text: str) -> Sequence[int]:
        """The ids of `encode_text`, without offsets."""
        ...

    def encode_prompt(
        self, text: str, options: PromptOptions = DEFAULTS, warn: Warn = ignore
    ) -> Sequence[int]:
        """The ids of a prompt that is a text, with the special tokens that the options ask for."""
        ...

    def encode_chat(
        self, messages: Sequence[Message], options: PromptOptions = DEFAULTS, warn: Warn = ignore
    ) -> list[int]:
        """The ids of a chat in the policy's template, with the generation prompt.

        Raises:
            CodecError: there is no template, or it refuses the messages; or they end with the assistant's,
                and the options do not say whether to continue it.
        """
        ...

    def unknown_end(self, text: str) -> str | None:
        """The special token at the end of a text, if it is not an end token."""
        ...

    def decode(self, ids: Sequence[int]) -> Tokens:
        """The text and offsets of ids. Special tokens are part of the text.

        Raises:
            CodecError: too many ids of a decoder whose offsets take quadratic time.
        """
        ...


class PolicyTokenizer:
    """A `Codec` on a fast tokenizer of transformers.

    Args:
        num_ids: rows of the model's embedding.
        end_ids, end_texts: tokens that are ignored after an answer.
        chat: default: the tokenizer's own templates.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        num_ids: int,
        end_ids: Sequence[int],
        *,
        end_texts: Sequence[str] = (),
        chat: ChatRenderer | None = None,
    ) -> None:
        if not tokenizer.is_fast:
            raise CodecError(f"{type(tokenizer).__name__} has no offsets; a tokenizer.json is needed")
        self.tokenizer = tokenizer
        self._backend = tokenizer.backend_tokenizer
        # A tokenizer.json may truncate or pad silently.
        self._backend.no_truncation()
        self._backend.no_padding()
        self._context = self._backend.encode("a", add_special_tokens=False).ids
        self._context_text = self._decode(self._context)
        self._texts_inside: dict[int, str | None] = {}
        self._bytes = ByteVocabulary(self._backend)
        self.num_ids = num_ids
        ends = (*(self._decode([token_id]) for token_id in end_ids), *end_texts)
        self.end_tokens = tuple(dict.fromkeys(ends))
        self._other_specials = [text for text in special_texts(tokenizer) if text not in self.end_tokens]
        self._chat = chat or ChatRenderer(tokenizer)
        self._bos = self._bos_of(tokenizer.bos_token_id)

    def encode_text(self, text: str) -> Tokens:
        decoded = self.decode(self.encode_ids(text))
        if decoded.text == text:
            return decoded
        # The tokenizer normalises the text: only the library knows the characters.
        [encoding] = self._backend.encode_batch([text], add_special_tokens=False)
        return Tokens(text, encoding.ids, encoding.offsets)

    def encode_ids(self, text: str) -> Sequence[int]:
        # The library's only call that computes no offsets.
        [encoding] = self._backend.encode_batch_fast([text], add_special_tokens=False)
        ids: Sequence[int] = encoding.ids
        return ids

    def encode_prompt(
        self, text: str, options: PromptOptions = DEFAULTS, warn: Warn = ignore
    ) -> Sequence[int]:
        ids = self.encode_ids(text)
        has_bos = self._bos is None or list(ids[:1]) == [self._bos]
        if options.add_special_tokens:
            [encoding] = self._backend.encode_batch_fast([text], add_special_tokens=True)
            with_special: list[int] = encoding.ids
            return with_special[1:] if has_bos and with_special[:2] == [self._bos] * 2 else with_special
        if options.add_special_tokens is None and not has_bos:
            warn(_no_bos(self._decode([self._bos or 0])))
        return ids

    def encode_chat(
        self, messages: Sequence[Message], options: PromptOptions = DEFAULTS, warn: Warn = ignore
    ) -> list[int]:
        return list(self.encode_ids(self._chat.render(messages, options, warn)))

    def unknown_end(self, text: str) -> str | None:
        text = strip_end(text, self.end_tokens)
        return next((special for special in self._other_specials if text.endswith(special)), None)

    def decode(self, ids: Sequence[int]) -> Tokens:
        ids = list(ids)
        text = self._decode(ids)
        for find_offsets in (self._offsets_by_windows, self._offsets_by_windows_only, self._offsets_by_runs):
            tokens = find_offsets(ids)
            if tokens is not None and tokens.text == text:
                return tokens
        if len(ids) > _MAX_PREFIXES:
            raise CodecError(
                f"{len(ids)} token ids of a decoder that takes quadratic time to tell their characters; "
                f"at most {_MAX_PREFIXES}: send the text instead"
            )
        return self._offsets_by_prefixes(ids, text)

    def _bos_of(self, bos_id: int | None) -> int | None:
        """The BOS if the tokenizer adds it to texts."""
        ids = self._backend.encode("a", add_special_tokens=True).ids
        return bos_id if bos_id is not None and ids[:1] == [bos_id] else None

    def _decode(self, ids: list[int]) -> str:
        if len(ids) <= _SHORT:
            return str(self._backend.decode(ids, skip_special_tokens=False))
        [text] = self._backend.decode_batch([ids], skip_special_tokens=False)
        return str(text)

    def _offsets_by_windows_only(self, ids: list[int]) -> Tokens | None:
        return self._offsets_by_windows(ids, only_windows=True)

    def _offsets_by_windows(self, ids: list[int], *, only_windows: bool = False) -> Tokens | None:
        """Offsets in linear time: decode windows that end where the bytes are whole characters.

        A window begins with the tokens of the window before, because some decoders treat the first token
        differently. A token of whole characters needs no window, unless its text depends on the token before.
        The caller compares the joined text with the text decoded at once.

        Args:
            only_windows: use a window for every token.
        """
        texts, num_chars, offsets = list[str](), 0, list[tuple[int, int]]()
        context = 0  # first id of the window; ids[context:done] have their offsets already
        done = 0
        for end in range(1, len(ids) + 1):
            checkpoint()
            piece = self._text_inside(ids[done]) if 0 < done == end - 1 and not only_windows else None
            if piece is not None:
                offsets.append((num_chars, num_chars + len(piece)))
                texts.append(piece)
                num_chars += len(piece)
                context, done = done, end
                continue
            before = self._decode(ids[context:done])
            window = self._decode(ids[context:end])
            if window.endswith(REPLACEMENT) and end < len(ids) and end - done < _MAX_WINDOW:
                continue
            if not window.startswith(before):
                return None
            prefixes = [self._decode(ids[context:k]) for k in range(done + 1, end)]
            placed = _place(window, before, [*prefixes, window], self._texts_alone(ids[done:end]))
            shift = num_chars - len(before)
            offsets += [(shift + first, shift + last) for first, last in placed]
            texts.append(window[len(before) :])
            num_chars += len(texts[-1])
            context, done = done, end
        return Tokens("".join(texts), ids, offsets)

    def _offsets_by_runs(self, ids: list[int]) -> Tokens | None:
        """Offsets in linear time: from the bytes of each run of tokens that are no whole characters.

        Whole characters before and after a run do not change what it decodes to.
        """
        texts, num_chars, offsets = list[str](), 0, list[tuple[int, int]]()
        context = start = 0  # some decoders treat the first text differently: ids[context:start] has one
        while start < len(ids):
            checkpoint()
            end = next((k for k in range(start, len(ids)) if not self._is_partial(ids[k])), len(ids))
            end = max(end, start + 1)
            before = self._decode(ids[context:start])
            text = self._decode(ids[context:end])[len(before) :]
            context = start if text else context
            spans = [(0, len(text))]
            if end > start + 1 or self._is_partial(ids[start]):
                found = run_offsets([self._bytes.bytes_of(token_id) for token_id in ids[start:end]], text)
                if found is None:
                    return None
                spans = found
            offsets += [(num_chars + first, num_chars + last) for first, last in spans]
            texts.append(text)
            num_chars += len(text)
            start = end
        return Tokens("".join(texts), ids, offsets)

    def _is_partial(self, token_id: int) -> bool:
        # Bytes before and after a token without text are joined.
        return not self._text_inside(token_id) or self._bytes.is_byte(token_id)

    def _offsets_by_prefixes(self, ids: list[int], text: str) -> Tokens:
        """Offsets from decoding every prefix: right for any decoder, in quadratic time."""
        prefixes = []
        for end in range(1, len(ids) + 1):
            checkpoint()
            prefixes.append(self._decode(ids[:end]))
        return Tokens(text, ids, _place(text, "", prefixes, self._texts_alone(ids)))

    def _text_inside(self, token_id: int) -> str | None:
        """The text of a token after another one, cached; None unless it is whole characters."""
        if token_id not in self._texts_inside:
            text = self._decode([*self._context, token_id])
            piece = text[len(self._context_text) :]
            is_after = bool(self._context_text) and text.startswith(self._context_text)
            self._texts_inside[token_id] = piece if is_after and REPLACEMENT not in piece else None
        return self._texts_inside[token_id]

    def _texts_alone(self, ids: list[int]) -> list[str]:
        return [self._decode([token_id]) for token_id in ids]


def _no_bos(token: str) -> ScoreWarning:
    return ScoreWarning(
        code=WarningCode.NO_BOS,
        message=f"the prompt does not begin with {token!r}, which the tokenizer adds; set "
        "add_special_tokens, false if the policy did not see it either",
    )


def _place(text: str, before: str, prefixes: Sequence[str], alone: Sequence[str]) -> list[tuple[int, int]]:
    """The characters of `text` that each further token overlaps.

    Bytes that are no whole character yet decode to replacement characters, which vanish when the character is
    complete. A token therefore reaches as far as the shortest prefix from it on.

    Args:
        before: text of the tokens before.
        prefixes: text of all tokens up to and including each further token; the last one is `text`.
        alone: text of each further token alone.
    """
    reaches = list(accumulate((len(prefix) for prefix in reversed(prefixes)), min))[::-1]
    offsets: list[tuple[int, int]] = []
    start, former = len(before), before
    for prefix, piece, end in zip(prefixes, alone, reaches, strict=True):
        first = start - 1 if _is_joined(text, start, end, former, prefix, piece) else start
        first = max(first, offsets[-1][0]) if offsets else first
        offsets.append((first, max(first, end)))
        start, former = max(start, end), prefix
    return offsets


def _is_joined(text: str, start: int, end: int, former: str, prefix: str, piece: str) -> bool:
    """Whether a token has bytes of the character before `start`, which an earlier token has begun."""
    if not start or REPLACEMENT not in (former[-1:], prefix[-1:]):
        return False
    completes_it = former[start - 1 : start] != text[start - 1]
    adds_less_than_alone = former.endswith(REPLACEMENT) and len(prefix) < len(former) + len(piece)
    return end <= start or completes_it or adds_less_than_alone
