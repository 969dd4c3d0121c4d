"""What the processes that hold one model together must decide alike. One that is alone agrees with itself."""


class Agreement:
    """Of one process. `tensor_parallel/` has that of several."""

    def least(self, number: int) -> int:
        """The least of what all of them say."""
        return number

    def settle(self, error: Exception | None) -> None:
        """After each try of a batch: returns if all may go on as this process would.

        Args:
            error: what the try failed with here; None: with nothing.

        Raises:
            OutOfMemoryError: memory was short elsewhere; all try again.
            FatalEngineError: they cannot go on together.
        """
