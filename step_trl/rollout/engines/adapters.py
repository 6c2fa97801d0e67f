"""LoRA adapters as models of their own."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def is_adapter(model: str | Path) -> bool:
    """Whether a folder holds an adapter, and not a whole model."""
    return (Path(model) / "adapter_config.json").is_file()


def merge_adapter(adapter: str | Path, folder: str | Path, trust_remote_code: bool = False, **loading: Any) -> None:
    """
    Save an adapter and the model under it as one model, tokenizer included.

    Args:
        adapter (`str` or `Path`):
            Folder of the adapter.
        folder (`str` or `Path`):
            Where to save.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            For a model with code of its own.
        **loading:
            Further arguments of `from_pretrained` for the model under the adapter, such as `dtype`.
    """
    from peft import PeftConfig, PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = PeftConfig.from_pretrained(str(adapter)).base_model_name_or_path
    model = AutoModelForCausalLM.from_pretrained(base, trust_remote_code=trust_remote_code, **loading)
    PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(folder)
    AutoTokenizer.from_pretrained(adapter, trust_remote_code=trust_remote_code).save_pretrained(folder)


@contextmanager
def servable(model: str, beside: Path) -> Iterator[str]:
    """
    What vLLM can serve as a model: the model itself, or, of an adapter, a merged one that is removed at the end.

    Args:
        model (`str`):
            Folder or name of the model, or folder of the adapter, which is left as it is.
        beside (`Path`):
            Folder in which the merged model is made, under a name of its own.
    """
    if not is_adapter(model):
        yield model
        return
    with tempfile.TemporaryDirectory(prefix=f"{Path(model).name}-merged-", dir=beside) as merged:
        merge_adapter(model, merged, dtype="auto")
        yield merged
