"""
Train the visual testbed's model from scratch: tokenizer, and pre-training on written-out thoughts (`traces.py`).

    python benchmarks/testbed_model/vision --output DIR

1. Names: the encoder alone learns to name what is in each cell, in seconds.
2. Drill: places in random order, and what is there. The decoder learns where to look.
3. Readings: everything in a picture, in one of several orders.
4. Passes: a reading, or three of a clip, and the conclusion from it.
5. Lookups: conclusions from a reading, of which only what is found is trained on. The questions are not that of the
   prompt: with many lookups before the passes, a model ignored the question of the prompt to the end.
6. Thoughts: passes, re-checks and answer, with slips that carry no loss. Some are cut, or empty, and only their answer
   is trained on.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from step_trl.testbed.vision.problems import CLIP, EASY, HARD, MEDIUM, Problem, evaluation_frames, generate
from step_trl.testbed.vision.questions import ask
from step_trl.testbed.vision.scenes import COLOURS, GRID, PLACES, SHAPES, Frames, draw, random_scene

from ..pretrain import IGNORE, Inputs, encode, in_batches, padded, train
from ..traces import Piece
from .model import IMAGE, Size, build_model, build_processor, train_tokenizer
from .traces import (
    CHECKS,
    FIRST,
    Order,
    ThoughtWriter,
    conclusion,
    cut,
    found_only,
    reading,
    with_answer,
    without_thought,
)


Example = tuple[Frames, list[Piece]]  # of a completion, with its prompt
CELLS = [(row, column) for row in range(GRID) for column in range(GRID)]
PICTURE_FAMILIES = (*MEDIUM.families, "same")
MIXTURE = (EASY, MEDIUM, MEDIUM, HARD, HARD)


@dataclass(frozen=True)
class Recipe:
    """The hyper-parameters of the pre-training."""

    size: Size = field(default_factory=Size)
    learning_rate: float = 2e-3
    name_updates: int = 200
    drill_updates: int = 400
    drill_tokens: int = 1_024
    reading_updates: int = 600
    reading_tokens: int = 1_536
    pass_updates: int = 400
    pass_tokens: int = 2_048
    lookup_updates: int = 300
    lookup_tokens: int = 2_048
    thought_updates: int = 2_500
    thought_tokens: int = 3_072
    seed: int = 0


def opening(pictures: int, question: str) -> Piece:
    """Return what the chat template writes before a completion, with one token per cell of each picture."""
    text = f"<|im_start|>user\n{IMAGE * len(CELLS) * pictures}{question}<|im_end|>\n<|im_start|>assistant\n"
    return Piece(text, trained=False)


def prompt(problem: Problem) -> Piece:
    return opening(len(problem.frames), problem.question.text)


class Corpus:
    """An endless source of examples. No problem is about evaluation frames; the drill, without questions, has any."""

    def __init__(self, seed: int):
        self.rng = random.Random(seed)
        taken = evaluation_frames()
        self.pictures = generate(MIXTURE, self.rng, taken)
        self.clips = generate((CLIP,), self.rng, taken)
        self.writer = ThoughtWriter(self.rng)

    def problem(self, clip_rate: float = 0.15) -> Problem:
        return next(self.clips if self.rng.random() < clip_rate else self.pictures)

    def drill(self) -> Example:
        """Return places of a picture, in random order, and what is there. Only the latter is trained on."""
        scene = random_scene(self.rng, self.rng.randint(4, 7))
        pieces = [opening(1, "")]
        for cell in self.rng.sample(CELLS, 7):
            thing = scene.at(cell)
            name = thing.name if thing else "nothing"
            place = PLACES[cell[0]][cell[1]]
            pieces += [Piece(f" {place}", trained=False), Piece(f" {name}"), Piece(",", trained=False)]
        return (scene,), pieces

    def order(self) -> Order:
        return self.rng.choice((FIRST, FIRST, *CHECKS))

    def reading(self) -> Example:
        """Return one reading of a picture."""
        problem, order = self.problem(clip_rate=0), self.order()
        before = Piece(f"<think>\n{self.rng.choice(order.openings)}", trained=False)
        scene = problem.frames[0]
        return problem.frames, [prompt(problem), before, *reading(scene, order, scene)]

    def lookups(self) -> Example:
        """Return a reading, which carries no loss, and conclusions from it for unrelated questions."""
        problem, order = self.problem(), self.order()
        frames, families = problem.frames, CLIP.families if len(problem.frames) > 1 else PICTURE_FAMILIES
        _, written = self.writer.one_pass(problem, order, slip_rate=0)
        read = "".join(piece.text for piece in written[:-1])
        pieces = [prompt(problem), Piece(f"<think>\n{read}", trained=False)]
        for _ in range(4):
            question = ask(self.rng, families, frames)
            if question is not None:
                pieces += [*found_only(conclusion(question, frames, order)), Piece(" ", trained=False)]
        return frames, pieces

    def one_pass(self) -> Example:
        """Return one correct pass over a problem, and its answer. Now and then, the thought is empty."""
        problem = self.problem()
        if self.rng.random() < 0.2:
            return problem.frames, [prompt(problem), *without_thought(problem)]
        found, written = self.writer.one_pass(problem, self.order(), slip_rate=0)
        start = Piece(f"<think>\n{written[0].text}", trained=False)
        return problem.frames, [prompt(problem), start, *written[1:], Piece(f" So it is {found}.")]

    def thought(self) -> Example:
        """Return a whole completion, or only the answer to a thought that is cut or empty."""
        problem, kind = self.problem(), self.rng.random()
        if kind < 0.25:
            return problem.frames, [prompt(problem), *without_thought(problem)]
        thought = self.writer.thought(problem, checks=1 if len(problem.frames) > 1 else None)
        completion = cut(thought, problem, self.rng) if kind < 0.4 else with_answer(thought, problem)
        return problem.frames, [prompt(problem), *completion]


def batches(
    processor: LlavaProcessor, example: Callable[[], Example], tokens: int, rng: random.Random
) -> Iterator[Inputs]:
    """Yield batches of about `tokens` tokens, of examples of similar length."""
    while True:
        examples = [example() for _ in range(256)]
        encoded = [(*encode(processor.tokenizer, pieces), frames) for frames, pieces in examples]
        for rows in in_batches(encoded, tokens, rng):
            ids, labels, frames = zip(*rows)
            pictures = [draw(scene) for scenes in frames for scene in scenes]
            pixels = processor.image_processor(pictures, return_tensors="pt").pixel_values
            yield {"input_ids": padded(ids, 0), "pixel_values": pixels}, padded(labels, IGNORE)


def learn_names(model: LlavaForConditionalGeneration, processor: LlavaProcessor, updates: int, seed: int) -> None:
    """
    Teach the encoder to name what is in each cell and where it is, without the decoder, in seconds.

    Features of a cell are trained to predict its words through the output embeddings, which the input embeddings start
    from: words look like what they name. Otherwise, the decoder would have to learn where to look while the encoder
    learns to see.
    """
    rng = random.Random(seed)
    words = [*COLOURS, *SHAPES, *sum(PLACES, ()), "nothing"]
    index = {word: processor.tokenizer.convert_tokens_to_ids(f"Ġ{word}") for word in words}
    encoder = [model.model.vision_tower, model.model.multi_modal_projector, model.lm_head]
    optimizer = torch.optim.AdamW([weight for part in encoder for weight in part.parameters()], lr=2e-3)
    for update in range(updates):
        scenes = [random_scene(rng, rng.randint(2, 7)) for _ in range(64)]
        pixels = processor.image_processor([draw(scene) for scene in scenes], return_tensors="pt").pixel_values
        targets = torch.zeros(len(scenes), len(CELLS), model.lm_head.out_features)
        for target, scene in zip(targets, scenes):
            for row, cell in zip(target, CELLS):
                thing = scene.at(cell)
                named = [PLACES[cell[0]][cell[1]], *((thing.colour, thing.shape) if thing else ["nothing"])]
                row[torch.tensor([index[word] for word in named])] = 1 / len(named)
        features = torch.stack(list(model.get_image_features(pixels, return_dict=True).pooler_output))
        logits = model.lm_head(torch.nn.functional.rms_norm(features, features.shape[-1:]))
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(0, 1))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (update + 1) % 50 == 0:
            print(f"names {update + 1}/{updates} loss {loss.item():.4f}", flush=True)
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(model.lm_head.weight)


def pretrain(recipe: Recipe, output: Path) -> None:
    """Run all stages, and save the model and its processor to `output`."""
    torch.manual_seed(recipe.seed)
    corpus = Corpus(recipe.seed)
    texts = ["".join(piece.text for piece in corpus.thought()[1]) for _ in range(2_000)]
    tokenizer = train_tokenizer([text.replace(IMAGE, "") for text in texts], recipe.size.vocab_size)
    processor = build_processor(tokenizer)
    processor.save_pretrained(output)
    model = build_model(recipe.size, tokenizer)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens", flush=True)

    learn_names(model, processor, recipe.name_updates, recipe.seed)
    for name, example, updates, tokens in (
        ("drill", corpus.drill, recipe.drill_updates, recipe.drill_tokens),
        ("readings", corpus.reading, recipe.reading_updates, recipe.reading_tokens),
        ("passes", corpus.one_pass, recipe.pass_updates, recipe.pass_tokens),
        ("lookups", corpus.lookups, recipe.lookup_updates, recipe.lookup_tokens),
        ("thoughts", corpus.thought, recipe.thought_updates, recipe.thought_tokens),
    ):
        train(model, batches(processor, example, tokens, corpus.rng), updates, recipe.learning_rate, name)
        model.save_pretrained(output / f"after {name}")
    model.save_pretrained(output)
