"""The software that decides how a checkpoint becomes a policy, as a key of what is kept for later starts."""

import hashlib
from functools import cache
from importlib.metadata import version
from pathlib import Path

_LIBRARIES = ("torch", "transformers", "tokenizers", "safetensors", "gguf")
_PACKAGE = Path(__file__).parents[1]
_ROOMS = ("engine", "policy", "weights")


@cache
def software_digest() -> str:
    """Digest of the libraries' versions and of the service's own code that loads and checks policies.

    The code counts, not the service's version: a change under development must not find what the code before
    it has kept.
    """
    digest = hashlib.sha256(repr([(name, version(name)) for name in _LIBRARIES]).encode())
    for file in sorted(file for room in _ROOMS for file in (_PACKAGE / room).rglob("*.py")):
        digest.update(str(file.relative_to(_PACKAGE)).encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()
