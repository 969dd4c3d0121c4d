"""Examples in the OpenAPI document. A test scores the request and compares the response."""

from typing import Any

from fastapi.openapi.models import Example

from shopr1_rewards import load_recipe

_RECIPE = load_recipe("shop_r1")
_RECIPE_REF = {"name": _RECIPE.name, "digest": _RECIPE.digest}

PROMPT = "<html><button name='add_to_cart.buy_now'>Buy now</button></html>\nWhat does the shopper do next?\n"

COMPLETION = (
    '{"rationale": "I want to know what others say first.", '
    '"action": {"type": "click", "name": "refinements.customer_reviews"}}'
)

SCORE_REQUEST: dict[str, Any] = {
    "groups": [
        {
            "id": "session-7/step-3",
            "prompt": PROMPT,
            "ground_truth": {"type": "click", "name": "add_to_cart.buy_now"},
            "completions": [COMPLETION],
        }
    ]
}

_CHAT_REQUEST: dict[str, Any] = {
    "recipe": "shop_r1",
    "groups": [
        {
            "prompt": [{"role": "user", "content": PROMPT}],
            "ground_truth": '{"type": "terminate"}',
            "completions": [COMPLETION, {"text": "I am done."}],
        }
    ],
    "include": ["tokens"],
}

_IDS_REQUEST: dict[str, Any] = {
    "groups": [
        {
            "prompt": {"token_ids": [1, 4093, 198]},
            "ground_truth": {"type": "type_and_submit", "name": "nav_bar.search_input", "text": "comforter"},
            "completions": [{"token_ids": [39428, 20018, 85]}],
        }
    ],
    "policy_version": "0",
}

SCORE_REQUESTS: dict[str, Example] = {
    "text": {"summary": "A templated prompt and a completion as text", "value": SCORE_REQUEST},
    "chat": {"summary": "Chat messages; per-token values in the response", "value": _CHAT_REQUEST},
    "token_ids": {"summary": "Token ids, and a policy version that must be loaded", "value": _IDS_REQUEST},
}

_PATH = "/checkpoints/step-120"

UPDATE_REQUESTS: dict[str, Example] = {
    "full": {"summary": "All weights of a checkpoint", "value": {"path": _PATH, "version": "120"}}
}
TRANSFER_REQUESTS: dict[str, Example] = {
    "one": {
        "summary": "One tensor, over gloo",
        "value": {
            "version": "120",
            "partial": True,
            "host": "127.0.0.1",
            "port": 29500,
            "timeout_s": 1.0,
            "tensors": [{"name": "model.norm.weight", "dtype": "F32", "shape": [576]}],
        },
    }
}
ADAPTER_REQUESTS: dict[str, Example] = {
    "default": {
        "summary": "An adapter for requests that name none",
        "value": {"name": "grpo", "path": _PATH, "version": "120", "default": True},
    }
}
SGLANG_UPDATES: dict[str, Example] = {
    "one": {"summary": "As slime sends it", "value": {"model_path": _PATH, "weight_version": "120"}}
}
LORA_LOADS: dict[str, Example] = {
    "one": {"summary": "As TRL sends it", "value": {"lora_name": "grpo-v7", "lora_path": _PATH}}
}
LORA_UNLOADS: dict[str, Example] = {"one": {"summary": "As TRL sends it", "value": {"lora_name": "grpo-v6"}}}

