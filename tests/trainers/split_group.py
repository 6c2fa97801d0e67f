"""Run on two processes: one group of eight completions, four on each. Both write what was scored."""

import json
import sys

from step_trl import testbed
from step_trl.trainers import METHODS


OPTIONS = {
    "step_grpo": {
        "max_completion_length": 160,
        "length_reward": "kimi",
        "advantage_selection": {"selection_ratio": 0.5},
    },
    "seed_grpo": {"max_completion_length": 160, "alpha": 1.0},
    "nft": {"max_completion_length": 160},
}  # fmt: skip


def recording(trainer_class):
    class RecordingTrainer(trainer_class):
        def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
            self.columns = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
            return self.columns

        def _generate_and_score_completions(self, inputs):
            output = super()._generate_and_score_completions(inputs)
            self.kept = {
                name: output[name].tolist() for name in ("correct", "advantages", "correct_rate") if name in output
            }
            return output

    return RecordingTrainer


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
    trainer.train()
    return trainer.kept | {
        "ids": trainer.batch.completion_ids,
        "texts": [messages[0]["content"] for messages in trainer.batch.completions],
        "columns": trainer.columns.tolist(),
        "weights": trainer.reward_weights.tolist(),
        "logs": trainer.state.log_history[0],
        "rank": trainer.accelerator.process_index,
    }


def main(path: str) -> None:
    records = {method: train(method, path) for method in OPTIONS}
    with open(f"{path}.{records['nft']['rank']}.json", "w") as file:
        json.dump(records, file)


if __name__ == "__main__":
    main(sys.argv[1])
