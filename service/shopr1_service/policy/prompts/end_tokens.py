"""The tokens that may follow an answer without belonging to it: end of turn, end of sequence, padding.

They are known from the tokenizer, the model's configurations, and the chat template, which writes the end of
the assistant's turn. Base models that were trained on chats often know it from their template only.
"""

import re
from collections.abc import Iterator, Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from shopr1_client.wire import Message
from shopr1_service.core import CodecError
from shopr1_service.policy.prompts.chat import ASSISTANT, ChatRenderer

_ANSWER, _NEXT = "zqanswer", "zqnext"
"""Contents of messages that no template has in its own text."""
_MARKER = re.compile(r"<\|?[^<>\s]{1,60}>|\[/?[A-Z_]{1,20}\]")
"""A special token as all tokenizers spell them: `<|im_end|>`, `</s>`, `<end_of_turn>`, `[EOS]`."""


def end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of end tokens in the configurations of the model and of the tokenizer.

    The model's count only if they are special tokens: a configuration may have the default of its class, an
    ordinary token of this tokenizer.
    """
    configs = (model.generation_config, model.config, model.config.get_text_config())
    of_model = {token_id for config in configs for token_id in _listed(getattr(config, "eos_token_id", None))}
    of_tokenizer = {*_listed(tokenizer.eos_token_id), *_listed(tokenizer.pad_token_id)}
    return sorted({*(i for i in of_model if _is_special(tokenizer, i)), *of_tokenizer})


def template_ends(chat: ChatRenderer, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Texts of the tokens that the chat template writes after an answer, at the end and within a chat."""
    user, answer = Message(role="user", content=_NEXT), Message(role=ASSISTANT, content=_ANSWER)
    specials = special_texts(tokenizer)
    ends = []
    for messages in ([user, answer], [user, answer, user]):
        try:
            _, answered, tail = chat.turn(messages).rpartition(_ANSWER)
        except CodecError:
            continue
        if not answered:  # the template drops answers
            continue
        tail = tail.lstrip()
        marker = _MARKER.match(tail) if len(messages) == 2 else None
        found = next((text for text in specials if tail.startswith(text)), marker and marker[0])
        ends += [found] if found else []
    return ends


def special_texts(tokenizer: PreTrainedTokenizerBase) -> Sequence[str]:
    """Texts of the special tokens, the longest first."""
    added = tokenizer.added_tokens_decoder.values()
    texts = {token.content for token in added if token.special or _MARKER.fullmatch(token.content)}
    return sorted(filter(str.strip, texts), key=len, reverse=True)


def _is_special(tokenizer: PreTrainedTokenizerBase, token_id: int) -> bool:
    if token_id in tokenizer.added_tokens_decoder:
        return True
    piece = tokenizer.convert_ids_to_tokens(token_id) if token_id < len(tokenizer) else None
    return isinstance(piece, str) and _MARKER.fullmatch(piece) is not None


def _listed(ids: int | Sequence[int] | None) -> Iterator[int]:
    if ids is not None:
        yield from [ids] if isinstance(ids, int) else ids
