"""Run by `torchrun` on two processes: one group of eight completions, four on each. Rank 0 writes what was scored."""

import json
import sys

from step_trl import StepGRPOConfig, StepGRPOTrainer, testbed


class RecordingTrainer(StepGRPOTrainer):
    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        self.ids, self.columns = (
            completion_ids_list,
            super()._calculate_rewards(inputs, prompts, completions, completion_ids_list),
        )
        return self.columns

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        self.local_correct, self.advantages = output["correct"].tolist(), output["advantages"].tolist()
        return output


def main(path: str) -> None:
    config = StepGRPOConfig(
        f"{path}.run", num_generations=8, per_device_train_batch_size=4, max_completion_length=320, max_steps=1,
        save_strategy="no", report_to="none", disable_tqdm=True, bf16=False, gradient_checkpointing=False,
        use_cpu=True, seed=3, length_reward="kimi", advantage_selection={"selection_ratio": 0.5}, logging_steps=1,
    )  # fmt: skip
    trainer = RecordingTrainer(
        testbed.load_model(), args=config, train_dataset=testbed.load_dataset("easy"),
        processing_class=testbed.load_tokenizer(),
    )  # fmt: skip
    trainer.train()
    record = {
        "ids": trainer.ids,
        "columns": trainer.columns.tolist(),
        "correct": trainer.local_correct,
        "advantages": trainer.advantages,
        "weights": trainer.reward_weights.tolist(),
    }
    with open(f"{path}.{trainer.accelerator.process_index}.json", "w") as file:
        json.dump(record, file)


if __name__ == "__main__":
    main(sys.argv[1])
