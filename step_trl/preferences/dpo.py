"""Direct preference optimisation (DPO) on pairs of rollouts, token for token."""

from __future__ import annotations

from typing import Any

import pandas as pd
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import DPOTrainer

from ..data import tokenize_completion
from .records import QUESTION, prompt_of, row_key


VISUAL = ("prompt", "chosen", "rejected", "images", "image")  # columns that TRL reads


def tokenize_pairs(pairs: pd.DataFrame, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """
    Return pairs of [`preference_pairs`] as rows for [`RolloutDPOTrainer`]: `prompt_ids`, `chosen_ids`, `rejected_ids`.

    Completions follow the prompt as they were sampled, without the chat template, and end with the EOS token unless
    they were truncated.
    """
    if pairs.empty:
        raise ValueError(
            "pairs: there are none. Verify more rollouts, or with other limits: a group gives pairs if it has a clean "
            "rollout and one that is not."
        )
    rows = []
    for pair in pairs.to_dict("records"):
        prompt = prompt_of(pair["prompt"])
        prompt_ids, chosen = tokenize_completion(prompt, pair["chosen"], tokenizer)
        _, rejected = tokenize_completion(prompt, pair["rejected"], tokenizer, ended=not pair["rejected_truncated"])
        rows.append({"prompt_ids": prompt_ids, "chosen_ids": chosen, "rejected_ids": rejected})
    return Dataset.from_list(rows)


def visual_pairs(pairs: pd.DataFrame, dataset: Dataset) -> Dataset:
    """
    Return pairs of [`preference_pairs`] about images as rows for [`~trl.DPOTrainer`]: messages, and the images.

    TRL renders these with the chat template, so it must keep thoughts. `dataset` are the rows that the rollouts were
    sampled from, which have the images.
    """
    places = {row_key(row): place for place, row in enumerate(dataset)}
    rows = dataset.select([places[pair] for pair in pairs[QUESTION].itertuples(index=False, name=None)])
    for name in ("chosen", "rejected"):
        rows = rows.add_column(name, [[{"role": "assistant", "content": text}] for text in pairs[name]])
    return rows.select_columns([name for name in rows.column_names if name in VISUAL])


class RolloutDPOTrainer(DPOTrainer):
    """
    A [`~trl.DPOTrainer`] for rows of [`tokenize_pairs`].

    TRL would render each completion with the chat template, and those of many reasoning models drop the thought of an
    earlier message.
    """

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        if "prompt_ids" in next(iter(dataset)):
            return dataset
        return super()._prepare_dataset(dataset, processing_class, args, dataset_name)
