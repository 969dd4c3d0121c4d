"""Log-probabilities of prompts by vLLM, timed. Started by `vllm_column.py` in an interpreter that has vLLM.

Reads a job as JSON from stdin and writes what it measured as JSON into the last line of stdout:

    {"model": directory, "dtype": name, "max_tokens": longest sequence,
     "groups": [{"prompt_ids": [...], "completions": [[...], ...]}, ...]}
    {"version": of vLLM, "seconds": [of each group]}

vLLM can return no divergence, only the log-probabilities of the k most likely tokens, from which none can be
computed exactly. `prompt_logprobs` is the one way to have them of tokens that it did not sample.
"""

import importlib
import json
import os
import sys
import time
from typing import Any

NUM_LOGPROBS = 20  # the most that vLLM gives unless told otherwise
KV_CACHE_BYTES = 4 * 2**30
MEMORY_SHARE = 0.4  # of a GPU: the process that waits holds a policy, too
WARM_UP_IDS = list(range(1000, 1064))


def prepare_environment() -> None:
    """What vLLM reads when it is imported."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    if hasattr(os, "sched_getaffinity"):
        # On a CPU it would leave a core idle for its scheduler; the engine it is compared with has them all.
        cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", cores)


def load(vllm: Any, job: dict[str, Any]) -> Any:  # noqa: ANN401  # checked where there is no vLLM
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
    """Duration of one call with these sequences. It has to sample one token of each."""
    prompts = [{"prompt_token_ids": row} for row in rows]
    wishes = vllm.SamplingParams(max_tokens=1, prompt_logprobs=NUM_LOGPROBS, detokenize=False)
    start_s = time.perf_counter()
    answers = llm.generate(prompts, wishes, use_tqdm=False)
    seconds = time.perf_counter() - start_s
    assert [len(answer.prompt_logprobs) for answer in answers] == [len(row) for row in rows]
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
