"""Errors of the service, shared by server, client and OpenAPI document.

    ShopR1Error
    ├── SettingsError         a setting of the client is invalid, such as a URL
    ├── TransportError        no answer of the service
    ├── MixedVersionsError    only some of several servers accepted a new policy version
    ├── UnsendableModelError  a model that computes with more than can be sent
    ├── VerificationError     the service gives other numbers than the model that was sent
    └── ProblemError          an answer, application/problem+json (RFC 9457)
        └── a class for each `code`, with its HTTP status

`code` is the contract; the status follows from it. Both are defined once, in the class.

A rollout that cannot be scored is no error: its result has `reward: null` and a reason. Only protocols of
trainers that know nothing but numbers report it as an error.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, TypedDict

PROBLEM_MEDIA_TYPE = "application/problem+json"
_MAX_SHOWN = 3


class FieldError(TypedDict):
    """An invalid field of a request."""

    location: str
    """Path into the body, such as `groups[1].ground_truth.name`."""
    message: str


def summary(errors: Sequence[FieldError]) -> str:
    """The first few fields with their messages, and how many more there are."""
    shown = "; ".join(f"{error['location']}: {error['message']}" for error in errors[:_MAX_SHOWN])
    more = f"; and {len(errors) - _MAX_SHOWN} more" if len(errors) > _MAX_SHOWN else ""
    return shown + more


class ShopR1Error(Exception):
    """Base of every error of the service and its client."""


class SettingsError(ShopR1Error, ValueError):
    """A setting of the client is invalid; the message names it and its value."""


class TransportError(ShopR1Error):
    """No answer of the service: refused, reset, timed out, or the answer of another server."""


class MixedVersionsError(ShopR1Error):
    """Some servers have a new version and others do not. To recover, send it to all of them again.

    Attributes:
        version: the new one.
        updated: URLs of the servers that have it.
        failed: URL of the server that failed; `__cause__` is its error. It has the version only if its answer
            was lost.
        untried: URLs of the servers after it, which were not asked.
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


class UnsendableModelError(ShopR1Error, ValueError):
    """A model whose numbers the service cannot give: it computes with more than what would be sent."""


class VerificationError(ShopR1Error):
    """The service gives other numbers than the model that was sent to it.

    Attributes:
        url: the server.
        expected, actual: self-certainty of each token of the probe by the model and by the server, nats.
    """

    def __init__(
        self, url: str, expected: Sequence[float], actual: Sequence[float], limit_nats: float
    ) -> None:
        super().__init__(url, expected, actual, limit_nats)
        self.url = url
        self.expected = list(expected)
        self.actual = list(actual)
        self.limit_nats = limit_nats

    def __str__(self) -> str:
        worst = max(range(len(self.expected)), key=lambda i: abs(self.expected[i] - self.actual[i]))
        return (
            f"{self.url} scores with another model than the one that was sent: token {worst} of the probe is"
            f" {self.actual[worst]:.6g} nats there and {self.expected[worst]:.6g} here (limit"
            f" {self.limit_nats:g})"
        )


class ProblemError(ShopR1Error):
    """A problem that the service answered with.

    Attributes:
        detail: human-readable description.
        errors: the invalid fields, if the request is at fault.
        status: the answer's HTTP status.
        retry_after_s: seconds to wait before a retry, if one can succeed.
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
        # Trainers raise these in worker processes; the default would lose the keyword arguments.
        return type(self), (self.detail,), self.__dict__

    def relocate(self, rename: Callable[[str], str]) -> None:
        """Rename the fields' locations, also in the description."""
        self.detail = rename(self.detail)
        self.args = (self.detail,)
        self.errors = [{**error, "location": rename(error["location"])} for error in self.errors]

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
    """The service has API keys, and the request has none of them."""

    code, status, title = "unauthenticated", 401, "No valid API key"


class ForbiddenError(ProblemError):
    """The API key is valid, but its scopes do not allow the request."""

    code, status, title = "forbidden", 403, "Not allowed with this API key"


class NotFoundError(ProblemError):
    """There is no such path or recipe."""

    code, status, title = "not_found", 404, "Not found"


class MethodNotAllowedError(ProblemError):
    """The path exists, but not for this method."""

    code, status, title = "method_not_allowed", 405, "Method not allowed"


class RequestTimeoutError(ProblemError):
    """The request's body did not arrive within the service's `receive_timeout_s`."""

    code, status, title = "request_timeout", 408, "The body came too slowly"


class PolicyVersionError(ProblemError):
    """The request requires another policy version than the loaded one."""

    code, status, title = "policy_version", 409, "Another policy version is loaded"


class UpdateConflictError(ProblemError):
    """Another update of the policy is running, or finished meanwhile; retry after `Retry-After`."""

    code, status, title = "update_conflict", 409, "Another update is under way"


class TooLargeError(ProblemError):
    """The request exceeds one of the limits in `GET /info`."""

    code, status, title = "too_large", 413, "Too large"


class InvalidRequestError(ProblemError):
    """The request is JSON but not valid; `errors` names each invalid field. Nothing was scored."""

    code, status, title = "invalid_request", 422, "Invalid request"


class InvalidWeightsError(ProblemError):
    """New weights do not fit the policy; `errors` names tensors or fields. The old weights keep serving."""

    code, status, title = "invalid_weights", 422, "Not weights of this policy"


class UnscorableError(ProblemError):
    """A rollout has no reward, and the trainer's protocol only has numbers; `errors` has the reasons."""

    code, status, title = "unscorable", 422, "A rollout cannot be scored"


class OverloadedError(ProblemError):
    """The queue is full (`max_queue_tokens`). Nothing was scored; retry after `Retry-After`."""

    code, status, title = "overloaded", 429, "Overloaded"


class InternalError(ProblemError):
    """A bug in the service. Its log has the details under the request id."""

    code, status, title = "internal", 500, "Internal error"


class NotReadyError(ProblemError):
    """The policy is loading, the service is shutting down, or it has no room for more connections."""

    code, status, title = "not_ready", 503, "Not ready"


class DeadlineExceededError(ProblemError):
    """The request missed its deadline; its queued groups are dropped."""

    code, status, title = "deadline_exceeded", 504, "Deadline exceeded"


class StorageError(ProblemError):
    """New weights cannot be stored: `staging_dir` is full or fails. The old weights keep serving."""

    code, status, title = "storage", 507, "No room for new weights"


PROBLEMS: tuple[type[ProblemError], ...] = tuple(ProblemError.__subclasses__())
"""All of the above, in their order."""
_BY_CODE = {problem.code: problem for problem in PROBLEMS}


def from_problem(
    body: Mapping[str, Any], status: int | None = None, retry_after_s: float | None = None
) -> ProblemError:
    """The error of an answer; a plain `ProblemError` if the code is unknown."""
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
