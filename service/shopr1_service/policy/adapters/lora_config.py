"""Reader of a LoRA adapter's `adapter_config.json`, as PEFT writes it.

Fields that leave the numbers alone are ignored. Every other field that is set is refused: without it, the
adapter would give the numbers of a model that was never trained. PEFT's own `LoraConfig` does not do that: it
accepts any type (`r="8"`), drops unknown fields with a warning, and its import takes seconds.

>>> config = parse_config('{"peft_type": "LORA", "r": 8, "lora_alpha": 16, "rank_pattern": {"v_proj": 4}}')
>>> config.rank("model.layers.0.self_attn.v_proj"), config.scale("model.layers.0.self_attn.v_proj")
(4, 4.0)
"""

import functools
import math
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import SchemaError, SchemaValidator, core_schema

from shopr1_client.field_messages import plain_message
from shopr1_client.json_text import DuplicateKeyError, read_json
from shopr1_client.wire_policy import ADAPTER_CONFIG_KEY

Number = TypeVar("Number", int, float)

_IGNORED = {
    # Origin and purpose.
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision", "task_type"),
    # Adapted modules: the tensors' names say which.
    *("ensure_weight_tying", "exclude_modules", "layers_pattern", "layers_to_transform", "target_modules"),
    # Used in training only, or when it began.
    *("corda_config", "eva_config", "loftq_config", "lora_dropout", "lora_ga_config", "runtime_config"),
    # Layout of the base layer, and the default of a method that is refused itself.
    *("fan_in_fan_out", "megatron_core", "qalora_group_size"),
}
_METHODS = {"arrow_config", "kasa_config", "monteclora_config", "use_bdlora", "velora_config"}
"""PEFT reads an empty object as the method with all defaults."""
_HARMLESS_INITS = {"gaussian", "eva", "orthogonal", "mica"}
_FULL_WEIGHTS = "the adapter has full weights beside LoRA's: push full weights instead"
_UNSUPPORTED = "not supported: it changes, or may change, what the adapter computes"
_REASONS = {
    "bias": "biases are not adapted; push full weights instead",
    "init_lora_weights": "it may have changed the base weights; let PEFT's save_pretrained convert it"
    " (path_initial_model_for_weight_conversion)",
    "layer_replication": "the adapter belongs to a policy with other layers",
    "modules_to_save": _FULL_WEIGHTS,
    "target_parameters": "only modules can be adapted, not single parameters, as of stacked experts;"
    " push full weights instead",
    "trainable_token_indices": _FULL_WEIGHTS,
}


class AdapterError(ValueError):
    """Not a LoRA adapter that can be applied to this policy.

    Attributes:
        location: wrong key of the config, or name of the wrong tensor; `adapter_config` or `tensors` for all.
        message: the reason; `str(error)` has both.
    """

    def __init__(self, location: str, message: str) -> None:
        super().__init__(f"{location}: {message}")
        self.location = location
        self.message = message


# Strict: PEFT writes numbers as numbers.
_Rank = Annotated[int, Field(strict=True, ge=1, le=2**20)]
_Alpha = Annotated[float, Field(strict=True, ge=-1e9, le=1e9, allow_inf_nan=False)]


