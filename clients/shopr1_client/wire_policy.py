"""What travels over HTTP when the policy changes: its versions, updates and adapters, as pydantic models."""

from enum import StrEnum
from typing import Annotated, Literal, Self

from pydantic import Discriminator, Field, StrictInt, Tag, model_validator
from pydantic_core import PydanticCustomError

from shopr1_client.wire_base import NUMBER, STRING, AnswerModel, RequestModel, UnicodeText

BASE = "base"
"""As an adapter's name: the policy's own weights and no adapter."""
ADAPTER_CONFIG_KEY = "adapter_config"
"""In the `__metadata__` of an uploaded adapter: PEFT's `adapter_config.json`, as text."""

AdapterName = Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,128}$")]
VersionName = Annotated[UnicodeText, Field(min_length=1, max_length=256)]


def _key_kind(value: object) -> str | None:
    if isinstance(value, str):
        return STRING
    return NUMBER if isinstance(value, int) and not isinstance(value, bool) else None


VersionKey = Annotated[
    Annotated[str, Tag(STRING)] | Annotated[StrictInt, Tag(NUMBER)],
    Discriminator(
        _key_kind,
        custom_error_type="version_key_kind",
        custom_error_message="must be a version's name or its number",
    ),
]
"""A version by its name or by its number."""


class VersionDemand(RequestModel):
    """Which version of the policy a request wants to be scored with.

    A string is a version's name, a number its `policy_number`. A name that was given several times means the
    last of them.
    """

    exact: Annotated[VersionKey | None, Field(description="This version and no other.")] = None
    at_least: Annotated[VersionKey | None, Field(description="This version or any that came after it.")] = (
        None
    )
    wait_s: Annotated[
        float,
        Field(
            ge=0,
            allow_inf_nan=False,
            description="How long to wait for it before the answer is 409; not beyond the request's time.",
        ),
    ] = 0.0

    @model_validator(mode="after")
    def _check_one(self) -> Self:
        if (self.exact is None) == (self.at_least is None):
            raise PydanticCustomError("version_demand", "give either exact or at_least")
        return self


class VersionInfo(AnswerModel):
    """A version of the policy's weights, or of an adapter on them."""

    version: Annotated[str, Field(description="Opaque name, given by whoever brought the weights.")]
    number: Annotated[
        int,
        Field(description="Counts every change of weights and adapters since the service started, from 0."),
    ]
    adapter: Annotated[str | None, Field(description="Null: the policy's own weights.")] = None
    loaded_at: Annotated[float, Field(description="Unix time, s.")]


class Stage(StrEnum):
    """How far an update is."""

    RECEIVING = "receiving"
    """Weights come in and are checked; the old ones score."""
    KEEPING = "keeping"
    """The old ones are written down, so that there is a way back."""
    SWAPPING = "swapping"
    """Nothing is scored: the weights are being exchanged between two batches."""


class UpdateProgress(AnswerModel):
    """An update that is under way."""

    version: str
    stage: Stage
    num_bytes: Annotated[int, Field(description="Of weights, that have come.")]
    num_bytes_in_all: Annotated[int | None, Field(description="Null as long as that is not known.")]
    age_s: float


class PolicyState(AnswerModel):
    """The answer to `GET /policy`."""

    model: str
    current: Annotated[VersionInfo, Field(description="What scores a request that names nothing.")]
    base: Annotated[VersionInfo, Field(description="The policy's own weights.")]
    adapters: Annotated[
        list[VersionInfo], Field(description="Loaded versions of adapters, by name, the newest of each last.")
    ]
    default_adapter: Annotated[
        str | None, Field(description="Scores requests that name no adapter; null: the policy's own weights.")
    ]
    update: UpdateProgress | None


class UpdateRequest(RequestModel):
    """Weights from a checkpoint that the service can read."""

    path: Annotated[
        str,
        Field(
            min_length=1,
            max_length=4096,
            description="A directory with safetensors, below one of the service's `policy_roots`.",
        ),
    ]
    version: VersionName
    partial: Annotated[bool, Field(description="Some tensors only; the others stay as they are.")] = False


class TensorSpec(RequestModel):
    """A tensor that will be sent."""

    name: Annotated[str, Field(min_length=1, max_length=1024)]
    dtype: Annotated[Literal["F64", "F32", "BF16", "F16"], Field(description="As safetensors spells it.")]
    shape: list[Annotated[StrictInt, Field(ge=0)]]


class TransferRequest(RequestModel):
    """Weights that a trainer broadcasts in a torch.distributed group of two, made for this transfer alone.

    The trainer is rank 0 and serves the group's TCPStore; the service is rank 1. `broadcast.py` is the
    trainer's side, and says what travels.
    """

    version: VersionName
    partial: bool = False
    backend: Literal["gloo", "nccl"] = "gloo"
    host: Annotated[str, Field(min_length=1, max_length=253, description="Where the TCPStore is.")]
    port: Annotated[int, Field(ge=1, le=65535)]
    timeout_s: Annotated[
        float, Field(gt=0, le=3600, allow_inf_nan=False, description="For all of it; then it has failed.")
    ] = 300.0
    tensors: Annotated[list[TensorSpec], Field(min_length=1)]


class PolicyUpdate(AnswerModel):
    """What an update did."""

    current: VersionInfo
    former: VersionInfo
    num_tensors: int
    num_bytes: Annotated[int, Field(description="Of the weights, as they came.")]
    duration_s: Annotated[float, Field(description="From the first byte to the first batch on the new ones.")]
    pause_s: Annotated[
        float | None,
        Field(description="How long nothing was scored. Null only in a client that lost the answer."),
    ]
    unloaded_adapters: Annotated[
        list[str], Field(description="They belong to the weights that they were loaded on.")
    ] = []  # noqa: RUF012  # pydantic copies it


class AdapterRequest(RequestModel):
    """A LoRA adapter as PEFT writes it, from a directory that the service can read."""

    name: AdapterName
    path: Annotated[str, Field(min_length=1, max_length=4096)]
    version: Annotated[VersionName | None, Field(description="Default: its number.")] = None
    default: Annotated[
        bool, Field(description="From now on it scores the requests that name no adapter.")
    ] = False


class AdapterUpdate(AnswerModel):
    """What loading an adapter did."""

    current: VersionInfo
    rank: Annotated[int, Field(description="The largest of its layers.")]
    num_layers: int
    num_bytes: int
    duration_s: float
    unloaded: Annotated[list[VersionInfo], Field(description="Older versions that made room.")] = []  # noqa: RUF012  # pydantic copies it
