"""The fake policy, whose numbers other tests compute by hand."""

from hypothesis import given
from hypothesis import strategies as st

from shopr1_client.wire import Message, Reason
from shopr1_rewards import load_recipe
from shopr1_service.core import Certainty, CompletionTokens, PromptKey, TokenGroup, Unmeasurable
from shopr1_service.policy.fake import CharacterCodec, FakePolicy

RULES = load_recipe("shop_r1").self_certainty


@given(st.text())
def test_a_character_is_a_token(text: str) -> None:
    codec = CharacterCodec()
    tokens = codec.encode_text(text)
    assert list(tokens.ids) == codec.encode_ids(text) == [ord(char) for char in text]
    assert list(tokens.offsets) == [(i, i + 1) for i in range(len(text))]
    assert codec.decode(tokens.ids) == tokens


def test_the_chat_template() -> None:
    codec = CharacterCodec()
    ids = codec.encode_chat([Message(role="user", content="hi"), Message(role="tool", content="")])
    assert codec.decode(ids).text == "user: hi\ntool: \n"


def test_certainties_grow_by_the_step() -> None:
    groups = [
        TokenGroup(PromptKey([1]), [CompletionTokens([5, 6, 7, 8], [1, 3])]),
        TokenGroup(PromptKey([1]), [CompletionTokens([5], [0]), CompletionTokens([5, 6], [1])]),
    ]
    assert FakePolicy(26.0, 0.5).certainties(groups, RULES) == [
        [Certainty((26.5, 27.5))],
        [Certainty((26.0,)), Certainty((26.5,))],
    ]


def test_the_tokens_before_the_last_measured_one_must_fit() -> None:
    policy = FakePolicy(max_sequence_tokens=4)
    fits = TokenGroup(PromptKey([1, 2]), [CompletionTokens([5, 6, 7, 8], [2])])
    too_long = TokenGroup(PromptKey([1, 2]), [CompletionTokens([5, 6, 7, 8], [3])])
    [[one], [other]] = policy.certainties([fits, too_long], RULES)
    assert one == Certainty((26.0,))
    assert isinstance(other, Unmeasurable)
    assert (other.reason, other.message) == (Reason.SEQUENCE_TOO_LONG, "5 tokens are needed")


def test_the_hook_is_called_once_per_batch() -> None:
    calls: list[None] = []
    policy = FakePolicy(before_scoring=lambda: calls.append(None))
    policy.certainties([TokenGroup(PromptKey([1]), [CompletionTokens([5], [0])])] * 3, RULES)
    assert len(calls) == 1
