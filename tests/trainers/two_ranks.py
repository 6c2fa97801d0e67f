"""Run on two processes, with DDP or FSDP2. Start-up takes longest, so only this is tested there."""

import json
import sys
from pathlib import Path

from peft import LoraConfig
from small_runs import SMALL_RUN
from trainers import equal_ranks, resumed_run
from trainers.held_bytes import HeldBytes
from transformers import AutoModelForCausalLM

from step_trl import SASConfig, SASTrainer, testbed
from step_trl.runtime.ranks import whole_parameters
from step_trl.runtime.weight_sync import DiskSyncedGeneration


class Reader:
    """Replaces servers: reads what they would read."""

    async def load_weights(self, folder):
        self.weights = AutoModelForCausalLM.from_pretrained(folder, dtype="float32").state_dict()


def synced_weights(trainer, folder):
    """Return the weights that servers receive."""
    reader = Reader()
    generation = DiskSyncedGeneration(
        engine=reader,
        folder=folder / "sync",
        model=trainer.model,
        accelerator=trainer.accelerator,
        processing_class=trainer.processing_class,
    )
    generation.sync_weights()
    return getattr(reader, "weights", None)  # the first process reads


def build_sharded(folder, peft_config=None, **options):
    sizes = {"per_device_train_batch_size": 1, "num_generations": 2, "max_completion_length": 32}
    config = SASConfig(str(folder), beta=0.1, **SMALL_RUN, **sizes)
    equal_ranks.shard_on_cpu(**options)
    return SASTrainer(
        testbed.load_model(), args=config, train_dataset=testbed.load_dataset("easy"),
        processing_class=testbed.load_tokenizer(), peft_config=peft_config,
    )  # fmt: skip


def check_fsdp2(trainer, folder):
    """What is sharded: evaluation, synchronised weights, bytes, LoRA, and what is refused. Writes what it finds."""
    found = {"evaluated": trainer.evaluate()["eval_reward"]}  # by transformers' `generate`, of different lengths
    whole, synced = trainer.accelerator.get_state_dict(trainer.model), synced_weights(trainer, folder)
    if synced is not None:
        found["synced"] = max((whole[name] - synced[name]).abs().max().item() for name in whole)

    full = build_sharded(folder / "full")
    watcher = HeldBytes(full)
    full.train()
    found["held"] = watcher.held

    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    adapted = build_sharded(folder / "lora", lora)
    adapted.train()
    synced = synced_weights(adapted, folder)
    with whole_parameters(adapted):
        layer = adapted.model.get_base_model().model.layers[0].self_attn.q_proj
        merged = (layer.base_layer.weight + layer.get_delta_weight("default")).detach()
        if synced is not None:
            found["merged"] = (merged - synced["model.layers.0.self_attn.q_proj.weight"]).abs().max().item()
            found["adapter"] = layer.get_delta_weight("default").abs().max().item()

    try:
        build_sharded(folder / "refused", cpu_ram_efficient_loading=True)
    except ValueError as error:
        found["refused"] = str(error)
    if trainer.accelerator.is_main_process:
        (folder / "fsdp2.json").write_text(json.dumps(found))


def main(folder: Path, how: str) -> None:
    trainer = equal_ranks.train("step_grpo", folder, 2, how)
    if how == "fsdp2":
        check_fsdp2(trainer, folder)
    equal_ranks.train("sas", folder, 2, how)
    for method in ("step_grpo", "sas") if how == "ddp" else ("step_grpo",):
        resumed_run.train_and_resume(method, folder / how, how)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
