"""Settings of the shims, from arguments and the environment. All are checked together, at every use."""

import os
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from shopr1_client.base import checked_urls
from shopr1_client.errors import SettingsError
from shopr1_client.field_messages import plain_message
from shopr1_client.json_text import DuplicateKeyError, read_json
from shopr1_client.proxies import DIRECT, SCHEMES, url_flaw, without_passwords
from shopr1_client.transport import check_header_value
from shopr1_client.wire_base import matches
from shopr1_client.wire_prompt import TemplateArguments

PREFIX = "SHOPR1_CLIENT_"
DEFAULT_URL = "http://127.0.0.1:8000"
DEFAULT_DEMAND_WAIT_S = 60.0

_VARIABLES = {"urls": f"{PREFIX}URL"}
"""The variables whose names are not those of their fields."""


def _split_urls(value: object) -> object:
    return [url for url in map(str.strip, value.split(",")) if url] if isinstance(value, str) else value


def _check_urls(urls: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(checked_urls(urls))


def _check_proxy(proxy: str) -> str:
    if proxy != DIRECT and (flaw := url_flaw(proxy, SCHEMES)):
        raise ValueError(flaw)
    return proxy


def _from_json(value: object) -> object:
    try:
        return read_json(value) if isinstance(value, str) else value
    except DuplicateKeyError:
        raise
    except (ValueError, RecursionError):
        raise ValueError("must be a JSON object") from None


HeaderValue = Annotated[str, AfterValidator(check_header_value)]


class ClientSettings(BaseModel):
    """Options of the shims' requests; each is also a variable of the environment.

    Attributes:
        urls: a server, or several that serve the same policy (`SHOPR1_CLIENT_URL`, separated by commas).
        api_key: sent as a bearer token (`SHOPR1_CLIENT_API_KEY`).
        recipe: None: the service's default (`SHOPR1_CLIENT_RECIPE`).
        unscorable: reward of unscorable rollouts for trainers that require a number; None: an error
            (`SHOPR1_CLIENT_UNSCORABLE`).
        run: the training run in the service's metrics (`SHOPR1_CLIENT_RUN`).
        demand: `exact`: the version that the trainer sent last scores, if the shim knows it; `at_least`: that
            one or a later one; None: any (`SHOPR1_CLIENT_DEMAND`).
        demand_wait_s: how long the service waits for that version (`SHOPR1_CLIENT_DEMAND_WAIT_S`).
        chat_template_kwargs: arguments of the chat template, in addition to those that the shim knows from
            the trainer (`SHOPR1_CLIENT_CHAT_TEMPLATE_KWARGS`, a JSON object).
        proxy: see `BaseClient` (`SHOPR1_CLIENT_PROXY`).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    urls: Annotated[tuple[str, ...], BeforeValidator(_split_urls), AfterValidator(_check_urls)] = (
        DEFAULT_URL,
    )
    api_key: HeaderValue | None = Field(default=None, repr=False)
    recipe: str | None = None
    unscorable: Annotated[float, Field(allow_inf_nan=False)] | None = None
    run: (
        Annotated[
            str, AfterValidator(matches(r"[A-Za-z0-9._-]{1,64}", "must be 1 to 64 of A-Z a-z 0-9 . _ -"))
        ]
        | None
    ) = None
    demand: Literal["exact", "at_least"] | None = None
    demand_wait_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] = DEFAULT_DEMAND_WAIT_S
    chat_template_kwargs: Annotated[TemplateArguments, BeforeValidator(_from_json)] | None = None
    proxy: Annotated[str, AfterValidator(_check_proxy)] | None = None

    @classmethod
    def read(cls, arguments: Mapping[str, Any]) -> Self:
        """The settings of these arguments, with defaults from the environment; empty means not set.

        Raises:
            SettingsError: names each invalid argument or variable, and its value.
        """
        variables = {name: _VARIABLES.get(name, PREFIX + name.upper()) for name in cls.model_fields}
        _refuse_unknown(variables.values())
        values, sources = dict[str, Any](), dict[str, str]()
        for name, variable in variables.items():
            if arguments.get(name) not in (None, ""):
                values[name], sources[name] = arguments[name], f"`{name}`"
            elif os.environ.get(variable):
                values[name], sources[name] = os.environ[variable], variable
        try:
            return cls(**values)
        except ValidationError as error:
            raise SettingsError(
                "; ".join(_message(each, values, sources) for each in error.errors())
            ) from None


def _message(error: Any, values: Mapping[str, Any], sources: Mapping[str, str]) -> str:  # noqa: ANN401  # pydantic's
    name = error["loc"][0]
    # Keys and passwords are secrets.
    shown = "not valid" if name == "api_key" else without_passwords(repr(values[name]))
    return f"{sources[name]} is {shown}: {plain_message(error)}"


def _refuse_unknown(known: Any) -> None:  # noqa: ANN401
    unknown = sorted(name for name in os.environ if name.startswith(PREFIX) and name not in set(known))
    if unknown:
        raise SettingsError(f"unknown variable {unknown[0]}; there are: {', '.join(known)}")
