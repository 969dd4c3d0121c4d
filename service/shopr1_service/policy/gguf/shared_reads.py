"""Read a GGUF file's fields once for all the callers in transformers.

Transformers reads them for the tokenizer, the config and the weights, each time in Python, string by string,
and builds the map of tensor names again for every module of the model.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from unittest.mock import patch


@contextmanager
def shared_reads() -> Iterator[None]:
    """Remember readers and name maps of the `gguf` package until the end of the block."""
    import gguf  # slow to import, and only needed for these files

    with (
        patch.object(gguf, "GGUFReader", cache(gguf.GGUFReader)),
        patch.object(gguf, "get_tensor_name_map", cache(gguf.get_tensor_name_map)),
    ):
        yield
