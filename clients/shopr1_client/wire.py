"""Pydantic models of requests and answers, shared by server, client and `openapi.yaml`.

A request consists of groups because GRPO samples many completions from one prompt: the prompt is sent,
tokenised and computed once. A single rollout is a group of one. Weights and versions are in `wire_policy.py`.
"""

from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, StrictInt, Tag

from shopr1_client.data_set_values import to_json_types
from shopr1_client.wire_base import (
    IN_PIECES,
    MESSAGES,
    OBJECT,
    STRING,
    TEXT,
    TEXTS_AT_ONCE,
    TOKEN_IDS,
    AnswerModel,
    RequestModel,
    UnicodeText,
    by_type,
)
from shopr1_client.wire_policy import AdapterName, VersionDemand
from shopr1_client.wire_prompt import PromptOptions, ScoreWarning

TokenId = Annotated[StrictInt, Field(ge=0)]


class TokenIds(RequestModel):
    """Token ids of the policy's tokenizer. The preferred form: re-tokenising text can give other ids."""

    token_ids: Annotated[list[TokenId], Field(fail_fast=True)]


class Text(RequestModel):
    """Equivalent to a plain string. Text that is not valid Unicode is a format error, not a bad request."""

    text: str


class Message(RequestModel):
    """One message of a chat."""

    role: UnicodeText
    content: UnicodeText


Prompt = Annotated[
    Annotated[UnicodeText, Tag(STRING)]
    | Annotated[list[Message], IN_PIECES, Tag(MESSAGES)]
    | Annotated[TokenIds, Tag(TOKEN_IDS)],
    by_type(
        {STRING: str, MESSAGES: list, TOKEN_IDS: (dict, TokenIds)},
        "prompt_kind",
        'must be a string, a list of messages or {"token_ids": […]}',
    ),
]
Completion = Annotated[
    Annotated[str, Tag(STRING)] | Annotated[Text, Tag(TEXT)] | Annotated[TokenIds, Tag(TOKEN_IDS)],
    by_type(
        {STRING: str, TEXT: Text, TOKEN_IDS: (dict, TokenIds)},
        "completion_kind",
        'must be a string, {"text": "…"} or {"token_ids": […]}',
        text_key=True,
    ),
]
GroundTruth = Annotated[
    Annotated[dict[str, Any], Tag(OBJECT)] | Annotated[str, Tag(STRING)],
    by_type({STRING: str, OBJECT: dict}, "ground_truth_kind", "must be an object or a JSON string"),
    BeforeValidator(to_json_types),
]
Demand = Annotated[
    Annotated[str, Tag(STRING)] | Annotated[VersionDemand, Tag(OBJECT)],
    by_type(
        {STRING: str, OBJECT: (dict, VersionDemand)},
        "policy_version_kind",
        "must be a version's name or an object",
    ),
]


class Include(StrEnum):
    """Optional parts of an answer."""

    TOKENS = "tokens"
    """`details.tokens`: the value of every measured token."""
    TOKEN_IDS = "token_ids"
    """`prompt_token_ids` and `details.completion_token_ids`: the ids that the policy was given."""


class Group(PromptOptions):
    """A prompt, the human's action, and the completions that a policy sampled."""

    id: Annotated[UnicodeText | None, Field(description="Echoed in the answer.")] = None
    prompt: Annotated[
        Prompt,
        Field(
            description=(
                "A string is used unchanged, already templated; `add_special_tokens` adds a BOS. Messages "
                "pass through the policy's chat template with the generation prompt. Token ids are used "
                "unchanged."
            )
        ),
    ]
    ground_truth: Annotated[
        GroundTruth,
        Field(description="The human's action as an object, or as a string with this JSON."),
    ]
    completions: Annotated[
        list[Completion],
        IN_PIECES,
        TEXTS_AT_ONCE,
        Field(
            description="Text is tokenised separately, without special tokens, and appended to the prompt."
        ),
    ]


