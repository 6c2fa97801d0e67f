"""
The testbed: a tiny reasoning model that overthinks, with its tokenizer and problems. All of it ships with the package.

Every example, test and demo runs on it, on a CPU and without a network. `benchmarks/testbed.py` measures it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .loading import load_quietly
from .problems import DATA_DIR, EVALUATION_SPLITS, SPLITS, as_dataset, read_problems
from .smollm2 import unpack_smollm2


if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MODEL_DIR = Path(__file__).parent / "model"

__all__ = [
    "DATA_DIR",
    "EVALUATION_SPLITS",
    "MODEL_DIR",
    "load_dataset",
    "load_model",
    "load_tokenizer",
    "unpack_smollm2",
]


def load_model() -> PreTrainedModel:
    """Load the testbed model: Qwen3 architecture, float32, on the CPU."""
    from transformers import AutoModelForCausalLM

    return load_quietly(AutoModelForCausalLM, MODEL_DIR)


def load_tokenizer() -> PreTrainedTokenizerBase:
    """Load the testbed's tokenizer: byte-level BPE, with a chat template that opens the thought."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(MODEL_DIR)


def load_dataset(split: str = "train") -> Dataset:
    """
    Load the testbed's problems of one split.

    Args:
        split (`str`, *optional*, defaults to `"train"`):
            The split: `"train"`, or an evaluation split, which is `"easy"`, `"medium"`, `"hard"`, or `"unseen"`, a
            family of problems that the model was not trained on.

    Returns:
        [`~datasets.Dataset`]: The rows, with `prompt` (messages) and `solution` (str).
    """
    if split not in SPLITS:
        raise ValueError(f"split: {split!r} is not known. Set one of {', '.join(SPLITS)}.")
    return as_dataset(read_problems(split))
