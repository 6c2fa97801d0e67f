"""Sample a model on benchmarks and grade its answers: one tidy row per sample."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pandas as pd
from torch import nn
from transformers import AutoModelForCausalLM, AutoProcessor, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
from trl import prepare_multimodal_messages
from trl.trainer.utils import create_model_from_path

from ..preferences.records import images_key
from ..rollout import DynamicTruncatedRollout, Rollout, SamplingParams, TruncationCallback
from ..rollout.engines import Engine, PromptImages, TransformersEngine
from ..rollout.engines.adapters import is_adapter
from ..steps import TriggerSegmenter
from ..text import TRIGGERS, tokenizer_of
from ..token_targets import TARGET_COLUMN
from .benchmarks import load_benchmark
from .graders import grade
from .store import KEY, add_samples, locked_folder, read_samples


if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftModel

OPTIONAL = (TARGET_COLUMN, "images")  # columns of problems
_ROWS_PER_FILE = 256
_SECONDS_PER_FILE = 15.0  # a killed process loses at most the samples of this time


def evaluate(
    model: str | Path | PreTrainedModel | PeftModel | Engine,
    benchmarks: Sequence[str] | Mapping[str, Dataset],
    *,
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin | None = None,
    n: int = 1,
    seeds: Sequence[int] | None = None,
    temperature: float = 0.6,
    top_p: float = 0.95,
    top_k: int = 0,
    min_p: float = 0.0,
    max_tokens: int = 32_768,
    callbacks: Sequence[TruncationCallback] = (),
    triggers: Sequence[str] = TRIGGERS,
    require_end_of_thinking: bool = True,
    max_in_flight: int = 64,
    save_to: str | Path | None = None,
    name: str | None = None,
    on_sample: Callable[[Rollout], None] | None = None,
) -> pd.DataFrame:
    """
    Sample `n` completions of each problem and grade them.

    Args:
        model (`str`, `Path`, [`~transformers.PreTrainedModel`], [`~peft.PeftModel`] or [`Engine`]):
            The policy: a folder or a name on the Hub, a model, or an engine such as a [`VLLMServerEngine`].
        benchmarks (`Sequence[str]` or `Mapping[str, Dataset]`):
            Names for [`load_benchmark`], or a mapping from names to rows with `prompt` (messages) and `solution`, and
            optionally `problem` (an id, by default the index), `images` (a list), `grader` (by default `"math"`) and
            `target_tokens` (the length that the prompt asks for, see
            [`~step_trl.token_targets.add_token_targets`]).
        tokenizer ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`], *optional*):
            A tokenizer with a chat template, or the processor of a vision-language model. Required for a model that is
            already loaded.
        n (`int`, *optional*, defaults to `1`):
            The number of samples per problem.
        seeds (`Sequence[int]`, *optional*):
            One seed per sample, by default 0, 1, ... The random draws of a sample depend only on its seed, benchmark
            and problem, so that two models are compared on the same draws.
        temperature (`float`), top_p (`float`), top_k (`int`), min_p (`float`), max_tokens (`int`):
            The sampling parameters and the maximum number of tokens of a completion. SAS evaluates with top-p 0.95 and
            8,192 tokens, Step-GRPO with top-p 0.9 and 32,768, both at temperature 0.6.
        callbacks (`Sequence[TruncationCallback]`, *optional*):
            Callbacks that truncate completions at inference time, such as [`~step_trl.rollout.ConfidenceTruncation`]
            (DEER).
        triggers (`Sequence[str]`, *optional*):
            The words that open a semantic step, for the column `steps`.
        require_end_of_thinking (`bool`, *optional*, defaults to `True`):
            Whether a completion without `</think>` is wrong. Otherwise, all of its text is graded, as needed for
            models that do not think.
        max_in_flight (`int`, *optional*, defaults to `64`):
            The number of completions to generate at once.
        save_to (`str` or `Path`, *optional*):
            The folder for the samples, which are saved after every 256 samples or 15 seconds. Samples that it already
            contains are not sampled again. Other settings, another model, and a second process at the same time are
            refused.
        name (`str`, *optional*):
            The name of the model in `save_to`, by which another model is recognised and refused. By default, a name
            with a fingerprint of the weights, or the engine's `repr`.
        on_sample (`Callable[[Rollout], None]`, *optional*):
            A function that is called with each finished completion.

    Returns:
        [`~pandas.DataFrame`]: One row per sample, with `benchmark`, `problem` (id, text), `sample` (0 to n - 1),
        `correct` (bool), `tokens`, `steps`, `exit` (bool: whether a callback stopped the thinking), `finish_reason`
        (`"eos"` or `"length"`), `completion` (text), `sampled_tokens` (including those of probes and discarded ones),
        and `target_tokens` if the rows have it.
    """
    seeds = list(range(n)) if seeds is None else list(seeds)
    if len(seeds) != n or len(set(seeds)) != n or n < 1:
        raise ValueError(f"seeds: {seeds} are not {n} different seeds, one per sample. Set n, or as many seeds.")
    problems = _problems(benchmarks)
    engine, processor = _engine(model, tokenizer)
    sampling = SamplingParams(max_tokens, temperature, top_p, top_k, min_p)
    settings = {
        "model": name or _name_of(model, engine),
        "chat_template": _digest(json.dumps(engine.tokenizer.chat_template)),
        "sampling": asdict(sampling),
        "callbacks": [_describe(callback) for callback in callbacks],
        "triggers": list(triggers),
        "require_end_of_thinking": require_end_of_thinking,
        "seeds": "of a sample: its number" if seeds == list(range(n)) else seeds,
        "benchmarks": {name: _fingerprint(rows) for name, rows in problems.groupby("benchmark", sort=False)},
    }
    order = problems.merge(pd.DataFrame({"sample": range(n), "seed": seeds}), how="cross")
    with nullcontext() if save_to is None else locked_folder(save_to, settings):
        done = pd.DataFrame(columns=KEY) if save_to is None else read_samples(save_to)
        jobs = order[~pd.MultiIndex.from_frame(order[KEY]).isin(pd.MultiIndex.from_frame(done[KEY]))]
        segmenter = TriggerSegmenter(engine.tokenizer, triggers)
        made = _Samples(jobs, processor, engine.tokenizer, segmenter, require_end_of_thinking, save_to, on_sample)
        made.sample(DynamicTruncatedRollout(engine, callbacks, sampling, max_in_flight=max_in_flight))
    samples = pd.concat([part for part in (done, *made.parts) if len(part)], ignore_index=True)
    # The types must not depend on whether rows were read or sampled.
    samples = samples.astype(dict.fromkeys(["benchmark", "problem", "completion", "finish_reason"], "str"))
    return order[KEY].astype({"benchmark": "str", "problem": "str"}).merge(samples, on=KEY, validate="one_to_one")


@dataclass
class _Samples:
    """Finished completions, which are graded and stored in batches."""

    jobs: pd.DataFrame
    processor: PreTrainedTokenizerBase | ProcessorMixin
    tokenizer: PreTrainedTokenizerBase
    segmenter: TriggerSegmenter
    require_end_of_thinking: bool
    save_to: str | Path | None
    on_sample: Callable[[Rollout], None] | None
    parts: list[pd.DataFrame] = field(default_factory=list)
    waiting: dict[int, Rollout] = field(default_factory=dict)
    written: float = field(default_factory=time.monotonic)

    def sample(self, rollout: DynamicTruncatedRollout) -> None:
        """Sample all jobs. If this is interrupted, completions that have ended are kept."""
        if self.jobs.empty:
            return
        prompts = self._prompts(rollout.engine)
        draws = [_draw(*job) for job in self.jobs[["seed", "benchmark", "problem"]].itertuples(index=False)]
        try:
            rollout.run(prompts, draws, on_rollout=self.add)
        finally:
            self.flush()

    def _prompts(self, engine: Engine) -> list[list[int]]:
        """Return the token ids of the prompts, with the patches of their images if there are any."""
        prompts = self.jobs["prompt"].tolist()
        if "images" not in self.jobs:
            return cast(
                "list[list[int]]",
                self.tokenizer.apply_chat_template(prompts, add_generation_prompt=True, return_dict=False),
            )
        if not isinstance(self.processor, ProcessorMixin):
            raise ValueError(
                "benchmarks: their problems have images, which need a vision-language model. Pass its folder, or the "
                "model or its engine, and its processor as the tokenizer."
            )
        messages = [
            prepare_multimodal_messages(prompt, images=images)
            for prompt, images in zip(prompts, self.jobs["images"], strict=True)
        ]
        rendered: Any = self.processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True
        )
        images = PromptImages.of(self.processor, self.jobs["images"].tolist(), rendered)
        return engine.with_images(rendered["input_ids"], images)

    def add(self, place: int, rollout: Rollout) -> None:
        self.waiting[place] = rollout
        if len(self.waiting) >= _ROWS_PER_FILE or time.monotonic() - self.written >= _SECONDS_PER_FILE:
            self.flush()
        if self.on_sample is not None:
            self.on_sample(rollout)

    def flush(self) -> None:
        if not self.waiting:
            return
        rows = (
            self.jobs.iloc[list(self.waiting)]
            .drop(columns=["prompt", "images", "seed"], errors="ignore")
            .reset_index(drop=True)
        )
        rollouts = list(self.waiting.values())
        rows["completion"] = self.tokenizer.batch_decode(
            [rollout.completion_ids for rollout in rollouts], skip_special_tokens=True
        )
        rows["correct"] = False
        for grader, some in rows.groupby("grader"):
            rows.loc[some.index, "correct"] = grade(
                cast("str", grader),
                some["completion"].tolist(),
                some["solution"].tolist(),
                self.require_end_of_thinking,
            )
        rows["tokens"] = [len(rollout.completion_ids) for rollout in rollouts]
        rows["steps"] = [1 + self.segmenter.count(rollout.completion_ids) for rollout in rollouts]
        rows["exit"] = [rollout.truncated for rollout in rollouts]
        rows["finish_reason"] = ["eos" if rollout.ended else "length" for rollout in rollouts]
        rows["sampled_tokens"] = [rollout.sampled_tokens for rollout in rollouts]
        part = rows.drop(columns=["solution", "grader"])
        if self.save_to is not None:
            add_samples(self.save_to, part)
        self.parts.append(part)
        self.waiting, self.written = {}, time.monotonic()


def _problems(benchmarks: Sequence[str] | Mapping[str, Dataset]) -> pd.DataFrame:
    """Return `benchmark`, `problem`, `prompt`, `solution`, `grader`, and what rows have of `OPTIONAL`."""
    if isinstance(benchmarks, str):
        raise ValueError(f"benchmarks: {benchmarks!r} is a single name. Pass a list, such as [{benchmarks!r}].")
    if not isinstance(benchmarks, Mapping):
        benchmarks = {name: load_benchmark(name) for name in benchmarks}
    parts = []
    for name, dataset in benchmarks.items():
        rows = pd.DataFrame(list(dataset))
        missing = [column for column in ("prompt", "solution") if column not in rows]
        if missing:
            raise ValueError(f"benchmarks: {name} has no column {' and '.join(missing)}. See `load_benchmark`.")
        defaults = {"problem": [str(place) for place in range(len(rows))], "grader": "math"}
        part = rows.assign(benchmark=name, **{key: value for key, value in defaults.items() if key not in rows})
        part["problem"] = part["problem"].astype(str)
        if part["problem"].duplicated().any():
            raise ValueError(f"benchmarks: {name} has the problem {part['problem'].mode()[0]!r} more than once.")
        others = [column for column in OPTIONAL if column in part]
        parts.append(part[["benchmark", "problem", "prompt", "solution", "grader", *others]])
    if not parts:
        raise ValueError("benchmarks: is empty. Name at least one.")
    return pd.concat(parts, ignore_index=True)


def _engine(
    model: str | Path | PreTrainedModel | PeftModel | Engine,
    processor: PreTrainedTokenizerBase | ProcessorMixin | None,
) -> tuple[Engine, PreTrainedTokenizerBase | ProcessorMixin]:
    """Return the engine, and the tokenizer or processor of its prompts."""
    if isinstance(model, str | Path):
        processor = processor or AutoProcessor.from_pretrained(model)
        kind: Any = AutoModelForCausalLM if is_adapter(model) else None  # otherwise, that of its configuration
        model = create_model_from_path(str(model), kind, dtype="auto", device_map="auto")
    if isinstance(model, nn.Module):
        if processor is None:
            raise ValueError("tokenizer: is missing. A model that is already loaded needs its tokenizer.")
        return TransformersEngine(cast("PreTrainedModel", model), tokenizer_of(processor)), processor
    return model, processor or model.tokenizer


def _name_of(model: str | Path | PreTrainedModel | PeftModel | Engine, engine: Engine) -> str:
    """Return the name of the model, with a fingerprint of its weights if available, since training changes them."""
    if isinstance(engine, TransformersEngine):
        digest = hashlib.blake2b(digest_size=8)
        for name, parameter in engine.model.named_parameters():
            some = parameter.detach().flatten()[:: max(1, parameter.numel() // 1000)]
            digest.update(name.encode() + some.float().cpu().numpy().tobytes())
        return f"{Path(str(engine.model.config.name_or_path)).name} ({digest.hexdigest()})"  # a folder may be moved
    return repr(model)


def _describe(callback: TruncationCallback) -> str:
    plain = (str, int, float, tuple, list, type(None))
    options = {name: value for name, value in vars(callback).items() if isinstance(value, plain)}
    return f"{type(callback).__name__}({options})"


def _fingerprint(rows: pd.DataFrame) -> str:
    text = rows[["problem", "prompt", "solution", "grader"]].to_json(orient="values")
    images = [images_key(row) for row in rows.to_dict("records")] if "images" in rows else []
    return _digest(text + "".join(images))


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _draw(seed: int, benchmark: str, problem: str) -> int:
    return int(_digest(json.dumps([seed, benchmark, problem])), 16) >> 2  # below 2**62
