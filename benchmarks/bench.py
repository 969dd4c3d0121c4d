"""How long exact self-certainty takes, against what people do today. Run by `make bench`.

Everything is measured in one run on the embedded policy, and stated as ratios: absolute times of a shared
machine mean little. P prompt tokens, G completions of a prompt, R rationale tokens of each.

    full      one batch of G whole sequences, all logits (as Intuitor does)
    keep      the same with `logits_to_keep`: logits of the completions only
    engine    this engine, in process, an unknown prompt
    hit       this engine, the same prompt again
    http      this engine over HTTP, an unknown prompt
    burst     G concurrent requests of one rollout each over HTTP, an unknown prompt
    session   8 requests, each prompt beginning with the last; with and without the prefix cache
"""

import argparse
import contextlib
import csv
import gc
import platform
import socket
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import torch
import transformers
import uvicorn

from shopr1_rewards import load_recipe
from shopr1_service import loading
from shopr1_service.app import create_app
from shopr1_service.engine import MeasuredCompletion, TokenGroup
from shopr1_service.settings import load_settings

RESULTS = Path(__file__).with_name("results.csv")
RULES = load_recipe("shop_r1").self_certainty
ANSWER = '{"rationale": "%s", "action": {"type": "terminate"}}'
NUM_SESSION_STEPS = 8


@dataclass(frozen=True)
class Shape:
    """A workload."""

    P: int
    G: int
    R: int

    def __str__(self) -> str:
        return f"P{self.P} G{self.G} R{self.R}"


class Bench:
    """A policy, and ways to have its certainty."""

    def __init__(self, dtype: str) -> None:
        settings = load_settings({"dtype": dtype})
        source = loading.find_source(None)
        tokenizer, self.model = loading.load_model(source, settings)
        self.policy = loading.build_policy(self.model, tokenizer, settings, name=source.name)
        bare = load_settings({"dtype": dtype, "prefix_cache_bytes": 0})
        self.bare_policy = loading.build_policy(self.model, tokenizer, bare, name=source.name)
        self.settings = settings
        self._generator = torch.Generator().manual_seed(0)

    def ids(self, num: int) -> list[int]:
        """Fresh random tokens: no prompt is known before it is meant to be."""
        return torch.randint(1000, 40_000, (num,), generator=self._generator).tolist()

    def completions(self, shape: Shape) -> list[list[int]]:
        """Valid answers whose rationale has R tokens."""
        before = self.policy.codec.encode_text('{"rationale": "').ids
        after = self.policy.codec.encode_text('", "action": {"type": "terminate"}}').ids
        word = self.policy.codec.encode_text(" mug").ids[0]
        words = [self.policy.codec.encode_text(f" {name}").ids[0] for name in ("set", "blue", "new", "old")]
        return [
            [*before, *(words[(i >> k) % 4] if k < 8 else word for k in range(shape.R)), *after]
            for i in range(shape.G)
        ]

    def group(self, shape: Shape, prompt: Sequence[int] | None = None) -> TokenGroup:
        first = len(self.policy.codec.encode_text('{"rationale": "').ids)
        measured = range(first, first + shape.R)
        completions = [MeasuredCompletion(ids, measured) for ids in self.completions(shape)]
        return TokenGroup(prompt or self.ids(shape.P), completions)

    def measure_unknown(self, shape: Shape) -> None:
        """The engine on a prompt that it has never seen."""
        self.policy.certainties(self.group(shape), RULES)

    @torch.inference_mode()
    def batch(self, group: TokenGroup, *, keeps_all: bool) -> None:
        """A batched forward with logits, reduced in fp32."""
        rows = torch.tensor([[*group.prompt_ids, *completion.ids] for completion in group.completions])
        num_kept = 0 if keeps_all else len(group.completions[0].ids) + 1
        logits = self.model(rows, use_cache=False, logits_to_keep=num_kept).logits
        for row in logits[:, -len(group.completions[0].ids) - 1 :]:
            row = row.float()
            _ = row.logsumexp(-1) - row.mean(-1)


