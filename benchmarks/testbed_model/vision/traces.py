"""
Write the thoughts that the visual testbed's model is pre-trained on, from problems.

A thought says what is where, concludes, and then does it again and again: "Wait, let me look again." There
are always re-checks, even of a picture with one thing: this is what overthinking looks like.

The first reading may contain a slip, a wrong colour or shape, that carries no loss: the model learns how thinking
continues after a wrong word, but never to write one, so its own errors reflect its ability.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from step_trl.testbed.vision.problems import Problem
from step_trl.testbed.vision.questions import Kind, Question, neighbouring_cell
from step_trl.testbed.vision.scenes import COLOURS, GRID, PLACES, SHAPES, Frames, Scene, Thing

from ..traces import Piece


TRIGGERS = "Wait|Alternatively"
ANSWER = "\n</think>\n<answer>{}</answer>"
ONE_THING = ("colour", "shape", "where", "beside", "same", "way", "end")  # families about a single thing


@dataclass(frozen=True)
class Order:
    """An order in which to read a picture, and what to write before."""

    openings: tuple[str, ...]
    by_columns: bool = False
    backwards: bool = False

    def sort(self, things: Sequence[Thing]) -> list[Thing]:
        """Return the things in this order."""
        by_rows = sorted(things, key=lambda thing: (thing.column, thing.row) if self.by_columns else thing)
        return by_rows[::-1] if self.backwards else by_rows


FIRST = Order(("I see:",))
AGAIN = Order(("Wait, let me look again:", "Wait, let me check that:"))
BACKWARDS = Order(("Wait, let me go backwards:", "Wait, I should start at the end:"), backwards=True)
COLUMNS = Order(("Alternatively, go by columns:", "Alternatively, take the columns:"), by_columns=True)
CHECKS = (AGAIN, BACKWARDS, COLUMNS)


def reading(scene: Scene, order: Order, seen: Scene) -> list[Piece]:
    """Write what is where. A word that differs between the scene and what is `seen` carries no loss."""
    pieces = []
    for thing in order.sort(seen.things):
        true = scene.at((thing.row, thing.column)) or thing
        pieces += [
            Piece(f" {thing.place}"),
            Piece(f" {thing.colour}", trained=thing.colour == true.colour),
            Piece(f" {thing.shape}", trained=thing.shape == true.shape),
            Piece(","),
        ]
    return [*pieces[:-1], Piece(".\n")]


def scan(kind: Kind, scene: Scene, order: Order, plural: bool = False) -> str:
    """
    Return for example `"The red shapes: north no, east 1, south 2."`.

    Going through all places is longer than naming those that count. But it only asks what is in a place, and never
    where a thing is, which a model of this size had hardly learned after 800 updates of lookups.
    """
    marks, number = [], 0
    for thing in order.sort(scene.things):
        number += thing in kind.of(scene)
        marks.append(f"{thing.place} {number if thing in kind.of(scene) else 'no'}")
    return f"The {kind}{'s' if plural else ''}: {', '.join(marks)}."


def changes(frames: Frames, order: Order) -> str:
    """Return for example `"From first to last: north leaves, east stays, south comes."`."""
    first, last = ({thing.place: thing for thing in scene.things} for scene in (frames[0], frames[-1]))
    marks = []
    for place, thing in {thing.place: thing for thing in order.sort([*(first | last).values()])}.items():
        what = "stays" if first.get(place) == last.get(place) == thing else "comes" if place in last else "leaves"
        marks.append(f"{place} {what}")
    return f"From first to last: {', '.join(marks)}."


def conclusion(question: Question, frames: Frames, order: Order) -> str:
    """Write the way from what was read to the answer, without the answer."""
    scene, kind = frames[-1], question.kind
    if question.family == "count":
        return scan(kind, scene, order, plural=True)
    if question.family == "more":
        other = Kind(question.other)
        counts = f"{len(kind.of(scene))} and {len(other.of(scene))}."
        return f"{scan(kind, scene, order, plural=True)} {scan(other, scene, order, plural=True)} {counts}"
    if question.family in ("moved", "way"):
        return changes(frames, order)
    thing, found = kind.of(scene)[0], scan(kind, scene, order)
    if question.family == "beside":
        row, column = neighbouring_cell(thing, question.other)
        inside = 0 <= row < GRID and 0 <= column < GRID
        place = PLACES[row][column] if inside else "the edge"
        return f"{found} {question.other.capitalize()} of it is {place}."
    if question.family == "same":
        return f"{found} Its colour is {thing.colour}. {scan(Kind(thing.colour), scene, order, plural=True)}"
    return found


def found_only(text: str) -> list[Piece]:
    """Split conclusions into what is looked for, which carries no loss, and what is found."""
    parts = re.split(r"((?:The|From) [a-z ]+?:|[A-Z][a-z]+ of it is)", text)
    return [Piece(part, trained=index % 2 == 0) for index, part in enumerate(parts) if part]


class ThoughtWriter:
    """Writes thoughts about problems."""

    def __init__(self, rng: random.Random, slip_rate: float = 0.3):
        self.rng = rng
        self.slip_rate = slip_rate

    def misread(self, problem: Problem) -> Frames:
        """Return the frames with one thing of a picture misread, or unchanged if the question would have no answer."""
        scene = problem.frames[0]
        if len(problem.frames) > 1:
            return problem.frames
        thing = self.rng.choice(scene.things)
        if self.rng.random() < 0.5:
            wrong = replace(thing, colour=self.rng.choice([colour for colour in COLOURS if colour != thing.colour]))
        else:
            wrong = replace(thing, shape=self.rng.choice([shape for shape in SHAPES if shape != thing.shape]))
        seen = replace(scene, things=tuple(wrong if one == thing else one for one in scene.things))
        question = problem.question
        if question.family in ONE_THING and len(question.kind.of(seen)) != 1:
            return problem.frames
        return (seen,)

    def one_pass(self, problem: Problem, order: Order, slip_rate: float) -> tuple[str, list[Piece]]:
        """Read the frames and conclude. Return the answer that was found, and what was written."""
        seen = self.misread(problem) if self.rng.random() < slip_rate else problem.frames
        pieces = [Piece(self.rng.choice(order.openings))]
        for index, (scene, as_seen) in enumerate(zip(problem.frames, seen)):
            if len(seen) > 1:
                pieces.append(Piece(f"{'' if index else chr(10)}Frame {index + 1}:"))
            pieces += reading(scene, order, as_seen)
        pieces.append(Piece(conclusion(problem.question, seen, order)))
        return problem.question.answer(seen), pieces

    def thought(self, problem: Problem, checks: int | None = None) -> list[Piece]:
        """Write a first pass and one to three re-checks, and one more while the last two answers differ."""
        found, pieces = self.one_pass(problem, FIRST, self.slip_rate)
        pieces.append(Piece(f" So it is {found}."))
        answers = [found]
        wanted = self.rng.choice((1, 2, 2, 3)) if checks is None else checks
        while len(answers) <= wanted or (len(answers) > 1 and answers[-1] != answers[-2]):
            found, written = self.one_pass(problem, self.rng.choice(CHECKS), self.slip_rate / 6)
            agrees = f" It is {found} again." if found == answers[-1] else f" It is {found}, not {answers[-1]}."
            pieces += [Piece("\n\n"), *written, Piece(agrees)]
            answers.append(found)
        return pieces


def with_answer(thought: list[Piece], problem: Problem) -> list[Piece]:
    """Return a whole completion, with the true answer, whatever the thought found."""
    return [Piece("<think>\n"), *thought, Piece(ANSWER.format(problem.answer)), Piece("<|im_end|>")]


def cut(thought: list[Piece], problem: Problem, rng: random.Random) -> list[Piece]:
    """
    Return a completion whose thought stops before a re-check. Only the answer is trained on.

    The model must know what to answer when a thought is cut, but must not learn to stop early by itself.
    """
    ends = [index for index, piece in enumerate(thought) if piece.text == "\n\n"]
    kept = "".join(piece.text for piece in thought[: rng.choice(ends)]) if ends else ""
    return answer_only(f"<think>\n{kept}", problem)


def without_thought(problem: Problem) -> list[Piece]:
    """Return a completion with an empty thought, as TON writes it. Only the answer is trained on."""
    return answer_only("<think>\n", problem)


def answer_only(before: str, problem: Problem) -> list[Piece]:
    opening, tag, answer = ANSWER.format(problem.answer).partition("<answer>")
    return [Piece(before + opening, trained=False), Piece(tag + answer), Piece("<|im_end|>")]
