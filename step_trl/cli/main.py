"""The `step-trl` command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .user_errors import is_user_error, message_of


if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

FORWARDING = ("train", "distill", "serve", "study")  # commands that have a parser of their own for further arguments


TRAIN_HELP = "train from a recipe: --config RECIPE, and --FIELD VALUE for any field; --dry-run only checks it"
DISTILL_HELP = "fine-tune a model on its own short, correct completions (DEER+SFT): train --trainer distill"


def main(arguments: list[str] | None = None) -> None:
    """Run the `step-trl` command."""
    parser = argparse.ArgumentParser(prog="step-trl", description="Efficient-reasoning trainers for TRL.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add_demo(commands)
    add_training(commands, "train", TRAIN_HELP)
    add_training(commands, "distill", DISTILL_HELP, trainer="distill")
    for add in (add_eval, add_report, add_serve, add_study):
        add(commands)
    options, further = parser.parse_known_args(arguments)
    parameters = vars(options)
    command, run, debug = (parameters.pop(name) for name in ("command", "run", "debug"))
    if isinstance(debug, str):
        further += ["--debug", debug]
    if command in FORWARDING:
        parameters["further"] = further
    elif further:
        parser.error(f"unrecognized arguments: {' '.join(further)}")
    try:
        status = run(**parameters)
    except KeyboardInterrupt:
        parser.exit(130, f"step-trl {command}: interrupted\n")
    except Exception as error:
        if debug or not is_user_error(error):
            raise
        parser.exit(2, f"step-trl {command}: error: {message_of(error)}\n")
    if isinstance(status, int):
        sys.exit(status)


def add_command(commands: Commands, name: str, run: Callable[..., int | None], help: str) -> argparse.ArgumentParser:
    """Add a command with the options that every command has, and return its parser."""
    parser = commands.add_parser(name, help=help)
    parser.set_defaults(run=run)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


# A command's function is imported only when it runs, because `--help` does not need torch and TRL.


def add_demo(commands: Commands) -> None:
    def run(**options):
        from .demo import run_demo

        run_demo(**options)

    demo = add_command(commands, "demo", run, "train Step-GRPO and SAS on the embedded testbed and compare")
    demo.add_argument(
        "--output-dir",
        type=Path,
        default=Path("runs/demo"),
        help="by default %(default)s; an earlier run there is renamed first",
    )
    demo.add_argument(
        "--problems", type=int, default=64, help="number of problems per evaluation split, by default %(default)s"
    )
    demo.add_argument(
        "--engine",
        choices=("transformers", "vllm"),
        default="transformers",
        help="rollout engine, by default %(default)s",
    )
    demo.add_argument(
        "--max-steps", type=int, default=40, help="number of updates per training, by default %(default)s"
    )


def add_training(commands: Commands, name: str, help: str, trainer: str | None = None) -> None:
    """Add a command whose arguments are the fields of a recipe, which have their own parser."""

    def run(
        further: list[str],
        trainer: str | None,
        model: str | None,
        dry_run: bool,
        help: bool,
        help_all: bool,
        **layout: Any,
    ) -> int | None:
        if help or help_all:
            from .train_help import print_full_help, print_help

            return (print_full_help if help_all else print_help)(name, trainer)
        for field, value in (("trainer", trainer), ("model_name_or_path", model)):
            further = further if value is None else [*further, f"--{field}={value}"]
        if dry_run:
            from .dry_run.plan import print_plan

            return print_plan(further, **layout)
        if given := [f"--{name.replace('_', '-')}" for name, value in layout.items() if value is not None]:
            parser.error(f"{', '.join(given)}: for --dry-run only. A training has the layout of `accelerate launch`.")
        from .train import run_train

        run_train(further)
        return None

    parser = commands.add_parser(name, add_help=False, allow_abbrev=False, help=help)
    parser.set_defaults(run=run)
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("--help-all", "--help_all", action="store_true")
    parser.add_argument("--trainer", default=trainer)
    parser.add_argument("--model")
    parser.add_argument("--dry-run", "--dry_run", action="store_true")
    parser.add_argument("--debug", nargs="?", const=True)  # with a value it is a field of transformers
    parser.add_argument("--accelerate-config", "--accelerate_config", type=Path)
    parser.add_argument("--num-processes", "--num_processes", type=int)
    parser.add_argument("--gpu-memory", "--gpu_memory", type=float)


def add_eval(commands: Commands) -> None:
    def run(**options):
        from .evaluate import run_eval

        run_eval(**options)

    evaluation = add_command(commands, "eval", run, "sample and grade a model on benchmarks")
    evaluation.add_argument("--model", required=True, help="a folder, a name on the Hub, or 'testbed'")
    evaluation.add_argument(
        "--benchmarks", nargs="+", required=True, metavar="NAME", help="such as math500 aime24, or 'testbed'"
    )
    evaluation.add_argument("--report", type=Path, required=True, help="folder for samples, summary and picture")
    evaluation.add_argument(
        "--engine", choices=("transformers", "vllm"), default="transformers",
        help="in process, or on vLLM servers; by default %(default)s",
    )  # fmt: skip
    evaluation.add_argument("--urls", nargs="+", help="URLs of running vLLM servers; by default, one is started")
    evaluation.add_argument("--source", type=Path, help="folder with one folder per benchmark, instead of the Hub")
    evaluation.add_argument("--limit", type=int, help="use only the first problems of each benchmark")
    evaluation.add_argument("--n", type=int, default=1, help="number of samples per problem, by default %(default)s")
    evaluation.add_argument(
        "--seeds", type=int, nargs="+", metavar="N", help="one seed per sample, by default 0, 1, ..."
    )
    evaluation.add_argument("--temperature", type=float, default=0.6, help="by default %(default)s")
    evaluation.add_argument("--top-p", type=float, default=0.95, help="by default %(default)s")
    evaluation.add_argument(
        "--max-tokens", type=int, default=32_768,
        help="maximum number of tokens per completion, by default %(default)s",
    )  # fmt: skip
    evaluation.add_argument(
        "--max-in-flight",
        type=int,
        default=64,
        help="maximum number of concurrent completions, by default %(default)s",
    )
    evaluation.add_argument(
        "--token-targets", type=int, nargs="+", metavar="N",
        help="evaluate each benchmark at each of these lengths, which its prompts ask for (L1)",
    )  # fmt: skip
    evaluation.add_argument("--at-most", action="store_true", help="ask for at most these lengths")
    evaluation.add_argument("--system-prompt", help="for a model that was trained with one (ThinkPrune)")
    evaluation.add_argument(
        "--truncate", type=float, nargs="?", const=0.95, metavar="CONFIDENCE",
        help="end a thought when the confidence of an induced answer exceeds this, without a value 0.95 (DEER)",
    )  # fmt: skip
    evaluation.add_argument(
        "--require-end-of-thinking", action=argparse.BooleanOptionalAction, default=True,
        help="grade a completion without </think> as wrong; switch off for models that do not think",
    )  # fmt: skip
    evaluation.add_argument("--vanilla", type=Path, help="the --report folder that CR and AES are relative to")


def add_report(commands: Commands) -> None:
    def run(**options):
        from .report import run_report

        run_report(**options)

    report = add_command(commands, "report", run, "compare evaluations and trainings in tables and figures")
    report.add_argument(
        "runs", nargs="+", metavar="[NAME=]FOLDER",
        help="folder of `step-trl eval --report`, of a training or of a W&B run, or wandb:entity/project/run",
    )  # fmt: skip
    report.add_argument("--output-dir", type=Path, required=True, help="an earlier report there is replaced")
    report.add_argument("--vanilla", metavar="NAME", help="name of the run that CR and AES are relative to")
    report.add_argument(
        "--accuracy", default="rewards/math_accuracy_reward/mean", metavar="METRIC", help="metric to draw"
    )


def add_serve(commands: Commands) -> None:
    def run(further, **options):
        from .serve import serve

        return serve(**options, extra_arguments=further)

    server = add_command(
        commands, "serve", run, "start a vLLM server for rollouts, or an OpenAI endpoint with early exits before it"
    )
    server.description = (
        "Further arguments go to vLLM. An option about exits adds the endpoint: docs/how-to/endpoint.md."
    )
    server.add_argument("model", help="a folder, a name on the Hub, or 'testbed'")
    server.add_argument("--host", default="127.0.0.1", help="address to listen on, by default for this machine only")
    server.add_argument("--port", type=int, default=8000, help="by default %(default)s")
    server.add_argument("--max-model-len", type=int, help="maximum number of tokens of prompt and completion together")
    server.add_argument(
        "--exit-confidence", type=float, metavar="CONFIDENCE",
        help="end a thought when the confidence of an induced answer exceeds this, such as 0.95 (DEER)",
    )  # fmt: skip
    server.add_argument(
        "--exit-consistency", type=int, metavar="N",
        help="end a thought when N induced answers in a row are equal (Dynasor)",
    )  # fmt: skip
    server.add_argument("--thinking-token-budget", type=int, metavar="N", help="end a thought after N tokens")
    server.add_argument(
        "--urls", nargs="+", help="URLs of running vLLM servers for the endpoint, instead of one of its own"
    )
    server.add_argument("--dry-run", action="store_true", help="only print what would be started")


def add_study(commands: Commands) -> None:
    def run(further, **options):
        raise ValueError("the study has moved out of the package. Run, in a clone: python benchmarks/study")

    add_command(commands, "study", run, "moved: python benchmarks/study")
