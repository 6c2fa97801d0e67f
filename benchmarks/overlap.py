"""
Measure what `rollouts_ahead=1` saves: the time of an update while the server samples the next batch.

    python benchmarks/overlap.py                                # starts a server on the testbed model
    python benchmarks/overlap.py --completions 64 --max-tokens 224 --updates 6 --rounds 5

The server runs on one core and the trainer on another, so that neither slows the other down; a server that is given
by `--url` is not pinned. Each round trains every contender for `--updates` updates, from the same model and with
learning rate 0, so that completions stay equally long. The first update, whose batch nothing overlaps, is left out.
The table shows medians over the rounds; ratios are computed within each round.

TRL's GRPOTrainer samples with its own client. It gets weights to the server over the disk, as the others do, since
there is no NCCL on a CPU. "rest" is scoring, loss, backward pass and optimizer; with overlap, "generation" is only the
time that the trainer waits for it.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from transformers import PrinterCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer
from trl.generation.vllm_client import VLLMClient
from trl.generation.vllm_generation import VLLMGeneration

from step_trl import EfficientReasoningConfig, EfficientReasoningTrainer, StepGRPOConfig, StepGRPOTrainer
from step_trl.report.tables import to_markdown
from step_trl.rewards import math_accuracy_reward
from step_trl.rollout.engines import VLLMServer, VLLMServerEngine
from step_trl.runtime.weight_sync import DiskSyncedGeneration
from step_trl.testbed import MODEL_DIR, load_dataset, load_model, load_tokenizer


NUM_GENERATIONS = 8
MICRO_BATCHES = 4  # of an update
GOAL = 1.10
NAMES = {
    "trl": "TRL's GRPOTrainer",
    "grpo": "ours, GRPO",
    "grpo ahead": "ours, GRPO, rollouts_ahead=1",
    "step": "ours, Step-GRPO",
    "step ahead": "ours, Step-GRPO, rollouts_ahead=1",
}
SMALLEST = ("--completions", "8", "--max-tokens", "8", "--updates", "2", "--rounds", "1")  # for tests


class TRLGeneration(DiskSyncedGeneration):
    """Sends weights over the disk, and samples as TRL does."""

    generate = VLLMGeneration.generate

    def _init_vllm(self) -> None:
        self.vllm_client = VLLMClient(base_url=self.server_base_url, connection_timeout=60)


class Clock(TrainerCallback):
    """Notes the ends of updates, and the seconds of generations and of synchronisations."""

    def __init__(self):
        self.ends: list[float] = []
        self.generating: list[float] = []
        self.sending: list[float] = []

    def on_step_end(self, args, state, control, **kwargs):
        self.ends.append(time.perf_counter())

    def watch(self, trainer: GRPOTrainer) -> None:
        trainer._generate_single_turn = self._timed(trainer._generate_single_turn, self.generating)
        trainer.vllm_generation.sync_weights = self._timed(trainer.vllm_generation.sync_weights, self.sending)
        trainer.add_callback(self)

    def _timed(self, function: Callable, seconds: list[float]) -> Callable:
        def timed(*args, **kwargs):
            sent, began = sum(self.sending), time.perf_counter()
            result = function(*args, **kwargs)
            seconds.append(time.perf_counter() - began - (sum(self.sending) - sent))
            return result

        return timed

    def quantities(self) -> dict[str, float]:
        """Return the seconds of an update and its parts, without the first update."""
        updates = len(self.ends) - 1
        seconds = (self.ends[-1] - self.ends[0]) / updates
        generation, weights = sum(self.generating[1:]) / updates, sum(self.sending[1:]) / updates
        return {
            "seconds": seconds,
            "generation": generation,
            "weights": weights,
            "rest": seconds - generation - weights,
        }


def options(args: argparse.Namespace, folder: str) -> dict[str, Any]:
    """Return the options that all contenders share."""
    return {
        "output_dir": folder,
        "max_steps": args.updates,
        "per_device_train_batch_size": args.completions // MICRO_BATCHES,
        "gradient_accumulation_steps": MICRO_BATCHES,
        "num_generations": NUM_GENERATIONS,
        "max_completion_length": args.max_tokens,
        "learning_rate": 0.0,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "logging_steps": args.updates,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def build_trls(url: str, args: argparse.Namespace, folder: str, **arguments: Any) -> GRPOTrainer:
    trainer = GRPOTrainer(args=GRPOConfig(**options(args, folder)), **arguments)
    trainer.use_vllm, trainer._last_loaded_step = True, -1
    trainer.vllm_generation = TRLGeneration.of(
        trainer,
        engine=VLLMServerEngine(url, trainer.processing_class),
        folder=Path(folder) / "weight_sync",
        server_base_url=url,
    )
    return trainer


def build_ours(
    trainer_class: type,
    config_class: type,
    ahead: int,
    url: str,
    args: argparse.Namespace,
    folder: str,
    **arguments: Any,
) -> GRPOTrainer:
    servers = {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": url, "weight_sync": "disk"}
    config = config_class(rollouts_ahead=ahead, **options(args, folder) | servers)
    return trainer_class(args=config, **arguments)


CONTENDERS: dict[str, Callable[..., GRPOTrainer]] = {
    "trl": build_trls,
    "grpo": partial(build_ours, EfficientReasoningTrainer, EfficientReasoningConfig, 0),
    "grpo ahead": partial(build_ours, EfficientReasoningTrainer, EfficientReasoningConfig, 1),
    "step": partial(build_ours, StepGRPOTrainer, StepGRPOConfig, 0),
    "step ahead": partial(build_ours, StepGRPOTrainer, StepGRPOConfig, 1),
}


def measure(name: str, url: str, args: argparse.Namespace) -> dict[str, float]:
    """Train one contender, and return its [`Clock.quantities`]."""
    clock, prompts = Clock(), args.updates * args.completions // NUM_GENERATIONS
    with tempfile.TemporaryDirectory() as folder:
        trainer = CONTENDERS[name](
            url,
            args,
            folder,
            model=load_model(),
            reward_funcs=math_accuracy_reward,
            train_dataset=load_dataset("train").select(range(prompts)),
            processing_class=load_tokenizer(),
        )
        clock.watch(trainer)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return clock.quantities()


@contextmanager
def pinned(core: int | None) -> Iterator[None]:
    """Run on one core, as do the processes that are started meanwhile."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, before if core is None else {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def table(rounds: dict[str, pd.DataFrame]) -> pd.DataFrame:
    lines = {}
    for name, own in rounds.items():
        alone = rounds[name.removesuffix(" ahead")]  # the same without overlap
        longer = alone[["generation", "rest"]].max(axis=1)
        lines[NAMES[name]] = {column: f"{value:.2f}" for column, value in own.median().items()} | {
            "/TRL": f"{(own['seconds'] / rounds['trl']['seconds']).median():.2f}",
            "/without": f"{(own['seconds'] / alone['seconds']).median():.2f}",
            "/longer part": f"{(own['seconds'] / longer).median():.2f}",
        }
    return pd.DataFrame.from_dict(lines, orient="index")


