#!/bin/bash
# The paper's Step-GRPO recipe on two nodes of 8 GPUs: a vLLM server on the first, the training on the second.
#
#     sbatch recipes/slurm/two_nodes.sh
#
# The nodes must reach each other on ports 8000 (completions) and 51216 (weights). See docs/how-to/eight-gpus.md.
#SBATCH --job-name=step-grpo
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=3-00:00:00
#SBATCH --output=%x-%j.log

set -euo pipefail
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
server=${nodes[0]}
trainer=${nodes[1]}

# No API key protects the endpoints that receive weights, so the server should listen only on the cluster's own network.
export VLLM_SERVER_DEV_MODE=1
srun --nodes=1 --ntasks=1 --nodelist="$server" --output="$SLURM_JOB_NAME-$SLURM_JOB_ID-server.log" \
    step-trl serve Qwen/Qwen3-8B --host "$server" --tensor-parallel-size 8 --max-model-len 18432 &
trap 'kill %1' EXIT

# The trainer waits until the server is up.
srun --nodes=1 --ntasks=1 --nodelist="$trainer" \
    accelerate launch --config_file recipes/accelerate_configs/fsdp2.yaml -m step_trl train \
    --config recipes/step_grpo/paper.yaml --vllm_server_base_url "http://$server:8000" --vllm_server_timeout 900 \
    --gradient_accumulation_steps 40 --steps_per_generation 160
