"""Problems of the visual testbed: frames and a question, drawn from a seed. Nothing is stored."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice

from .questions import Question, ask
from .scenes import Frames, random_clip, random_scene


@dataclass(frozen=True)
class Problem:
    """A question about frames: one for a picture, three for a clip."""

    frames: Frames
    question: Question

    @property
    def answer(self) -> str:
        return self.question.answer(self.frames)


@dataclass(frozen=True)
class Difficulty:
    """How many things there are, and what is asked."""

    counts: tuple[int, ...]
    families: tuple[str, ...]
    clip: bool = False


EASY = Difficulty((1, 2, 2, 2), ("count", "colour", "shape", "where"))  # there are few scenes with one thing
MEDIUM = Difficulty((3, 4), ("count", "colour", "shape", "where", "beside", "more"))
HARD = Difficulty((5, 6, 7), ("count", "beside", "same", "more"))
CLIP = Difficulty((2, 3, 4), ("moved", "way", "end"), clip=True)
PICTURES = (EASY, MEDIUM, HARD)


@dataclass(frozen=True)
class Split:
    """The difficulties of a split's problems, how many there are, and their seed."""

    difficulties: tuple[Difficulty, ...]
    size: int
    seed: int


SPLITS = {
    "train": Split(PICTURES, 2048, 1),
    "train_clips": Split((CLIP,), 1024, 2),
    "easy": Split((EASY,), 256, 3),
    "medium": Split((MEDIUM,), 256, 4),
    "hard": Split((HARD,), 256, 5),
    "clips": Split((CLIP,), 256, 6),
}
EVALUATION_SPLITS = ("easy", "medium", "hard", "clips")


def generate(
    difficulties: tuple[Difficulty, ...], rng: random.Random, exclude: Collection[Frames] = ()
) -> Iterator[Problem]:
    """Yield problems endlessly, about frames that are not excluded."""
    while True:
        difficulty = rng.choice(difficulties)
        count = rng.choice(difficulty.counts)
        frames = random_clip(rng, count) if difficulty.clip else (random_scene(rng, count),)
        question = None if frames in exclude else ask(rng, difficulty.families, frames)
        if question is not None:
            yield Problem(frames, question)


@lru_cache
def draw_problems(split: str) -> tuple[Problem, ...]:
    """Return the problems of a split. No frames are in two evaluation problems, or in evaluation and training."""
    if split not in SPLITS:
        raise ValueError(f"split: {split!r} is not known. Set one of {', '.join(SPLITS)}.")
    spec = SPLITS[split]
    if split not in EVALUATION_SPLITS:
        source = generate(spec.difficulties, random.Random(spec.seed), evaluation_frames())
        return tuple(islice(source, spec.size))
    found: dict[Frames, Problem] = {}
    for problem in generate(spec.difficulties, random.Random(spec.seed)):
        found.setdefault(problem.frames, problem)
        if len(found) == spec.size:
            break
    return tuple(found.values())


@lru_cache
def evaluation_frames() -> frozenset[Frames]:
    """Return the frames of all evaluation problems."""
    return frozenset(problem.frames for split in EVALUATION_SPLITS for problem in draw_problems(split))
