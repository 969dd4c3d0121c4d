"""Prompts over HTTP: the tokenizer's own ids, and the numbers of a full forward in fp64 on them."""

from statistics import fmean
from typing import Any

import pytest
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from shopr1_service.policy.factory import build_policy
from shopr1_service.policy.loaded_policy import LoadedPolicy
from shopr1_service.settings import Settings
from tests.support.http import answer, group, metric, post, problem, running, score
from tests.support.models import Reference, byte_level, rules, tiny_model

pytestmark = pytest.mark.anyio

TEMPLATE = (
    "{% for m in messages if m.role != 'system' %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined %}{{ 'on' if enable_thinking else 'off' }} {{ strftime_now('%Y') }}\n"
    "{% endif %}{% endif %}"
)
"""Drops system messages; its arguments change the generation prompt, and bring the date into it."""
MODEL = tiny_model()
REFERENCE = Reference(MODEL)
CHAT = [{"role": "user", "content": "green tea"}]
PREFILLED = [*CHAT, {"role": "assistant", "content": '{"rationale"'}]
IDS = {"include": ["tokens", "token_ids"]}


def chatml(*, bos: bool = False) -> PreTrainedTokenizerFast:
    """ChatML on a base model: its tokenizer ends and pads with `<|endoftext|>`."""
    tokenizer = byte_level(chat_template=TEMPLATE)
    tokenizer.eos_token = tokenizer.pad_token = tokenizer.bos_token = "<|endoftext|>"
    if bos:
        ids = [("<|endoftext|>", tokenizer.bos_token_id)]
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<|endoftext|> $A", special_tokens=ids
        )
    return tokenizer


def policy(tokenizer: PreTrainedTokenizerFast, **settings: Any) -> LoadedPolicy:
    MODEL.generation_config.eos_token_id = MODEL.config.eos_token_id = tokenizer.eos_token_id
    return build_policy(MODEL, tokenizer, Settings(max_sequence_tokens=512, **settings), name="tiny")


def templated(tokenizer: PreTrainedTokenizerFast, chat: Any, **arguments: Any) -> list[int]:
    arguments = {"add_generation_prompt": True, **arguments}
    return list(tokenizer.apply_chat_template(chat, return_dict=False, **arguments))


def check(scored: Any, prompt_ids: list[int]) -> None:
    """The prompt is these ids, and each measured token has the value of a full forward after them."""
    assert scored["prompt_token_ids"] == prompt_ids
    for reward in scored["rewards"]:
        details = reward["details"]
        measured = [token["index"] for token in details["tokens"]]
        expected = REFERENCE.values(prompt_ids, details["completion_token_ids"], measured, rules())
        assert [token["value"] for token in details["tokens"]] == pytest.approx(expected, rel=0, abs=1e-4)
        assert details["self_certainty_nats"] == pytest.approx(fmean(expected), rel=0, abs=1e-4)


async def test_every_form_of_a_prompt_has_the_ids_that_the_trainer_computes() -> None:
    tokenizer = chatml(bos=True)
    off = {"chat_template_kwargs": {"enable_thinking": False}, "chat_template_date": "2026-02-03"}
    text = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    cases = [
        (group(answer(), prompt=CHAT), templated(tokenizer, CHAT)),
        (
            group(answer(), prompt=CHAT, **off),
            tokenizer.encode(f"{text}off 2026\n", add_special_tokens=False),
        ),
        (
            group(answer(), prompt=PREFILLED, continue_final_message=True),
            templated(tokenizer, PREFILLED, add_generation_prompt=False, continue_final_message=True),
        ),
        (group(answer(), prompt=PREFILLED, continue_final_message=False), templated(tokenizer, PREFILLED)),
        (group(answer(), prompt="tea", add_special_tokens=True), tokenizer("tea")["input_ids"]),
        (group(answer(), prompt="<|endoftext|>tea", add_special_tokens=True), tokenizer("tea")["input_ids"]),
        (group(answer(), prompt="tea", add_special_tokens=False), tokenizer("tea")["input_ids"][1:]),
    ]
    async with running(policy(tokenizer)) as client:
        scored = await score(client, *(each for each, _ in cases), **IDS)
    for one, (_, expected) in zip(scored["groups"], cases, strict=True):
        check(one, list(expected))
        assert one["warnings"] == []


