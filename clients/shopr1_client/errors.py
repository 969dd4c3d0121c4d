"""Every error that the service answers with, shared by server, client and OpenAPI document.

    ShopR1Error
    ├── TransportError             no answer of the service: refused, reset, timed out, somebody else's
    ├── MixedVersionsError         of several servers some took a new policy version and others did not
    └── ProblemError               an answer, application/problem+json (RFC 9457)
        ├── MalformedBodyError     400  malformed_body    the body is not JSON
        ├── UnauthenticatedError   401  unauthenticated   no valid API key
        ├── ForbiddenError         403  forbidden         a key for something else
        ├── NotFoundError          404  not_found         no such path or recipe
        ├── MethodNotAllowedError  405  method_not_allowed
        ├── RequestTimeoutError    408  request_timeout   the body came too slowly
        ├── PolicyVersionError     409  policy_version    another policy version than demanded is loaded
        ├── UpdateConflictError    409  update_conflict   another update is under way
        ├── TooLargeError          413  too_large         more than a limit allows
        ├── InvalidRequestError    422  invalid_request   names each bad field; nothing was scored
        ├── InvalidWeightsError    422  invalid_weights   no weights of this policy; the old ones stay
        ├── UnscorableError        422  unscorable        a trainer's protocol has no place for "no reward"
        ├── OverloadedError        429  overloaded        too much waits already; try again later
        ├── InternalError          500  internal          a bug in the service
        ├── NotReadyError          503  not_ready         loading or shutting down; try again
        ├── DeadlineExceededError  504  deadline_exceeded not scored within the request's time
        └── StorageError           507  storage           no room for new weights

`code` is the contract. The status is a view of it, and each stands once: in the class.

A rollout that cannot be scored is no error. It is a result with `reward: null` and a reason. Only the
protocols of trainers that know nothing but numbers make it one.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, TypedDict

PROBLEM_MEDIA_TYPE = "application/problem+json"


class FieldError(TypedDict):
    """One bad field of a request."""

    location: str
    """Path into the body, such as `groups[1].ground_truth.name`."""
    message: str


class ShopR1Error(Exception):
    """Base of every error of the service and its client."""


class TransportError(ShopR1Error):
    """No answer of the service came: refused, reset, timed out, or somebody else answered."""


class MixedVersionsError(ShopR1Error):
    """Some servers have a new version and others do not. Sending it again, to all of them, is the way out.

    Attributes:
        version: the new one.
        updated: URLs of the servers that have it.
        failed: URL of the server that failed; `__cause__` is its error. It has the version only if its answer
            was lost.
        untried: URLs of the servers that were not reached any more.
    """

    def __init__(self, version: str, updated: Sequence[str], failed: str, untried: Sequence[str]) -> None:
        super().__init__(version, updated, failed, untried)
        self.version = version
        self.updated = list(updated)
        self.failed = failed
        self.untried = list(untried)

    def __str__(self) -> str:
        untried = f", and {', '.join(self.untried)} were not tried" if self.untried else ""
        return f"{', '.join(self.updated)} have version {self.version!r}; {self.failed} failed{untried}"


class ProblemError(ShopR1Error):
    """The service answered with a problem.

    Attributes:
        detail: what happened, for people.
        errors: the bad fields, where the request is at fault.
        status: the answer's HTTP status.
        retry_after_s: seconds to wait before another try, where one makes sense.
        request_id: the request's id in the service's logs.
    """

    code: ClassVar[str] = "unknown"
    status: int = 500
    title: ClassVar[str] = "Unknown problem"

    def __init__(
        self,
        detail: str,
        *,
        errors: Sequence[FieldError] = (),
        retry_after_s: float | None = None,
        request_id: str | None = None,
    ) -> None:
        super().__init__(detail)
        self.detail = detail
        self.errors = list(errors)
        self.retry_after_s = retry_after_s
        self.request_id = request_id

    def __reduce__(self) -> tuple[Any, ...]:
        # Trainers raise these in worker processes; keyword arguments would be lost by the default.
        return type(self), (self.detail,), self.__dict__

    def to_problem(self, request_id: str | None = None) -> dict[str, Any]:
        """The body of the answer."""
        return {
            "type": f"urn:shopr1:problem:{self.code}",
            "title": self.title,
            "status": self.status,
            "detail": self.detail,
            "code": self.code,
            "request_id": request_id or self.request_id,
            "errors": self.errors,
        }


class MalformedBodyError(ProblemError):
    """The body is not JSON."""

    code, status, title = "malformed_body", 400, "The body is not JSON"


class UnauthenticatedError(ProblemError):
    """The service has API keys, and the request came with none of them."""

    code, status, title = "unauthenticated", 401, "No valid API key"


class ForbiddenError(ProblemError):
    """The API key is valid, but its scopes do not allow this."""

    code, status, title = "forbidden", 403, "Not allowed with this API key"


class NotFoundError(ProblemError):
    """There is no such path or recipe."""

    code, status, title = "not_found", 404, "Not found"


class MethodNotAllowedError(ProblemError):
    """The path exists, but not for this method."""

    code, status, title = "method_not_allowed", 405, "Method not allowed"


class RequestTimeoutError(ProblemError):
    """The request's body did not come within the service's `receive_timeout_s`."""

    code, status, title = "request_timeout", 408, "The body came too slowly"


class PolicyVersionError(ProblemError):
    """The request demands another policy version than the one loaded."""

    code, status, title = "policy_version", 409, "Another policy version is loaded"


class UpdateConflictError(ProblemError):
    """Another update of the policy is under way, or came between; `Retry-After` says when to try again."""

    code, status, title = "update_conflict", 409, "Another update is under way"


class TooLargeError(ProblemError):
    """The request exceeds one of the limits in `GET /info`."""

    code, status, title = "too_large", 413, "Too large"


class InvalidRequestError(ProblemError):
    """The request is JSON but not a valid request; `errors` names each bad field. Nothing was scored."""

    code, status, title = "invalid_request", 422, "Invalid request"


class InvalidWeightsError(ProblemError):
    """New weights do not fit the policy; `errors` names tensors or fields. The old ones go on serving."""

    code, status, title = "invalid_weights", 422, "Not weights of this policy"


class UnscorableError(ProblemError):
    """A trainer's protocol has numbers only, and a rollout has none; `errors` names each and the reason."""

    code, status, title = "unscorable", 422, "A rollout cannot be scored"


