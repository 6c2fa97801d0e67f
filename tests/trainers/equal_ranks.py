"""Run on one process, on two with DDP, or on two with FSDP2: two updates of each trainer, to be compared."""

from __future__ import annotations

import json
from pathlib import Path

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, TorchDynamoPlugin
from safetensors.torch import save_file
from small_runs import SMALL_RUN, every_other
from transformers import Trainer

from step_trl import SASConfig, SASTrainer, StepGRPOConfig, StepGRPOTrainer, testbed


COMPLETIONS = 12  # of an update, over all processes: three groups, of which two processes split the second
OPTIONS = SMALL_RUN | {
    "max_steps": 2,
    "optim": "sgd",  # parameters move by the gradient; Adam would blow up rounding where that is zero
    "lr_scheduler_type": "constant",
    "learning_rate": 0.1,
    "beta": 0.01,
    "num_generations": 4,
    "max_completion_length": 64,
    "per_device_eval_batch_size": 1,
    "num_generations_eval": 1,
    "seed": 3,
}


def shard_on_cpu(cpu_ram_efficient_loading: bool = False) -> None:
    """Use FSDP2 on CPUs, as accelerate does on GPUs. accelerate does not use it on CPUs, though torch supports it."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        reshard_after_forward=True,
        state_dict_type="full_state_dict",
        cpu_ram_efficient_loading=cpu_ram_efficient_loading,
    )
    AcceleratorState(cpu=True, dynamo_plugin=TorchDynamoPlugin(), _from_accelerator=True)
    PartialState().distributed_type = DistributedType.FSDP
    AcceleratorState().fsdp_plugin = plugin


class ReplayingSASTrainer(SASTrainer):
    """Reads completions from a file by their position in the global batch. One process writes the file."""

    file: Path

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False):
        place = self.accelerator.process_index * len(prompt_ids)
        replayed = json.loads(self.file.read_text()) if self.file.exists() else []
        update = self.state.global_step
        if len(replayed) == update:  # only in the first run, on one process
            ids, _ = super()._generate_single_turn(prompt_ids, images, multimodal_fields, num_generations)
            replayed.append([prompt_ids, ids])
            self.file.write_text(json.dumps(replayed))
        prompts, completions = (part[place : place + len(prompt_ids)] for part in replayed[update])
        assert prompts == prompt_ids
        return completions, None


def train(method: str, folder: Path, processes: int, how: str) -> Trainer:
    """Train for two updates, save the model, and write parameters and history."""
    trainer_class, config_class, options = {
        "step_grpo": (StepGRPOTrainer, StepGRPOConfig, {"advantage_selection": {"selection_ratio": 0.5}}),
        "sas": (ReplayingSASTrainer, SASConfig, {"length_reward": "grpo_lambda", "failed_step_advantage": 1.0}),
    }[method]
    output = folder / f"{method}-{how}"
    config = config_class(str(output), per_device_train_batch_size=COMPLETIONS // processes, **OPTIONS, **options)
    if how == "fsdp2":
        shard_on_cpu()
    problems = testbed.load_dataset("medium")
    trainer = trainer_class(
        testbed.load_model(),
        every_other,
        args=config,
        train_dataset=problems,
        eval_dataset=problems.select(range(4)),
        processing_class=testbed.load_tokenizer(),
    )
    trainer.file = folder / "completions.json"
    trainer.train()
    trainer.save_model()
    write(trainer, output)
    return trainer


def write(trainer: Trainer, folder: Path) -> None:
    """Write parameters and history."""
    weights = trainer.accelerator.get_state_dict(trainer.model)
    if trainer.accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(weights, folder / "weights.safetensors")
        (folder / "history.json").write_text(json.dumps(trainer.state.log_history))
