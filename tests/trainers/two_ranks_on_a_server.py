"""Run on two processes: three steps on a vLLM server, with weights over the disk. Each rank writes a log."""

import json
import sys

from small_runs import SMALL_RUN, every_other

from step_trl import SASConfig, SASTrainer, StepGRPOConfig, StepGRPOTrainer, testbed


def main(method: str, url: str, path: str, rollouts_ahead: str) -> None:
    trainer_class, config_class = {
        "step_grpo": (StepGRPOTrainer, StepGRPOConfig),
        "sas": (SASTrainer, SASConfig),
    }[method]
    config = config_class(
        f"{path}.run", use_vllm=True, vllm_mode="server", vllm_server_base_url=[url], weight_sync="disk",
        rollouts_ahead=int(rollouts_ahead), weight_sync_check_every=1 + int(rollouts_ahead),
        num_generations=4, per_device_train_batch_size=4, max_completion_length=48, learning_rate=1e-3, seed=3,
        **SMALL_RUN | {"max_steps": 3},
    )  # fmt: skip
    trainer = trainer_class(
        testbed.load_model(),
        every_other,
        args=config,
        train_dataset=testbed.load_dataset("hard"),
        processing_class=testbed.load_tokenizer(),
    )
    batches, prompts_of = [], trainer._generate_single_turn

    def recording(prompt_ids, *args):
        batches.append(prompt_ids)
        return prompts_of(prompt_ids, *args)

    trainer._generate_single_turn = recording
    trainer.train()
    with open(f"{path}.{trainer.accelerator.process_index}.json", "w") as file:
        json.dump({"history": trainer.state.log_history, "batches": batches}, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
