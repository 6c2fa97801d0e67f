"""A tiny, random vision-language model, with a processor built here: nothing is downloaded."""

from __future__ import annotations

from datasets import Dataset
from PIL import Image
from transformers import (
    PreTrainedModel,
    ProcessorMixin,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLProcessor,
    set_seed,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from step_trl import testbed


IMAGE_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
TEMPLATE = (
    "{%- for message in messages %}<|im_start|>{{ message.role }}\n{%- for part in message.content %}"
    "{%- if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{%- else %}{{ part.text }}{%- endif %}"
    "{%- endfor %}<|im_end|>\n{%- endfor %}{%- if add_generation_prompt %}<|im_start|>assistant\n{%- endif %}"
)


class ImageProcessor(Qwen2VLProcessor):
    """A processor without videos, which would need torchvision."""

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None):
        self.image_token, self.video_token = IMAGE_TOKENS[2:]
        self.image_token_id, self.video_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKENS[2:])
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


def tiny_vlm() -> tuple[PreTrainedModel, ProcessorMixin]:
    """Qwen2-VL with one layer each for images and text, and the testbed's words."""
    tokenizer = testbed.load_tokenizer()
    tokenizer.padding_side = "left"  # as TRL loads it
    tokenizer.add_tokens(list(IMAGE_TOKENS), special_tokens=True)
    start, end, image, video = tokenizer.convert_tokens_to_ids(IMAGE_TOKENS)
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        "depth": 1,
        "embed_dim": 32,
        "hidden_size": 32,
        "num_heads": 2,
        "patch_size": 4,
        "temporal_patch_size": 2,
    }
    config = Qwen2VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
    )
    set_seed(0)
    images = Qwen2VLImageProcessorPil(patch_size=4, min_pixels=16 * 16, max_pixels=32 * 32)
    return Qwen2VLForConditionalGeneration(config), ImageProcessor(images, tokenizer, chat_template=TEMPLATE)


def pictures(number: int = 4) -> Dataset:
    """Questions of different lengths about pictures of different sizes, so that prompts have padding to trim."""
    colours = ("red", "green", "blue", "white")
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": "Which colour is this?" * (1 + row)}],
                "image": Image.new("RGB", (16 + 8 * row, 16), colours[row % 4]),
            }
            for row in range(number)
        ]
    )
