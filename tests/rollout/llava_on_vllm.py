"""A plugin for vLLM servers of a LLaVA: what vLLM 0.31 lacks on a machine without torchvision."""

import importlib.abc
import importlib.util
import os
import re
import sys
from pathlib import Path


PIXTRAL = "transformers.models.pixtral.image_processing"


class WithoutTorchvision(importlib.abc.MetaPathFinder):
    """vLLM's LLaVA imports two functions of Pixtral's image processor. The one that uses Pillow has them, too."""

    def find_spec(self, name, path, target=None):
        return importlib.util.find_spec(f"{PIXTRAL}_pil_pixtral") if name == f"{PIXTRAL}_pixtral" else None


def register():
    sys.meta_path.insert(0, WithoutTorchvision())
    from vllm.model_executor.models.llava import LlavaForConditionalGeneration
    from vllm.model_executor.models.utils import WeightsMapper

    # transformers 5 calls the weights of a CLIP encoder "vision_tower.encoder...", as nested modules are flattened.
    LlavaForConditionalGeneration.hf_to_vllm_mapper |= WeightsMapper(
        orig_to_new_regex={re.compile(r"vision_tower\.(?!vision_model)"): "vision_tower.vision_model."}
    )


def install(folder: Path) -> str:
    """Install the plugin in a folder. Returns the `PYTHONPATH` of the servers that are to have it."""
    (folder / "llava_on_vllm-1.dist-info").mkdir()
    (folder / "llava_on_vllm-1.dist-info" / "METADATA").write_text("Name: llava-on-vllm\nVersion: 1\n")
    (folder / "llava_on_vllm-1.dist-info" / "entry_points.txt").write_text(
        "[vllm.general_plugins]\nllava = rollout.llava_on_vllm:register\n"
    )
    return os.pathsep.join([str(folder), os.environ["PYTHONPATH"]])
