"""The visual testbed: scenes, questions, its model, and the script that makes the model."""

import math
import random
import re
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from testbed_model.traces import Piece
from testbed_model.vision import traces
from testbed_model.vision.evaluate import NO_THOUGHT, complete
from testbed_model.vision.model import Size
from testbed_model.vision.pretrain import Corpus, Recipe, opening, pretrain, prompt
from transformers import AutoModelForImageTextToText, AutoProcessor

from step_trl import EfficientReasoningConfig, EfficientReasoningTrainer
from step_trl.rewards import think_answer_format_reward
from step_trl.testbed import vision
from step_trl.testbed.vision import problems, questions, scenes


WHERE = ["northwest", "north", "northeast", "west", "centre", "east", "southwest", "south", "southeast"]
SEEDS = st.integers(0, 2**32 - 1)
DIFFICULTIES = st.sampled_from([*problems.PICTURES, problems.CLIP])


def a_problem(seed, difficulty):
    return next(problems.generate((difficulty,), random.Random(seed)))


def as_map(scene):
    """The names of things by their places."""
    return {WHERE[3 * thing.row + thing.column]: (thing.colour, thing.shape) for thing in scene.things}


def answer_by_reading(text, maps):
    """The answer to the wording of a question, found in maps from places to names, without our data classes."""
    seen = maps[-1]
    places = {" ".join(name): place for place, name in seen.items()}

    def matches(words):
        wanted = {word.removesuffix("s") for word in words.split()} - {"shape"}
        return [name for name in seen.values() if wanted <= set(name)]

    if match := re.fullmatch(r"How many (.*)s are there\?", text):
        return str(len(matches(match[1])))
    if match := re.fullmatch(r"What colour is the (.*)\?", text):
        ((colour, _),) = matches(match[1])
        return colour
    if match := re.fullmatch(r"What shape is the (.*) one\?", text):
        ((_, shape),) = matches(match[1])
        return shape
    if match := re.fullmatch(r"Where is the (.*?)( at the end)?\?", text):
        return places[match[1]]
    if match := re.fullmatch(r"What is (.*) of the (.*)\?", text):
        x, y = WHERE.index(places[match[2]]) % 3, WHERE.index(places[match[2]]) // 3
        x += {"west": -1, "east": 1}.get(match[1], 0)
        y += {"north": -1, "south": 1}.get(match[1], 0)
        inside = x in range(3) and y in range(3)
        return " ".join(seen.get(WHERE[3 * y + x], ("nothing",))) if inside else "nothing"
    if match := re.fullmatch(r"How many shapes have the colour of the (.*)\?", text):
        ((colour, _),) = matches(match[1])
        return str(len(matches(colour)))
    if match := re.fullmatch(r"Are there more (.*) shapes than (.*) shapes\?", text):
        return "yes" if len(matches(match[1])) > len(matches(match[2])) else "no"
    (before,) = [(place, name) for place, name in maps[0].items() if seen.get(place) != name]
    if text == "What moved?":
        return " ".join(before[1])
    match = re.fullmatch(r"Which way did the (.*) move\?", text)
    assert match[1] == " ".join(before[1])
    start, end = WHERE.index(before[0]), WHERE.index(places[match[1]])
    return {2: "east", -2: "west", 6: "south", -6: "north"}[end - start]


@given(SEEDS, DIFFICULTIES)
def test_answers_are_right(seed, difficulty):
    problem = a_problem(seed, difficulty)
    assert problem.answer == answer_by_reading(problem.question.text, [as_map(scene) for scene in problem.frames])


@given(SEEDS, DIFFICULTIES)
def test_problems_and_pictures_are_deterministic(seed, difficulty):
    problem, again = a_problem(seed, difficulty), a_problem(seed, difficulty)
    assert problem == again
    for scene, other in zip(problem.frames, again.frames, strict=True):
        assert scenes.draw(scene).tobytes() == scenes.draw(other).tobytes()


@given(SEEDS, DIFFICULTIES)
def test_pixels_have_the_colour_of_the_cell(seed, difficulty):
    for scene in a_problem(seed, difficulty).frames:
        picture = scenes.draw(scene)
        assert picture.size == (scenes.SIZE, scenes.SIZE)
        for row in range(scenes.GRID):
            for column in range(scenes.GRID):
                pixel = picture.getpixel(tuple(int(scenes.CELL * (index + 0.5)) for index in (column, row)))
                palette = {**scenes.COLOURS, None: (240, 240, 240)}
                nearest = min(palette, key=lambda colour: math.dist(palette[colour], pixel))
                thing = scene.at((row, column))
                assert nearest == (thing and thing.colour)


