"""Backup of the weights that are loaded: an update that fails half-way goes back to it."""

from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from shopr1_service.weights.files import AnonymousTempFile
from shopr1_service.weights.tensors import TensorLocation, Weights


class WeightBackup:
    """Knows the files of the tensors that are loaded, and writes out those that are in none.

    The files of an update are its backup. Only the weights loaded at start are written out, and those whose
    checkpoint file was written to since.
    """

    def __init__(self, weights: Weights, directory: Path | None) -> None:
        self._weights = weights
        self._directory = directory
        self._locations: dict[str, TensorLocation] = {}

    def missing(self, names: Collection[str]) -> list[str]:
        """Names of tensors that could not be restored. Looks at checkpoint files, whose disk may hang."""
        return [name for name in names if not self._is_saved(name)]

    def save(self, names: Collection[str]) -> None:
        """Write tensors out. May run beside the engine: it only reads what the engine reads.

        Raises:
            StorageError: there is no room.
        """
        if not names:
            return
        file = AnonymousTempFile(self._directory, "the old weights")
        try:
            self._locations.update(self._weights.store(names, file))
        except BaseException:
            file.discard()
            raise

    def restore(self, names: Collection[str], on_piece: Callable[[], None]) -> None:
        """Put tensors back into the model.

        Raises:
            OSError: the disk fails, or a checkpoint file was written to.
        """
        if self.missing(names):
            raise OSError(None, "the file of the former weights was written to")
        locations = {name: self._locations[name] for name in names}
        self._weights.load(locations, on_piece)
        if self._weights.differing(locations):
            raise OSError(None, "the file of the former weights has other numbers now")

    def record(self, locations: Mapping[str, TensorLocation]) -> None:
        """These tensors are loaded now; files that hold no others are closed."""
        self._locations.update(locations)

    def _is_saved(self, name: str) -> bool:
        return name in self._locations and self._locations[name].file.is_intact