def run_rounds(url: str, args: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    """Train all contenders in turn. Return the [`Clock.quantities`] of each round, by contender."""
    measure("grpo", url, args)  # the first requests are slow
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in CONTENDERS}
    for number in range(args.rounds):
        for name in CONTENDERS:
            rounds[name].append(measure(name, url, args))
            print(f"round {number + 1}, {NAMES[name]}: {rounds[name][-1]['seconds']:.2f} s", flush=True)
    return rounds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="URL of an idle server on the testbed model; by default, this script starts one")
    parser.add_argument("--completions", type=int, default=64, help="completions per update, a multiple of 8")
    parser.add_argument("--max-tokens", type=int, default=224)
    parser.add_argument("--updates", type=int, default=6, help="updates of each training, at least 2")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    cores: list[int | None] = [*sorted(os.sched_getaffinity(0))][:2]
    first, last = cores if len(cores) == 2 else (None, None)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the server inherits it
    with ExitStack() as stack:
        url = args.url
        if url is None:
            server = VLLMServer(MODEL_DIR, max_model_len=1024, log_file="/dev/null")
            with pinned(first):
                url = stack.enter_context(server).url
        stack.enter_context(pinned(last))
        rounds = run_rounds(url, args)
    print(f"\n{args.completions} completions of at most {args.max_tokens} tokens; seconds of an update")
    print(to_markdown(table({name: pd.DataFrame(own) for name, own in rounds.items()})))
    print(f"\nGoal: /longer part <= {GOAL:.2f} with rollouts_ahead=1")


if __name__ == "__main__":
    main()