@given(SEEDS, DIFFICULTIES)
def test_scenes_have_things_in_different_cells(seed, difficulty):
    problem = a_problem(seed, difficulty)
    assert len(problem.frames) == (3 if difficulty.clip else 1)
    for scene in problem.frames:
        assert len(as_map(scene)) == len(scene.things) in difficulty.counts
    for one, next_ in zip(problem.frames, problem.frames[1:]):
        assert len(set(one.things) & set(next_.things)) == len(one.things) - 1


def test_a_scene_is_its_things_whatever_the_drawing():
    thing = scenes.Thing(0, 0, "red", "circle")
    one, other = scenes.Scene((thing,), seed=1), scenes.Scene((thing,), seed=2)
    assert one == other
    assert scenes.draw(one).tobytes() != scenes.draw(other).tobytes()


def test_no_evaluation_frames_are_in_training_or_twice():
    evaluation = [problem.frames for split in vision.EVALUATION_SPLITS for problem in problems.draw_problems(split)]
    assert len(evaluation) == len(set(evaluation))
    training = {p.frames for split in ("train", "train_clips") for p in problems.draw_problems(split)}
    assert not training & set(evaluation)
    corpus = Corpus(0)
    assert not {corpus.problem().frames for _ in range(3_000)} & set(evaluation)


@pytest.mark.parametrize("split", ["easy", "clips"])
def test_rows(split):
    rows = vision.load_dataset(split)
    assert rows.column_names == ["prompt", "images", "solution"]
    assert len(rows) == vision.SPLITS[split].size
    row, problem = rows[5], problems.draw_problems(split)[5]
    assert row["prompt"] == [{"role": "user", "content": problem.question.text}]
    assert row["solution"] == problem.answer
    assert [image.tobytes() for image in row["images"]] == [scenes.draw(scene).tobytes() for scene in problem.frames]


def test_an_unknown_split_is_named():
    with pytest.raises(ValueError, match=r"split: 'test' is not known.*easy"):
        vision.load_dataset("test")


def test_no_answer_prevails():
    for family in ("count", "more", "same", "way", "colour", "shape"):
        answers = [
            p.answer
            for p in problems.draw_problems("train") + problems.draw_problems("train_clips")
            if p.question.family == family
        ]
        assert max(answers.count(answer) for answer in answers) < 0.65 * len(answers)


def written(pieces):
    return "".join(piece.text for piece in pieces)


@given(SEEDS, DIFFICULTIES)
def test_thoughts_without_slips_are_right(seed, difficulty):
    problem = a_problem(seed, difficulty)
    thought = written(traces.ThoughtWriter(random.Random(seed), slip_rate=0).thought(problem))
    assert f"So it is {problem.answer}." in thought
    assert thought.count("Wait") + thought.count("Alternatively") == thought.count(f"It is {problem.answer} again.")
    assert thought.count("\n\n") == thought.count(" again.") >= 1


def test_misread_words_carry_no_loss():
    writer = traces.ThoughtWriter(random.Random(1), slip_rate=1.0)
    slips = 0
    for seed in range(30):
        problem = a_problem(seed, problems.HARD)
        untrained = [piece.text.strip() for piece in writer.thought(problem, checks=0) if not piece.trained]
        assert len(untrained) <= 1
        assert set(untrained) <= {*scenes.COLOURS, *scenes.SHAPES}
        slips += len(untrained)
    assert slips >= 15


def test_of_a_cut_or_empty_thought_only_the_answer_is_trained_on():
    rng = random.Random(2)
    problem = a_problem(3, problems.MEDIUM)
    for completion in (
        traces.cut(traces.ThoughtWriter(rng).thought(problem), problem, rng),
        traces.without_thought(problem),
    ):
        trained = written([piece for piece in completion if piece.trained])
        assert trained == f"<answer>{problem.answer}</answer><|im_end|>"
        text = written(completion).removesuffix("<|im_end|>")
        assert think_answer_format_reward([text], strict=True) == [1.0]
    assert written(traces.without_thought(problem)).startswith(NO_THOUGHT)


