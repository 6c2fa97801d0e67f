"""
The visual testbed: a tiny vision-language model that overthinks, with its processor, and drawn scenes to ask it about.

The model answers questions about pictures and about clips of three frames, in the format
`<think>...</think>\\n<answer>...</answer>`. Pictures are drawn when a data set is loaded. Everything works on a CPU
and without a network.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..loading import load_quietly
from .problems import EVALUATION_SPLITS, SPLITS, draw_problems
from .scenes import draw


if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, ProcessorMixin

MODEL_DIR = Path(__file__).parent / "model"

__all__ = ["EVALUATION_SPLITS", "MODEL_DIR", "SPLITS", "load_dataset", "load_model", "load_processor"]


def load_model() -> PreTrainedModel:
    """Load the visual testbed's model: LLaVA architecture, float32, on the CPU."""
    from transformers import AutoModelForImageTextToText

    return load_quietly(AutoModelForImageTextToText, MODEL_DIR)


def load_processor() -> ProcessorMixin:
    """Load the processor: the tokenizer, a chat template that does not open the thought, and an image processor."""
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(MODEL_DIR)


def load_dataset(split: str = "train") -> Dataset:
    """
    Draw the problems of one split.

    Args:
        split (`str`, *optional*, defaults to `"train"`):
            The split: `"train"` or `"train_clips"`, or an evaluation split, which is `"easy"`, `"medium"`, `"hard"` or
            `"clips"`. Clips have three images per row, and other splits one.

    Returns:
        [`~datasets.Dataset`]: The rows, with `prompt` (messages), `images` (list of PIL images) and `solution` (str).
    """
    from datasets import Dataset

    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": problem.question.text}],
                "images": [draw(scene) for scene in problem.frames],
                "solution": problem.answer,
            }
            for problem in draw_problems(split)
        ]
    )
