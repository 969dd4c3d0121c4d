"""What can keep the command line from doing its work.

    ServiceError
    ├── SettingsError      a setting is unknown or malformed
    ├── PolicyError        the policy cannot be loaded or measured
    └── RolloutFileError   a line of a rollout file is malformed

Errors of requests are answers, not these: they stand in `shopr1_client.errors`.
"""


class ServiceError(Exception):
    """Base; the message is for the operator and says what to do."""


class SettingsError(ServiceError):
    """A setting is unknown or malformed; the message names key and value."""


class PolicyError(ServiceError):
    """The policy cannot be loaded, or its certainty cannot be measured."""


class RolloutFileError(ServiceError):
    """A line of input or output is not what it must be; the message begins with file and line."""
