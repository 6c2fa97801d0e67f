"""LoRA adapters: merged into models, and taken off them."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate.utils import is_peft_model


def is_adapter(model: str | Path) -> bool:
    """Whether a folder contains an adapter instead of a model."""
    return (Path(model) / "adapter_config.json").is_file()


def without_adapter(model: Any) -> Any:
    """Return the model under an adapter, or the model itself if it has none."""
    return model.get_base_model() if is_peft_model(model) else model


def merge_adapter(adapter: str | Path, folder: str | Path, trust_remote_code: bool = False, **loading: Any) -> None:
    """
    Merge an adapter into its base model and save the result in `folder`, with its tokenizer.

    `trust_remote_code` runs custom code of the model. `loading` are further arguments of `from_pretrained` for the
    base model, such as `dtype`.
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
    Yield a model that vLLM can serve: the model itself, or a merged copy of an adapter, which is deleted at the end.

    The copy gets a unique name in the folder `beside`.
    """
    if not is_adapter(model):
        yield model
        return
    with tempfile.TemporaryDirectory(prefix=f"{Path(model).name}-merged-", dir=beside) as merged:
        merge_adapter(model, merged, dtype="auto")
        yield merged
