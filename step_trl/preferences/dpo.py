"""Direct preference optimisation (DPO) on pairs of rollouts, token for token."""

from __future__ import annotations

from typing import Any

import pandas as pd
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import DPOTrainer

from ..data import tokenize_completion
from .records import prompt_of


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
