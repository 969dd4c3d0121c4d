"""Passes and tokens of the check at load with a wide window: `python -m benchmarks.engine.check_passes`.

A tiny Mistral with a window of 4,096 tokens; the numbers of passes do not depend on its size. With `--base`,
those of another checkout, too, counted by its own interpreter (`CHECKOUT/.venv`).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]
WINDOW = 4096
_NUM_IDS = 389
_CONFIG: Mapping[str, Any] = {
    "vocab_size": _NUM_IDS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "sliding_window": WINDOW,
    "max_position_embeddings": 4 * WINDOW,
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Passes of the check at load with a wide window.")
    parser.add_argument("--base", type=Path, metavar="CHECKOUT", help="an older checkout with its own .venv")
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder of results")
    parser.add_argument("--count", action="store_true", help="only print the lengths of the passes, as JSON")
    options = parser.parse_args()
    if options.count:
        print(json.dumps(lengths_of_passes()))
        return
    from benchmarks.report import Report  # `--count` runs with the packages of another checkout alone

    report = Report(torch.device("cpu"), "float32")
    builds = {"new": (ROOT, Path(sys.executable))}
    if options.base is not None:
        builds["old"] = (options.base, options.base / ".venv/bin/python")
    for name, (root, python) in builds.items():
        lengths = _count(root, python)
        long = [length for length in lengths if length > WINDOW // 2]
        report.add(f"window {WINDOW}", f"{name}, passes", len(lengths), "")
        report.add(f"window {WINDOW}", f"{name}, passes of more than half the window", len(long), "")
        report.add(f"window {WINDOW}", f"{name}, tokens fed", sum(lengths), "")
    report.write(options.output / "check_passes.csv")


def _count(root: Path, python: Path) -> list[int]:
    """Lengths of the passes of a checkout's check."""
    with tempfile.TemporaryDirectory() as cache:  # an earlier outcome would only be confirmed
        packages = os.pathsep.join(str(root / package) for package in ("rewards", "service", "clients"))
        env = {**os.environ, "PYTHONPATH": packages, "XDG_CACHE_HOME": cache}
        output = subprocess.check_output([python, __file__, "--count"], cwd=root, env=env, text=True)
    lengths: list[int] = json.loads(output.splitlines()[-1])
    return lengths


def lengths_of_passes() -> list[int]:
    """Tokens of each pass of the trunk while a policy is built."""
    from shopr1_service.settings import Settings

    torch.manual_seed(0)
    config = AutoConfig.for_model("mistral", **_CONFIG)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
    lengths: list[int] = []

    def note(_module: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        lengths.append((kwargs["input_ids"] if "input_ids" in kwargs else args[0]).numel())

    model.base_model.register_forward_pre_hook(note, with_kwargs=True)
    _builder()(model, _tokenizer(), Settings(), name="tiny")
    return lengths


def _builder() -> Any:  # noqa: ANN401
    """`build_policy` of this checkout or of one before the packages had folders."""
    try:
        from shopr1_service.policy.factory import build_policy
    except ModuleNotFoundError:
        from shopr1_service.building import build_policy  # type: ignore[import-not-found,no-redef]
    return build_policy


def _tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner)  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    main()
