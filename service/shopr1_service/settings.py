"""The service's settings: each is defined once, here.

Sources, in order of precedence: the command line, the environment (`SHOPR1_PORT=8000`), a TOML file
(`SHOPR1_CONFIG` or `--config`), the defaults below. An unknown key or a malformed value is refused at start,
and the message names both.
"""

import contextlib
import difflib
import json
import os
import reprlib
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from enum import StrEnum
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, cast

from pydantic import Field, SecretStr, ValidationError, field_validator
from pydantic_core import ErrorDetails
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from shopr1_client.field_messages import plain_message
from shopr1_client.json_text import read_json
from shopr1_client.wire import Limits
from shopr1_client.wire_prompt import IsoDate, PromptOptions, TemplateArguments
from shopr1_service.errors import SettingsError

ENV_PREFIX = "SHOPR1_"
CLIENT_PREFIX = "SHOPR1_CLIENT_"
"""Prefix of the trainer shims' variables, which may be set on the same machine."""
CONFIG_VARIABLE = "SHOPR1_CONFIG"

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 300

PositiveInt = Annotated[int, Field(gt=0)]

Unscorable = Literal["error"] | Annotated[float, Field(allow_inf_nan=False)]
"""A trainer's response for a rollout that cannot be scored: the problem `unscorable`, or this number."""


class DType(StrEnum):
    """Precision of the policy's weights."""

    AUTO = "auto"
    """bfloat16 where the hardware multiplies it natively (CUDA, AMX), else float32."""
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class LogFormat(StrEnum):
    """Format of log lines."""

    AUTO = "auto"
    """Text on a terminal, else JSON."""
    TEXT = "text"
    JSON = "json"


