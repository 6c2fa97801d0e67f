"""The `step-trl` command."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]


def main(arguments: list[str] | None = None) -> None:
    """Entry point of `step-trl`."""
    parser = argparse.ArgumentParser(prog="step-trl", description="Efficient-reasoning trainers for TRL.")
    commands = parser.add_subparsers(dest="command", required=True)
    for add in (add_demo, add_train, add_eval, add_report, add_distill, add_study, add_serve):
        add(commands)
    options, further = parser.parse_known_args(arguments)
    parameters = vars(options)
    command, run = parameters.pop("command"), parameters.pop("run")
    if command in ("train", "serve"):
        parameters["further"] = further
    elif further:
        parser.error(f"unrecognized arguments: {' '.join(further)}")
    status = run(**parameters)
    if isinstance(status, int):
        sys.exit(status)


# A command's function is imported when it runs: torch and TRL, which `--help` does without.


def add_demo(commands: Commands) -> None:
    def run(**options):
        from .demo import run_demo

        run_demo(**options)

    demo = commands.add_parser("demo", help="train Step-GRPO and SAS on the embedded testbed and compare")
    demo.set_defaults(run=run)
    demo.add_argument("--output-dir", type=Path, default=Path("runs/demo"), help="an earlier run there is set aside")
    demo.add_argument("--problems", type=int, default=64, help="problems per evaluation split")
    demo.add_argument("--engine", choices=("transformers", "vllm"), default="transformers", help="of the rollouts")
    demo.add_argument("--max-steps", type=int, default=40, help="updates of each training")


def add_train(commands: Commands) -> None:
    def run(further, dry_run):
        if dry_run:
            from .plan import print_plan

            return print_plan(further)
        from .train import run_train

        run_train(further)

    train = commands.add_parser(
        "train",
        add_help=False,  # of the fields, by their own parser
        allow_abbrev=False,
        help="train as a recipe says: --config RECIPE, and --FIELD VALUE for any field; --dry-run only checks",
    )
    train.set_defaults(run=run)
    train.add_argument("--dry-run", "--dry_run", action="store_true")


def add_eval(commands: Commands) -> None:
    def run(**options):
        from .eval import run_eval

        run_eval(**options)

    evaluation = commands.add_parser("eval", help="sample and grade a model on benchmarks")
    evaluation.set_defaults(run=run)
    evaluation.add_argument("--model", required=True, help="folder or name of the model")
    evaluation.add_argument("--benchmarks", nargs="+", required=True, metavar="NAME", help="such as math500 aime24")
    evaluation.add_argument("--report", type=Path, required=True, help="folder for samples, summary and picture")
    evaluation.add_argument("--engine", choices=("transformers", "vllm"), default="transformers")
    evaluation.add_argument("--urls", nargs="+", help="of vLLM servers of the model; without, one is started")
    evaluation.add_argument("--source", type=Path, help="folder with one folder per benchmark, in place of the hub")
    evaluation.add_argument("--limit", type=int, help="first problems of each benchmark only")
    evaluation.add_argument("--n", type=int, default=1, help="samples per problem")
    evaluation.add_argument("--seeds", type=int, nargs="+", metavar="N", help="one per sample, by default 0, 1, ...")
    evaluation.add_argument("--temperature", type=float, default=0.6)
    evaluation.add_argument("--top-p", type=float, default=0.95)
    evaluation.add_argument("--max-tokens", type=int, default=32_768, help="of a completion")
    evaluation.add_argument("--max-in-flight", type=int, default=64, help="completions under way at once")
    evaluation.add_argument(
        "--token-targets", type=int, nargs="+", metavar="N",
        help="evaluate each benchmark at each of these lengths, which its prompts ask for (L1)",
    )  # fmt: skip
    evaluation.add_argument("--at-most", action="store_true", help="ask for at most these lengths")
    evaluation.add_argument("--system-prompt", help="for a model that was trained with one (ThinkPrune)")
    evaluation.add_argument(
        "--truncate", type=float, nargs="?", const=0.95, metavar="CONFIDENCE",
        help="leave a thought where an induced answer is more confident than this (DEER)",
    )  # fmt: skip
    evaluation.add_argument(
        "--require-end-of-thinking", action=argparse.BooleanOptionalAction, default=True,
        help="a completion without </think> is wrong; not so for models that do not think",
    )  # fmt: skip
    evaluation.add_argument("--vanilla", type=Path, help="the --report that CR and AES are relative to")


def add_report(commands: Commands) -> None:
    def run(**options):
        from .compare import run_report

        run_report(**options)

    report = commands.add_parser("report", help="tables and figures of evaluations and trainings, side by side")
    report.set_defaults(run=run)
    report.add_argument(
        "runs", nargs="+", metavar="[NAME=]FOLDER",
        help="of `step-trl eval --report`, of a training, of a W&B run, or wandb:entity/project/run",
    )  # fmt: skip
    report.add_argument("--output-dir", type=Path, required=True, help="an earlier report there is replaced")
    report.add_argument("--vanilla", metavar="NAME", help="of the run that CR and AES are relative to")
    report.add_argument(
        "--accuracy", default="rewards/math_accuracy_reward/mean", metavar="METRIC", help="of trainings, to be drawn"
    )


def add_distill(commands: Commands) -> None:
    def run(**options):
        from .distill import distill

        distill(**options)

    distillation = commands.add_parser(
        "distill", help="learn from one's own truncated completions that are right and short (DEER+SFT)"
    )
    distillation.set_defaults(run=run)
    distillation.add_argument("--model", required=True, help="folder or name of the model, or 'testbed'")
    distillation.add_argument("--dataset", required=True, help="name on the hub, folder, file, or 'testbed'")
    distillation.add_argument("--dataset-name", help="configuration of the data set")
    distillation.add_argument("--dataset-split", default="train")
    distillation.add_argument("--output-dir", type=Path, required=True, help="for samples, kept rows and the model")
    distillation.add_argument("--limit", type=int, help="first problems only")
    distillation.add_argument("--n", type=int, default=4, help="samples per problem")
    distillation.add_argument("--per-problem", type=int, default=1, help="most completions that are kept of a problem")
    distillation.add_argument("--confidence", type=float, default=0.95, help="above which a thought is left")
    distillation.add_argument("--temperature", type=float, default=1.0)
    distillation.add_argument("--max-tokens", type=int, default=16_384, help="of a completion")
    distillation.add_argument("--engine", choices=("transformers", "vllm"), default="transformers")
    distillation.add_argument("--urls", nargs="+", help="of vLLM servers of the model; without, one is started")
    distillation.add_argument("--seed", type=int, default=0)
    distillation.add_argument("--learning-rate", type=float, default=1e-5)
    distillation.add_argument("--num-train-epochs", type=float, default=3)
    distillation.add_argument("--per-device-train-batch-size", type=int, default=8)


def add_study(commands: Commands) -> None:
    def run(**options):
        from .study import study

        study(**options)

    study_parser = commands.add_parser(
        "study", help="run every comparison of both papers on the testbed, or go on with it"
    )
    study_parser.set_defaults(run=run)
    study_parser.add_argument("--output-dir", type=Path, default=Path("runs/study"), help="of models and samples")
    study_parser.add_argument(
        "--page", type=Path, default=Path("benchmarks/study"), help="of tables, figures and claims"
    )
    study_parser.add_argument("--arms", nargs="*", default=[], metavar="NAME", help="by default all")
    study_parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    study_parser.add_argument("--max-steps", type=int, default=40, help="updates of an arm")
    study_parser.add_argument("--page-only", action="store_true", help="write the page of what is done")


def add_serve(commands: Commands) -> None:
    def run(further, **options):
        from .serve import serve

        return serve(**options, extra_arguments=further)

    server = commands.add_parser("serve", help="start a vLLM server for rollouts; further arguments go to vLLM")
    server.set_defaults(run=run)
    server.add_argument("model", help="folder or name of the model")
    server.add_argument("--host", default="127.0.0.1", help="address to listen on, by default for this machine only")
    server.add_argument("--port", type=int, default=8000)
    server.add_argument("--max-model-len", type=int, help="tokens of prompt and completion together")