class OverloadedError(ProblemError):
    """More than `max_queue_tokens` wait already. Nothing was scored; `Retry-After` says when to try again."""

    code, status, title = "overloaded", 429, "Overloaded"


class InternalError(ProblemError):
    """A bug in the service. The details are in its log under the request id."""

    code, status, title = "internal", 500, "Internal error"


class NotReadyError(ProblemError):
    """The policy is loading, or the service is shutting down."""

    code, status, title = "not_ready", 503, "Not ready"


class DeadlineExceededError(ProblemError):
    """The request was not scored within its time; what still waited of it is dropped."""

    code, status, title = "deadline_exceeded", 504, "Deadline exceeded"


class StorageError(ProblemError):
    """New weights cannot be kept: `staging_dir` is full or fails. The old ones go on serving."""

    code, status, title = "storage", 507, "No room for new weights"


PROBLEMS: tuple[type[ProblemError], ...] = (
    MalformedBodyError,
    UnauthenticatedError,
    ForbiddenError,
    NotFoundError,
    MethodNotAllowedError,
    RequestTimeoutError,
    PolicyVersionError,
    UpdateConflictError,
    TooLargeError,
    InvalidRequestError,
    InvalidWeightsError,
    UnscorableError,
    OverloadedError,
    InternalError,
    NotReadyError,
    DeadlineExceededError,
    StorageError,
)
_BY_CODE = {problem.code: problem for problem in PROBLEMS}


def from_problem(
    body: Mapping[str, Any], status: int | None = None, retry_after_s: float | None = None
) -> ProblemError:
    """The error that an answer stands for; a plain `ProblemError` where the code is not known here."""
    problem_class = _BY_CODE.get(str(body.get("code")), ProblemError)
    error = problem_class(
        str(body.get("detail", body)),
        errors=body.get("errors") or (),
        retry_after_s=retry_after_s,
        request_id=body.get("request_id"),
    )
    if status is not None:
        error.status = status
    return error