class _Sources(BaseSettings):
    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, frozen=True, validate_default=True)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Command line, environment, TOML file; no `.env` file that happens to be there."""
        return (init_settings, env_settings, _TomlSource(settings_cls))


class _LogFormatOnly(_Sources):
    model_config = SettingsConfigDict(extra="ignore")

    log_format: LogFormat = LogFormat.AUTO


class Settings(_Sources):
    """Frozen after start."""

    model_config = SettingsConfigDict(extra="forbid")

    host: str = "127.0.0.1"
    """Address to listen on."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """Port to listen on; 0 lets the system choose."""

    api_keys: Annotated[tuple[SecretStr, ...], NoDecode] = ()
    """Keys as `[scope[+scope]:]key`, separated by commas, so that they can be rotated one by one. Without any
    the service is open to everybody. See `http/api_keys.py`."""
    api_key_file: Path | None = None
    """File of further keys, one per line; read again when it changes."""
    allow_unauthenticated: bool = False
    """Listen without keys on an address that others can reach."""
    tls_cert_file: Path | None = None
    """Certificate chain, PEM. With it the service accepts only HTTPS."""
    tls_private_key_file: Path | None = None
    """Its private key, PEM."""

    policy: str | None = None
    """Directory, hub id or GGUF file of the policy; default: the embedded SmolLM2-135M-Instruct."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    ignored_tensors: Annotated[tuple[str, ...], NoDecode] = ()
    """Tensors of checkpoints that the policy need not compute with, separated by commas; `*` and `?` match as
    in file names (`v_head.*`). Any other tensor without a place in the model is refused, at start and in
    updates."""
    policy_version: Annotated[str, Field(min_length=1)] = "0"
    """Opaque name of the loaded weights; every response contains it."""
    policy_roots: Annotated[tuple[Path, ...], NoDecode] = ()
    """Directories, separated by commas, below which an update may name checkpoints and adapters. Without any,
    updates must upload their weights."""
    staging_dir: Path | None = None
    """Directory for new weights until they replace the old ones; needs room for two copies. Default: the
    system's directory for temporary files. `/dev/shm` is fast, but uses memory."""
    max_adapters: PositiveInt = 16
    """Most LoRA adapters, by name, that are loaded at a time."""
    adapter_versions: PositiveInt = 2
    """Versions of each adapter that stay loaded, for rollouts that were sampled a little earlier."""
    max_adapter_bytes: PositiveInt = 2 * 2**30
    """Largest adapter, in bytes."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:1` …"""
    dtype: DType = DType.AUTO
    max_sequence_tokens: PositiveInt | None = None
    """Longest prompt with completion; default: the limit in the policy's config."""

    self_check: Literal["full", "short"] = "full"
    """The check at load: `full` runs sequences longer than every window of the policy; `short` runs
    short ones, which do not show whether long prompts are computed rightly."""
    cache_dir: Path | None = None
    """Directory of what later starts need not do again: copies of converted GGUF files, and outcomes of full
    checks, by architecture, versions and device. Default: `shopr1` in `XDG_CACHE_HOME` or `~/.cache`."""
    cache_bytes: Annotated[int, Field(ge=0)] = 8 * 2**30
    """Most bytes of the copies; the least recently used are deleted. 0: nothing is kept for later starts."""
    chat_template: str | None = None
    """Chat template of requests that name none: a name in `chat_templates` or in the tokenizer. Default: the
    tokenizer's own."""
    chat_templates: Annotated[tuple[Path, ...], NoDecode] = ()
    """Files of further chat templates, Jinja, separated by commas. A request chooses one by the file's name
    without suffix, or by its text."""
    chat_template_kwargs: Annotated[TemplateArguments, NoDecode] = {}
    """Arguments of the chat template, JSON, such as `{"enable_thinking": false}`. Those of a request replace
    them, name by name."""
    chat_template_date: IsoDate | None = None
    """Date that `strftime_now` in a chat template takes for now, in ISO 8601. Default: the clock's."""
    end_tokens: Annotated[tuple[str, ...], NoDecode] = ()
    """Further tokens, separated by commas, that may follow an answer: those of the tokenizer, the model's
    configuration and the chat template are known."""

    prefix_cache_bytes: Annotated[int, Field(ge=0)] | None = None
    """Size of the prefix cache, which keeps the KV of prompts across requests; 0 turns it off. Default: 2 GiB
    on a CPU, on CUDA the rest of `memory_share`."""
    memory_share: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Share of a CUDA device's memory for weights, forward passes and the prefix cache together."""

    deterministic: bool = False
    """The same request gives the same bits: each group is computed alone, and there is no prefix cache."""
    max_queue_tokens: PositiveInt = 2**20
    """Queue capacity, in tokens; beyond it requests get 429 with `Retry-After`."""
    request_timeout_s: Annotated[float, Field(gt=0, le=86_400)] = 540.0
    """Seconds a request may take; then it gets 504. `X-Request-Timeout` can ask for less."""
    receive_timeout_s: Annotated[float, Field(gt=0, le=3600)] = 60.0
    """Seconds a request's head may take to arrive, and then its body; and how long a client may take nothing
    of its answer."""
    engine_timeout_s: Annotated[float, Field(gt=0, le=86_400)] = 600.0
    """Seconds after which a forward pass counts as hanging; the process then ends with exit code 1."""
    read_timeout_s: Annotated[float, Field(gt=0, le=86_400)] = 3600.0
    """Seconds for reading the files of a checkpoint or an adapter; then the update fails."""

    recipe: str = "shop_r1"
    """Default recipe: the name of a shipped one, or a TOML file."""

    max_body_bytes: PositiveInt = 64 * 2**20
    max_groups: PositiveInt = 1024
    max_completions_per_group: PositiveInt = 256
    max_request_tokens: PositiveInt = 4 * 2**20
    """Prompts and completions of one request together."""
    max_body_values: PositiveInt = 5 * 2**20
    """Numbers, strings and other values of one body, counted by its commas, with those inside strings."""
    max_text_chars: PositiveInt = 2**20
    """Characters of one completion, or of one prompt, with its roles and 16 more for each message."""

    max_client_memory_bytes: PositiveInt = 4 * 2**30
    """Memory for what clients send and make the service keep: requests, kept answers, labels, adapters.
    Beyond it requests get 429 with `Retry-After`, or 413 if they never fit."""

    max_labels: PositiveInt = 1_000_000
    """Capacity of the label store (`PUT /labels`), of all runs; a label takes some hundred bytes."""

    # OpenRLHF, slime and LLaMA-Factory have no way to express that there is no reward. They train on a number
    # like on any other; `shopr1_fallback_rewards_total` counts them.
    openrlhf_unscorable: Unscorable = "error"
    slime_unscorable: Unscorable = "error"
    llama_factory_unscorable: Unscorable = "error"
    nemo_gym_unscorable: Literal["mask", "error"] = "mask"
    """NeMo Gym can: the rollout is marked as failed and masked. verifiers and Axolotl ignore the mark."""

    max_runs: PositiveInt = 32
    """Training runs (`X-Run-ID`) that metrics distinguish; the one that was idle longest is dropped first."""
    log_format: LogFormat = LogFormat.AUTO
    access_log: bool = True
    """Log a line for each request, except health checks and metrics."""
    tracing: bool = False
    """Send OpenTelemetry spans, configured by OpenTelemetry's own variables; needs the extra `otel`."""
    rollout_log: Path | None = None
    """Directory for JSONL files of every scored rollout."""
    rollout_log_bytes: PositiveInt = 64 * 2**20
    """Largest of these files, in bytes."""
    rollout_log_files: PositiveInt = 16
    """Number of these files; the oldest is deleted."""
    rollout_log_text: bool = False
    """Write prompts and completions into them too."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    shutdown_grace_s: PositiveInt = 30
    """Seconds for open requests to finish after SIGTERM."""

    @field_validator(
        *("api_key_file", "tls_cert_file", "tls_private_key_file", "staging_dir", "cache_dir"),
        *("rollout_log", "policy", "revision", "chat_template"),
        mode="before",
    )
    @classmethod
    def _check_not_empty(cls, value: object) -> object:
        if value == "":  # as a path it would be the working directory
            raise ValueError("must not be empty")
        return value

    @field_validator("chat_template_kwargs", mode="before")
    @classmethod
    def _from_json(cls, value: object) -> object:
        try:
            return read_json(value) if isinstance(value, str) else value
        except json.JSONDecodeError as error:
            raise ValueError(f"not JSON: {error}") from None

    @field_validator(
        *("api_keys", "chat_templates", "end_tokens", "ignored_tensors", "policy_roots"), mode="before"
    )
    @classmethod
    def _split(cls, value: object) -> object:
        return (
            [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value
        )

    @property
    def prompt_options(self) -> PromptOptions:
        """Options for the prompts of requests that have none."""
        return PromptOptions(
            chat_template=self.chat_template,
            chat_template_kwargs=self.chat_template_kwargs or None,
            chat_template_date=self.chat_template_date,
        )

    @property
    def cache(self) -> Path | None:
        """The directory that is kept for later starts; None: nothing is."""
        if self.cache_bytes == 0:
            return None
        if self.cache_dir is not None:
            return self.cache_dir
        try:
            return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "shopr1")
        except RuntimeError:  # a container's user without a home
            return None

    @property
    def limits(self) -> Limits:
        return Limits(**{name: getattr(self, name) for name in Limits.model_fields})


class _TomlSource(TomlConfigSettingsSource):
    """The TOML file, which may begin with a byte order mark."""

    def _read_file(self, file_path: Path | Traversable) -> dict[str, Any]:
        return tomllib.loads(file_path.read_text("utf-8-sig"))


_Kind = TypeVar("_Kind", bound=_Sources)


def load_settings(options: Mapping[str, Any] | None = None, config: Path | None = None) -> Settings:
    """The settings, with the command line's `options` on top.

    Args:
        config: a TOML file; default: the one that `SHOPR1_CONFIG` names, if it is set.

    Raises:
        SettingsError: an unknown key or a malformed value. It names it, its value, and where it was given.
    """
    options = options or {}
    _refuse_unknown_variables()
    _refuse_private_options(options)
    source = "" if config else f" ({CONFIG_VARIABLE})"
    config = config or _config_from_environment()
    if config is not None and not config.is_file():
        raise SettingsError(f"no such file of settings: {str(config)!r}{source}")
    try:
        return _load(Settings, options, config)
    except ValidationError as error:
        raise SettingsError("; ".join(_messages(error, options, config))) from error
    except RecursionError:
        raise SettingsError(f"{config}: nested too deeply") from None
    except OSError as error:
        raise SettingsError(f"{config}: cannot be read: {error.strerror or error}") from error
    except ValueError as error:  # also of an integer with thousands of digits
        raise SettingsError(f"{config}: not TOML: {error}") from error


def wanted_log_format(options: Mapping[str, Any], config: Path | None) -> LogFormat:
    """The format of log lines, as well as it can be found out where other settings are wrong."""
    given = {name: value for name, value in options.items() if name == "log_format"}
    for file in (config or _config_from_environment(), None):
        with contextlib.suppress(ValueError, OSError, RecursionError):
            return _load(_LogFormatOnly, given, file).log_format
    return LogFormat.AUTO


def _load(kind: type[_Kind], options: Mapping[str, Any], config: Path | None) -> _Kind:
    class Configured(kind):  # type: ignore[misc, valid-type]  # a base that is a variable
        model_config = SettingsConfigDict(toml_file=config)

    return cast("_Kind", Configured(**options))


def _messages(error: ValidationError, options: Mapping[str, Any], config: Path | None) -> Iterator[str]:
    """A sentence for each wrong setting."""
    by_key: dict[str, list[ErrorDetails]] = {}
    for details in error.errors():
        by_key.setdefault(str(details["loc"][0]), []).append(details)
    for key, flaws in by_key.items():
        given = f"{_shown(key, flaws[0]['input'])}{_place(key, options, config)}"
        if flaws[0]["type"] == "extra_forbidden":
            yield f"unknown setting {key!r} (value {given}){_closest(key, Settings.model_fields)}"
        else:  # a union has an error for each of its members
            rules = dict.fromkeys(map(plain_message, flaws))
            yield f"{key}: {' or '.join(rules)} (got {given})"


def _place(key: str, options: Mapping[str, Any], config: Path | None) -> str:
    """Where a setting was given; nothing for the command line, which the reader has just written."""
    if key in options:
        return ""
    variable = next((name for name in os.environ if name.upper() == f"{ENV_PREFIX}{key.upper()}"), None)
    return f" in {variable}" if variable else f" in {config}"


def _closest(name: str, known: Iterable[str]) -> str:
    found = difflib.get_close_matches(name, list(known), 1, 0.75)
    return f"; is {found[0]} meant?" if found else ""


def _shown(name: str, value: object) -> str:
    """A value for an error message, hidden where it may be a secret."""
    try:
        return "…" if "key" in name.lower() else _SHORT.repr(value)
    except ValueError:  # Python writes no integer with thousands of digits
        return "an integer with thousands of digits"


def _config_from_environment() -> Path | None:
    values = [value for name, value in os.environ.items() if name.upper() == CONFIG_VARIABLE]
    return Path(values[0]) if values else None


def _refuse_private_options(options: Mapping[str, Any]) -> None:
    # Settings() would take some of these for keyword arguments of its own, such as `_env_prefix`.
    for name, value in options.items():
        if name.startswith("_"):
            raise SettingsError(f"unknown setting {name!r} (value {value!r})")


def _refuse_unknown_variables() -> None:
    known = {f"{ENV_PREFIX}{name.upper()}" for name in Settings.model_fields} | {CONFIG_VARIABLE}
    for name, value in os.environ.items():
        is_ours = name.upper().startswith(ENV_PREFIX) and not name.upper().startswith(CLIENT_PREFIX)
        if is_ours and name.upper() not in known:
            closest = _closest(name.upper(), known)
            raise SettingsError(f"unknown environment variable {name} (value {_shown(name, value)}){closest}")
