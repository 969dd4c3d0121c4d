"""Loading a policy with transformers: from a directory, a hub id, or a GGUF file.

Weights are read from safetensors or GGUF only and no code that comes with a model is run: pickled weights
and remote code execute whatever their author put in them.
"""

import logging
import os
from collections.abc import Sequence
from typing import Any, cast

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DistributedConfig,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from shopr1_client.wire import PolicyInfo
from shopr1_rewards.recipe import SelfCertaintyRecipe
from shopr1_rewards.self_certainty import Head
from shopr1_service.agreement import Agreement
from shopr1_service.codec import PolicyCodec
from shopr1_service.device import choose_device, choose_dtype, prefix_cache_bytes
from shopr1_service.engine import Engine, EngineStats, MeasuredCompletion, TokenGroup
from shopr1_service.errors import PolicyError
from shopr1_service.expanded_forward import ExpandedForward
from shopr1_service.forward import Forward, choose_forward
from shopr1_service.head import LinearHead, choose_head, trunk_of
from shopr1_service.heartbeat import Heartbeat
from shopr1_service.loaded_policy import LoadedPolicy
from shopr1_service.packed_forward import PackedForward
from shopr1_service.prefix import PrefixCache
from shopr1_service.settings import Settings
from shopr1_service.shared_forward import SharedPrefixForward
from shopr1_service.source import Source, find_source
from shopr1_service.startup import Startup, Step
from shopr1_service.traits import NUM_CHECK_TOKENS, UNLIMITED, check_ids, end_ids, longest_sequence
from shopr1_service.warm_up import warm_up

logger = logging.getLogger(__name__)

_NUM_PROBE_TOKENS = 4
"""Each passes through every weight; more of them would only lengthen the pause of an update."""
_WARM_UP_RULES = SelfCertaintyRecipe(alpha=0.005)


def load_policy(settings: Settings, startup: Startup | None = None) -> LoadedPolicy:
    """Load, check and warm up the policy that the settings name.

    Args:
        startup: is told how far it is.

    Raises:
        PolicyError: not found, not loadable, or not a model whose certainty can be measured.
    """
    startup = startup or Startup()
    source = find_source(settings.policy)
    try:
        startup.enter(Step.READING_WEIGHTS)
        if settings.tensor_parallel > 1:
            from shopr1_service.tensor_parallel.policy import load_on_all_ranks  # of no use to one device

            return load_on_all_ranks(source, settings, startup)
        tokenizer, model = load_model(source, settings)
        return build_policy(model, tokenizer, settings, name=source.name, startup=startup)
    except PolicyError:
        raise
    except Exception as error:  # a damaged checkpoint raises whatever its reader stumbles over
        reason = f"{type(error).__name__}: {error}"
        raise PolicyError(f"cannot load policy {source.name!r}: {reason}") from error


def load_model(
    source: Source, settings: Settings, distributed: DistributedConfig | None = None
) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """Tokenizer and model, on the device and in the dtype of the settings.

    Args:
        distributed: how the model is split; this process gets its part.
    """
    device = choose_device(settings.device)
    dtype = choose_dtype(settings.dtype, device)
    if settings.deterministic and device.type == "cuda":
        # cuBLAS sums in an order of its own choice unless it is given fixed work space.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    logger.info("loading %s on %s in %s", source.name, device, dtype)
    return _load(source, device, dtype, settings.revision, distributed)


def build_policy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: Settings,
    *,
    name: str,
    startup: Startup | None = None,
    agreement: Agreement | None = None,
) -> LoadedPolicy:
    """A policy of a model in memory: chooses head and forward by what they give on random tokens.

    Args:
        agreement: with the other processes that hold a part of the model.
    """
    startup, agreement = startup or Startup(), agreement or Agreement()
    startup.enter(Step.CHECKING)
    model.train(False)
    num_ids = cast("torch.nn.Embedding", model.get_input_embeddings()).num_embeddings
    longest = longest_sequence(model, tokenizer)
    max_sequence_tokens = settings.max_sequence_tokens or longest
    if max_sequence_tokens is None:
        raise PolicyError("the policy states no longest sequence; set max_sequence_tokens")
    random_ids = check_ids(model, num_ids, longest)
    head = choose_head(model, torch.tensor([random_ids[:NUM_CHECK_TOKENS]], device=model.device))
    cache = PrefixCache(UNLIMITED)
    candidates: list[Forward] = [
        SharedPrefixForward(model, cache),
        PackedForward(model),
        ExpandedForward(model),
    ]
    forward = choose_forward(model, random_ids, candidates)
    engine = Engine(
        forward,
        head,
        max_sequence_tokens=max_sequence_tokens,
        num_tokenizer_tokens=len(tokenizer),
        release_memory=lambda: _release_memory(cache),
        agree=agreement.settle,
    )
    startup.enter(Step.WARMING_UP)
    own_bytes = _cache_bytes(engine, model.device, random_ids, settings, max_sequence_tokens)
    cache.max_bytes = agreement.least(own_bytes)
    cache.reset()
    engine.stats = EngineStats(cache.stats)
    info = _info(model, tokenizer, settings, name, max_sequence_tokens, head, forward)
    logger.info("%s is ready: %s", name, info.model_dump_json())
    heartbeat = Heartbeat()
    trunk_of(model).register_forward_pre_hook(heartbeat.beat)

    def renew() -> None:
        if isinstance(head, LinearHead):
            head.renew()
        cache.enter(None)
        cache.clear()

    return LoadedPolicy(
        info,
        PolicyCodec(tokenizer, num_ids, end_ids(model, tokenizer)),
        engine,
        heartbeat,
        model,
        cache,
        renew=renew,
        probe=lambda: engine.certainties([_probe_group(random_ids)], _WARM_UP_RULES),
        staging_dir=settings.staging_dir,
    )


def _probe_group(random_ids: Sequence[int]) -> TokenGroup:
    """One pass: of all its tokens the last one is measured, which is not fed."""
    *prompt_ids, last = random_ids[:_NUM_PROBE_TOKENS]
    return TokenGroup(prompt_ids, [MeasuredCompletion([last], [0])])


def _cache_bytes(
    engine: Engine, device: torch.device, random_ids: Sequence[int], settings: Settings, max_tokens: int
) -> int:
    if settings.deterministic:
        # Whether a prompt's beginning was known changes the order of sums, hence the last bits.
        return 0
    if device.type == "cuda":
        warm_up(engine, random_ids, _WARM_UP_RULES, max_tokens=max_tokens)
    if settings.prefix_cache_bytes is not None:
        return settings.prefix_cache_bytes
    peak_bytes = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    return prefix_cache_bytes(device, settings.memory_share, peak_bytes=peak_bytes)


def _release_memory(cache: PrefixCache) -> None:
    cache.clear()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


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
        number=0,
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
    source: Source,
    device: torch.device,
    dtype: torch.dtype,
    revision: str | None,
    distributed: DistributedConfig | None,
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
    if distributed is not None:
        options["distributed_config"] = distributed
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        source.path, dtype=dtype, output_loading_info=True, **options
    )
    model: PreTrainedModel = loaded[0]
    loading: dict[str, Any] = loaded[1]
    if loading["missing_keys"]:  # transformers makes up random numbers for them
        missing = ", ".join(sorted(loading["missing_keys"])[:3])
        raise PolicyError(f"cannot load policy {source.name!r}: it has no weights for {missing} …")
    if distributed is None:
        torch.nn.Module.to(model, device)
    return tokenizer, model
