"""`step-trl distill` (DEER+SFT): fine-tune a model on its own short, correct completions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import AutoProcessor
from trl import ModelConfig

from ..rollout import ConfidenceTruncation
from ..text import tokenizer_of
from ..thoughts import drop_thought
from .arguments import DistillArguments, FineTuningConfig
from .fine_tuning import examples_of, fine_tune, print_figures, sample_rows, starting_model, training_rows
from .sources import load_rows


def keep_right(samples: pd.DataFrame) -> pd.DataFrame:
    """Return the samples that are correct and that ended with the EOS token."""
    return samples[samples["correct"].astype(bool) & (samples["finish_reason"] == "eos")]


def keep_short(samples: pd.DataFrame, per_problem: int = 1) -> pd.DataFrame:
    """
    Keep the shortest correct completions of each problem (rejection sampling), at most `per_problem` different ones.

    `samples` is the result of [`~step_trl.evaluation.evaluate`]. The rows that are kept are correct and ended with the
    EOS token; they are sorted by problem, then by tokens.
    """
    right = keep_right(samples).drop_duplicates(["benchmark", "problem", "completion"])
    ordered = right.sort_values(["benchmark", "problem", "tokens"], kind="stable")
    return ordered.groupby(["benchmark", "problem"], sort=False).head(per_problem).reset_index(drop=True)


def statistics(samples: pd.DataFrame, kept: pd.DataFrame) -> dict[str, float]:
    """Return statistics of all samples, and of those that [`keep_short`] kept."""
    return {
        "problems": samples["problem"].nunique(),
        "samples": len(samples),
        "accuracy": float(samples["correct"].mean()),
        "exit rate": float(samples["exit"].mean()),
        "tokens": float(samples["tokens"].mean()),
        "kept": len(kept),
        "problems kept": kept["problem"].nunique(),
        "tokens kept": float(kept["tokens"].mean()),
        "exit rate kept": float(kept["exit"].mean()),
    }


def distill(arguments: DistillArguments, model: ModelConfig, config: FineTuningConfig) -> dict[str, float]:
    """
    Sample with the truncated rollout, keep the short correct completions, and train on them.

    Samples are saved to `samples/` in `config.output_dir` and are not generated twice. The kept rows are saved to
    `kept.parquet`, and the model beside them. With several processes, the first one samples, and the others wait for
    it for up to `ddp_timeout` seconds. The seed of `config` is also used for sampling.

    Returns:
        `dict[str, float]`: The result of [`statistics`].
    """
    output_dir, name = Path(str(config.output_dir)), starting_model(model, config)
    rows = load_rows(arguments)
    processor = AutoProcessor.from_pretrained(name, trust_remote_code=config.trust_remote_code)
    if "grader" not in rows.column_names:
        rows = rows.add_column("grader", [arguments.grader] * len(rows))
    truncation = ConfidenceTruncation(tokenizer_of(processor), threshold=arguments.confidence)
    callbacks = [] if arguments.confidence >= 1 else [truncation]  # with 1, no probe could end a thought
    figures: list[Any] = [None]
    if PartialState().is_main_process:
        samples = sample_rows(
            name,
            rows,
            arguments,
            output_dir,
            n=arguments.n,
            seeds=range(config.seed * arguments.n, (config.seed + 1) * arguments.n),
            callbacks=callbacks,
            require_end_of_thinking=arguments.require_end_of_thinking,
        )
        figures = [keep(samples, arguments.per_problem, output_dir, arguments.thought_dropout, config.seed)]
    broadcast_object_list(figures)
    kept = pd.read_parquet(output_dir / "kept.parquet")
    fine_tune(name, training_rows(examples_of(kept, rows), processor), processor, config, model)
    return figures[0]


def keep(
    samples: pd.DataFrame, per_problem: int, output_dir: Path, thought_dropout: float = 0.0, seed: int = 0
) -> dict[str, float]:
    """
    Write the samples that [`keep_short`] keeps to `kept.parquet`, and print their [`statistics`].

    Some of them lose their thoughts, as by [`~step_trl.data.thought_dropout`].
    """
    kept = keep_short(samples, per_problem)
    kept["completion"] = [
        drop_thought(text, index, thought_dropout, seed) for index, text in enumerate(kept["completion"])
    ]
    kept.to_parquet(output_dir / "kept.parquet", index=False)
    figures = statistics(samples, kept)
    print_figures(figures)
    if kept.empty:
        raise ValueError(
            f"n: none of the {len(samples)} samples is both correct and complete. Set a larger n or max_tokens."
        )
    return figures
