"""
Compare what a GPU computes in bfloat16 and TF32 with float32 and float64, as the trainers and the engine compute it.

    python benchmarks/gpu/correctness.py

1. Log-probabilities and step confidences: an update of `SASTrainer` at learning rate 0 scores completions that the
   testbed model has sampled. The reference is a forward pass of each completion alone in float64, without padding. (In
   transformers, norms and rotary embeddings stay in float32 even then.) `changed` is the share of tokens whose
   advantage SAS would not have set to the same value.
2. The engine: greedy completions, compared with those of `model.generate` in the same precision up to the first token
   that differs, with the log-probabilities of the tokens before it. Differences of tokens are expected in bfloat16:
   the two compute with other shapes, and the largest logits of random weights are close to each other.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils.import_utils import enable_tf32


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from engine import left_padded

from gpu.block import SHAPES, TESTBED, Block, begin_peak, build_model, device, make_parser
from step_trl import SASConfig, SASTrainer, testbed
from step_trl.advantages import select_step_advantages, step_confidences
from step_trl.rollout import DynamicTruncatedRollout, SamplingParams
from step_trl.rollout.engines import TransformersEngine


SMALLEST = ("--models", "toy", "--precisions", "bf16, weights in float32", "--prompts", "2", "--max-tokens", "12")
GROUP = 2  # completions of each prompt


@dataclass(frozen=True)
class Precision:
    """The dtype of the weights, whether products of float32 use TF32, and whether a trainer has `bf16=True`."""

    dtype: str = "float32"
    tf32: bool = False
    bf16: bool = False

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Compute in this precision, as a trainer with its options does."""
        on_gpu = torch.cuda.is_available()
        if on_gpu:
            enable_tf32(self.tf32)
        try:
            with torch.autocast(device().type, torch.bfloat16, enabled=self.bf16):
                yield
        finally:
            if on_gpu:
                enable_tf32(False)


PRECISIONS = {
    "float32": Precision(),
    "TF32": Precision(tf32=True),
    "bf16, weights in float32": Precision(bf16=True),
    "bf16": Precision("bfloat16", bf16=True),
}


@dataclass
class Scored:
    """A completion with what a trainer computes for its tokens, (T,) each, on the CPU."""

    logps: torch.Tensor
    step_ids: torch.Tensor

    @property
    def confidences(self) -> torch.Tensor:
        return step_confidences(self.logps[None], self.step_ids[None])[0]

    @property
    def selected(self) -> torch.Tensor:
        """The advantages that SAS gives to the tokens of a correct completion with advantage 1."""
        one, correct = torch.ones(1), torch.ones(1, dtype=torch.bool)
        return select_step_advantages(one, self.logps[None].float(), self.step_ids[None], correct)[0]


Completions = dict[tuple[int, ...], list[list[int]]]  # by prompt
Scores = dict[tuple[tuple[int, ...], tuple[int, ...]], Scored]  # by prompt and completion


class FixedCompletions(SASTrainer):
    """Scores given completions instead of sampling, and stores in `scores` what its loss reads of them."""

    def __init__(self, *arguments: Any, completions: Completions, **options: Any):
        super().__init__(*arguments, **options)
        self.completions = completions
        self.scores: Scores = {}

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False):
        left = {prompt: list(own) for prompt, own in self.completions.items()}
        return [left[tuple(ids)].pop() for ids in prompt_ids], None

    def before_loss(self, inputs, logps):
        super().before_loss(inputs, logps)
        for row, mask in enumerate(inputs["completion_mask"].bool()):
            prompt = inputs["prompt_ids"][row][inputs["prompt_mask"][row].bool()]
            completion = inputs["completion_ids"][row][mask]
            scored = Scored(logps[row][mask].cpu(), inputs["step_ids"][row][mask].cpu())
            self.scores[tuple(prompt.tolist()), tuple(completion.tolist())] = scored


@lru_cache(maxsize=1)
def prompts(count: int) -> list[list[int]]:
    """Return the first distinct prompts of the testbed."""
    tokenizer = testbed.load_tokenizer()
    problems = testbed.load_dataset("train").select(range(count))["prompt"]
    return [tokenizer.apply_chat_template(p, add_generation_prompt=True, return_dict=False) for p in problems]


@lru_cache(maxsize=1)
def completions(count: int, max_tokens: int) -> Completions:
    """Return completions of the testbed model, sampled in float32. Other models score the same ones."""
    engine = TransformersEngine(testbed.load_model().to(device()), testbed.load_tokenizer())
    repeated = [prompt for prompt in prompts(count) for _ in range(GROUP)]
    rollouts = DynamicTruncatedRollout(engine, sampling=SamplingParams(max_tokens)).run(repeated, range(len(repeated)))
    found: Completions = {}
    for prompt, rollout in zip(repeated, rollouts, strict=True):
        found.setdefault(tuple(prompt), []).append(list(rollout.completion_ids))
    return found


