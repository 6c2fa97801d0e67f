"""Run on two processes: one group of eight completions, four on each. Both write what was scored."""

import json
import sys
from typing import ClassVar

import torch

from step_trl import testbed
from step_trl.rollout import AnswerProbes
from step_trl.trainers import METHODS, spae
from step_trl.trainers.spo_chain import SegmentChain


OPTIONS = {
    "step_grpo": {
        "max_completion_length": 160,
        "length_reward": "kimi",
        "advantage_selection": {"selection_ratio": 0.5},
    },
    "seed_grpo": {"max_completion_length": 160, "alpha": 1.0},
    "nft": {"max_completion_length": 160},
    "critique_grpo": {"max_completion_length": 64, "refine_when": "always"},
    "spo": {"max_completion_length": 96, "value_samples": 3, "max_segments": 2, "prompt_value": "rollout"},
    "gvm": {"max_completion_length": 64, "loss": "grpo", "estimate_samples": 2, "generations_per_estimate": 3},
    "spae": {"max_completion_length": 160, "probe_samples": 2, "max_probes": 6, "saturation_threshold": -0.5},
}  # fmt: skip


def recording(trainer_class):
    class RecordingTrainer(trainer_class):
        def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
            self.columns = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
            return self.columns

        def _generate_and_score_completions(self, inputs):
            output = super()._generate_and_score_completions(inputs)
            self.in_loss = (output["completion_mask"] * output.get("tool_mask", 1)).tolist()
            self.kept = {
                name: output[name].tolist() for name in ("correct", "advantages", "correct_rate") if name in output
            }
            return output

    return RecordingTrainer


class RecordingProbes(AnswerProbes):
    """Records where it has probed, and what it has found."""

    record: ClassVar = {"measured": [], "cuts": []}

    def run(self, thoughts):
        self.record["cuts"] = [list(thought.cuts) for thought in thoughts]
        self.record["measured"] = super().run(thoughts)
        return self.record["measured"]


class RecordingChain(SegmentChain):
    """Records what was sampled for values, and the advantages before whitening."""

    def __init__(self, args):
        super().__init__(args)
        self.record = {"values": [], "rows": []}

    def _values(self, trainer, batch, places, samples):
        values = super()._values(trainer, batch, places, samples)
        self.record["values"].append((places, samples, values.tolist()))
        return values

    def advantages(self, trainer, batch):
        rows = super().advantages(trainer, batch)
        self.record["rows"] = [row.tolist() for row in rows]
        return rows


def train(method: str, path: str) -> dict:
    trainer_class, config_class = METHODS[method]
    config = config_class(
        f"{path}.{method}", num_generations=8, per_device_train_batch_size=4, max_steps=1, save_strategy="no",
        report_to="none", disable_tqdm=True, bf16=False, gradient_checkpointing=False, use_cpu=True, seed=3,
        logging_steps=1, **OPTIONS[method],
    )  # fmt: skip
    trainer = recording(trainer_class)(
        testbed.load_model(), args=config, train_dataset=testbed.load_dataset("easy"),
        processing_class=testbed.load_tokenizer(),
    )  # fmt: skip
    if method == "spo":
        trainer._segments = RecordingChain(trainer.args)
    spae.AnswerProbes = RecordingProbes
    trainer.train()
    return (
        trainer.kept
        | getattr(getattr(trainer, "_segments", None), "record", {})
        | RecordingProbes.record
        | {
            "ids": trainer.batch.completion_ids,
            "texts": [messages[0]["content"] for messages in trainer.batch.completions],
            "columns": trainer.columns.tolist(),
            "in_loss": trainer.in_loss,
            "refined": getattr(trainer, "_refined", torch.zeros(0)).tolist(),
            "budget": getattr(trainer, "_groups", []),
            "prompts": [row["prompt"][-1]["content"] for row in trainer.batch.rows],
            "weights": trainer.reward_weights.tolist(),
            "logs": trainer.state.log_history[0],
            "rank": trainer.accelerator.process_index,
        }
    )


def main(path: str) -> None:
    records = {method: train(method, path) for method in OPTIONS}
    with open(f"{path}.{records['nft']['rank']}.json", "w") as file:
        json.dump(records, file)


if __name__ == "__main__":
    main(sys.argv[1])
