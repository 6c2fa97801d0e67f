"""Trainings whose vLLM server gets weights through TRL's own synchronisation. Run on two processes, or imported."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from small_runs import SMALL_RUN, every_other
from trainers.equal_ranks import shard_on_cpu
from trainers.tcp_transfer import weights_over_tcp
from trl.generation.vllm_generation import VLLMGeneration

from step_trl import SASConfig, SASTrainer, StepGRPOConfig, StepGRPOTrainer, testbed
from step_trl.rollout.engines.vllm_process import free_port


UPDATES = 2
CLASSES = {"step_grpo": (StepGRPOTrainer, StepGRPOConfig), "sas": (SASTrainer, SASConfig)}


class Watched:
    """
    Compares the server with the policy, before and after each synchronisation: `differences` are the largest ones of
    the log-probabilities of texts, on the main process.
    """

    def __init__(self, trainer):
        generation = trainer.vllm_generation
        assert type(generation) is VLLMGeneration and generation.mode == "server"
        self.trainer, self.generation, self.synchronise = trainer, generation, generation.sync_weights
        self.differences: list[tuple[float, float]] = []
        self.whole = testbed.load_model().eval()
        tokenizer = testbed.load_tokenizer()
        self.texts = [
            tokenizer.apply_chat_template(row["prompt"], return_dict=False)
            + tokenizer.encode(f"Let me see. The answer is {row['solution']}.\n\nWait, ")
            for row in testbed.load_dataset("easy").select(range(4))
        ]
        generation.sync_weights = self.sync_weights

    def sync_weights(self) -> None:
        self.whole.load_state_dict(self.trainer.accelerator.get_state_dict(self.trainer.model))
        before = self.difference()
        self.synchronise()
        self.differences.append((before, self.difference()))

    @torch.no_grad()
    def difference(self) -> float:
        if not self.trainer.accelerator.is_main_process:
            return 0.0
        scored = self.generation.vllm_client.get_sequence_logprobs(self.texts, [1] * len(self.texts), top_logprobs=1)
        largest = 0.0
        for text, server in zip(self.texts, scored["actual_logprobs"], strict=True):
            ids = torch.tensor([text])
            policy = self.whole(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])
            largest = max(largest, (policy - torch.tensor(server)).abs().max().item())
        return largest


def train(method: str, how: str, url: str, folder: Path) -> dict:
    """Return what the main process records of a training that runs `"alone"`, with `"ddp"` or with `"fsdp2"`."""
    trainer_class, config_class = CLASSES[method]
    if how == "fsdp2":
        shard_on_cpu()
    config = config_class(
        str(folder / f"{method}-{how}"), use_vllm=True, vllm_mode="server", vllm_server_base_url=url,
        vllm_group_port=free_port(), weight_sync_check_every=1, num_generations=4,
        per_device_train_batch_size=8 if how == "alone" else 4, max_completion_length=64, learning_rate=1e-3, seed=3,
        **SMALL_RUN | {"max_steps": UPDATES},
    )  # fmt: skip
    with weights_over_tcp():
        trainer = trainer_class(
            testbed.load_model(),
            every_other,
            args=config,
            train_dataset=testbed.load_dataset("medium"),
            processing_class=testbed.load_tokenizer(),
        )
        watched = Watched(trainer)
        trainer.train()
        trainer._policy_engine.sync_weights()  # the last update's; no process goes on before the server has them
        if trainer.accelerator.is_main_process:
            trainer.vllm_generation.vllm_client.close_communicator()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {
        "differences": watched.differences,
        "sampled": [entry["sampling/sampling_logp_difference/max"] for entry in logs],
        "processes": trainer.accelerator.num_processes,
    }


def main(url: str, folder: Path) -> None:
    found = {f"{method}-{how}": train(method, how, url, folder) for how in ("ddp", "fsdp2") for method in CLASSES}
    if torch.distributed.get_rank() == 0:
        (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
