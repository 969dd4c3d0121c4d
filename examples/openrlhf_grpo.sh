#!/usr/bin/env bash
# GRPO with OpenRLHF and the Shop-R1 reward, on one machine with 8 GPUs; the service runs elsewhere. Data:
# docs/trainers/openrlhf.md.
set -euo pipefail

SERVICE="${SHOPR1_CLIENT_URL:-http://127.0.0.1:8000}"
if [[ -n "${SHOPR1_CLIENT_API_KEY:-}" ]]; then
  SERVICE="$SERVICE/key/$SHOPR1_CLIENT_API_KEY"
fi

python3 -m openrlhf.cli.train_ppo_ray \
  --reward.remote_url "$SERVICE/dialects/openrlhf/get_reward" \
  --data.prompt_dataset "${DATASET:-train.jsonl}" \
  --data.input_key prompt \
  --data.label_key label \
  --data.apply_chat_template \
  --data.max_len 6656 \
  --actor.model_name_or_path "${MODEL:-Qwen/Qwen2.5-3B-Instruct}" \
  --actor.num_gpus_per_node 8 \
  --actor.gradient_checkpointing_enable \
  --actor.adam.lr 1e-6 \
  --ref.num_gpus_per_node 8 \
  --vllm.num_engines 8 \
  --vllm.enable_sleep \
  --vllm.gpu_memory_utilization 0.6 \
  --train.colocate_all \
  --train.batch_size 1024 \
  --train.micro_batch_size 4 \
  --rollout.batch_size 128 \
  --rollout.micro_batch_size 8 \
  --rollout.n_samples_per_prompt 8 \
  --rollout.max_new_tokens 512 \
  --algo.advantage.estimator group_norm \
  --algo.kl.use_loss \
  --algo.kl.estimator k3 \
  --algo.kl.init_coef 0.001 \
  --ds.zero_stage 3 \
  --ds.enable_sleep \
  --ckpt.output_dir "${OUTPUT:-checkpoint}" \
  "$@"
