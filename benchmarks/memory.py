"""
Compare the memory that a dry run estimates with the memory that the training then uses.

A small model with random weights is trained for two updates, on completions of full length that are drawn at random.
On a CPU, torch's profiler counts the allocations, and FSDP2 runs on two processes (gloo). On a GPU, in bfloat16, the
peak is `torch.cuda.max_memory_allocated`.

    python benchmarks/memory.py
    python benchmarks/memory.py --cases checkpointing fsdp2 --layers 8 --length 512
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from accelerate import PartialState
from transformers import AutoModelForCausalLM, PretrainedConfig, Qwen3Config
from trl import ModelConfig

from step_trl import EfficientReasoningConfig, EfficientReasoningTrainer, testbed
from step_trl.cli.dry_run.layout import Layout
from step_trl.cli.dry_run.memory import Workload, estimate_memory
from step_trl.data import prompt_length


sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from trainers.equal_ranks import shard_on_cpu
from trainers.held_bytes import HeldBytes, local_bytes


CASES = {  # the number of processes, and the fields
    "checkpointing": (1, {}),
    "whole activations": (1, {"gradient_checkpointing": False}),
    "no reference": (1, {"beta": 0.0}),
    "fsdp2": (2, {"accelerator_config": {"gradient_accumulation_kwargs": {"sync_each_batch": True}}}),
    "fsdp2, whole gradients": (2, {}),
}
ACCUMULATION = 2
SMALLEST = ("--cases", "whole activations", "--layers", "1", "--length", "16")  # for tests


class RandomCompletions(EfficientReasoningTrainer):
    """Returns random tokens, which no model has sampled, up to the limit."""

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False):
        ids = range(len(self.processing_class))
        return [random.choices(ids, k=self.max_completion_length) for _ in prompt_ids], None


def random_reward(completions, **kwargs):
    """Return random rewards, so that they are not all equal."""
    return [random.random() for _ in completions]


def small_config(layers: int) -> PretrainedConfig:
    """Return a configuration that is wide enough for tensors to outweigh Python's objects."""
    return Qwen3Config(
        vocab_size=2048, hidden_size=512, intermediate_size=1536, num_hidden_layers=layers, num_attention_heads=8,
        num_key_value_heads=4, head_dim=64, max_position_embeddings=4096, tie_word_embeddings=False,
    )  # fmt: skip


def run_case(name: str, layers: int, length: int, folder: Path) -> dict[str, tuple[int, int]]:
    """Return the bytes of each part: estimated, and measured in this process."""
    processes, fields = CASES[name]
    on_gpu = torch.cuda.is_available()
    config, problems = small_config(layers), testbed.load_dataset("easy")
    args = EfficientReasoningConfig(
        str(folder / "run"), per_device_train_batch_size=2, gradient_accumulation_steps=ACCUMULATION,
        num_generations=2, max_completion_length=length, max_steps=2, save_strategy="no", report_to="none",
        disable_tqdm=True,
        use_cpu=not on_gpu, bf16=on_gpu, model_init_kwargs={"dtype": "bfloat16" if on_gpu else "float32"},
        **{"beta": 0.01} | fields,
    )  # fmt: skip
    if processes > 1:
        shard_on_cpu()
    trainer = RandomCompletions(
        str(folder / "model"),
        random_reward,
        args=args,
        train_dataset=problems,
        processing_class=testbed.load_tokenizer(),
    )
    watcher = HeldBytes(trainer)
    peak = measure_peak(trainer, on_gpu)
    longest = max(prompt_length(prompt, trainer.processing_class) for prompt in problems["prompt"])
    work = Workload(
        ModelConfig(dtype="bfloat16" if on_gpu else "float32"),
        Layout(processes, "fsdp", 3) if processes > 1 else Layout(),
        max_length=longest + length,
        micro_batch=args.per_device_train_batch_size,
        bf16=on_gpu,
        has_reference=args.beta != 0.0,
        gradient_checkpointing=args.gradient_checkpointing,
        accumulates_unshared=name.endswith("whole gradients"),
        padded=True,
        kept_completions=args.per_device_train_batch_size * ACCUMULATION,
    )
    estimate = estimate_memory(config, work)
    parts = {part: (estimate.lasting.get(part, 0), count) for part, count in watcher.held.items()}
    return parts | {f"peak ({estimate.peak})": (estimate.total, peak)}


def measure_peak(trainer: EfficientReasoningTrainer, on_gpu: bool) -> int:
    """Return the maximum number of bytes that were allocated at once."""
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        trainer.train()
        return torch.cuda.max_memory_allocated()
    before = sum(local_bytes(model.parameters()) for model in (trainer.model, trainer.ref_model) if model)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        trainer.train()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return before + max(itertools.accumulate(changes))


def run_alone(name: str, arguments: argparse.Namespace, folder: Path) -> dict[str, tuple[int, int]]:
    """Run a case in separate processes, so that no other case affects it. The first process writes the results."""
    AutoModelForCausalLM.from_config(small_config(arguments.layers)).save_pretrained(folder / "model")
    processes = CASES[name][0]
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    )
    sizes = ["--layers", str(arguments.layers), "--length", str(arguments.length)]
    command = [sys.executable, *launcher, __file__, "--cases", name, *sizes, "--folder", str(folder)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return json.loads((folder / "parts.json").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--length", type=int, default=512, help="number of tokens of the completions")
    parser.add_argument("--folder", type=Path, help="folder of a process of a case")
    arguments = parser.parse_args()
    if arguments.folder is not None:
        parts = run_case(arguments.cases[0], arguments.layers, arguments.length, arguments.folder)
        if PartialState().is_main_process:
            (arguments.folder / "parts.json").write_text(json.dumps(parts))
        return
    print("| case | part | estimated, MiB | measured, MiB | ratio |\n|---|---|---:|---:|---:|")
    for name in arguments.cases:
        if CASES[name][0] > 1 and torch.cuda.is_available():
            continue  # there is only one GPU
        with tempfile.TemporaryDirectory() as folder:
            parts = run_alone(name, arguments, Path(folder))
        for part, (estimated, measured) in parts.items():
            if measured:
                mib = f"{estimated / 2**20:.1f} | {measured / 2**20:.1f}"
                print(f"| {name} | {part} | {mib} | {estimated / measured:.2f} |", flush=True)


if __name__ == "__main__":
    main()
