"""A tiny LLaVA without weights: its tokenizer, processor and configuration."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tokenizers import AddedToken
from transformers import (
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from step_trl.testbed.vision.scenes import CELL, SIZE

from .. import pretrain


IMAGE = "<image>"
TAGS = ("<answer>", "</answer>")
# Content may be text or parts, as TRL sends it. The template does not open the thought: the model does, or leaves it
# out.
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' }}"
    "{%- if message.content is string %}{{- message.content }}"
    "{%- else %}{%- for part in message.content %}"
    "{{- '<image>' if part.type == 'image' else part.text }}"
    "{%- endfor %}{%- endif %}"
    "{{- '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


@dataclass(frozen=True)
class Size:
    """The size of the model: about 1.4 million parameters."""

    vocab_size: int = 512
    hidden_size: int = 128
    layers: int = 5
    heads: int = 4
    vision_hidden_size: int = 96
    vision_layers: int = 2


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train the text testbed's kind of tokenizer, with tags of the answer that decoding keeps, and with images."""
    tokenizer = pretrain.train_tokenizer(texts, vocab_size - len(TAGS) - 1)
    tokenizer.add_tokens([AddedToken(tag, normalized=False) for tag in TAGS])
    tokenizer.add_tokens([AddedToken(IMAGE, normalized=False, special=True)], special_tokens=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        eos_token=tokenizer.eos_token,
        pad_token=tokenizer.pad_token,
        padding_side="left",  # as generation needs it
        model_max_length=tokenizer.model_max_length,
        clean_up_tokenization_spaces=False,
    )


def build_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """Return a processor with the image processor that does without torchvision, for pictures of the grid's size."""
    images = LlavaImageProcessorPil(
        size={"height": SIZE, "width": SIZE},
        do_center_crop=False,
        image_mean=[0.94] * 3,  # the background, so that empty cells are about zero
        image_std=[0.3] * 3,
    )
    return LlavaProcessor(
        images,
        tokenizer,
        patch_size=CELL,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
        image_token=IMAGE,
    )


def build_model(size: Size, tokenizer: PreTrainedTokenizerFast) -> LlavaForConditionalGeneration:
    """Return a model with random weights: a CLIP encoder whose patches are the cells of the grid, and Qwen3."""
    vision = CLIPVisionConfig(
        hidden_size=size.vision_hidden_size,
        intermediate_size=2 * size.vision_hidden_size,
        num_hidden_layers=size.vision_layers,
        num_attention_heads=size.heads,
        image_size=SIZE,
        patch_size=CELL,
        projection_dim=size.vision_hidden_size,
    )
    architectures = {"architectures": ["Qwen3ForCausalLM"]}
    text = pretrain.text_config(size.hidden_size, size.layers, size.heads, tokenizer, **architectures)
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        vision_feature_layer=-1,
        image_seq_length=(SIZE // CELL) ** 2,
        tie_word_embeddings=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    model = LlavaForConditionalGeneration(config)
    # By default, positions are far smaller than what is seen there, and the decoder learns late where to look.
    torch.nn.init.normal_(model.model.vision_tower.embeddings.position_embedding.weight, std=0.5)
    torch.nn.init.normal_(model.model.multi_modal_projector.linear_1.weight, std=size.vision_hidden_size**-0.5)
    return model
