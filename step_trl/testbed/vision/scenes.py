"""Scenes of the visual testbed: coloured shapes on a grid, as data and as pictures. Clips are sequences of scenes."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from PIL import Image

COLOURS = {"red": (215, 45, 45), "green": (45, 165, 60), "blue": (50, 80, 215), "yellow": (225, 190, 30)}
SHAPES = ("circle", "square", "triangle")
PLACES = (("northwest", "north", "northeast"), ("west", "centre", "east"), ("southwest", "south", "southeast"))
DIRECTIONS = {"north": (-1, 0), "south": (1, 0), "west": (0, -1), "east": (0, 1)}  # rows down, columns to the right
GRID = len(PLACES)  # rows, and columns
CELL = 16  # pixels
SIZE = GRID * CELL

Cell = tuple[int, int]  # row and column


@dataclass(frozen=True, order=True)
class Thing:
    """A coloured shape in a cell of the grid."""

    row: int
    column: int
    colour: str
    shape: str

    @property
    def name(self) -> str:
        """Return for example `"red circle"`."""
        return f"{self.colour} {self.shape}"

    @property
    def place(self) -> str:
        """Return for example `"northwest"`."""
        return PLACES[self.row][self.column]


@dataclass(frozen=True)
class Scene:
    """
    Things in different cells, in reading order.

    Two scenes with the same things are equal. The seed only varies the drawing: sizes, shades and small shifts.
    """

    things: tuple[Thing, ...]
    seed: int = field(default=0, compare=False)

    def at(self, cell: Cell) -> Thing | None:
        """Return the thing in a cell, which may be empty or outside of the grid."""
        return next((thing for thing in self.things if (thing.row, thing.column) == cell), None)


Frames = tuple[Scene, ...]  # one scene for a picture, several for a clip


def random_scene(rng: random.Random, count: int) -> Scene:
    """Draw a scene of `count` things. Colours and shapes may repeat."""
    cells = rng.sample([(row, column) for row in range(GRID) for column in range(GRID)], count)
    things = (Thing(*cell, rng.choice(list(COLOURS)), rng.choice(SHAPES)) for cell in cells)
    return Scene(tuple(sorted(things)), rng.getrandbits(32))


def random_clip(rng: random.Random, count: int, length: int = 3) -> Frames:
    """
    Draw a clip of `count` different things, one of which moves from one edge of the grid to the opposite one.

    It moves by one cell per frame.
    """
    names = rng.sample([(colour, shape) for colour in COLOURS for shape in SHAPES], count)
    down, across = DIRECTIONS[rng.choice(list(DIRECTIONS))]
    line = rng.randrange(GRID)
    path = [
        tuple((GRID - 1 if step < 0 else 0) + step * index if step else line for step in (down, across))
        for index in range(length)
    ]
    free = [(row, column) for row in range(GRID) for column in range(GRID) if (row, column) not in path]
    still = [Thing(*cell, *name) for cell, name in zip(rng.sample(free, count - 1), names[1:])]
    return tuple(
        Scene(tuple(sorted([*still, Thing(cell[0], cell[1], *names[0])])), rng.getrandbits(32)) for cell in path
    )


def draw(scene: Scene) -> Image.Image:
    """Return the picture of a scene, `SIZE` pixels wide and high. Each thing covers the centre of its cell."""
    from PIL import Image, ImageDraw

    rng = random.Random(scene.seed)
    picture = Image.new("RGB", (SIZE, SIZE), (rng.randint(225, 255),) * 3)
    canvas = ImageDraw.Draw(picture)
    for thing in scene.things:
        radius = rng.uniform(4.5, 6.5)
        x = CELL * (thing.column + 0.5) + rng.uniform(-1, 1)
        y = CELL * (thing.row + 0.5) + rng.uniform(-1, 1)
        fill = tuple(max(0, min(255, value + rng.randint(-25, 25))) for value in COLOURS[thing.colour])
        box = (x - radius, y - radius, x + radius, y + radius)
        if thing.shape == "circle":
            canvas.ellipse(box, fill)
        elif thing.shape == "square":
            canvas.rectangle(box, fill)
        else:
            canvas.polygon([(x, y - radius), (x - radius, y + radius), (x + radius, y + radius)], fill)
    return picture
