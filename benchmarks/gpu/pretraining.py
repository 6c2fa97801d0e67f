"""Pre-training of the larger testbed's model for a given time, which may be spread over several calls."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from testbed_model.pretrain import Inputs, batches, loss_of, make_optimizer, step, text_config, train_tokenizer
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers import PreTrainedTokenizerBase, Qwen3ForCausalLM

from step_trl.files import atomic_write

from .block import device
from .chains import LongerCorpus


CONTEXT = 2048
WARM_UP = 0.02  # share of the time
SAVE_EVERY = 90.0  # seconds
# The stages of `benchmarks/testbed_model`, with the share of the time at which each of them begins.
STAGES = (("drill", 0.0), ("easy passes", 0.2), ("passes", 0.35), ("traces", 0.6))


@dataclass(frozen=True)
class Recipe:
    """The sizes of the model, and how it is trained. `seconds` are those of all calls together."""

    seconds: float
    hidden_size: int = 512
    layers: int = 12
    heads: int = 8
    vocab_size: int = 512
    batch_tokens: int = 65_536
    drawn_at_once: int = 1_024
    tokenizer_texts: int = 3_000
    learning_rate: float = 1e-3
    workers: int = 0
    seed: int = 0


@dataclass
class Progress:
    """What has been done so far."""

    seconds: float = 0.0
    updates: int = 0
    tokens: int = 0
    calls: int = 0
    loss: float = float("nan")


class Traces(IterableDataset):
    """The batches of a stage. Each worker, in each call, writes traces of its own."""

    def __init__(self, stage: str, tokenizer: PreTrainedTokenizerBase, recipe: Recipe, call: int):
        self.stage, self.tokenizer, self.recipe, self.call = stage, tokenizer, recipe, call

    def __iter__(self) -> Iterator[Inputs]:
        worker = get_worker_info()
        place = (self.recipe.seed, self.stage, self.call, worker.id if worker else 0)
        corpus = LongerCorpus(random.Random(str(place)).randrange(2**31))
        example = {
            "drill": corpus.drill,
            "easy passes": partial(corpus.one_pass, easy=True),
            "passes": corpus.one_pass,
            "traces": corpus.mixed,
        }[self.stage]
        yield from batches(self.tokenizer, example, self.recipe.batch_tokens, corpus.rng, self.recipe.drawn_at_once)


class Pretraining:
    """
    A training that ends when its recipe's seconds are spent, so that its length does not depend on the GPU.

    The learning rate and the stage follow from the share of the seconds that is spent. Two trainings therefore differ.
    In the folder, `checkpoint.pt` lets another call go on, and the finished model is saved to `model/`.
    """

    def __init__(self, recipe: Recipe, folder: Path):
        self.recipe, self.folder, self.progress = recipe, folder, Progress()
        self.model_dir = folder / "model"
        self._checkpoint = folder / "checkpoint.pt"

    @property
    def done(self) -> bool:
        return self.model_dir.exists()

    def run(self, seconds: float) -> bool:
        """Train for at most these seconds, and return whether the training is done."""
        if self.done:
            return True
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers are forks
        deadline = time.monotonic() + seconds
        self._load()
        self._train(deadline)
        if self.progress.seconds < self.recipe.seconds:
            return False
        with atomic_write(self.model_dir) as partial_folder:
            self.model.save_pretrained(partial_folder)
            self.tokenizer.save_pretrained(partial_folder)
        self._checkpoint.unlink(missing_ok=True)
        return True

    def _load(self) -> None:
        """Set up the model and its optimizer, from the checkpoint if there is one."""
        recipe = self.recipe
        self.tokenizer = train_tokenizer(LongerCorpus(recipe.seed).texts(recipe.tokenizer_texts), recipe.vocab_size)
        self.tokenizer.model_max_length = CONTEXT
        config = text_config(recipe.hidden_size, recipe.layers, recipe.heads, self.tokenizer)
        config.max_position_embeddings = CONTEXT
        torch.manual_seed(recipe.seed)
        self.model = Qwen3ForCausalLM(config).to(device()).train()
        self.optimizer = make_optimizer(self.model, recipe.learning_rate, fused=torch.cuda.is_available())
        if self._checkpoint.exists():
            saved = torch.load(self._checkpoint, map_location=device(), weights_only=True)
            self.model.load_state_dict(saved["model"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.progress = Progress(**saved["progress"])
        self.progress.calls += 1
        print(f"{self.model.num_parameters():,} parameters, {self.progress}", flush=True)

    def _save(self) -> None:
        with atomic_write(self._checkpoint) as partial_file:
            torch.save(
                {
                    "model": self.model.state_dict(),
                    "optimizer": self.optimizer.state_dict(),
                    "progress": asdict(self.progress),
                },
                partial_file,
            )

    def _train(self, deadline: float) -> None:
        """Go through the stages until the time is over, and save a checkpoint now and then and at the end."""
        saved = time.monotonic()
        ends = [begin for _, begin in STAGES[1:]] + [1.0]
        for (stage, _), end in zip(STAGES, ends, strict=True):
            if self._share >= end:
                continue
            source = Traces(stage, self.tokenizer, self.recipe, self.progress.calls)
            for inputs, labels in self._on_device(source):
                self._update(inputs, labels)
                if time.monotonic() > deadline:
                    self._save()
                    return
                if time.monotonic() > saved + SAVE_EVERY:
                    self._save()
                    saved = time.monotonic()
                if self._share >= end:
                    break
            print(f"{stage}: {self.progress}", flush=True)

    @property
    def _share(self) -> float:
        return self.progress.seconds / self.recipe.seconds

    def _on_device(self, source: Traces) -> Iterator[Inputs]:
        """Yield batches, and add the seconds between two of them to the progress, those of writing them included."""
        workers, on_gpu = self.recipe.workers, torch.cuda.is_available()
        # On a GPU, no worker may use CUDA after the fork; these only write text.
        loader = DataLoader(source, batch_size=None, num_workers=workers, pin_memory=on_gpu)
        started = time.monotonic()
        for inputs, labels in loader:
            moved = {name: tensor.to(device(), non_blocking=True) for name, tensor in inputs.items()}
            yield moved, labels.to(device(), non_blocking=True)
            now = time.monotonic()
            self.progress.seconds += now - started
            started = now

    def _update(self, inputs: dict[str, torch.Tensor], labels: torch.Tensor) -> None:
        share, progress = self._share, self.progress
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.learning_rate * max(0.0, min(1.0, share / WARM_UP + 0.01, 3 * (1 - share)))
        with torch.autocast(device().type, torch.bfloat16, enabled=torch.cuda.is_available()):
            loss = loss_of(self.model, inputs, labels)
        step(self.model, self.optimizer, loss)
        progress.updates += 1
        progress.tokens += labels.numel()
        if progress.updates % 20 == 0 or not torch.cuda.is_available():
            progress.loss = loss.item()  # waits for the GPU, so that the clock is not far ahead of it
