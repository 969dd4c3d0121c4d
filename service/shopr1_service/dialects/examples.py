"""Examples of trainers' requests in the OpenAPI document. A test sends them and compares the responses."""

import json
from typing import Any

from fastapi.openapi.models import Example

from shopr1_service.http.examples import COMPLETION, PROMPT

_TRUTH = {"type": "click", "name": "add_to_cart.buy_now"}
_LABEL = json.dumps(_TRUTH)
_TERMS = {"format": 0.5, "action_type": 0.3, "attribute": 0.2, "value": 0.0, "self_certainty": 0.13}
_LOGS = {
    **{f"shopr1/{name}": value for name, value in _TERMS.items()},
    "shopr1/self_certainty_nats": 26.0,
    "shopr1/has_self_certainty": 1.0,
    "shopr1/format_ok": 1.0,
    "shopr1/type_match": 1.0,
    "shopr1/exact_match": 0.0,
    "shopr1/num_rationale_tokens": 37.0,
    "shopr1/unscorable": 0.0,
}
_REWARD = 1.13

OPENRLHF_REQUEST = {"query": [f"{PROMPT}{COMPLETION}<|im_end|>"], "prompts": [PROMPT], "labels": [_LABEL]}
OPENRLHF: dict[str, Example] = {
    "one": {"summary": "One rollout, as OpenRLHF sends it", "value": OPENRLHF_REQUEST},
    "none": {"summary": "No rollout", "value": {"query": [], "prompts": [], "labels": []}},
}

SLIME_REQUEST = {"prompt": PROMPT, "response": COMPLETION, "label": _LABEL}
_SLIME_CHAT = {
    "prompt": [{"role": "user", "content": PROMPT}],
    "response": COMPLETION,
    "label": {"ground_truth": _TRUTH, "recipe": "shop_r1"},
}
SLIME: dict[str, Example] = {
    "text": {"summary": "A templated prompt", "value": SLIME_REQUEST},
    "chat": {"summary": "Chat messages, and a label that names the recipe", "value": _SLIME_CHAT},
}

LLAMA_FACTORY_REQUEST = {"model": "model", "messages": [f"{PROMPT}{COMPLETION}<|im_end|>"]}
LLAMA_FACTORY: dict[str, Example] = {
    "one": {"summary": "A text whose prompt is registered", "value": LLAMA_FACTORY_REQUEST}
}

LABELS_REQUEST = {
    "labels": [
        {"prompt": PROMPT, "ground_truth": _TRUTH},
        {"prompt": [{"role": "user", "content": PROMPT}], "ground_truth": _LABEL},
    ]
}
LABELS: dict[str, Example] = {
    "two": {"summary": "The same prompt as text and as messages", "value": LABELS_REQUEST}
}

_ROW: dict[str, Any] = {
    "responses_create_params": {"input": [{"role": "user", "content": PROMPT}]},
    "ground_truth": _TRUTH,
    "_ng_task_index": 7,
}
NEMO_GYM_ROW: dict[str, Example] = {"row": {"summary": "A row of the data set", "value": _ROW}}
NEMO_GYM_REQUEST: dict[str, Any] = {
    **_ROW,
    "response": {
        "id": "resp_1",
        "created_at": 0,
        "model": "policy",
        "object": "response",
        "output": [
            {
                "id": "msg_1",
                "role": "assistant",
                "type": "message",
                "status": "completed",
                "content": [{"type": "output_text", "text": COMPLETION, "annotations": []}],
            }
        ],
        "parallel_tool_calls": True,
        "tool_choice": "auto",
        "tools": [],
    },
}
NEMO_GYM_VERIFY: dict[str, Example] = {
    "row": {"summary": "A row with the policy's response", "value": NEMO_GYM_REQUEST}
}
NEMO_GYM_METRICS: dict[str, Example] = {
    "two": {
        "summary": "Two rollouts of a task",
        "value": {
            "verify_responses": [{"_ng_task_index": 7, "reward": 1.0}, {"_ng_task_index": 7, "reward": 3.0}]
        },
    }
}
# The standard deviation of 1 and 3 over n − 1 is the square root of 2.
_STATISTICS = {
    "mean/reward": 2.0,
    "max/reward": 3.0,
    "min/reward": 1.0,
    "median/reward": 2.0,
    "std/reward": 2.0**0.5,
}

ANSWERS: dict[str, Any] = {
    "openrlhfGetReward": {"rewards": [_REWARD], "scores": [0.0], "extra_logs": _LOGS},
    "slimeReward": _REWARD,
    "llamaFactoryScoreEvaluation": {
        "id": "scoreval-4f3c",
        "object": "score.evaluation",
        "model": "model",
        "scores": [_REWARD],
    },
    "putLabels": {"num_labels": 2},
    "getLabels": {"num_labels": 2},
    "deleteLabels": {"num_labels": 0},
    "nemoGymSeedSession": {},
    "nemoGymVerify": {
        **NEMO_GYM_REQUEST,
        "reward": _REWARD,
        "reward_components": _TERMS,
        "mask_sample": False,
        "failure_kind": None,
        "failure_reason": None,
        **_LOGS,
    },
    "nemoGymAggregateMetrics": {
        "group_level_metrics": [{**_STATISTICS, "_ng_task_index": 7}],
        "agent_metrics": _STATISTICS,
        "key_metrics": {"mean/reward": 2.0},
    },
    "nemoGymReverifyMode": "stateless",
}
"""Responses by operation id."""
