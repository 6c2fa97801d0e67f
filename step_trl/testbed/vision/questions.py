"""Questions about scenes and clips, and their answers, which are a word, two words or a number."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from .scenes import COLOURS, DIRECTIONS, SHAPES, Cell, Frames, Scene, Thing


@dataclass(frozen=True)
class Kind:
    """A description of things: a colour, a shape, or both."""

    colour: str | None = None
    shape: str | None = None

    def __str__(self) -> str:
        """Return for example `"red circle"`, `"red shape"` or `"circle"`."""
        return " ".join(word for word in (self.colour, self.shape or "shape") if word)

    def of(self, scene: Scene) -> list[Thing]:
        """Return the things of this kind, in reading order."""
        return [
            thing
            for thing in scene.things
            if self.colour in (None, thing.colour) and self.shape in (None, thing.shape)
        ]


@dataclass(frozen=True)
class Question:
    """
    A question of a family about things of a kind.

    Attributes:
        family (`str`):
            `"count"`, `"colour"`, `"shape"`, `"where"`, `"beside"`, `"same"` and `"more"` are about pictures;
            `"moved"`, `"way"` and `"end"` are about clips.
        kind ([`Kind`]):
            The things in question. All families but `"count"` and `"more"` are about a single thing.
        other (`str`):
            For `"beside"`, the direction; for `"more"`, the colour to compare with.
    """

    family: str
    kind: Kind = Kind()
    other: str = ""

    @property
    def text(self) -> str:
        """Return the wording."""
        return {
            "count": f"How many {self.kind}s are there?",
            "colour": f"What colour is the {self.kind}?",
            "shape": f"What shape is the {self.kind.colour} one?",
            "where": f"Where is the {self.kind}?",
            "beside": f"What is {self.other} of the {self.kind}?",
            "same": f"How many shapes have the colour of the {self.kind}?",
            "more": f"Are there more {self.kind}s than {self.other} shapes?",
            "moved": "What moved?",
            "way": f"Which way did the {self.kind} move?",
            "end": f"Where is the {self.kind} at the end?",
        }[self.family]

    def answer(self, frames: Frames) -> str:
        """Return the answer for a picture, given as its scene, or for a clip."""
        first, last = frames[0], frames[-1]
        things = self.kind.of(last)
        if self.family == "count":
            return str(len(things))
        if self.family == "more":
            return "yes" if len(things) > len(Kind(self.other).of(last)) else "no"
        if self.family == "moved":
            return moved_thing(frames).name
        thing = things[0]
        if self.family == "beside":
            neighbour = last.at(neighbouring_cell(thing, self.other))
            return neighbour.name if neighbour else "nothing"
        if self.family == "same":
            return str(len(Kind(thing.colour).of(last)))
        if self.family == "way":
            return way(self.kind.of(first)[0], thing)
        return {"colour": thing.colour, "shape": thing.shape, "where": thing.place, "end": thing.place}[self.family]


def neighbouring_cell(thing: Thing, direction: str) -> Cell:
    """Return the cell next to a thing; it may be outside of the grid."""
    down, across = DIRECTIONS[direction]
    return thing.row + down, thing.column + across


def moved_thing(frames: Frames) -> Thing:
    """Return the thing that moved, where it is at the end."""
    return next(thing for thing in frames[-1].things if thing not in frames[0].things)


def way(start: Thing, end: Thing) -> str:
    """Return the direction from one place to another in the same row or column."""
    if start.row == end.row:
        return "east" if start.column < end.column else "west"
    return "south" if start.row < end.row else "north"


def possible_questions(family: str, frames: Frames) -> Iterator[Question]:
    """Yield the questions of a family that have one answer for these frames."""
    scene = frames[-1]
    colours, shapes = [Kind(colour) for colour in COLOURS], [Kind(shape=shape) for shape in SHAPES]
    both = [Kind(colour, shape) for colour in COLOURS for shape in SHAPES]

    def is_one(kind: Kind) -> bool:
        return len(kind.of(scene)) == 1

    if family == "count":
        yield from (Question(family, kind) for kind in (*colours, *shapes, *both))
    elif family in ("colour", "same"):
        yield from (Question(family, kind) for kind in shapes if is_one(kind))
    elif family == "shape":
        yield from (Question(family, kind) for kind in colours if is_one(kind))
    elif family == "beside":
        yield from (Question(family, kind, direction) for kind in both if is_one(kind) for direction in DIRECTIONS)
    elif family == "more":
        present = [kind for kind in colours if kind.of(scene)]
        yield from (
            Question(family, kind, str(other.colour)) for kind in present for other in present if kind != other
        )
    elif family == "moved":
        yield Question(family)
    elif family == "way":
        yield Question(family, Kind(moved_thing(frames).colour, moved_thing(frames).shape))
    else:
        yield from (Question(family, kind) for kind in both if is_one(kind))


def ask(rng: random.Random, families: tuple[str, ...], frames: Frames) -> Question | None:
    """
    Draw a question from a random family, or return `None` if no family has one.

    The family, then the answer, then one of the questions that have it are drawn, so that no answer prevails.
    """
    for family in rng.sample(families, len(families)):
        by_answer: dict[str, list[Question]] = {}
        for question in possible_questions(family, frames):
            by_answer.setdefault(question.answer(frames), []).append(question)
        if by_answer:
            return rng.choice(by_answer[rng.choice(sorted(by_answer))])
    return None