SCORE_RESPONSE: dict[str, Any] = {
    "request_id": "4f3c",
    "recipe": _RECIPE_REF,
    "policy": {"model": "SmolLM2-135M-Instruct", "version": "0", "number": 0, "adapter": None},
    "groups": [
        {
            "id": "session-7/step-3",
            "policy_version": "0",
            "policy_number": 0,
            "adapter": None,
            "rewards": [
                {
                    "reward": 1.13,
                    "status": "scored",
                    "reason": None,
                    "message": None,
                    "components": {
                        "format": 0.5,
                        "action_type": 0.3,
                        "attribute": 0.2,
                        "value": 0.0,
                        "self_certainty": 0.13,
                    },
                    "details": {
                        "format_error": None,
                        "format_message": None,
                        "predicted_action": {"type": "click", "name": "refinements.customer_reviews"},
                        "unknown_action_type": False,
                        "missing_attributes": [],
                        "extra_keys": [],
                        "converted": [],
                        "similarity": {"name": 0.0, "text": None},
                        "type_match": True,
                        "exact_match": False,
                        "self_certainty_nats": 26.0,
                        "num_rationale_tokens": 37,
                        "tokens": None,
                        "completion_token_ids": None,
                    },
                }
            ],
            "warnings": [],
            "prompt_token_ids": None,
        }
    ],
}

INFO: dict[str, Any] = {
    "version": "0.1.0",
    "policy": {
        "model": "SmolLM2-135M-Instruct",
        "version": "0",
        "number": 0,
        "architecture": "LlamaForCausalLM",
        "dtype": "float32",
        "device": "cpu",
        "num_head_rows": 49152,
        "num_tokenizer_tokens": 49152,
        "max_sequence_tokens": 8192,
        "head": "linear",
        "forward": "shared_prefix",
    },
    "limits": {
        "max_body_bytes": 67108864,
        "max_groups": 1024,
        "max_completions_per_group": 256,
        "max_request_tokens": 4194304,
        "max_text_chars": 1048576,
    },
    "default_recipe": _RECIPE_REF,
    "recipes": [_RECIPE_REF],
}

_VERSION = {"version": "120", "number": 3, "adapter": None, "loaded_at": 1795690000.0}
_FORMER = {"version": "110", "number": 2, "adapter": None, "loaded_at": 1795680000.0}
_ADAPTER = {"version": "7", "number": 4, "adapter": "grpo", "loaded_at": 1795691000.0}

POLICY: dict[str, Any] = {
    "model": "SmolLM2-135M-Instruct",
    "current": _VERSION,
    "base": _VERSION,
    "adapters": [_ADAPTER],
    "default_adapter": None,
    "update": None,
}

POLICY_UPDATE: dict[str, Any] = {
    "current": _VERSION,
    "former": _FORMER,
    "num_tensors": 272,
    "num_bytes": 538060032,
    "duration_s": 0.9,
    "pause_s": 0.2,
    "unloaded_adapters": [],
}

ADAPTER_UPDATE: dict[str, Any] = {
    "current": _ADAPTER,
    "rank": 16,
    "num_layers": 60,
    "num_bytes": 3686400,
    "duration_s": 0.1,
    "unloaded": [],
}

RECIPES: list[dict[str, Any]] = [_RECIPE_REF]

RECIPE: dict[str, Any] = _RECIPE.model_dump(mode="json")

ANSWERS: dict[str, Any] = {
    "score": SCORE_RESPONSE,
    "info": INFO,
    "listRecipes": RECIPES,
    "getRecipe": RECIPE,
    "policy": POLICY,
    "updatePolicy": POLICY_UPDATE,
    "uploadWeights": POLICY_UPDATE,
    "transferWeights": POLICY_UPDATE,
    "loadAdapter": ADAPTER_UPDATE,
    "uploadAdapter": ADAPTER_UPDATE,
    "unloadAdapter": POLICY,
    "sglangUpdateWeights": {"success": True, "message": "version '120' scores", "num_paused_requests": 0},
    "sglangPause": {"message": "Generation paused successfully.", "status": "ok"},
    "sglangContinue": {"message": "Generation continued successfully.", "status": "ok"},
    "sglangLoadLora": {"success": True, "error_message": "", "loaded_adapters": {"grpo-v7": _PATH}},
    "sglangUnloadLora": {"success": True, "error_message": "", "loaded_adapters": {}},
    "sglangModelInfo": {
        "model_path": "SmolLM2-135M-Instruct",
        "weight_version": "120",
        "is_generation": False,
    },
    "live": {"status": "live"},
    "ready": {"status": "ready"},
}
"""Responses by operation id."""
