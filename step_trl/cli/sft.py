"""Fine-tune on examples whose thoughts are their own or the model's, and of which some are dropped (TON)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import datasets
import pandas as pd
from accelerate import PartialState
from transformers import AutoProcessor
from trl import ModelConfig

from ..data import reverse_thinking_prompts, thought_dropout
from ..text import THINK_END, THINK_START
from ..thoughts import split_thought
from .arguments import FineTuningConfig, SFTArguments
from .fine_tuning import examples_of, fine_tune, sample_rows, starting_model, training_rows
from .sources import load_examples, load_rows


def fine_tune_on_examples(arguments: SFTArguments, model: ModelConfig, config: FineTuningConfig) -> None:
    """
    Train on the completions of a data set, or on thoughts that the model writes for known answers.

    With `reverse_thinking`, the rows are problems with answers, and the model is asked for the thought that leads to
    each of them. Its samples are saved to `samples/` in `config.output_dir` and are not generated twice, and the
    examples to `examples.parquet`. With several processes, the first one samples, and the others wait for it for up to
    `ddp_timeout` seconds.
    """
    name = starting_model(model, config)
    if arguments.reverse_thinking:
        examples = reverse_thinking(name, arguments, Path(str(config.output_dir)), config.seed)
    else:
        examples = load_examples(arguments)
    processor = AutoProcessor.from_pretrained(name, trust_remote_code=config.trust_remote_code)
    rows = training_rows(thought_dropout(examples, arguments.thought_dropout, config.seed), processor)
    fine_tune(name, rows, processor, config, model)


def reverse_thinking(model: str, arguments: SFTArguments, output_dir: Path, seed: int) -> datasets.Dataset:
    """Return the problems of a recipe with completions: a thought of the model, and the answer in a block."""
    file = output_dir / "examples.parquet"
    state = PartialState()
    if state.is_main_process:
        rows, asked = load_rows(arguments), load_rows(replace(arguments, prompt_template=None, system_prompt=None))
        samples = sample_rows(model, reverse_thinking_prompts(asked), arguments, output_dir, n=1, seeds=[seed])
        examples = with_thoughts(rows, samples)
        print(f"reverse_thinking: {len(examples):,} of {len(rows):,} problems have a thought.")
        examples.to_parquet(file)
    state.wait_for_everyone()
    return datasets.Dataset.from_parquet(str(file))


def with_thoughts(rows: datasets.Dataset, samples: pd.DataFrame) -> datasets.Dataset:
    """
    Return the rows for which a thought was sampled as examples, see [`examples_of`].

    What a model says after thinking about the request is the thought. One that was cut off is left out.
    """
    said = [split_thought(text)[1] if THINK_END in text else text for text in samples["completion"]]
    samples = samples.assign(said=[text.strip() for text in said])
    samples = samples[(samples["finish_reason"] == "eos") & (samples["said"] != "")].copy()
    if samples.empty:
        raise ValueError("reverse_thinking: none of the sampled thoughts is complete. Set a larger max_tokens.")
    samples["completion"] = [
        f"{THINK_START}{thought}{THINK_END}\n<answer>{rows[int(problem)]['solution']}</answer>"
        for problem, thought in zip(samples["problem"], samples["said"], strict=True)
    ]
    return examples_of(samples, rows)