def test_prompts_are_what_the_chat_template_and_the_processor_write():
    processor = vision.load_processor()
    problem = a_problem(0, problems.CLIP)
    content = [*({"type": "image"} for _ in problem.frames), {"type": "text", "text": problem.question.text}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    ids = processor(images=[scenes.draw(scene) for scene in problem.frames], text=text)["input_ids"]
    assert ids[0] == processor.tokenizer.encode(prompt(problem).text)
    assert prompt(problem) == opening(3, problem.question.text)
    assert not prompt(problem).trained
    assert isinstance(prompt(problem), Piece)


def test_model_is_small_untied_and_opens_the_thought_itself():
    model, processor = vision.load_model(), vision.load_processor()
    assert model.config.model_type == "llava"
    assert not model.config.tie_word_embeddings
    assert not model.config.text_config.tie_word_embeddings
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert sum(file.stat().st_size for file in vision.MODEL_DIR.iterdir()) <= 8_000_000
    text = processor.apply_chat_template([{"role": "user", "content": "What moved?"}], add_generation_prompt=True)
    assert text.endswith("<|im_start|>assistant\n")
    for tag in ("<think>", "</think>", "<answer>", "</answer>"):
        (index,) = processor.tokenizer.encode(tag)
        assert processor.tokenizer.decode([index], skip_special_tokens=True) == tag


def test_the_folder_loads_in_a_new_process_without_the_package():
    script = (
        "import sys; from transformers import AutoModelForImageTextToText, AutoProcessor;"
        "AutoModelForImageTextToText.from_pretrained(sys.argv[1]); AutoProcessor.from_pretrained(sys.argv[1])"
    )
    subprocess.run([sys.executable, "-c", script, str(vision.MODEL_DIR)], check=True, timeout=120)


@pytest.fixture(scope="module")
def model_and_processor():
    return vision.load_model(), vision.load_processor()


@pytest.mark.parametrize(("split", "count", "least"), [("easy", 24, 0.6), ("clips", 12, 0.1)])
def test_model_answers_in_format(model_and_processor, split, count, least):
    """The measured accuracies are higher, see `benchmarks/README.md`: these are few problems, at temperature 1."""
    asked = list(problems.draw_problems(split)[:count])
    torch.manual_seed(0)
    completions = complete(*model_and_processor, asked)
    texts = [completion.text for completion in completions]
    assert sum(think_answer_format_reward(texts, strict=True)) >= count - 2
    right = [completion.answer == problem.answer for completion, problem in zip(completions, asked)]
    assert sum(right) >= least * count
    assert sum("Wait" in text or "Alternatively" in text for text in texts) >= count - 2  # needlessly


def test_trainer_takes_pictures_and_clips(model_and_processor, tmp_path):
    def right(completions, solution, **kwargs):
        return [float(f"<answer>{s}</answer>" in c[0]["content"]) for c, s in zip(completions, solution)]

    model, processor = model_and_processor
    for split in ("easy", "clips"):
        args = EfficientReasoningConfig(
            str(tmp_path), bf16=False, max_completion_length=16, num_generations=2, per_device_train_batch_size=4,
            max_steps=1, learning_rate=1e-12, report_to="none", save_strategy="no",
        )  # fmt: skip
        rows = vision.load_dataset(split).select(range(4))
        trainer = EfficientReasoningTrainer(model, right, args, train_dataset=rows, processing_class=processor)
        trainer.train()
        assert trainer.state.global_step == 1


def test_pretraining_runs_from_end_to_end(tmp_path):
    recipe = Recipe(
        Size(hidden_size=32, layers=1, heads=2, vision_hidden_size=32, vision_layers=1), name_updates=2,
        drill_updates=2, drill_tokens=256,
        reading_updates=2, reading_tokens=256, lookup_updates=2, lookup_tokens=256,
        pass_updates=2, pass_tokens=256, thought_updates=2, thought_tokens=512,
    )  # fmt: skip
    pretrain(recipe, tmp_path)
    assert AutoModelForImageTextToText.from_pretrained(tmp_path).config.text_config.hidden_size == 32
    assert AutoProcessor.from_pretrained(tmp_path).tokenizer.eos_token == "<|im_end|>"


def test_questions_of_every_family_are_asked():
    asked = {p.question.family for split in vision.SPLITS for p in problems.draw_problems(split)}
    families = {family for d in (*problems.PICTURES, problems.CLIP) for family in d.families}
    assert asked == families
    assert str(questions.Kind()) == "shape"