def median_s(run: Callable[[], object], num_runs: int) -> float:
    times = []
    for _ in range(num_runs):
        start_s = time.perf_counter()
        run()
        times.append(time.perf_counter() - start_s)
    return statistics.median(times)


def peak_bytes(run: Callable[[], object]) -> int:
    """How far resident memory rises above where it was (Linux)."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = _status_bytes("VmRSS")
    run()
    return _status_bytes("VmHWM") - before


def _status_bytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def matmul_flops() -> float:
    """What the machine does at most, in bf16."""
    a = torch.randn(2048, 2048, dtype=torch.bfloat16)
    return 2 * 2048**3 / min(median_s(lambda: a @ a.T, 1) for _ in range(20))


def needed_flops(model: transformers.PreTrainedModel, shape: Shape) -> float:
    """Of a forward with a shared prefix: weights, causal attention, head."""
    config = model.config.get_text_config()
    weights = sum(p.numel() for name, p in model.named_parameters() if "layers" in name)
    num_tokens = shape.P + shape.G * shape.R
    pairs = shape.P**2 / 2 + shape.G * shape.R * (shape.P + shape.R / 2)
    attention = 4 * config.num_attention_heads * config.head_dim * config.num_hidden_layers * pairs
    head = 2 * shape.G * shape.R * config.hidden_size * config.vocab_size
    return float(2 * weights * num_tokens + attention + head)


@contextlib.contextmanager
def served(bench: Bench) -> Iterator[str]:
    """URL of a server with the same policy."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        app = create_app(bench.settings, lambda: bench.policy)
        server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        while not _is_ready(url):
            time.sleep(0.05)
        yield url
        server.should_exit = True
        thread.join()


def _is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health/ready").is_success
    except httpx.TransportError:
        return False


def body(prompt: Sequence[int], completions: Sequence[Sequence[int]]) -> dict[str, object]:
    group = {
        "prompt": {"token_ids": list(prompt)},
        "ground_truth": {"type": "terminate"},
        "completions": [{"token_ids": list(ids)} for ids in completions],
    }
    return {"groups": [group]}


def post(client: httpx.Client, url: str, request: dict[str, object]) -> None:
    rewards = client.post(f"{url}/score", json=request).raise_for_status().json()["groups"][0]["rewards"]
    assert all(reward["details"]["self_certainty_nats"] is not None for reward in rewards)


def burst(client: httpx.Client, url: str, bench: Bench, shape: Shape) -> None:
    prompt = bench.ids(shape.P)
    with ThreadPoolExecutor(shape.G) as pool:
        list(pool.map(lambda ids: post(client, url, body(prompt, [ids])), bench.completions(shape)))


