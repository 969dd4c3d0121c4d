"""What travels over HTTP, as pydantic models. The one definition for server, client and `openapi.yaml`.

A request is group-shaped because GRPO samples many completions from one prompt: the prompt travels, is
tokenised and is computed once. A lone rollout is a group of one.
"""

from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import (
    Discriminator,
    Field,
    StrictInt,
    Tag,
)

from shopr1_client.wire_base import (
    MESSAGES,
    OBJECT,
    STRING,
    TEXT,
    TOKEN_IDS,
    AnswerModel,
    RequestModel,
    UnicodeText,
)
from shopr1_client.wire_policy import AdapterName, VersionDemand

TokenId = Annotated[StrictInt, Field(ge=0)]


class TokenIds(RequestModel):
    """Token ids of the policy's tokenizer. The primary form: re-tokenising text drifts."""

    token_ids: list[TokenId]


class Text(RequestModel):
    """The same as a bare string. What a policy wrote may be no valid text: that is a format error."""

    text: str


class Message(RequestModel):
    """One message of a chat."""

    role: UnicodeText
    content: UnicodeText


def _prompt_kind(value: object) -> str | None:
    match value:
        case str():
            return STRING
        case list():
            return MESSAGES
        case dict() | TokenIds():
            return TOKEN_IDS
        case _:
            return None


def _completion_kind(value: object) -> str | None:
    match value:
        case str():
            return STRING
        case {"text": _} | Text():
            return TEXT
        case dict() | TokenIds():
            return TOKEN_IDS
        case _:
            return None


def _truth_kind(value: object) -> str | None:
    match value:
        case str():
            return STRING
        case dict():
            return OBJECT
        case _:
            return None


def _demand_kind(value: object) -> str | None:
    match value:
        case str():
            return STRING
        case dict() | VersionDemand():
            return OBJECT
        case _:
            return None


Prompt = Annotated[
    Annotated[UnicodeText, Tag(STRING)]
    | Annotated[list[Message], Tag(MESSAGES)]
    | Annotated[TokenIds, Tag(TOKEN_IDS)],
    Discriminator(
        _prompt_kind,
        custom_error_type="prompt_kind",
        custom_error_message='must be a string, a list of messages or {"token_ids": […]}',
    ),
]
Completion = Annotated[
    Annotated[str, Tag(STRING)] | Annotated[Text, Tag(TEXT)] | Annotated[TokenIds, Tag(TOKEN_IDS)],
    Discriminator(
        _completion_kind,
        custom_error_type="completion_kind",
        custom_error_message='must be a string, {"text": "…"} or {"token_ids": […]}',
    ),
]
GroundTruth = Annotated[
    Annotated[dict[str, Any], Tag(OBJECT)] | Annotated[str, Tag(STRING)],
    Discriminator(
        _truth_kind,
        custom_error_type="ground_truth_kind",
        custom_error_message="must be an object or a JSON string",
    ),
]
Demand = Annotated[
    Annotated[str, Tag(STRING)] | Annotated[VersionDemand, Tag(OBJECT)],
    Discriminator(
        _demand_kind,
        custom_error_type="policy_version_kind",
        custom_error_message="must be a version's name or an object",
    ),
]


class Include(StrEnum):
    """What an answer holds on demand."""

    TOKENS = "tokens"
    """`details.tokens`: the value of every token that was measured."""
    TOKEN_IDS = "token_ids"
    """`prompt_token_ids` and `details.completion_token_ids`: the ids that were used."""


class Group(RequestModel):
    """One prompt, the human's action, and the completions that a policy sampled."""

    id: Annotated[UnicodeText | None, Field(description="Echoed in the answer.")] = None
    prompt: Annotated[
        Prompt,
        Field(
            description=(
                "A string is used as it is, already templated: no special token is added. Messages go "
                "through the policy's chat template with the generation prompt. Token ids are taken as given."
            )
        ),
    ]
    ground_truth: Annotated[
        GroundTruth,
        Field(description="The human's action, as an object or as the same in a JSON string."),
    ]
    completions: Annotated[
        list[Completion],
        Field(
            description="Text is tokenised on its own, without special tokens, and appended to the prompt."
        ),
    ]


class ScoreRequest(RequestModel):
    """Groups to score."""

    recipe: Annotated[str | None, Field(description="Default: the service's default recipe.")] = None
    groups: list[Group]
    policy_version: Annotated[
        Demand | None,
        Field(description="Score with this version of the policy, or one that is new enough, or answer 409."),
    ] = None
    adapter: Annotated[
        AdapterName | None,
        Field(description="Score with this LoRA adapter; `base`: with none. Default: the service's default."),
    ] = None
    include: list[Include] = []  # noqa: RUF012  # pydantic copies it


class Status(StrEnum):
    """Whether there is a reward."""

    SCORED = "scored"
    UNSCORABLE = "unscorable"


