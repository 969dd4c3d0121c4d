"""How fast the engine has been of late."""

_MEMORY = 0.9


class TokenRate:
    """Tokens per second of late: the mean over batches, each weighing 0.9 of the one after it."""

    def __init__(self) -> None:
        self._num_tokens = 0.0
        self._seconds = 0.0

    def record(self, num_tokens: int, duration_s: float) -> None:
        self._num_tokens = self._num_tokens * _MEMORY + num_tokens
        self._seconds = self._seconds * _MEMORY + duration_s

    def seconds(self, num_tokens: int) -> float:
        """How long so many tokens will take; 0 as long as nothing is known."""
        return num_tokens * self._seconds / self._num_tokens if self._num_tokens else 0.0
