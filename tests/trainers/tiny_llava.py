"""A tiny, random LLaVA with a processor, and questions about pictures: nothing is downloaded."""

from __future__ import annotations

from pathlib import Path

from datasets import Dataset
from PIL import Image
from transformers import (
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    Qwen3Config,
    set_seed,
)
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from step_trl import testbed


SIZE, PATCH = 16, 8
IMAGE = "<image>"
TEMPLATE = (
    "{%- for message in messages %}<|im_start|>{{ message.role }}\n"
    "{%- if message.content is string %}{{ message.content }}"
    "{%- else %}{%- for part in message.content %}"
    "{%- if part.type == 'image' %}<image>{%- else %}{{ part.text }}{%- endif %}"
    "{%- endfor %}{%- endif %}<|im_end|>\n{%- endfor %}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n{%- endif %}"
)
COLOURS = ("red", "green", "blue", "white")


def save_tiny_llava(folder: Path) -> Path:
    """Save one layer each for images and text, with the testbed's words, and return the folder."""
    tokenizer = testbed.load_tokenizer()
    tokenizer.padding_side = "left"  # as TRL loads it
    tokenizer.add_tokens([IMAGE], special_tokens=True)
    text = Qwen3Config(
        architectures=["Qwen3ForCausalLM"],
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=SIZE,
        patch_size=PATCH,
        projection_dim=32,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        vision_feature_layer=-1,
        image_seq_length=(SIZE // PATCH) ** 2,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
        dtype="float32",
    )
    processor = LlavaProcessor(
        LlavaImageProcessorPil(size={"height": SIZE, "width": SIZE}, do_center_crop=False),
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
        image_token=IMAGE,
    )
    set_seed(0)
    model = LlavaForConditionalGeneration(config)
    # Otherwise, a random model says the same about all pictures.
    model.model.multi_modal_projector.linear_2.weight.data.mul_(50)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def pictures(number: int = 4, images: int = 1) -> Dataset:
    """Questions about the colours of pictures."""
    colours = [[COLOURS[(place + frame) % len(COLOURS)] for frame in range(images)] for place in range(number)]
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": "Which colour?"}],
                "images": [Image.new("RGB", (SIZE, SIZE), colour) for colour in row],
                "solution": row[0],
            }
            for row in colours
        ]
    )