class ScoreRequest(PromptOptions):
    """Groups to score. Its options for prompts are defaults of those of its groups."""

    recipe: Annotated[str | None, Field(description="Default: the service's default recipe.")] = None
    groups: Annotated[list[Group], IN_PIECES]
    policy_version: Annotated[
        Demand | None,
        Field(description="Score with this version of the policy, or with one that is new enough; else 409."),
    ] = None
    adapter: Annotated[
        AdapterName | None,
        Field(
            description="Score with this LoRA adapter; `base`: without any. Default: the service's default."
        ),
    ] = None
    include: list[Include] = []  # noqa: RUF012  # pydantic copies it


class Status(StrEnum):
    """Whether the rollout has a reward."""

    SCORED = "scored"
    UNSCORABLE = "unscorable"


class Reason(StrEnum):
    """Reason why a rollout has no reward."""

    SEQUENCE_TOO_LONG = "sequence_too_long"
    """The prompt and the completion's tokens before the last measured one exceed the policy's limit."""
    NON_FINITE_LOGITS = "non_finite_logits"
    """The policy returned NaN or infinite logits."""
    NO_CONTEXT = "no_context"
    """The prompt is empty, and the completion's first token is measured: no distribution predicts it."""
    OUT_OF_MEMORY = "out_of_memory"
    """The device ran out of memory, even with a smaller batch."""
    ENGINE_FAILURE = "engine_failure"
    """The forward failed; the error is in the service's log."""


class TokenCertainty(AnswerModel):
    """A measured token."""

    index: Annotated[int, Field(description="Position among the completion's tokens.")]
    token_id: int
    value: Annotated[
        float, Field(description="The recipe's divergence at this token, in nats (eq3: nats / V).")
    ]


class Details(AnswerModel):
    """Explanation of a reward."""

    format_error: Annotated[
        str | None, Field(description="Error code of the output; null if its format is valid.")
    ]
    format_message: Annotated[str | None, Field(description="The error in words.")]
    predicted_action: Annotated[
        dict[str, str] | None, Field(description="The parsed action; null if the format is invalid.")
    ]
    unknown_action_type: bool
    missing_attributes: Annotated[
        list[str], Field(description="Absent or empty attributes of the predicted type.")
    ]
    extra_keys: Annotated[list[str], Field(description="Paths of keys that the format does not have.")]
    converted: Annotated[
        list[str],
        Field(
            description=(
                "Paths of fields that only a lenient recipe reads: a type in other case, a number or boolean "
                "as text, null as a key left out."
            )
        ),
    ] = []  # noqa: RUF012  # pydantic copies it
    similarity: Annotated[
        dict[str, float | None],
        Field(description="ROUGE-L F1 per attribute, before the threshold; null if not compared."),
    ]
    type_match: Annotated[bool, Field(description="The action's type is the human's.")]
    exact_match: Annotated[bool, Field(description="Type and all attributes equal the human's.")]
    self_certainty_nats: Annotated[
        float | None,
        Field(description="Mean over the measured tokens, in nats (eq3: nats / V); null if there is none."),
    ]
    num_rationale_tokens: Annotated[int, Field(description="Number of tokens to measure.")]
    tokens: Annotated[list[TokenCertainty] | None, Field(description="With `include: [tokens]`.")] = None
    completion_token_ids: Annotated[list[int] | None, Field(description="With `include: [token_ids]`.")] = (
        None
    )


class Reward(AnswerModel):
    """The reward of a completion."""

    reward: Annotated[float | None, Field(description="Null if and only if the status is `unscorable`.")]
    status: Status
    reason: Reason | None
    message: Annotated[str | None, Field(description="The reason in words.")]
    components: Annotated[
        dict[str, float | None],
        Field(
            description=(
                "The terms of the reward by name, each already weighted: in this order they sum to it. The "
                "recipe declares the names. Null if a term could not be measured."
            )
        ),
    ]
    details: Details


