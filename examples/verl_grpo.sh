#!/usr/bin/env bash
# GRPO with verl and the Shop-R1 reward, on one machine with 8 GPUs; the service runs elsewhere. Data: docs/trainers/verl.md.
set -euo pipefail

export SHOPR1_CLIENT_URL="${SHOPR1_CLIENT_URL:-http://127.0.0.1:8000}"

python3 -m verl.trainer.main_ppo \
  reward.reward_manager.source=importlib \
  reward.reward_manager.module.path=pkg://shopr1_client.trainers.verl_manager \
  reward.reward_manager.name=ShopR1RewardManager \
  algorithm.adv_estimator=grpo \
  algorithm.use_kl_in_reward=False \
  data.train_files="${TRAIN_FILES:-train.parquet}" \
  data.val_files="${VAL_FILES:-val.parquet}" \
  data.train_batch_size=128 \
  data.max_prompt_length=6144 \
  data.max_response_length=512 \
  data.filter_overlong_prompts=True \
  actor_rollout_ref.model.path="${MODEL:-Qwen/Qwen2.5-3B-Instruct}" \
  actor_rollout_ref.actor.optim.lr=1e-6 \
  actor_rollout_ref.actor.ppo_mini_batch_size=64 \
  actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=4 \
  actor_rollout_ref.actor.use_kl_loss=True \
  actor_rollout_ref.actor.kl_loss_coef=0.001 \
  actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu=8 \
  actor_rollout_ref.rollout.name=vllm \
  actor_rollout_ref.rollout.n=8 \
  actor_rollout_ref.rollout.tensor_model_parallel_size=1 \
  actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=8 \
  trainer.logger=console \
  trainer.n_gpus_per_node=8 \
  trainer.nnodes=1 \
  trainer.total_epochs=1 \
  "$@"
