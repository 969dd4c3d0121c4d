"""The weights that score now, written down: what an update goes back to when it fails in the middle."""

from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from shopr1_client.errors import StorageError
from shopr1_service.weights.files import AnonymousTempFile
from shopr1_service.weights.tensors import Stored, Weights


class WeightBackup:
    """Knows where the tensors stand that have been replaced, and writes those down that will be.

    What an update brought is kept as it came. Only what was loaded at start is written once more, and what
    came from a file that somebody has written to since.
    """

    def __init__(self, weights: Weights, directory: Path | None) -> None:
        self._weights = weights
        self._directory = directory
        self._stored: dict[str, Stored] = {}

    def missing(self, names: Collection[str]) -> list[str]:
        """Those that could not be restored. Asks the files of former checkpoints: their disk may hang."""
        return [name for name in names if not self._is_kept(name)]

    def keep(self, names: Collection[str]) -> None:
        """Write these down. Beside the engine: it changes nothing that the engine reads.

        Raises:
            StorageError: there is no room.
        """
        if not names:
            return
        try:
            self._stored.update(self._store(names))
        except OSError as error:
            reason = error.strerror or error
            raise StorageError(f"the old weights cannot be kept in staging_dir: {reason}") from error

    def restore(self, names: Collection[str], on_piece: Callable[[], None]) -> None:
        """Put these back.

        Raises:
            OSError: the disk fails.
        """
        if not all(map(self._is_kept, names)):
            raise OSError(None, "the former weights' file was written to")
        self._weights.load({name: self._stored[name] for name in names}, on_piece)

    def _is_kept(self, name: str) -> bool:
        return name in self._stored and self._stored[name].file.is_intact

    def _store(self, names: Collection[str]) -> Mapping[str, Stored]:
        file = AnonymousTempFile(self._directory)
        try:
            return self._weights.store(names, file)
        except OSError:
            file.discard()
            raise

    def moved_on(self, stored: Mapping[str, Stored]) -> None:
        """These have replaced what was there; the files that nothing else stands in are gone."""
        self._stored.update(stored)
