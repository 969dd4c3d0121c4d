#!/usr/bin/env bash
# ms-swift 4.6.0 (torch 2.13.0): a reward of None is a reward of 0 in the advantages of the whole group.
#
# Behaviour: ms-swift accepts None from a reward function, as TRL does, and stores NaN. compute_advantages then sums the
# rewards of a rollout with nansum, which makes 0 of it, and takes mean and deviation of the group with this 0. TRL 1.16
# leaves such a rollout out of the mean and gives it the advantage 0. ms-swift logs a warning.
#
# Seen, a group with the rewards 3, 3, None, 1, scale_rewards "none": the rewards count as 3, 3, 0, 1, and the
#       advantages are 1.25, 1.25, -1.75, -0.75. Without the third rollout they would be 0.67, 0.67, -1.33.
#
# Why it matters: None is the only way of a reward function to say that it could not score a rollout (a judge timed
# out, a label is missing). 0 is what a wrong answer earns. The policy is pushed away from an answer that nobody has
# judged, and towards all others of its group, also the worst. Raise an exception instead, or drop the group.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --no-compile --disable-pip-version-check torch==2.13.0 ms-swift==4.6.0
cd "$dir"
export HF_HOME="$dir/hf" MODELSCOPE_CACHE="$dir/modelscope" HF_HUB_OFFLINE=1
venv/bin/python - <<'EOF'
import torch
from swift.rl_core.advantage import compute_advantages
from swift.rl_core.data import GRPOSample
from swift.rl_core.grpo_algorithm import compute_rewards_per_func

GIVEN = [3.0, 3.0, None, 1.0]


def reward(completions, **_):
    return GIVEN


messages = [{"role": "user", "content": "page"}, {"role": "assistant", "content": "answer"}]
samples = [GRPOSample.from_row({"messages": messages}) for _ in GIVEN]
rewards = compute_rewards_per_func(samples, [reward], [None], torch.device("cpu"))
advantages, counted = compute_advantages(rewards, torch.ones(1), len(GIVEN), scale_rewards="none")
print("given     ", GIVEN)
print("stored    ", rewards[:, 0].tolist())
print("counted as", counted.tolist())
print("advantages", advantages.tolist())
if counted.tolist() != [3, 3, 0, 1] or advantages.tolist() != [1.25, 1.25, -1.75, -0.75]:
    raise SystemExit("the behaviour has changed: expected that None counts as 0")
EOF
