"""Timed prompt log-probabilities by vLLM. `vllm_column.py` runs this file in an interpreter that has vLLM.

It reads a job as JSON from stdin and writes the results as JSON into the last line of stdout:

    {"model": directory, "dtype": name, "max_tokens": longest sequence,
     "groups": [{"prompt_ids": [...], "completions": [[...], ...]}, ...]}
    {"version": of vLLM, "seconds": [of each group]}

vLLM returns no divergence, only the log-probabilities of the k most likely tokens, which do not determine
one. `prompt_logprobs` is the only way to get them for tokens that vLLM did not sample.
"""

import importlib
import json
import os
import sys
import time
from typing import Any

NUM_LOGPROBS = 20  # the largest number that vLLM allows by default
KV_CACHE_BYTES = 4 * 2**30
MEMORY_SHARE = 0.4  # of a GPU: the waiting process holds a policy, too
WARM_UP_IDS = list(range(1000, 1064))


def prepare_environment() -> None:
    """Set the variables that vLLM reads on import."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    if hasattr(os, "sched_getaffinity"):
        # On a CPU vLLM would reserve a core for its scheduler; the engine uses all cores.
        cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", cores)


def load(vllm: Any, job: dict[str, Any]) -> Any:  # noqa: ANN401  # type-checked without vLLM
    return vllm.LLM(
        model=job["model"],
        dtype=job["dtype"],
        max_model_len=job["max_tokens"],
        max_logprobs=NUM_LOGPROBS,
        enable_prefix_caching=True,
        kv_cache_memory_bytes=KV_CACHE_BYTES,
        gpu_memory_utilization=MEMORY_SHARE,
    )


def measure_s(vllm: Any, llm: Any, rows: list[list[int]]) -> float:  # noqa: ANN401
    """Duration of one call with these sequences. vLLM has to sample one token of each."""
    prompts = [{"prompt_token_ids": row} for row in rows]
    sampling = vllm.SamplingParams(max_tokens=1, prompt_logprobs=NUM_LOGPROBS, detokenize=False)
    start_s = time.perf_counter()
    outputs = llm.generate(prompts, sampling, use_tqdm=False)
    seconds = time.perf_counter() - start_s
    assert [len(output.prompt_logprobs) for output in outputs] == [len(row) for row in rows]
    return seconds


def main() -> None:
    job = json.load(sys.stdin)
    prepare_environment()
    vllm = importlib.import_module("vllm")
    llm = load(vllm, job)
    measure_s(vllm, llm, [WARM_UP_IDS])
    seconds = []
    for group in job["groups"]:
        rows = [[*group["prompt_ids"], *completion] for completion in group["completions"]]
        seconds.append(measure_s(vllm, llm, rows))
    print(json.dumps({"version": vllm.__version__, "seconds": seconds}), flush=True)


if __name__ == "__main__":
    main()
