"""Run on two processes: trainings on a vLLM server in which something different happens on rank 1."""

from __future__ import annotations

import json
import os
import sys

from small_runs import SMALL_RUN

from step_trl import StepGRPOConfig, StepGRPOTrainer, testbed
from step_trl.rollout import GoOn, TruncationCallback


RANK = int(os.environ.get("RANK", 0))


class RaisesOnRankOne(TruncationCallback):
    """Raises an error in the rollouts after the first `fine` ones."""

    def __init__(self, fine: int = 0):
        self.fine = fine

    def positions(self, prompt_ids, max_tokens, seed):
        return (5,)

    def at_boundary(self, boundary):
        self.fine -= 1
        if RANK == 1 and self.fine < 0:
            raise ZeroDivisionError("the callback of rank 1")
        return GoOn()


def build(url: str, folder: str, rollouts_ahead: int = 0, **options) -> StepGRPOTrainer:
    config = StepGRPOConfig(
        folder, use_vllm=True, vllm_mode="server", vllm_server_base_url=[url], weight_sync="disk",
        num_generations=4, per_device_train_batch_size=4, max_completion_length=96, seed=3,
        rollouts_ahead=rollouts_ahead, **SMALL_RUN | {"max_steps": 2},
    )  # fmt: skip
    dataset, tokenizer = testbed.load_dataset("hard"), testbed.load_tokenizer()
    return StepGRPOTrainer(
        testbed.load_model(), args=config, train_dataset=dataset, processing_class=tokenizer, **options
    )


def main(url: str, path: str) -> None:
    trainer = build(url, f"{path}.short")
    if RANK == 1:
        trainer.max_completion_length = 16
    lengths, generate = [], trainer._generate_single_turn

    def recording(prompt_ids, *args):
        completion_ids, logprobs = generate(prompt_ids, *args)
        lengths.append([len(ids) for ids in completion_ids])
        return completion_ids, logprobs

    trainer._generate_single_turn = recording
    trainer.train()
    with open(f"{path}.{RANK}.json", "w") as file:
        json.dump(lengths, file)
    trainer.vllm_generation.generate_together = False  # as with tools
    for _ in range(1 + RANK):
        trainer.vllm_generation.generate([[5, 6, 7]], None, 1)
    ahead = build(url, f"{path}.ahead", 1, truncation_callbacks=[RaisesOnRankOne(4)])  # in the second batch
    try:
        ahead.train()
    except Exception as error:
        with open(f"{path}.ahead.{RANK}.json", "w") as file:
            json.dump([f"{type(error).__name__}: {error}", ahead.state.global_step], file)
    build(url, f"{path}.raise", truncation_callbacks=[RaisesOnRankOne()]).train()


if __name__ == "__main__":
    main(*sys.argv[1:])
