"""
`step-trl train --dry-run`: what a recipe would do, and everything that is wrong with it.

Nothing is trained or written, and no weights are loaded. The configuration is read as on a CPU, so whether the GPU
supports bfloat16 is not checked. A GPU is only asked for the size of its memory.
"""

from __future__ import annotations

import os
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..recipe import named_trainer, read_recipe, recipe_layers, recipe_path
from .checks import CHECKS
from .layout import Layout
from .other_checks import OTHER_CHECKS
from .stage_plan import StagePlan


def run_checks(plan: StagePlan) -> None:
    """Run each check of a stage that has what it needs, even if other checks have failed."""
    trainer = named_trainer(plan.recipe, plan.arguments)
    for name, check, needs in OTHER_CHECKS.get(trainer or "", CHECKS):
        missing = [need for need in needs if getattr(plan, need) is None]
        if missing:
            plan.lines[name] = f"not checked, as it needs {' and '.join(missing)}".replace("_", " ")
            continue
        plan.lines[name] = "wrong, see below"
        try:
            plan.lines[name] = check(plan)
        except ValueError as error:  # its lines name the fields
            plan.failures += str(error).splitlines()
        except Exception as error:  # any error of a library: the other checks still run
            plan.failures.append(f"{name}: {type(error).__name__}: {error}")


def print_plan(
    arguments: Sequence[str],
    accelerate_config: Path | None = None,
    num_processes: int | None = None,
    gpu_memory: float | None = None,
) -> int:
    """
    Check a recipe, print what it would do, and return the exit status: 1 if anything is wrong.

    The first argument is that of [`~step_trl.cli.train.run_train`], the others are those of
    [`~step_trl.cli.dry_run.layout.Layout.of`].
    """
    if int(os.environ.get("RANK", 0)) > 0:
        return 0  # only the first process prints
    try:
        layout = Layout.of(accelerate_config, num_processes, gpu_memory)
        recipe, stages, rest = read_recipe(arguments)
    except (ValueError, FileNotFoundError) as error:
        print(error)
        return 1
    if (path := recipe_path(arguments)) is not None:
        print(describe_layers(recipe_layers(path)), end="\n\n")
    plans: list[StagePlan] = []
    for number, stage in enumerate(stages, 1):
        plan = StagePlan(recipe | stage, rest, layout, number, len(stages), tuple(plans))
        run_checks(plan)
        plans.append(plan)
        print(*([f"Stage {number} of {len(stages)}"] if len(stages) > 1 else []), plan, sep="\n", end="\n\n")
    return print_verdict(plans)


def print_verdict(plans: Sequence[StagePlan]) -> int:
    """Print everything that is wrong, or that nothing is, and return the exit status."""
    failures = dict.fromkeys(failure for plan in plans for failure in plan.failures)
    if failures:
        print("Wrong:", *(textwrap.indent(failure, "  ") for failure in failures), sep="\n")
        return 1
    if all(plan.memory_is_known for plan in plans):
        print("All of this was checked. Nothing was trained.")
    else:
        print("This was checked, but not whether a GPU has the memory: give --gpu-memory. Nothing was trained.")
    return 0


def describe_layers(layers: Sequence[tuple[Path, Mapping[str, Any]]]) -> str:
    """Describe which fields are a recipe's own, and which come from its bases."""
    (path, own), bases = layers[0], layers[1:]
    lines = [f"recipe   {path} sets {', '.join(own) or 'nothing'}"]
    lines += [f"base     {file} sets {', '.join(fields) or 'nothing else'}" for file, fields in bases]
    return "\n".join(textwrap.fill(line, 119, subsequent_indent=" " * 9) for line in lines)