class Reason(StrEnum):
    """Why a rollout has no reward."""

    SEQUENCE_TOO_LONG = "sequence_too_long"
    """Prompt and completion are longer than the policy's limit."""
    NON_FINITE_LOGITS = "non_finite_logits"
    """The policy answered with NaN or infinite logits."""
    NO_CONTEXT = "no_context"
    """The first token has nothing before it that could predict it: the prompt is empty."""
    OUT_OF_MEMORY = "out_of_memory"
    """The device's memory did not suffice, also not in smaller parts."""
    ENGINE_FAILURE = "engine_failure"
    """The forward failed; the service's log says how."""


class TokenCertainty(AnswerModel):
    """One measured token."""

    index: Annotated[int, Field(description="Position among the completion's tokens.")]
    token_id: int
    value: Annotated[
        float, Field(description="The recipe's divergence at this token, in nats (eq3: nats / V).")
    ]


class Details(AnswerModel):
    """Why the reward is what it is."""

    format_error: Annotated[str | None, Field(description="Code of what is wrong with the output.")]
    format_message: Annotated[str | None, Field(description="The same in words.")]
    predicted_action: Annotated[
        dict[str, str] | None, Field(description="The action as parsed; null where the format is invalid.")
    ]
    unknown_action_type: bool
    missing_attributes: Annotated[
        list[str], Field(description="Absent or empty attributes of the predicted type.")
    ]
    extra_keys: Annotated[list[str], Field(description="Keys that an answer need not have, as paths.")]
    similarity: Annotated[
        dict[str, float | None],
        Field(description="ROUGE-L F1 per attribute, before the threshold; null where not compared."),
    ]
    type_match: Annotated[bool, Field(description="The action's type is the human's.")]
    exact_match: Annotated[bool, Field(description="Type and all attributes equal the human's.")]
    self_certainty_nats: Annotated[
        float | None,
        Field(
            description="Mean over the measured tokens, in nats (eq3: nats / V); null where there is none."
        ),
    ]
    num_rationale_tokens: Annotated[int, Field(description="How many tokens were to be measured.")]
    tokens: Annotated[list[TokenCertainty] | None, Field(description="On `include: [tokens]`.")] = None
    completion_token_ids: Annotated[list[int] | None, Field(description="On `include: [token_ids]`.")] = None


class Reward(AnswerModel):
    """What one completion earned."""

    reward: Annotated[float | None, Field(description="Null if and only if the status is `unscorable`.")]
    status: Status
    reason: Reason | None
    message: Annotated[str | None, Field(description="The reason in words.")]
    components: Annotated[
        dict[str, float | None],
        Field(
            description=(
                "The terms of the reward by name, each already weighted: in this order they sum to it. The "
                "recipe declares the names. Null where a term could not be measured."
            )
        ),
    ]
    details: Details


class GroupScore(AnswerModel):
    """The rewards of a group, in the order of its completions."""

    id: str | None
    policy_version: Annotated[str, Field(description="Of the weights that scored this group.")]
    policy_number: Annotated[int, Field(description="The same version, counted since the service started.")]
    adapter: Annotated[str | None, Field(description="That scored this group; null: none.")] = None
    rewards: list[Reward]
    prompt_token_ids: Annotated[list[int] | None, Field(description="On `include: [token_ids]`.")] = None


class RecipeRef(AnswerModel):
    """Which recipe."""

    name: str
    digest: Annotated[str, Field(description="sha256 over every number and choice of the recipe.")]


class PolicyRef(AnswerModel):
    """Which policy. If it changed while the request was scored, the newest that scored a group of it."""

    model: str
    version: str
    number: int
    adapter: str | None = None


class ScoreResponse(AnswerModel):
    """The answer to `POST /score`: groups in the order of the request."""

    request_id: str
    recipe: RecipeRef
    policy: PolicyRef
    groups: list[GroupScore]


class Limits(AnswerModel):
    """What a request may hold."""

    max_body_bytes: int
    max_groups: int
    max_completions_per_group: int
    max_request_tokens: Annotated[int, Field(description="Prompts and completions of one request together.")]


class PolicyInfo(AnswerModel):
    """The loaded policy."""

    model: str
    version: str
    number: Annotated[int, Field(description="Counts every change of the weights, from 0.")]
    architecture: str
    dtype: str
    device: str
    num_head_rows: Annotated[int, Field(description="V of `vocabulary = head`.")]
    num_tokenizer_tokens: Annotated[int, Field(description="V of `vocabulary = tokenizer`.")]
    max_sequence_tokens: int
    head: Annotated[str, Field(description="How logits are made from hidden states: `linear` or `module`.")]
    forward: Annotated[
        str,
        Field(description="How prompts are shared: `shared_prefix`, `packed`, `expanded` or `independent`."),
    ]


class Info(AnswerModel):
    """What this service is."""

    version: str
    policy: PolicyInfo
    limits: Limits
    default_recipe: RecipeRef
    recipes: list[RecipeRef]


class Health(AnswerModel):
    """A passed health check."""

    status: Literal["live", "ready"]


class Problem(AnswerModel):
    """RFC 9457 problem details."""

    type: str
    title: str
    status: int
    detail: str
    code: Annotated[str, Field(description="Stable name of the kind of error.")]
    request_id: str | None
    errors: Annotated[
        list["ProblemField"], Field(description="The bad fields, where the request is at fault.")
    ]


class ProblemField(AnswerModel):
    """One bad field of a request."""

    location: str
    message: str