def session_s(bench: Bench, policy: loading.LoadedPolicy, shape: Shape) -> float:
    prompt = bench.ids(shape.P)
    steps = [prompt[: shape.P * (i + 1) // NUM_SESSION_STEPS] for i in range(NUM_SESSION_STEPS)]
    groups = [bench.group(shape, step) for step in steps]
    return median_s(lambda: [policy.certainties(group, RULES) for group in groups], 1)


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed against what people do today.")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--large", action="store_true", help="also P 6000, G 16: minutes on a CPU")
    options = parser.parse_args()
    bench, runs = Bench(options.dtype), options.runs
    rows: list[tuple[str, str, float, str]] = []

    def note(workload: str, what: str, value: float, unit: str) -> None:
        rows.append((workload, what, value, unit))
        print(f"{workload:<22} {what:<28} {value:10.3f} {unit}", flush=True)

    flops = matmul_flops()
    note("machine", "bf16 matmul", flops / 1e12, "TFLOP/s")
    bench.policy.certainties(bench.group(Shape(64, 2, 8)), RULES)  # warm-up
    in_process(bench, Shape(2000, 8, 64), runs, flops, note)
    if options.large:
        in_process(bench, Shape(6000, 16, 64), 1, flops, note)
    peak = peak_bytes(lambda: bench.measure_unknown(Shape(6000, 16, 200)))
    note("P6000 G16 R200", "peak memory above weights", peak / 2**30, "GiB")
    with served(bench) as url, httpx.Client(timeout=600) as client:
        for shape in (Shape(2000, 8, 64), Shape(2000, 16, 64)):
            over_http(bench, shape, runs, client, url, note)
        rules_only(client, url, note)
    shape = Shape(6000, 8, 64)
    without_s = session_s(bench, bench.bare_policy, shape)
    note(
        "session of 8 to P6000",
        "without / with cache",
        without_s / session_s(bench, bench.policy, shape),
        "x",
    )
    write(rows, options.dtype)


Note = Callable[[str, str, float, str], None]


def in_process(bench: Bench, shape: Shape, runs: int, flops: float, note: Note) -> None:
    """The engine, known and unknown prompts, against batches with logits."""
    group = bench.group(shape)
    engine_s = median_s(lambda: bench.measure_unknown(shape), runs)
    bench.policy.certainties(group, RULES)
    hit_s = median_s(lambda: bench.policy.certainties(group, RULES), runs)
    keep_s = median_s(lambda: bench.batch(group, keeps_all=False), runs)
    note(str(shape), "engine", engine_s, "s")
    note(str(shape), "hit", hit_s, "s")
    note(str(shape), "keep", keep_s, "s")
    note(str(shape), "keep / engine", keep_s / engine_s, "x")
    note(str(shape), "engine / hit", engine_s / hit_s, "x")
    note(str(shape), "share of matmul peak", needed_flops(bench.model, shape) / engine_s / flops, "")
    if shape.P <= 2000:  # beyond, all logits take tens of GiB
        full_s = median_s(lambda: bench.batch(group, keeps_all=True), 1)
        note(str(shape), "full", full_s, "s")
        note(str(shape), "full / engine", full_s / engine_s, "x")


def over_http(bench: Bench, shape: Shape, runs: int, client: httpx.Client, url: str, note: Note) -> None:
    """What HTTP adds, and what a burst of lone rollouts costs against one request."""
    engine_s, one_s, burst_s = [], [], []
    for _ in range(runs):  # in turns, so that a busy moment meets all alike
        engine_s.append(median_s(lambda: bench.measure_unknown(shape), 1))
        one_s.append(
            median_s(lambda: post(client, url, body(bench.ids(shape.P), bench.completions(shape))), 1)
        )
        burst_s.append(median_s(lambda: burst(client, url, bench, shape), 1))
    note(str(shape), "http / engine", statistics.median(one_s) / statistics.median(engine_s), "x")
    note(str(shape), "burst / http", statistics.median(burst_s) / statistics.median(one_s), "x")


def rules_only(client: httpx.Client, url: str, note: Note) -> None:
    """512 rollouts a request that have nothing to measure: the parser, the rules and HTTP."""
    completions = [ANSWER % "" for _ in range(256)]
    group = {"prompt": "x", "ground_truth": {"type": "terminate"}, "completions": completions}
    request = {"groups": [group, group]}
    run_s = median_s(lambda: client.post(f"{url}/score", json=request).raise_for_status(), 9)
    note("rules only, 512", "rollouts", 512 / run_s, "1/s")


def write(rows: Sequence[tuple[str, str, float, str]], dtype: str) -> None:
    flags = Path("/proc/cpuinfo").read_text()
    cpu = next((line.split(":")[1].strip() for line in flags.splitlines() if "model name" in line), "")
    extras = [flag for flag in ("amx_bf16", "avx512_bf16") if flag in flags]
    device = f"{cpu or platform.processor()} x{torch.get_num_threads()} {' '.join(extras)}".strip()
    with RESULTS.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["device", "torch", "transformers", "dtype", "workload", "quantity", "value", "unit"])
        for workload, what, value, unit in rows:
            head = [device, torch.__version__, transformers.__version__, dtype]
            writer.writerow([*head, workload, what, f"{value:.4g}", unit])


if __name__ == "__main__":
    main()
