"""The embedded policy's tokenizer as a directory for trainers."""

import subprocess
from pathlib import Path

from tests.integration.trainers.live import ROOT

_SAVE = """
import sys
from transformers import AutoTokenizer
from shopr1_service.policy.loading import find_source
source = find_source(None)
AutoTokenizer.from_pretrained(source.path, gguf_file=source.gguf_file).save_pretrained(sys.argv[1])
"""


def save_tokenizer(directory: Path) -> str:
    """Save it with the project's own environment: a trainer's has neither the policy nor a GGUF reader."""
    python = ROOT / ".venv" / "bin" / "python"
    subprocess.run([python, "-c", _SAVE, directory], check=True, cwd=ROOT)
    return str(directory)
