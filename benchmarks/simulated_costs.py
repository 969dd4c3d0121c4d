"""What has been measured, as the simulation takes it: costs.csv and front.csv."""

import csv
import statistics
from pathlib import Path

import numpy as np

from costs import KEPT, NUM_ENGINES
from simulated_engine import Costs

FOLDER = Path(__file__).parent


def measured_costs() -> Costs:
    """What costs.csv and front.csv say."""
    of_engine = {row["quantity"]: float(row["value"]) for row in _rows("costs.csv")}
    proxy_s, ingress_s, prompt_token_s, own_token_s = front_costs()
    return Costs(
        fixed_s=of_engine["fixed"] / 1e3,
        prompt_token_s=of_engine["prompt token"] / 1e3,
        own_token_s=of_engine["completion token"] / 1e3,
        pair_s=of_engine["pair of tokens"] / 1e9,
        proxy_s=proxy_s,
        ingress_s=ingress_s,
        ingress_prompt_token_s=prompt_token_s,
        ingress_own_token_s=own_token_s,
        route_s=of_engine[f"decision among {NUM_ENGINES} engines"] / 1e6 / NUM_ENGINES,
    )


def front_costs() -> tuple[float, float, float, float]:
    """Of a request of one group: the proxy on average, the ingress as a line through its three shapes."""
    of_process: dict[str, dict[str, float]] = {"proxy": {}, "ingress": {}}
    for row in _rows("front.csv"):
        if row["quantity"].endswith("CPU, 1 a request"):
            of_process[row["quantity"].split(":")[0]][row["workload"]] = float(row["value"]) / 1e3
    tokens = {row["workload"]: float(row["value"]) for row in _rows("front.csv") if row["unit"] == "tokens"}
    shapes = [(1.0, float(shape.split()[0][1:]), tokens[shape]) for shape in of_process["ingress"]]
    line_s = np.linalg.solve(shapes, list(of_process["ingress"].values()))
    fixed_s, prompt_token_s, own_token_s = map(float, line_s)
    return statistics.fmean(of_process["proxy"].values()), fixed_s, prompt_token_s, own_token_s


def measured_kept_tokens() -> int:
    """Of prompts, in an engine."""
    return next(int(float(row["value"])) for row in _rows("costs.csv") if row["quantity"] == KEPT)


def _rows(name: str) -> list[dict[str, str]]:
    with (FOLDER / name).open() as file:
        return list(csv.DictReader(file))
