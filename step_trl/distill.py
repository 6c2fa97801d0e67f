"""`step-trl distill` (DEER+SFT): learn from one's own truncated completions that are right and short."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import datasets
import pandas as pd
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from .eval import sample
from .recipe import DISTILL, TrainArguments, resume_from
from .rollout import ConfidenceTruncation
from .sources import load_rows, model_source


# As DEER+SFT is trained in Step-GRPO's comparison.
TRAINING: dict[str, Any] = {"lr_scheduler_type": "cosine", "warmup_steps": 0.1, "num_train_epochs": 3}
_COMPLETIONS = {"completion_only_loss": True, "max_length": None, "shuffle_dataset": True}


def keep_right(samples: pd.DataFrame) -> pd.DataFrame:
    """Rows that are right and ended by themselves."""
    return samples[samples["correct"].astype(bool) & (samples["finish_reason"] == "eos")]


def keep_short(samples: pd.DataFrame, per_problem: int = 1) -> pd.DataFrame:
    """
    Rejection sampling: of each problem, the shortest right completions.

    Args:
        samples ([`~pandas.DataFrame`]):
            Result of [`~step_trl.evaluation.evaluate`].
        per_problem (`int`, *optional*, defaults to `1`):
            Most of one problem. Equal ones are kept once.

    Returns:
        [`~pandas.DataFrame`]: rows of `samples` that are right and ended by themselves, problem by problem, in
        ascending order of tokens.
    """
    right = keep_right(samples).drop_duplicates(["benchmark", "problem", "completion"])
    shortest = (
        right.sort_values("tokens", kind="stable").groupby(["benchmark", "problem"], sort=False).head(per_problem)
    )
    return shortest.sort_values(["benchmark", "problem", "tokens"], kind="stable").reset_index(drop=True)


def statistics(samples: pd.DataFrame, kept: pd.DataFrame) -> dict[str, float]:
    """
    What was sampled, and what of it was kept.

    Args:
        samples ([`~pandas.DataFrame`]), kept ([`~pandas.DataFrame`]):
            All samples, and those of [`keep_short`].
    """
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


def training_rows(
    kept: pd.DataFrame, problems: datasets.Dataset, tokenizer: PreTrainedTokenizerBase
) -> datasets.Dataset:
    """
    Kept completions as rows for [`~trl.SFTTrainer`]: the loss is on the completion only.

    Args:
        kept ([`~pandas.DataFrame`]):
            Of [`keep_short`].
        problems ([`~datasets.Dataset`]):
            Rows with `prompt`, in the order in which they were sampled.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Of the model.

    Returns:
        [`~datasets.Dataset`]: rows with `input_ids` and `completion_mask`.
    """
    rows = []
    for problem, completion in kept[["problem", "completion"]].itertuples(index=False):
        # Tokenized here: a chat template may open the thought in the prompt, or drop it from a message.
        messages = problems[int(problem)]["prompt"]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        rows.append(training_row(cast("list[int]", ids), completion, tokenizer))
    return datasets.Dataset.from_list(rows)


def training_row(prompt_ids: list[int], completion: str, tokenizer: PreTrainedTokenizerBase) -> dict[str, list[int]]:
    """`input_ids` and `completion_mask` of a completion that ended by itself."""
    answer = [*tokenizer.encode(completion, add_special_tokens=False), tokenizer.eos_token_id]
    return {
        "input_ids": [*prompt_ids, *answer],
        "completion_mask": [0] * len(prompt_ids) + [1] * len(answer),
    }


def fine_tune(
    model: str,
    rows: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    output_dir: Path,
    **training: Any,
) -> None:
    """
    Train on rows of [`training_rows`], and save the model.

    Args:
        model (`str`):
            Folder or name on the hub.
        rows ([`~datasets.Dataset`]):
            Of `input_ids` and `completion_mask`.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Of the model.
        output_dir (`Path`):
            For the model.
        **training:
            Fields of [`~trl.SFTConfig`].
    """
    config = training_config(output_dir, **training)
    trainer = SFTTrainer(model, args=config, train_dataset=rows, processing_class=tokenizer)
    trainer.train(resume_from_checkpoint=resume_from(config))
    trainer.save_model()
    trainer.save_state()


def training_config(output_dir: Path, **training: Any) -> SFTConfig:
    """The configuration of [`fine_tune`]."""
    return SFTConfig(str(output_dir), **TRAINING | _COMPLETIONS | training)


def distill(
    model: str,
    dataset: str,
    output_dir: Path,
    *,
    dataset_name: str | None = None,
    dataset_split: str = "train",
    limit: int | None = None,
    n: int = 4,
    per_problem: int = 1,
    confidence: float = 0.95,
    temperature: float = 1.0,
    max_tokens: int = 16_384,
    engine: str = "transformers",
    urls: Sequence[str] | None = None,
    seed: int = 0,
    **training: Any,
) -> dict[str, float]:
    """
    Sample with the truncated rollout, keep what is right and short, and train on it.

    Of several processes, the first one samples, and the others wait for it for up to `ddp_timeout` seconds.

    Args:
        model (`str`):
            Folder, name on the hub, or `"testbed"`.
        dataset (`str`), dataset_name (`str`, *optional*), dataset_split (`str`, *optional*, defaults to `"train"`):
            As in [`~step_trl.recipe.TrainArguments`].
        output_dir (`Path`):
            Samples go to `samples/`, where they are not made twice; kept rows to `kept.parquet`; the model beside.
        limit (`int`, *optional*):
            First problems only.
        n (`int`, *optional*, defaults to `4`):
            Samples per problem.
        per_problem (`int`, *optional*, defaults to `1`):
            Most that is kept of a problem.
        confidence (`float`, *optional*, defaults to `0.95`):
            Of an induced answer, above which a thought is left.
        temperature (`float`, *optional*, defaults to `1.0`), max_tokens (`int`, *optional*, defaults to `16384`):
            Sampling and budget of a completion.
        engine (`str`, *optional*, defaults to `"transformers"`), urls (`Sequence[str]`, *optional*):
            As in `step-trl eval`.
        seed (`int`, *optional*, defaults to `0`):
            Of samples and training.
        **training:
            Further fields of [`~trl.SFTConfig`].

    Returns:
        `dict[str, float]`: see [`statistics`].
    """
    check_no_model(output_dir)
    training_config(output_dir, seed=seed, **training)  # refuses what is wrong before anything is sampled
    name = model_source(model)
    rows = load_rows(TrainArguments(DISTILL, dataset, dataset_name, dataset_split))
    if limit is not None:
        rows = rows.select(range(min(limit, len(rows))))
    tokenizer = AutoTokenizer.from_pretrained(name)
    figures: list[Any] = [None]
    if PartialState().is_main_process:
        output_dir.mkdir(parents=True, exist_ok=True)
        samples = sample(
            name,
            {"train": rows},
            engine,
            urls,
            output_dir / "vllm.log",
            n=n,
            seeds=range(seed * n, (seed + 1) * n),
            temperature=temperature,
            top_p=1.0,
            max_tokens=max_tokens,
            callbacks=[ConfidenceTruncation(tokenizer, threshold=confidence)],
            save_to=output_dir / "samples",
        )
        figures = [keep(samples, per_problem, output_dir)]
    broadcast_object_list(figures)
    kept = pd.read_parquet(output_dir / "kept.parquet")
    fine_tune(name, training_rows(kept, rows, tokenizer), tokenizer, output_dir, seed=seed, **training)
    return figures[0]


def check_no_model(output_dir: Path) -> None:
    """Refuse a folder that holds an earlier model."""
    if any(output_dir.glob("*.safetensors")):
        raise ValueError(f"output_dir: {output_dir} holds a model. Set another folder.")


def keep(samples: pd.DataFrame, per_problem: int, output_dir: Path) -> dict[str, float]:
    """Write what [`keep_short`] keeps to `kept.parquet`, and print its [`statistics`]."""
    kept = keep_short(samples, per_problem)
    kept.to_parquet(output_dir / "kept.parquet", index=False)
    figures = statistics(samples, kept)
    for what, value in figures.items():
        print(f"{what:16}{value:10.3f}" if isinstance(value, float) else f"{what:16}{value:10d}")
    if kept.empty:
        raise ValueError(
            f"n: of {len(samples)} samples none is right and ended by itself. Set a larger n or max_tokens."
        )
    return figures
