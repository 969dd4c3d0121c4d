"""Pydantic models of the policy's versions, updates and adapters."""

from enum import StrEnum
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, StrictInt, Tag, model_validator
from pydantic_core import PydanticCustomError

from shopr1_client.wire_base import (
    NUMBER,
    STRING,
    AnswerModel,
    RequestModel,
    UnicodeText,
    by_type,
    matches,
)

BASE = "base"
"""As an adapter's name: the policy's own weights and no adapter."""
ADAPTER_CONFIG_KEY = "adapter_config"
"""In the `__metadata__` of an uploaded adapter: PEFT's `adapter_config.json`, as text."""
BASE_SAMPLE_KEY = "base_sample"
"""In the same place, optional: JSON of `TensorSample` by the name of the sender's base weights."""

_ADAPTER_NAME = "[A-Za-z0-9._-]{1,128}"

AdapterName = Annotated[
    str,
    AfterValidator(matches(_ADAPTER_NAME, "must be 1 to 128 of A-Z a-z 0-9 . _ -")),
    Field(json_schema_extra={"pattern": f"^{_ADAPTER_NAME}$"}),
]
VersionName = Annotated[UnicodeText, Field(min_length=1, max_length=256)]


VersionKey = Annotated[
    Annotated[str, Tag(STRING)] | Annotated[StrictInt, Tag(NUMBER)],
    by_type({STRING: str, NUMBER: int}, "version_key_kind", "must be a version's name or its number"),
]
"""Name or number of a version."""


class VersionDemand(RequestModel):
    """The version of the policy that a request requires.

    A string is a version's name, a number its `policy_number`. A name that several versions have means the
    last of them.
    """

    exact: Annotated[VersionKey | None, Field(description="This version and no other.")] = None
    at_least: Annotated[VersionKey | None, Field(description="This version or any later one.")] = None
    wait_s: Annotated[
        float,
        Field(
            ge=0,
            allow_inf_nan=False,
            description="How long to wait for it before the answer is 409, within the request's deadline.",
        ),
    ] = 0.0

    @model_validator(mode="after")
    def _check_one(self) -> Self:
        if (self.exact is None) == (self.at_least is None):
            raise PydanticCustomError("version_demand", "give either exact or at_least")
        return self


class VersionInfo(AnswerModel):
    """A version of the policy's weights, or of an adapter on them."""

    version: Annotated[str, Field(description="Opaque name, chosen by the client that sent the weights.")]
    number: Annotated[
        int,
        Field(description="Number of changes of weights and adapters since the service started, from 0."),
    ]
    adapter: Annotated[str | None, Field(description="Null: the policy's own weights.")] = None
    loaded_at: Annotated[float, Field(description="Unix time, s.")]


class Stage(StrEnum):
    """Stage of an update."""

    RECEIVING = "receiving"
    """Weights are received and checked; the old ones score."""
    KEEPING = "keeping"
    """The old weights are saved for a rollback."""
    SWAPPING = "swapping"
    """Weights are swapped between two batches; nothing is scored."""


class UpdateProgress(AnswerModel):
    """A running update."""

    version: str
    stage: Stage
    num_bytes: Annotated[int, Field(description="Received bytes of weights.")]
    num_bytes_in_all: Annotated[int | None, Field(description="Null while unknown.")]
    age_s: float


class PolicyState(AnswerModel):
    """The answer to `GET /policy`."""

    model: str
    current: Annotated[
        VersionInfo, Field(description="The version that scores a request without a version or adapter.")
    ]
    base: Annotated[VersionInfo, Field(description="The policy's own weights.")]
    adapters: Annotated[
        list[VersionInfo], Field(description="Loaded versions of adapters by name, oldest first.")
    ]
    default_adapter: Annotated[
        str | None, Field(description="Scores requests without an adapter; null: the policy's own weights.")
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
    partial: Annotated[bool, Field(description="Only some tensors; the others stay unchanged.")] = False


class TensorSpec(RequestModel):
    """Name, dtype and shape of a tensor to send."""

    name: Annotated[str, Field(min_length=1, max_length=1024)]
    dtype: Annotated[Literal["F64", "F32", "BF16", "F16"], Field(description="As safetensors spells it.")]
    shape: list[Annotated[StrictInt, Field(ge=0)]]


class TensorSample(RequestModel):
    """Some numbers of a tensor: every `step`-th in row-major order, from the first on."""

    dtype: Literal["F64", "F32", "BF16", "F16"]
    shape: list[Annotated[StrictInt, Field(ge=0)]]
    step: Annotated[StrictInt, Field(ge=1)]
    values: Annotated[list[float], Field(max_length=1024)]


class TransferRequest(RequestModel):
    """Weights that a trainer broadcasts in a torch.distributed group of two, created for this transfer.

    The trainer is rank 0 and serves the group's TCPStore; the service is rank 1. `updates/broadcast.py` is
    the trainer's side and describes the protocol.
    """

    version: VersionName
    partial: bool = False
    backend: Literal["gloo", "nccl"] = "gloo"
    host: Annotated[str, Field(min_length=1, max_length=253, description="Host of the TCPStore.")]
    port: Annotated[int, Field(ge=1, le=65535)]
    timeout_s: Annotated[
        float, Field(gt=0, le=3600, allow_inf_nan=False, description="Time limit of the whole transfer.")
    ] = 300.0
    tensors: Annotated[list[TensorSpec], Field(min_length=1)]


class PolicyUpdate(AnswerModel):
    """Result of an update."""

    current: VersionInfo
    former: VersionInfo
    num_tensors: int
    num_bytes: Annotated[int, Field(description="Received bytes of weights.")]
    duration_s: Annotated[
        float, Field(description="From the first byte to the first batch with the new weights.")
    ]
    pause_s: Annotated[
        float | None,
        Field(description="Time without scoring. Null only in a client that lost the answer."),
    ]
    unloaded_adapters: Annotated[list[str], Field(description="Adapters of the old weights.")] = []  # noqa: RUF012  # pydantic copies it


class AdapterRequest(RequestModel):
    """A LoRA adapter as PEFT writes it, from a directory that the service can read."""

    name: AdapterName
    path: Annotated[str, Field(min_length=1, max_length=4096)]
    version: Annotated[VersionName | None, Field(description="Default: its number.")] = None
    default: Annotated[bool, Field(description="Make it the default adapter, for requests without one.")] = (
        False
    )


class AdapterUpdate(AnswerModel):
    """Result of loading an adapter."""

    current: VersionInfo
    rank: Annotated[int, Field(description="Largest rank of its layers.")]
    num_layers: int
    num_bytes: int
    duration_s: float
    unloaded: Annotated[
        list[VersionInfo], Field(description="Older versions that were unloaded to make room.")
    ] = []  # noqa: RUF012  # pydantic copies it
