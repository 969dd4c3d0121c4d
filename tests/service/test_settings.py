"""Where settings come from, what overrides what, and what is refused."""

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr, ValidationError

from shopr1_service.errors import SettingsError
from shopr1_service.settings import DType, Settings, load_settings, wanted_log_format

KEYS = "one-0123456789abc,two-0123456789abc"


def shown(value: object) -> str:
    """A setting's value as it is written in a file."""
    if isinstance(value, dict):
        return json.dumps(value)
    if isinstance(value, tuple):
        parts = [part.get_secret_value() if isinstance(part, SecretStr) else str(part) for part in value]
        return ",".join(parts)
    return str(value)


def use_config(monkeypatch: pytest.MonkeyPatch, path: Path, toml: str | bytes) -> Path:
    path.write_bytes(toml if isinstance(toml, bytes) else toml.encode())
    monkeypatch.setenv("SHOPR1_CONFIG", str(path))
    return path


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SHOPR1_CACHE_BYTES")  # set for all other tests


def test_defaults() -> None:
    assert load_settings().model_dump() == {
        "host": "127.0.0.1",
        "port": 8000,
        "api_keys": (),
        "api_key_file": None,
        "allow_unauthenticated": False,
        "tls_cert_file": None,
        "tls_private_key_file": None,
        "policy": None,
        "revision": None,
        "policy_version": "0",
        "ignored_tensors": (),
        "policy_roots": (),
        "staging_dir": None,
        "max_adapters": 16,
        "adapter_versions": 2,
        "max_adapter_bytes": 2_147_483_648,
        "device": "auto",
        "dtype": DType.AUTO,
        "max_sequence_tokens": None,
        "self_check": "full",
        "cache_dir": None,
        "cache_bytes": 8_589_934_592,
        "chat_template": None,
        "chat_templates": (),
        "chat_template_kwargs": {},
        "chat_template_date": None,
        "end_tokens": (),
        "prefix_cache_bytes": None,
        "memory_share": 0.9,
        "deterministic": False,
        "max_queue_tokens": 1_048_576,
        "request_timeout_s": 540.0,
        "receive_timeout_s": 60.0,
        "engine_timeout_s": 600.0,
        "read_timeout_s": 3600.0,
        "recipe": "shop_r1",
        "max_body_bytes": 67_108_864,
        "max_groups": 1024,
        "max_completions_per_group": 256,
        "max_request_tokens": 4_194_304,
        "max_client_memory_bytes": 4_294_967_296,
        "max_body_values": 5_242_880,
        "max_text_chars": 1_048_576,
        "max_labels": 1_000_000,
        "openrlhf_unscorable": "error",
        "slime_unscorable": "error",
        "llama_factory_unscorable": "error",
        "nemo_gym_unscorable": "mask",
        "max_runs": 32,
        "log_format": "auto",
        "access_log": True,
        "tracing": False,
        "rollout_log": None,
        "rollout_log_bytes": 67_108_864,
        "rollout_log_files": 16,
        "rollout_log_text": False,
        "log_level": "info",
        "shutdown_grace_s": 30,
    }


@pytest.mark.parametrize(
    ("toml", "environment", "options", "expected"),
    [
        ("", None, {}, 8000),
        ("port = 1", None, {}, 1),
        ("", "2", {}, 2),
        ("port = 1", "2", {}, 2),
        ("", None, {"port": 3}, 3),
        ("port = 1", None, {"port": 3}, 3),
        ("", "2", {"port": 3}, 3),
        ("port = 1", "2", {"port": "3"}, 3),
    ],
)
def test_precedence(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    toml: str,
    environment: str | None,
    options: dict[str, Any],
    expected: int,
) -> None:
    use_config(monkeypatch, tmp_path / "shopr1.toml", toml)
    if environment is not None:
        monkeypatch.setenv("SHOPR1_PORT", environment)
    assert load_settings(options).port == expected