class LoraConfig(BaseModel):
    """Rank and scale of every adapted module.

    Attributes:
        r: rank where no pattern matches.
        lora_alpha: α where no pattern matches.
        rank_pattern, alpha_pattern: by regular expressions that a module's name, or its end after a dot, must
            match; the first one that matches counts.
        use_rslora: divide α by √r instead of r.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    peft_type: Literal["LORA"]
    r: _Rank
    lora_alpha: _Alpha
    rank_pattern: dict[str, _Rank] = {}
    alpha_pattern: dict[str, _Alpha] = {}
    use_rslora: Annotated[bool, Field(strict=True)] = False

    def rank(self, module: str) -> int:
        return _matching(self.rank_pattern, module, self.r)[0]

    def scale(self, module: str) -> float:
        """Factor of B·A: α/r, or α/√r.

        Raises:
            AdapterError: patterns contradict each other.
        """
        alphas = _matching(self.alpha_pattern, module, self.lora_alpha)
        # A wrong rank does not fit its tensors; a wrong α would go unnoticed.
        if len(set(alphas)) > 1:
            message = f"several match {module!r}, and PEFT writes them in another order than it was given"
            raise AdapterError("alpha_pattern", message)
        r = self.rank(module)
        return alphas[0] / (math.sqrt(r) if self.use_rslora else r)

    @model_validator(mode="before")
    @classmethod
    def _drop_ignored(cls, fields: Any) -> Any:  # noqa: ANN401  # any JSON
        if not isinstance(fields, dict):
            return fields
        return {key: value for key, value in fields.items() if not _is_ignored(key, value)}


def parse_config(text: str | bytes) -> LoraConfig:
    """Read a config.

    Raises:
        AdapterError: not a config of PEFT's, or it asks for more than LoRA.
    """
    try:
        config = LoraConfig.model_validate_json(text)
        read_json(text)
    except DuplicateKeyError as error:
        raise AdapterError(error.locations[0], error.message) from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        location = ".".join(map(str, first["loc"])) or ADAPTER_CONFIG_KEY
        is_extra = first["type"] == "extra_forbidden"
        raise AdapterError(
            location, _REASONS.get(location, _UNSUPPORTED) if is_extra else plain_message(first)
        ) from error
    for key, patterns in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern)):
        for pattern in patterns:
            _check_pattern(key, pattern)
    return config


def _is_ignored(key: str, value: Any) -> bool:  # noqa: ANN401  # any JSON
    if key in LoraConfig.model_fields:
        return value is None and key.endswith("_pattern")
    if key == "bias":
        return bool(value == "none")
    if key == "init_lora_weights":
        return value in (None, True, False) or (isinstance(value, str) and value.lower() in _HARMLESS_INITS)
    is_set = value is not None and value is not False if key in _METHODS else bool(value)
    return key in _IGNORED or not is_set


# --- patterns ---------------------------------------------------------------------------------------

_MAX_PATTERN_CHARACTERS = 1000
_AMBIGUOUS = re.compile(r"\[\^?\[|--|&&|~~|\|\||[*+?}]\+|\\[<>]|\\b\{")
"""Syntax that another Python, or Rust, reads differently: set operations, possessive repeats, word edges."""


def _matching(patterns: Mapping[str, Number], module: str, default: Number) -> list[Number]:
    """Values of the patterns that match, in order; at least one."""
    values = [value for pattern, value in patterns.items() if _matcher(pattern).isinstance_python(module)]
    return values or [patterns.get(module, default)]


# PEFT may write a pattern for each layer.
@functools.lru_cache(maxsize=8192)
def _matcher(pattern: str) -> SchemaValidator:
    r"""PEFT's `re.match("(.*\.)?(PATTERN)$", name)`, in pydantic's regex engine, which takes linear time."""
    return SchemaValidator(core_schema.str_schema(pattern=rf"\A(?:(.*\.)?({pattern})$)"))


def _check_pattern(key: str, pattern: str) -> None:
    if len(pattern) > _MAX_PATTERN_CHARACTERS:
        raise AdapterError(key, f"a pattern has more than {_MAX_PATTERN_CHARACTERS} characters")
    if _AMBIGUOUS.search(pattern):
        raise AdapterError(key, f"{pattern!r} is ambiguous: its meaning depends on the version of Python")
    try:
        re.compile(rf"(.*\.)?({pattern})$")
        _matcher(pattern)
    except (re.error, OverflowError, RecursionError, SchemaError) as error:
        raise AdapterError(key, f"{pattern!r} is not a supported regular expression: {error}") from error
