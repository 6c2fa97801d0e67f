"""Prompts with images in the in-process engine: patches are tokens with ids of their own."""

import asyncio
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import prepare_multimodal_messages

from step_trl.evaluation import evaluate
from step_trl.rollout.engines import PromptImages, TransformersEngine


sys.path.append(str(Path(__file__).parents[1] / "trainers"))
from tiny_llava import pictures, save_tiny_llava
from tiny_vlm import tiny_vlm


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_llava(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def model(folder):
    return AutoModelForImageTextToText.from_pretrained(folder, dtype="float32")


@pytest.fixture(scope="module")
def processor(folder):
    return AutoProcessor.from_pretrained(folder)


@pytest.fixture(scope="module")
def asked(processor):
    """Inputs of questions about one picture and about three: padded tensors, and lists of token ids."""
    rows = [*pictures(3), *pictures(2, images=3)]
    messages = [prepare_multimodal_messages(row["prompt"], images=row["images"]) for row in rows]
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
    padded = processor.apply_chat_template(
        messages, processor_kwargs={"padding": True, "return_tensors": "pt"}, **options
    )
    return padded, processor.apply_chat_template(messages, **options)["input_ids"]


def shown(fields):
    return PromptImages([], fields, -1)  # in process, the images are in the processor's fields


def sample(engine, prompts, **options):
    async def all_of_them():
        return await asyncio.gather(*(engine.generate(prompt, **options) for prompt in prompts))

    return asyncio.run(all_of_them())


def test_the_engine_sees_what_generate_sees(model, processor, asked):
    padded, prompts = asked
    engine = TransformersEngine(model, processor.tokenizer)
    found = sample(engine, engine.with_images(prompts, shown(padded)), max_tokens=20, temperature=0.0)
    assert len({tuple(one.token_ids) for one in found}) == len(prompts)
    images = iter(padded["pixel_values"].split([1, 1, 1, 3, 3]))
    for one, prompt in zip(found, prompts, strict=True):
        alone = {"input_ids": torch.tensor([prompt]), "pixel_values": next(images)}
        expected = model.generate(**alone, max_new_tokens=20, do_sample=False)[0, len(prompt) :].tolist()
        assert one.token_ids == expected[: len(one.token_ids)]


def test_log_probabilities_are_those_of_a_forward_pass_with_pixels(model, processor, asked):
    padded, prompts = asked
    engine = TransformersEngine(model, processor.tokenizer)
    (first, *_) = sample(engine, engine.with_images(prompts, shown(padded))[:1], max_tokens=30, seed=0)
    ids = torch.tensor([[*prompts[0], *first.token_ids]])
    with torch.no_grad():
        logits = model(input_ids=ids, pixel_values=padded["pixel_values"][:1]).logits
    logps = logits[0, len(prompts[0]) - 1 : -1].log_softmax(-1)
    expected = logps.gather(1, torch.tensor(first.token_ids)[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(first.logprobs), expected, atol=1e-4, rtol=1e-4)


def test_equal_images_share_their_ids_and_prefixes(model, processor, asked):
    padded, prompts = asked
    engine = TransformersEngine(model, processor.tokenizer)
    pixels = padded["pixel_values"][[0, 0, 1]]
    one, same, other = engine.with_images([prompts[0]] * 3, shown({"pixel_values": pixels}))
    assert one == same != other and len(one) == len(prompts[0])
    sample(engine, [one], max_tokens=1)
    sample(engine, [same], max_tokens=1)
    assert engine.stats.reused_tokens == len(one) - 1
    sample(engine, [other], max_tokens=1)  # the same text, up to the image
    text = next(place for place, id_ in enumerate(prompts[0]) if id_ == model.config.image_token_id)
    assert engine.stats.reused_tokens == len(one) - 1 + text
    # Features belong to the weights.
    engine.drop_prefix_cache()
    assert engine.with_images([prompts[0]], shown({"pixel_values": pixels[2:]}))[0] == one


def test_prompts_without_images_do_not_change(model, processor):
    engine = TransformersEngine(model, processor.tokenizer)
    assert engine.with_images([[5, 6], [7]], shown({})) == [[5, 6], [7]]


def test_what_is_refused(model, processor, asked):
    padded, prompts = asked
    engine = TransformersEngine(model, processor.tokenizer)
    for pixels in (padded["pixel_values"], padded["pixel_values"][:0]):
        with pytest.raises(ValueError, match="images: the prompts have not as many image tokens"):
            engine.with_images(prompts[:1], shown({"pixel_values": pixels}))
    qwen, qwen_processor = tiny_vlm()
    engine = TransformersEngine(qwen, qwen_processor.tokenizer)
    with pytest.raises(ValueError, match="images: TransformersEngine does not support those of 'qwen2_vl'"):
        engine.with_images([[1]], shown({"pixel_values": torch.zeros(1, 3, 4, 4)}))


def test_an_evaluation_sees_the_pictures(folder, model, processor, tmp_path):
    rows = pictures(3).add_column("grader", ["block"] * 3)
    options = {"max_tokens": 20, "temperature": 0.0, "require_end_of_thinking": False}
    samples = evaluate(folder, {"pictures": rows}, save_to=tmp_path, **options)
    assert samples["completion"].nunique() == 3
    again = evaluate(model, {"pictures": rows}, tokenizer=processor, **options)
    assert again["completion"].tolist() == samples["completion"].tolist()
    with pytest.raises(ValueError, match="benchmarks: their problems have images"):
        evaluate(model, {"pictures": rows}, tokenizer=processor.tokenizer, **options)
    # Other pictures are another benchmark.
    with pytest.raises(ValueError, match="save_to"):
        evaluate(folder, {"pictures": rows.select([0, 1, 1])}, save_to=tmp_path, **options)
