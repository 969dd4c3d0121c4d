"""What a LoRA adapter's `adapter_config.json` says, as PEFT writes it.

Only what is known to leave the numbers alone is passed over. All else that is set is refused: applied without
it, an adapter would give the numbers of a model that nobody trained.

>>> config = parse_config('{"peft_type": "LORA", "r": 8, "lora_alpha": 16, "rank_pattern": {"v_proj": 4}}')
>>> config.rank("model.layers.0.self_attn.v_proj"), config.scale("model.layers.0.self_attn.v_proj")
(4, 4.0)
"""

import functools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from shopr1_client.wire_policy import ADAPTER_CONFIG_KEY

Number = TypeVar("Number", int, float)


class AdapterError(ValueError):
    """Not a LoRA adapter that can be applied to this policy.

    Attributes:
        location: the config's key or the tensor's name that is at fault; `adapter_config` or `tensors` where
            all of it is.
        message: what is wrong with it; `str(error)` has both.
    """

    def __init__(self, location: str, message: str) -> None:
        super().__init__(f"{location}: {message}")
        self.location = location
        self.message = message


@dataclass(frozen=True)
class LoraConfig:
    """Rank and scale of every adapted module.

    Attributes:
        r: the rank where no pattern says otherwise.
        alpha: the same for α.
        rank_pattern, alpha_pattern: regular expressions that a module's name, or its end from a dot on, must
            match; the first one counts.
        use_rslora: divide α by √r and not by r.
    """

    r: int
    alpha: float
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    use_rslora: bool = False

    def rank(self, module: str) -> int:
        return _matching(self.rank_pattern, module, self.r)[0]

    def scale(self, module: str) -> float:
        """What B·A is multiplied with: α/r, or α/√r.

        Raises:
            AdapterError: patterns contradict each other.
        """
        alphas = _matching(self.alpha_pattern, module, self.alpha)
        # A wrong rank does not fit its tensors, a wrong α would go unnoticed.
        if len(set(alphas)) > 1:
            message = f"several match {module!r}, and PEFT writes them in another order than it was given"
            raise AdapterError("alpha_pattern", message)
        r = self.rank(module)
        return alphas[0] / (math.sqrt(r) if self.use_rslora else r)


def parse_config(text: str | bytes) -> LoraConfig:
    """Read a config.

    Raises:
        AdapterError: no config of PEFT's, or one that asks for more than LoRA.
    """
    try:
        file = _ConfigFile.model_validate_json(text)
    except ValidationError as error:
        raise _refusal(error) from error
    _check_init(file.init_lora_weights)
    for key, value in (file.model_extra or {}).items():
        _check_rest(key, value)
    for key, patterns in (("rank_pattern", file.rank_pattern), ("alpha_pattern", file.alpha_pattern)):
        for pattern in patterns:
            _check_pattern(key, pattern)
    return LoraConfig(file.r, file.lora_alpha, file.rank_pattern, file.alpha_pattern, file.use_rslora)


# Strict: PEFT writes numbers as numbers, and what it reads of anything else is not to be guessed.
_Rank = Annotated[int, Field(strict=True, ge=1, le=2**20)]
_Alpha = Annotated[float, Field(strict=True, ge=-1e9, le=1e9, allow_inf_nan=False)]
_none_is_empty = BeforeValidator(lambda value: {} if value is None else value)


class _ConfigFile(BaseModel):
    model_config = ConfigDict(extra="allow", frozen=True)

    peft_type: Literal["LORA"]
    r: _Rank
    lora_alpha: _Alpha
    rank_pattern: Annotated[dict[str, _Rank], _none_is_empty] = {}
    alpha_pattern: Annotated[dict[str, _Alpha], _none_is_empty] = {}
    use_rslora: Annotated[bool, Field(strict=True)] = False
    bias: Literal["none"] = "none"
    init_lora_weights: bool | str | None = True