def score(name: str, precision: Precision, count: int, max_tokens: int) -> Scores:
    """Score the completions with a trainer."""
    on_gpu = torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as folder:
        args = SASConfig(
            folder, per_device_train_batch_size=GROUP, gradient_accumulation_steps=count, num_generations=GROUP,
            max_completion_length=max_tokens, max_steps=1, learning_rate=0.0, beta=0.0, bf16=precision.bf16,
            tf32=precision.tf32 if on_gpu else None, use_cpu=not on_gpu, save_strategy="no", report_to="none",
            logging_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        trainer = FixedCompletions(
            build_model(name, precision.dtype),
            lambda completions, **columns: [1.0] * len(completions),
            args=args,
            train_dataset=testbed.load_dataset("train").select(range(count)),
            processing_class=testbed.load_tokenizer(),
            completions=completions(count, max_tokens),
        )
        trainer.train()
    return trainer.scores


@lru_cache(maxsize=1)
def reference(name: str, count: int, max_tokens: int) -> dict[tuple, torch.Tensor]:
    """Return the log-probabilities of each completion in float64."""
    model, found = build_model(name, "float64"), {}
    for prompt, own in completions(count, max_tokens).items():
        for completion in own:
            ids = torch.tensor([[*prompt, *completion]], device=device())
            with torch.no_grad():
                logps = model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(dim=-1)
            chosen = logps.gather(-1, ids[0, len(prompt) :, None])[:, 0]
            found[prompt, tuple(completion)] = chosen.cpu()
    return found


def compare_scores(name: str, precision: Precision, count: int, max_tokens: int) -> dict[str, Any]:
    """Compare the scores in a precision with the reference."""
    begin_peak()
    expected = reference(name, count, max_tokens)
    scores = score(name, precision, count, max_tokens)
    if scores.keys() != expected.keys():
        raise RuntimeError("The trainer has not scored the completions that it was given.")
    logps, confidences, changed = [], [], []
    for key, scored in scores.items():
        exact = Scored(expected[key], scored.step_ids)
        logps.append((scored.logps - exact.logps).abs())
        confidences += [(scored.confidences - exact.confidences).abs()] * bool((scored.step_ids >= 0).any())
        changed.append(scored.selected != exact.selected)
    differences = {"log-probability": torch.cat(logps), "confidence": torch.cat(confidences)}
    return {
        "completions": len(scores),
        "tokens": len(differences["log-probability"]),
        **{f"{what}, max": float(values.max()) for what, values in differences.items()},
        **{f"{what}, mean": float(values.mean()) for what, values in differences.items()},
        "changed": float(torch.cat(changed).float().mean()),
    }


def greedy_by_engine(model: PreTrainedModel, asked: list[list[int]], max_tokens: int) -> tuple[list, list]:
    """Return the tokens and log-probabilities of greedy completions."""
    engine = TransformersEngine(model, testbed.load_tokenizer(), eos_token_ids=())

    async def complete_all() -> list:
        calls = [engine.generate(ids, max_tokens=max_tokens, temperature=0.0) for ids in asked]
        return await asyncio.gather(*calls)

    found = asyncio.run(complete_all())
    return [one.token_ids for one in found], [one.logprobs for one in found]


def greedy_by_generate(model: PreTrainedModel, asked: list[list[int]], max_tokens: int) -> tuple[list, list]:
    """The same by `model.generate`, from its logits."""
    inputs = left_padded(asked, device())
    config = GenerationConfig(
        do_sample=False, max_new_tokens=max_tokens, pad_token_id=0, output_logits=True, return_dict_in_generate=True
    )
    output = model.generate(**inputs, generation_config=config)
    tokens = output.sequences[:, inputs["input_ids"].size(1) :]
    logps = torch.stack(
        [logits.float().log_softmax(-1).gather(-1, tokens[:, [i]])[:, 0] for i, logits in enumerate(output.logits)], 1
    )
    return tokens.tolist(), logps.tolist()


def compare_greedy(name: str, precision: Precision, count: int, max_tokens: int) -> dict[str, Any]:
    """Compare the engine's greedy completions with those of `generate`."""
    begin_peak()
    model, asked = build_model(name, precision.dtype), prompts(count)
    with precision.applied(), torch.no_grad():
        by_engine = greedy_by_engine(model, asked, max_tokens)
        by_generate = greedy_by_generate(model, asked, max_tokens)
    equal, differences = 0, [0.0]
    for own, own_logps, other, other_logps in zip(*by_engine, *by_generate, strict=True):
        same = next((i for i, (a, b) in enumerate(zip(own, other, strict=True)) if a != b), len(own))
        equal += same
        differences += [abs(a - b) for a, b in zip(own_logps[:same], other_logps[:same], strict=True)]
    return {
        "completions": count,
        "tokens": count * max_tokens,
        "equal": equal / (count * max_tokens),
        "log-probability, max": max(differences),
        "log-probability, mean": sum(differences) / max(1, equal),
    }


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--models", nargs="+", choices=[*SHAPES, TESTBED], default=[TESTBED, "0.6B"])
    parser.add_argument("--precisions", nargs="+", choices=list(PRECISIONS), default=list(PRECISIONS))
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=192, help="most tokens of a completion")
    options = parser.parse_args()
    sizes = options.prompts, options.max_tokens
    settings = {"prompts": options.prompts, "max_tokens": options.max_tokens}
    scores, greedy = Block("log_probabilities", options, settings), Block("greedy", options, settings)
    chosen = {name: PRECISIONS[name] for name in options.precisions}
    for model in options.models:
        for name, precision in chosen.items():
            if precision.tf32 and not torch.cuda.is_available():
                continue  # it is a mode of a GPU's matrix units
            scores.measure(f"{model}, {name}", partial(compare_scores, model, precision, *sizes))
            greedy.measure(f"{model}, {name}", partial(compare_greedy, model, precision, *sizes))
    scores.finish()
    greedy.finish()


if __name__ == "__main__":
    main()
