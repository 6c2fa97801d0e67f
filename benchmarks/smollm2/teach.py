"""Teach a pre-trained model to think and to check what it has found, by fine-tuning on written-out traces."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from datasets import Dataset
from testbed_model.traces import Piece
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from step_trl.cli.arguments import FineTuningConfig
from step_trl.cli.fine_tuning import fine_tune

from .problems import taught_rows
from .traces import example


def tokenize(
    prompt: list[dict[str, str]], pieces: list[Piece], tokenizer: PreTrainedTokenizerBase
) -> dict[str, list[int]]:
    """Return `input_ids` and `completion_mask` of an example: 1 for tokens that lie in trained pieces, and for EOS."""
    prompt_ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
    text = "".join(piece.text for piece in pieces)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    trained = [piece.trained for piece in pieces for _ in piece.text]
    mask = [int(all(trained[start:end])) for start, end in encoded["offset_mapping"]]
    return {
        "input_ids": [*prompt_ids, *encoded["input_ids"], tokenizer.eos_token_id],
        "completion_mask": [0] * len(prompt_ids) + [*mask, 1],
    }


def teach(model: Path, folder: Path, examples: int, dtype: str, **options: Any) -> None:
    """Fine-tune all weights of `model` on as many traces, in float32, and save it to `folder` with `dtype`."""
    tokenizer, rng = AutoTokenizer.from_pretrained(model), random.Random(0)
    rows = [
        tokenize([{"role": "user", "content": row["question"]}], example(row, rng), tokenizer)
        for row in taught_rows(examples)
    ]
    config = FineTuningConfig(str(folder), **options)
    fine_tune(str(model), Dataset.from_list(rows), tokenizer, config)
    AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).save_pretrained(folder)