def _refusal(error: ValidationError) -> AdapterError:
    first = error.errors(include_url=False, include_context=False)[0]
    location = ".".join(map(str, first["loc"])) or ADAPTER_CONFIG_KEY
    hint = ": biases are not adapted; push full weights instead" if location == "bias" else ""
    return AdapterError(location, f"{first['msg']}{hint}")


# --- what else may be set ---------------------------------------------------------------------------

_HARMLESS = {
    # What the adapter was made of and for.
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision", "task_type"),
    # Which modules it is for: the tensors' names say that.
    *("ensure_weight_tying", "exclude_modules", "layers_pattern", "layers_to_transform", "target_modules"),
    # Used in training only, or when it began.
    *("corda_config", "eva_config", "loftq_config", "lora_dropout", "lora_ga_config", "runtime_config"),
    # How the base layer is laid out or found, and the default of a method that is refused itself.
    *("fan_in_fan_out", "megatron_core", "qalora_group_size"),
}
# PEFT takes an empty object for "with all defaults".
_METHODS = {"arrow_config", "kasa_config", "monteclora_config", "use_bdlora", "velora_config"}
_FULL_WEIGHTS = "the adapter has full weights beside LoRA's: push full weights instead"
_UNSUPPORTED = "not supported: it changes, or may change, what the adapter computes"
_REASONS = {
    "modules_to_save": _FULL_WEIGHTS,
    "trainable_token_indices": _FULL_WEIGHTS,
    "layer_replication": "the adapter belongs to a policy with other layers",
    "target_parameters": "only modules can be adapted, not single parameters",
}
_HARMLESS_INITS = {"gaussian", "eva", "orthogonal", "mica"}


def _check_rest(key: str, value: Any) -> None:  # noqa: ANN401  # any JSON
    is_set = value is not None and value is not False if key in _METHODS else bool(value)
    if is_set and key not in _HARMLESS:
        raise AdapterError(key, _REASONS.get(key, _UNSUPPORTED))


def _check_init(init: bool | str | None) -> None:
    if isinstance(init, str) and init.lower() not in _HARMLESS_INITS:
        message = (
            f"{init!r} may have changed the weights that the adapter belongs to; let PEFT's save_pretrained"
            " convert it (path_initial_model_for_weight_conversion)"
        )
        raise AdapterError("init_lora_weights", message)


# --- patterns ---------------------------------------------------------------------------------------

_MAX_STEPS = 10**6
_SETS_IN_SETS = re.compile(r"\[\^?\[|--|&&|~~|\|\|")


def _matching(patterns: Mapping[str, Number], module: str, default: Number) -> list[Number]:
    """Values of the patterns that match, in order; at least one."""
    values = [value for pattern, value in patterns.items() if _compiled(pattern).match(module)]
    return values or [patterns.get(module, default)]


# PEFT may write one pattern per layer, more than `re` itself keeps.
@functools.lru_cache(maxsize=8192)
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(.*\.)?({pattern})$")  # PEFT's own frame: what a pattern means is up to it


def _check_pattern(key: str, pattern: str) -> None:
    if _num_steps(pattern) > _MAX_STEPS:
        raise AdapterError(key, f"{pattern!r} may take too long to match; write it more plainly")
    if _SETS_IN_SETS.search(pattern):
        raise AdapterError(key, f"{pattern!r} may mean something else to another Python")
    try:
        _compiled(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise AdapterError(key, f"{pattern!r} is no regular expression: {error}") from error


def _num_steps(pattern: str) -> float:
    """About how many ways there are to match a name of 64 characters.

    A match tries them all one after the other, and nobody can interrupt it.
    """
    if re.search(r"\)[*+{]", pattern) or len(pattern) > 1000:
        return math.inf
    num_repeats = sum(map(pattern.count, "*+{"))
    num_groups = max(1, pattern.count("("))
    num_choices = (1 + pattern.count("|") / num_groups) ** num_groups
    return float(64.0**num_repeats * 2.0 ** pattern.count("?") * num_choices)