async def test_settings_are_the_defaults() -> None:
    tokenizer = chatml()
    settings = {"chat_template_kwargs": {"enable_thinking": True}, "chat_template_date": "2025-01-01"}
    async with running(policy(tokenizer, **settings)) as client:
        scored = await score(client, group(answer(), prompt=CHAT), **IDS)
    text = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    check(scored["groups"][0], tokenizer.encode(f"{text}on 2025\n", add_special_tokens=False))


async def test_doubts_are_in_the_answer_and_the_metrics() -> None:
    arguments = {"enable_thinking": True}
    system = [{"role": "system", "content": "Be brief."}, *CHAT]
    async with running(policy(chatml(bos=True))) as client:
        scored = await score(
            client,
            group(answer(), prompt=system),
            group(answer(), prompt=CHAT, chat_template_kwargs=arguments),
            group(answer(), prompt="tea"),
            group(answer() + "<|im_start|>", prompt=CHAT),
        )
        codes = [[warning["code"] for warning in each["warnings"]] for each in scored["groups"]]
        assert codes == [["content_not_in_prompt"], ["clock_in_prompt"], ["no_bos"], ["unknown_end_token"]]
        for [code] in codes:
            assert await metric(client, "shopr1_warnings_total", code=code) == 1
        assert await metric(client, "shopr1_unknown_end_tokens_total") == 1


async def test_bad_prompts_are_refused_with_their_places() -> None:
    cases: list[tuple[dict[str, Any], str, str]] = [
        ({"prompt": PREFILLED}, "prompt", "continue_final_message"),
        ({"prompt": CHAT, "chat_template": "{{ messages }}"}, "prompt", "no chat template"),
        ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs", "tokenize is not an argument"),
        ({"chat_template_date": "soon"}, "chat_template_date", "ISO 8601"),
        ({"prompt": CHAT, "chat_template_kwargs": {"tools": "f"}}, "prompt", "refuses the messages"),
    ]
    async with running(policy(chatml())) as client:
        for more, place, message in cases:
            body = {"groups": [group(answer()), group(answer(), **more)]}
            [error] = problem(await post(client, body), 422, "invalid_request")["errors"]
            assert error["location"] == f"groups[1].{place}"
            assert message in error["message"]


async def test_the_end_of_the_turn_is_known_from_the_template() -> None:
    ends = ["", "<|im_end|>", "<|im_end|>\n", "<|im_end|><|endoftext|>", "<|endoftext|>"]
    async with running(policy(chatml())) as client:
        scored = await score(client, group(*(answer() + end for end in ends), "x<|im_end|>", prompt=CHAT))
        *valid, invalid = scored["groups"][0]["rewards"]
        assert [reward["details"]["format_error"] for reward in valid] == [None] * len(ends)
        assert len({reward["reward"] for reward in valid}) == 1
        assert invalid["details"]["format_error"] == "invalid_json"


async def test_an_unknown_end_of_the_turn_is_named_and_can_be_set() -> None:
    completion = answer() + "<|im_start|>"
    async with running(policy(chatml())) as client:
        [reward] = (await score(client, group(completion)))["groups"][0]["rewards"]
        assert reward["reward"] == 0.0
        assert "'<|im_start|>' after the object" in reward["details"]["format_message"]
    async with running(policy(chatml(), end_tokens=("<|im_start|>",))) as client:
        [reward] = (await score(client, group(completion)))["groups"][0]["rewards"]
        assert reward["details"]["format_error"] is None


async def test_ids_beyond_the_embedding_are_refused_at_once() -> None:
    tokenizer = chatml()
    beyond = [f"<extra_{i}>" for i in range(MODEL.config.vocab_size - len(tokenizer) + 1)][-1]
    tokenizer.add_tokens([f"<extra_{i}>" for i in range(MODEL.config.vocab_size - len(tokenizer) + 1)])
    cases = [
        (group(answer(rationale=f"a {beyond}")), "completions[0]"),
        (group(answer(), prompt=f"a {beyond}"), "prompt"),
        (group(answer(), prompt=[{"role": "user", "content": beyond}]), "prompt"),
        (group(answer(), prompt={"token_ids": [1, MODEL.config.vocab_size]}), "prompt.token_ids[1]"),
    ]
    async with running(policy(tokenizer)) as client:
        for bad, place in cases:
            refused = problem(await post(client, {"groups": [group(answer()), bad]}), 422, "invalid_request")
            [error] = refused["errors"]
            assert error["location"] == f"groups[1].{place}"
            assert str(MODEL.config.vocab_size) in error["message"]
        assert await metric(client, "shopr1_rollouts_total") == 0
