"""What recipes share that fine-tune a model on completions (SFT), often its own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
from transformers import PreTrainedTokenizerBase, ProcessorMixin, Trainer
from trl import ModelConfig, SFTTrainer, get_peft_config, get_quantization_config

from ..data import tokenize_examples
from ..text import tokenizer_of
from .arguments import FineTuningConfig, PreferenceConfig, SamplingArguments
from .evaluate import sample
from .recipe import set_model_init_kwargs
from .sources import check_model, model_source


def starting_model(options: ModelConfig, config: FineTuningConfig | PreferenceConfig) -> str:
    """Return the model that a training starts from, and refuse an `output_dir` that holds an earlier one."""
    check_no_model(Path(str(config.output_dir)))
    set_model_init_kwargs(config, options)
    name = model_source(options.model_name_or_path)
    check_model(name, revision=options.model_revision, trust_remote_code=config.trust_remote_code)
    return name


def check_no_model(output_dir: Path) -> None:
    """Refuse a folder that holds an earlier model."""
    if any(output_dir.glob("*.safetensors")):
        raise ValueError(f"output_dir: {output_dir} holds a model. Set another folder.")


def sample_rows(
    model: str, rows: datasets.Dataset, arguments: SamplingArguments, output_dir: Path, **options: Any
) -> pd.DataFrame:
    """
    Sample completions of rows with the fields of a recipe, to `samples/` in `output_dir`.

    Samples that are there are not made again. `options` are those of [`~step_trl.evaluation.evaluate`].
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    return sample(
        model,
        {"train": rows},
        arguments.engine,
        arguments.urls,
        output_dir / "vllm.log",
        temperature=arguments.temperature,
        top_p=1.0,
        max_tokens=arguments.max_tokens,
        save_to=output_dir / "samples",
        **options,
    )


def print_figures(figures: Mapping[str, Any]) -> None:
    """Print named numbers below each other."""
    width = max(map(len, figures)) + 2
    for what, value in figures.items():
        print(f"{what:{width}}{value:10.3f}" if isinstance(value, float) else f"{what:{width}}{value:10d}")


def train_and_save(trainer: Trainer) -> None:
    """Train, from a checkpoint if the configuration says so, and save the model and then the trainer state."""
    resume = trainer.args.resume_from_checkpoint
    # `true` in a recipe means the last checkpoint. transformers reads the text as a path.
    trainer.train(resume_from_checkpoint=True if str(resume).lower() == "true" else resume)
    trainer.save_model()
    trainer.save_state()


def examples_of(samples: pd.DataFrame, problems: datasets.Dataset) -> datasets.Dataset:
    """
    Return sampled completions as examples, with `prompt`, `completion` and the images of the problem.

    `problems` are rows with `prompt`, in the order in which they were sampled.
    """
    columns = [name for name in problems.column_names if name in ("prompt", "images", "image")]
    rows = problems.select_columns(columns).select([int(problem) for problem in samples["problem"]])
    return rows.add_column("completion", [[{"role": "assistant", "content": text}] for text in samples["completion"]])


def training_rows(examples: datasets.Dataset, processor: PreTrainedTokenizerBase | ProcessorMixin) -> datasets.Dataset:
    """
    Return examples as [`fine_tune`] trains on them: as token ids, or as they are if they have images.

    TRL then renders them with the chat template, so that of a vision-language model must keep thoughts.
    """
    if {"image", "images"} & set(examples.column_names):
        return examples
    return tokenize_examples(examples, tokenizer_of(processor))


def fine_tune(
    model: str,
    rows: datasets.Dataset,
    processor: PreTrainedTokenizerBase | ProcessorMixin,
    config: FineTuningConfig,
    options: ModelConfig | None = None,
) -> None:
    """
    Train on rows of [`training_rows`], and save the model to `config.output_dir`.

    `model` is a folder or a name on the Hub, and `options` are those of quantization and LoRA.
    """
    options = options or ModelConfig()
    trainer = SFTTrainer(
        model,
        args=config,
        train_dataset=rows,
        processing_class=processor,
        quantization_config=get_quantization_config(options),
        peft_config=get_peft_config(options),
    )
    train_and_save(trainer)
