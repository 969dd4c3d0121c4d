"""Identity of prompts: equal only with equal ids, weights and further inputs."""

from hypothesis import given
from hypothesis import strategies as st

from shopr1_client.wire_policy import VersionDemand
from shopr1_service.core import TEXT_SCOPE, PromptKey, PromptScope, Target, TokenGroup, Version

IDS = st.lists(st.integers(0, 2**40), max_size=4)
WEIGHTS = st.sampled_from(
    [
        None,
        Target(),
        Target("a"),
        Target(demand=VersionDemand(exact="1")),
        Version("1", 1, "a"),
        Version("2", 2),
    ]
)
SCOPES = st.builds(PromptScope, WEIGHTS, st.sampled_from([b"", b"an image", b"another"]))


@given(ids=IDS, other_ids=IDS, scope=SCOPES, other_scope=SCOPES)
def test_prompts_are_equal_if_all_of_their_parts_are(
    ids: list[int], other_ids: list[int], scope: PromptScope, other_scope: PromptScope
) -> None:
    key, other = PromptKey(ids, scope), PromptKey(tuple(other_ids), other_scope)
    assert (key == other) == (ids == other_ids and scope == other_scope)
    assert PromptKey(tuple(ids), scope) == key
    assert hash(PromptKey(tuple(ids), scope)) == hash(key)
    assert len({key, other}) == (1 if key == other else 2)


@given(ids=IDS, scope=SCOPES, weights=WEIGHTS)
def test_other_weights_keep_ids_and_further_inputs(
    ids: list[int], scope: PromptScope, weights: Target | Version | None
) -> None:
    prompt = TokenGroup(PromptKey(ids, scope), []).with_weights(weights).prompt
    assert (prompt.ids, prompt.scope) == (ids, PromptScope(weights, scope.inputs_digest))


def test_a_prompt_of_tokens_has_the_text_scope() -> None:
    assert PromptKey([1]).scope == TEXT_SCOPE == PromptScope(None, b"")
    assert PromptKey([1]) != (1,)
