"""Loading of the models that ship with the package."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def load_quietly(auto_class: Any, folder: Path) -> Any:
    """Load a model in float32 without a progress bar: it takes a millisecond."""
    from transformers.utils import logging

    has_bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        return auto_class.from_pretrained(folder, dtype="float32")
    finally:
        if has_bars:
            logging.enable_progress_bar()
