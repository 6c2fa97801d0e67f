"""The plan of one stage of a recipe, which the checks fill in."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from .layout import Layout


@dataclass
class StagePlan:
    """
    The plan of one stage of a recipe. Each check adds a line to it, and stores what later checks need.

    Attributes:
        recipe (`Mapping[str, Any]`), arguments (`Sequence[str]`):
            The fields of the recipe, and those of the command line, which take precedence.
        layout ([`~step_trl.cli.dry_run.layout.Layout`]):
            The processes and GPUs.
        number (`int`), stages (`int`), earlier (`Sequence[StagePlan]`):
            The number of the stage, from 1; the number of stages; and the plans of the stages before this one.
        lines (`dict[str, str]`):
            The lines of the plan, by check.
        failures (`list[str]`):
            Messages about everything that is wrong.
        values, config, batches, rows, model_config, processor, tokenizer, longest_prompt, longest_row,
        memory_is_known:
            The results of the checks, each `None` until its check has passed. Checks that need it are left out then.
    """

    recipe: Mapping[str, Any]
    arguments: Sequence[str]
    layout: Layout
    number: int = 1
    stages: int = 1
    earlier: Sequence[StagePlan] = ()
    lines: dict[str, str] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    values: Any = None
    config: Any = None
    batches: Any = None
    rows: Any = None
    model_config: Any = None
    processor: Any = None
    tokenizer: Any = None
    longest_prompt: Any = None
    longest_row: Any = None
    memory_is_known: bool | None = None

    def __str__(self) -> str:
        return "\n".join(
            textwrap.fill(text, 119, initial_indent=f"{name:<9}", subsequent_indent=" " * 9)
            for name, text in self.lines.items()
        )

    def dataclass_of(self, kind: type, **others: Any) -> Any:
        """Return an instance of a dataclass with the values of its fields."""
        names = [one.name for one in fields(kind) if one.init and one.name in vars(self.values)]
        return kind(**{name: getattr(self.values, name) for name in names} | others)
