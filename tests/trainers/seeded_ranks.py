"""Run on one process or on two: two steps with a seed per completion. Each rank writes what it sampled, per step."""

from __future__ import annotations

import json
import os
import sys

from small_runs import SMALL_RUN

from step_trl import StepGRPOConfig, StepGRPOTrainer, testbed


def sample_two_steps(urls: list[str], number_of_ranks: int, folder: str) -> list[list[tuple[list[int], list[int]]]]:
    """Return this process's prompts and completions for each step, out of 8 over all processes."""
    config = StepGRPOConfig(
        folder, use_vllm=True, vllm_mode="server", vllm_server_base_url=urls, weight_sync="disk",
        seeded_rollouts=True, learning_rate=0.0, num_generations=4, max_completion_length=96, seed=3,
        per_device_train_batch_size=8 // number_of_ranks, **SMALL_RUN | {"max_steps": 2},
    )  # fmt: skip
    trainer = StepGRPOTrainer(
        testbed.load_model(),
        args=config,
        train_dataset=testbed.load_dataset("medium"),
        processing_class=testbed.load_tokenizer(),
    )
    steps, generate = [], trainer._generate_single_turn

    def recording(prompt_ids, *args):
        completion_ids, logprobs = generate(prompt_ids, *args)
        steps.append(list(zip(prompt_ids, completion_ids)))
        return completion_ids, logprobs

    trainer._generate_single_turn = recording
    trainer.train()
    return steps


def main(path: str, *runs: str) -> None:
    """Each run is given as the URLs of its servers, with commas."""
    sampled = [sample_two_steps(urls.split(","), 2, f"{path}.run{number}") for number, urls in enumerate(runs)]
    with open(f"{path}.{os.environ['RANK']}.json", "w") as file:
        json.dump(sampled, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
