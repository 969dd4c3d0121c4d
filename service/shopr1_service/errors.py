"""Errors that end the command line, and when a client should retry what the service could not do.

    ServiceError
    ├── SettingsError      a setting is unknown or malformed
    ├── PolicyError        the policy cannot be loaded or cannot compute self-certainty
    └── RolloutFileError   a line of a rollout file is malformed

Errors of requests are not among them: they are responses, and are defined in `shopr1_client.errors`.
"""

RETRY_AFTER_S = 5.0
"""`Retry-After` while the service starts or ends, and when the engine has failed."""
RETRY_UPDATE_AFTER_S = 2.0
"""`Retry-After` of an update that is blocked by another one."""


class ServiceError(Exception):
    """Base class; the message tells the operator what to do."""


class SettingsError(ServiceError):
    """A setting is unknown or malformed; the message names key and value."""


class PolicyError(ServiceError):
    """The policy cannot be loaded, or cannot compute self-certainty."""


class RolloutFileError(ServiceError):
    """A line of input or output is malformed; the message begins with file and line."""