class GroupScore(AnswerModel):
    """The rewards of a group, in the order of its completions."""

    id: str | None
    policy_version: Annotated[str, Field(description="Version of the weights that scored this group.")]
    policy_number: Annotated[
        int, Field(description="Number of this version, counted from the service's start.")
    ]
    adapter: Annotated[str | None, Field(description="Adapter that scored this group; null: none.")] = None
    rewards: list[Reward]
    warnings: Annotated[
        list[ScoreWarning],
        Field(description="Reasons to doubt that this is the prompt or the end of turn of the policy."),
    ] = []  # noqa: RUF012  # pydantic copies it
    prompt_token_ids: Annotated[list[int] | None, Field(description="With `include: [token_ids]`.")] = None


class RecipeRef(AnswerModel):
    """Name and digest of a recipe."""

    name: str
    digest: Annotated[str, Field(description="SHA-256 of every number and choice of the recipe.")]


class PolicyRef(AnswerModel):
    """Version of the policy. If it changed during the request, the newest version that scored a group."""

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
    """Limits of a request."""

    max_body_bytes: int
    max_groups: int
    max_completions_per_group: int
    max_request_tokens: Annotated[int, Field(description="Prompts and completions of one request together.")]
    max_text_chars: Annotated[int, Field(description="Characters of one completion, or of one prompt.")] = (
        2**20
    )


class RejectedPath(AnswerModel):
    """A faster head or forward strategy that the check at load did not take."""

    path: Annotated[str, Field(description="`linear`, the head, or a strategy, as `forward` names them.")]
    reason: Annotated[
        str,
        Field(
            description="`unsupported`: it fails with this architecture. `differs`: its numbers are others."
        ),
    ]
    detail: str


class PolicyInfo(AnswerModel):
    """The loaded policy."""

    model: str
    version: str
    number: Annotated[int, Field(description="Number of changes of the weights, from 0.")]
    architecture: str
    dtype: str
    device: str
    num_head_rows: Annotated[int, Field(description="V of `vocabulary = head`.")]
    num_tokenizer_tokens: Annotated[int, Field(description="V of `vocabulary = tokenizer`.")]
    max_sequence_tokens: int
    head: Annotated[
        str,
        Field(
            description="How logits are computed from hidden states: `linear`, on CUDA also "
            "`linear_written` or `linear_fused`; or `module`."
        ),
    ]
    forward: Annotated[
        str,
        Field(
            description="How prompts are shared: `shared_prefix`, `branched`, `expanded`, "
            "`stepped` or `independent`."
        ),
    ]
    attention: Annotated[
        str,
        Field(
            description="Kernels of `shared_prefix`: `cpu_flash`, on CUDA `flash`, `efficient` or `open`. "
            "Otherwise `model`."
        ),
    ] = "model"
    rejected_paths: Annotated[
        tuple[RejectedPath, ...],
        Field(description="Faster paths that were not taken, fastest first, and why."),
    ] = ()
    remarks: Annotated[
        tuple[str, ...], Field(description="Findings of the check at load beside its choice, and its limits.")
    ] = ()


class Info(AnswerModel):
    """The service, its policy, limits and recipes."""

    version: str
    policy: PolicyInfo
    limits: Limits
    default_recipe: RecipeRef
    recipes: list[RecipeRef]


class Health(AnswerModel):
    """A successful health check."""

    status: Literal["live", "ready"]


class Problem(AnswerModel):
    """RFC 9457 problem details."""

    type: str
    title: str
    status: int
    detail: str
    code: Annotated[str, Field(description="Stable code of the error.")]
    request_id: str | None
    errors: Annotated[
        list["ProblemField"], Field(description="The invalid fields, if the request is at fault.")
    ]


class ProblemField(AnswerModel):
    """An invalid field of a request."""

    location: str
    message: str
