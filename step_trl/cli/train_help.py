"""
`step-trl train --help`: the fields that this package adds, and how to see those of TRL and transformers.

The fields are read from the source of their dataclasses, because importing them, with TRL and torch, takes seconds.
"""

from __future__ import annotations

import ast
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, cast


WIDTH = 110
INDENT = " " * 34
OVERVIEW = """\
usage: step-trl {command} [--config RECIPE] [--FIELD VALUE ...]

Trains from a recipe: a YAML file of fields, any of which the command line can override.

options:
  --config RECIPE                 the recipe, such as recipes/step_grpo/paper.yaml
  --model MODEL                   a folder, a name on the Hub, or 'testbed'; short for --model_name_or_path
  --dry-run                       check everything and print what would be done, without training
  --accelerate-config FILE        for a dry run: the --config_file of `accelerate launch`, by default of this launch
  --num-processes N               for a dry run: number of training processes, by default of the file or launch
  --gpu-memory GIB                for a dry run: GiB of a GPU (80 if sold as 80 GB), by default of the visible one
  --debug                         show the traceback of an error
  --help-all                      all fields of --trainer, with those of TRL and transformers
"""
FURTHER = """\
Further fields are those of TRL and transformers, such as --output_dir, --learning_rate, --num_generations,
--max_completion_length, --use_peft and --use_vllm. To see them: step-trl {command} --help-all"""
PACKAGE = Path(__file__).parents[1]
ARGUMENTS = "cli/arguments.py"


class Field(NamedTuple):
    """A field of a dataclass: its name, its default as Python code (`None` if it is not plain), and its help."""

    name: str
    default: str | None
    help: str


class Group(NamedTuple):
    """Fields that belong together: their title, file, classes, and the trainers that have them (`None` for all)."""

    title: str
    file: str
    classes: tuple[str, ...] | None
    trainers: tuple[str, ...] | None


def groups() -> list[Group]:
    """Return the groups of fields, those of each method as `METHODS` has them."""
    configs = method_configs()
    sources = {name: (PACKAGE / file).read_text() for name, (file, _) in configs.items()}
    found = [Group("fields of every recipe", ARGUMENTS, ("TrainArguments",), None)]
    for name, (file, config) in configs.items():
        heirs = [other for other, source in sources.items() if f"({config})" in source]
        if name != "grpo":
            found.append(Group(f"fields of {name}", file, None, (name, *heirs)))
    return [
        *found,
        Group("fields of every method", "trainers/base_config.py", None, tuple(configs)),
        Group("fields of every method, for long runs", "runtime/run_config.py", None, tuple(configs)),
        Group("fields of distill and sft", ARGUMENTS, ("SamplingArguments", "FineTuningConfig"), ("distill", "sft")),
        Group("fields of distill", ARGUMENTS, ("DistillArguments",), ("distill",)),
        Group("fields of sft", ARGUMENTS, ("SFTArguments",), ("sft",)),
        Group("fields of dpo", ARGUMENTS, ("DPOArguments", "PreferenceConfig"), ("dpo",)),
    ]


def method_configs() -> dict[str, tuple[str, str]]:
    """Return the file and the class of each method's configuration."""
    tree = ast.parse((PACKAGE / "trainers/__init__.py").read_text())
    files = {
        alias.name: f"trainers/{node.module}.py"
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    (table,) = (
        node.value for node in tree.body if isinstance(node, ast.AnnAssign) and isinstance(node.value, ast.Dict)
    )
    names = [ast.literal_eval(cast("ast.expr", key)) for key in table.keys]
    classes = [ast.unparse(cast("ast.Tuple", pair).elts[1]) for pair in table.values]
    return {name: (files[config], config) for name, config in zip(names, classes, strict=True)}


def own_fields(path: Path, names: tuple[str, ...] | None = None) -> Iterator[Field]:
    """Yield the fields that the named classes (by default, all classes) define, without inherited ones."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ClassDef) and (names is None or node.name in names):
            for line in node.body:
                if isinstance(line, ast.AnnAssign) and isinstance(line.value, ast.Call):
                    yield _read_field(line.target, line.value)


def _read_field(target: ast.expr, call: ast.Call) -> Field:
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    default = given.get("default")
    if isinstance(factory := given.get("default_factory"), ast.Lambda):
        default = factory.body
    text = ast.unparse(default) if isinstance(default, ast.Constant | ast.List) else "None"
    help = ast.literal_eval(given["metadata"])["help"]
    return Field(ast.unparse(target), None if text == "None" else text, help)


def print_help(command: str, trainer: str | None) -> None:
    """Print the fields that this package adds, by default those of all trainers."""
    print(OVERVIEW.format(command=command))
    for title, file, classes, trainers in groups():
        if trainer is None or trainers is None or trainer in trainers:
            print(f"{title}:")
            for one in own_fields(PACKAGE / file, classes):
                print(_line(one))
            print()
    print(FURTHER.format(command=command))


def _line(one: Field) -> str:
    help = one.help + (f" Defaults to {one.default}." if one.default is not None else "")
    lines = textwrap.wrap(help, WIDTH, initial_indent=INDENT, subsequent_indent=INDENT)
    name = f"  --{one.name}".ljust(len(INDENT))
    if len(name) > len(INDENT):
        return "\n".join([name, *lines])
    return "\n".join([name + lines[0][len(INDENT) :], *lines[1:]])


def print_full_help(command: str, trainer: str | None) -> None:
    """Print all fields of a trainer, by default those of Step-GRPO."""
    from .recipe import make_parser, trainer_name

    parser = make_parser(trainer_name({}, [f"--trainer={trainer or 'step_grpo'}"]), {})
    parser.usage = f"step-trl {command} [--config RECIPE] [--FIELD VALUE ...]"
    parser.print_help()