def test_sources_are_merged(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use_config(monkeypatch, tmp_path / "shopr1.toml", 'device = "cpu"\nmax_groups = 5\nport = 1\n')
    monkeypatch.setenv("SHOPR1_MAX_GROUPS", "6")
    monkeypatch.setenv("SHOPR1_DTYPE", "float32")
    settings = load_settings({"port": 9})
    assert (settings.device, settings.max_groups, settings.dtype, settings.port) == ("cpu", 6, "float32", 9)
    assert settings.recipe == "shop_r1"


@pytest.mark.parametrize("name", list(Settings.model_fields))
def test_every_setting_can_come_from_anywhere(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    special = {
        "api_keys": KEYS,
        "ignored_tensors": "v_head.*,*.k_scale",
        "policy_roots": "/a,/b c",
        "chat_templates": "/a.jinja,/b c.jinja",
        "chat_template_kwargs": '{"enable_thinking": false}',
        "chat_template_date": "2026-02-03",
        "end_tokens": "<|im_end|>,</s>",
        "dtype": "float16",
        "log_level": "debug",
        "deterministic": "True",
        "memory_share": "0.7",
        "request_timeout_s": "7.5",
        "receive_timeout_s": "7.5",
        "engine_timeout_s": "7.5",
        "read_timeout_s": "7.5",
        "allow_unauthenticated": "True",
        "access_log": "False",
        "tracing": "True",
        "rollout_log_text": "True",
        "log_format": "json",
        "openrlhf_unscorable": "-7.5",
        "slime_unscorable": "7.5",
        "llama_factory_unscorable": "error",
        "nemo_gym_unscorable": "error",
        "self_check": "short",
    }
    value = special.get(name, "7")
    toml = use_config(monkeypatch, tmp_path / "shopr1.toml", f"{name} = '{value}'")
    from_toml = load_settings()
    toml.write_text("")
    from_option = load_settings({name: value})
    monkeypatch.setenv(f"SHOPR1_{name.upper()}", value)
    from_environment = load_settings()
    for settings in (from_toml, from_option, from_environment):
        assert shown(getattr(settings, name)) == value
        assert settings.model_dump() == Settings.model_validate({name: value}).model_dump()


def test_limits() -> None:
    limits = load_settings({"max_body_bytes": 1, "max_groups": 2, "max_completions_per_group": 3}).limits
    assert limits.model_dump() == {
        "max_body_bytes": 1,
        "max_groups": 2,
        "max_completions_per_group": 3,
        "max_request_tokens": 4_194_304,
        "max_text_chars": 1_048_576,
    }


def test_frozen() -> None:
    settings = load_settings()
    with pytest.raises(ValidationError, match="frozen"):
        settings.port = 1
    assert settings.port == 8000


def test_options_of_prompts() -> None:
    assert Settings().prompt_options.given() == {}
    options = {"chat_template": "a", "chat_template_kwargs": {"x": 1}, "chat_template_date": "2026-02-03"}
    assert load_settings(options).prompt_options.given() == options


# --- rejections -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SHOPR1_PROT", "SHOPR1_", "SHOPR1_MAX_BODY", "shopr1_prot", "Shopr1_Prot"])
def test_unknown_variable(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "9001")
    with pytest.raises(SettingsError, match=f"{name} .*'9001'"):
        load_settings()


@pytest.mark.parametrize("name", ["SHOPR2_PORT", "PORT", "MY_SHOPR1_PORT", "SHOPR1"])
def test_other_variables_are_other_peoples(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "9001")
    assert load_settings().model_dump() == Settings().model_dump()


@pytest.mark.parametrize("toml", ["prot = 9001", "[server]\nport = 9001", "[port]\nx = 9001", "_port = 9001"])
def test_unknown_key_of_the_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, toml: str) -> None:
    use_config(monkeypatch, tmp_path / "shopr1.toml", toml)
    key = re.sub(r"\W.*", "", toml.removeprefix("["), flags=re.DOTALL)
    with pytest.raises(SettingsError, match=f"{key}.*9001"):
        load_settings()


@pytest.mark.parametrize(
    "key", ["prot", "", "port ", "config", "_env_prefix", "_case_sensitive", "_secrets_dir"]
)
def test_unknown_option(key: str) -> None:
    with pytest.raises(SettingsError, match=f"{key}.*'9001'"):
        load_settings({key: "9001"})


def test_a_setting_that_was_removed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A configuration that counts on it must not start without it."""
    with pytest.raises(SettingsError, match=r"^unknown setting 'tensor_parallel' \(value '4'\)$"):
        load_settings({"tensor_parallel": "4"})
    with monkeypatch.context() as patch:
        patch.setenv("SHOPR1_TENSOR_PARALLEL", "4")
        with pytest.raises(SettingsError, match=r"^unknown environment variable SHOPR1_TENSOR_PARALLEL "):
            load_settings()
    path = use_config(monkeypatch, tmp_path / "shopr1.toml", "tensor_parallel = 4")
    with pytest.raises(SettingsError) as caught:
        load_settings()
    assert str(caught.value) == f"unknown setting 'tensor_parallel' (value 4 in {path})"


MALFORMED: list[tuple[str, str]] = [
    ("port", "http"),
    ("port", "-1"),
    ("port", "65536"),
    ("port", "80.5"),
    ("port", ""),
    ("dtype", "float8"),
    ("max_groups", "0"),
    ("max_groups", "many"),
    ("max_body_bytes", "-5"),
    ("max_sequence_tokens", "0"),
    ("policy_version", ""),
    ("log_level", "loud"),
    ("log_level", "INFO"),
    ("shutdown_grace_s", "0"),
    ("max_labels", "0"),
    ("max_client_memory_bytes", "0"),
    ("openrlhf_unscorable", "zero"),
    ("slime_unscorable", "nan"),
    ("llama_factory_unscorable", "-inf"),
    ("nemo_gym_unscorable", "0"),
    ("chat_template_kwargs", "{"),
    ("chat_template_date", "tomorrow"),
]


@pytest.mark.parametrize(("name", "value"), MALFORMED)
def test_malformed_value(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, value: str) -> None:
    message = f"^{name}: .*{re.escape(repr(value))}"
    with pytest.raises(SettingsError, match=message):
        load_settings({name: value})
    with monkeypatch.context() as patch:
        patch.setenv(f"SHOPR1_{name.upper()}", value)
        with pytest.raises(SettingsError, match=message):
            load_settings()
    use_config(monkeypatch, tmp_path / "shopr1.toml", f'{name} = "{value}"')
    with pytest.raises(SettingsError, match=message):
        load_settings()


@pytest.mark.parametrize("toml", ["port = [1]", "port = {a = 1}", "host = 5", "policy = true"])
def test_malformed_type_in_the_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, toml: str) -> None:
    use_config(monkeypatch, tmp_path / "shopr1.toml", toml)
    with pytest.raises(SettingsError, match=toml.split()[0]):
        load_settings()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"port": "http"}, "port: must be an integer (got 'http')"),
        ({"port": "70000"}, "port: must be at most 65535 (got '70000')"),
        ({"max_groups": "0"}, "max_groups: must be greater than 0 (got '0')"),
        ({"log_level": "loud"}, "log_level: must be 'debug', 'info', 'warning' or 'error' (got 'loud')"),
        ({"slime_unscorable": "zero"}, "slime_unscorable: must be 'error' or must be a number (got 'zero')"),
        ({"max_grups": "3"}, "unknown setting 'max_grups' (value '3'); is max_groups meant?"),
        ({"staging_dir": ""}, "staging_dir: must not be empty (got '')"),
        ({"policy": ""}, "policy: must not be empty (got '')"),
        (
            {"chat_template_kwargs": '{"a": 1, "a": 2}'},
            """chat_template_kwargs: a: the key occurs twice (got '{"a": 1, "a": 2}')""",
        ),
        ({"chat_template_kwargs": "[1]"}, "chat_template_kwargs: must be an object (got [1])"),
        ({"api_key_file": ""}, "api_key_file: must not be empty (got …)"),
        ({"memory_share": "2"}, "memory_share: must be at most 1 (got '2')"),
        ({"deterministic": "maybe"}, "deterministic: must be true or false (got 'maybe')"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_messages_name_setting_rule_and_value(options: dict[str, str], message: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings(options)
    assert str(caught.value).replace(".0 (", " (") == message


def test_messages_name_the_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = use_config(monkeypatch, tmp_path / "shopr1.toml", "port = -1\nmax_groups = 0")
    monkeypatch.setenv("SHOPR1_PORT", "http")
    monkeypatch.setenv("SHOPR1_MAX_RUNS", "x")
    with pytest.raises(SettingsError) as caught:
        load_settings({"max_runs": "y"})
    assert str(caught.value).split("; ") == [
        "port: must be an integer (got 'http' in SHOPR1_PORT)",
        f"max_groups: must be greater than 0 (got 0 in {path})",
        "max_runs: must be an integer (got 'y')",
    ]


def test_long_values_are_shortened(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use_config(monkeypatch, tmp_path / "shopr1.toml", f"port = {list(range(10_000))}")
    with pytest.raises(SettingsError) as caught:
        load_settings()
    assert len(str(caught.value)) < 1000


def test_the_log_format_that_is_wanted_where_other_settings_are_wrong(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert wanted_log_format({"port": "http"}, None) == "auto"
    assert wanted_log_format({"log_format": "loud"}, None) == "auto"
    assert wanted_log_format({"log_format": "text", "port": "http"}, None) == "text"
    path = use_config(monkeypatch, tmp_path / "shopr1.toml", "log_format = 'json'\nprot = 1")
    assert wanted_log_format({}, None) == "json"
    monkeypatch.delenv("SHOPR1_CONFIG")
    assert wanted_log_format({}, path) == "json"
    assert wanted_log_format({"log_format": "text"}, path) == "text"
    monkeypatch.setenv("SHOPR1_LOG_FORMAT", "text")
    for broken in (b"port =", b"\xff", b"log_format = " + b"[" * 900):
        path.write_bytes(broken)
        assert wanted_log_format({}, path) == "text"
    assert wanted_log_format({}, tmp_path / "missing.toml") == "text"


def test_a_config_file_that_cannot_be_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = use_config(monkeypatch, tmp_path / "shopr1.toml", "port = 1")

    def refuse(*_args: object) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(SettingsError, match=f"^{re.escape(str(path))}: cannot be read: Permission denied$"):
        load_settings()


def test_all_flaws_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOPR1_DTYPE", "float8")
    with pytest.raises(SettingsError) as caught:
        load_settings({"port": "http", "prot": "1"})
    for part in ("dtype", "float8", "port", "http", "prot"):
        assert part in str(caught.value)


@pytest.mark.parametrize("path", ["missing.toml", "."])
@pytest.mark.parametrize("is_option", [False, True])
def test_config_file_is_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, path: str, is_option: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    if not is_option:
        monkeypatch.setenv("SHOPR1_CONFIG", path)
    with pytest.raises(SettingsError, match=f"no such file.*{re.escape(repr(path))}"):
        load_settings(config=Path(path) if is_option else None)


def test_the_config_option_is_stronger_than_the_variable(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    use_config(monkeypatch, tmp_path / "variable.toml", "port = 1\nmax_groups = 1")
    option = tmp_path / "option.toml"
    option.write_text("port = 2")
    settings = load_settings({"device": "cpu"}, option)
    assert (settings.port, settings.max_groups, settings.device) == (2, 1024, "cpu")


@pytest.mark.parametrize(
    "content",
    [
        b"port",
        b"port = ",
        b"{}",
        b"port = 1\nport = 2",
        b"\xff\xfe",
        b"\x00",
        pytest.param(b"port = " + b"1" * 5000, id="5000 digits"),
    ],
)
def test_config_file_is_not_toml(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: bytes) -> None:
    path = use_config(monkeypatch, tmp_path / "shopr1.toml", content)
    with pytest.raises(SettingsError, match=f"^{re.escape(str(path))}: not TOML: "):
        load_settings()


@pytest.mark.parametrize(
    "value",
    [
        pytest.param("[" * 900 + "]" * 900, id="900 lists"),
        pytest.param("0x" + "f" * 5000, id="5000 hexadecimal digits"),
    ],
)
def test_config_file_beyond_every_limit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, value: str) -> None:
    use_config(monkeypatch, tmp_path / "shopr1.toml", f"port = {value}")
    with pytest.raises(SettingsError):
        load_settings()


def test_config_file_with_a_byte_order_mark(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use_config(monkeypatch, tmp_path / "shopr1.toml", "port = 1".encode("utf-8-sig"))
    assert load_settings().port == 1


@pytest.mark.parametrize("name", ["shopr1_config", "Shopr1_Config"])
def test_the_config_variable_in_another_case(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    """Settings are found in any case; a config file must not be ignored in silence."""
    path = use_config(monkeypatch, tmp_path / "shopr1.toml", "port = 1")
    monkeypatch.delenv("SHOPR1_CONFIG")
    monkeypatch.setenv(name, str(path))
    try:
        port = load_settings().port
    except SettingsError:
        return
    assert port == 1


def test_no_stray_file_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for name in (".env", "shopr1.toml", "config.toml"):
        (tmp_path / name).write_text("SHOPR1_PORT=1\nport=1\n")
    assert load_settings().port == 8000


def test_loading_leaves_the_environment_alone(tmp_path: Path) -> None:
    config = tmp_path / "shopr1.toml"
    config.write_text("port = 5")
    before = dict(os.environ)
    assert load_settings({"max_groups": 6}, config).port == 5
    assert dict(os.environ) == before
    assert load_settings().port == 8000


# --- the cache --------------------------------------------------------------------------------------


def test_the_cache_is_in_the_users_cache_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Settings().cache == tmp_path / ".cache" / "shopr1"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert Settings().cache == tmp_path / "x" / "shopr1"
    assert Settings(cache_dir=tmp_path).cache == tmp_path
    assert Settings(cache_dir=tmp_path, cache_bytes=0).cache is None


def test_a_user_without_a_home_has_no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    assert Settings().cache is None
