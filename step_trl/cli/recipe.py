"""Recipes: YAML files of fields, any of which the command line can set."""

from __future__ import annotations

import difflib
import re
from argparse import ArgumentError, Namespace
from collections.abc import Container, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

import yaml
from trl import DPOConfig, GRPOConfig, ModelConfig, SFTConfig, TrlParser

from ..trainers import METHODS
from .arguments import DistillArguments, DPOArguments, FineTuningConfig, PreferenceConfig, SFTArguments, TrainArguments


DISTILL, SFT, DPO = "distill", "sft", "dpo"
# Values of `trainer` that are no methods, with the classes of their fields besides those of ModelConfig.
OTHER_TRAINERS: dict[str, tuple[Any, Any]] = {
    DISTILL: (DistillArguments, FineTuningConfig),
    SFT: (SFTArguments, FineTuningConfig),
    DPO: (DPOArguments, PreferenceConfig),
}
# What the other trainers' fields are called for `distill`.
DISTILL_FIELDS = {
    "model": "model_name_or_path",
    "num_generations": "n",
    "confidence_threshold": "confidence",
    "max_completion_length": "max_tokens",
    "use_vllm": "engine",
    "vllm_server_base_url": "urls",
}
# Fields of earlier versions, mostly of TRL and transformers, that older recipes still have, and what to set instead.
OBSOLETE_FIELDS = {
    "max_prompt_length": "TRL no longer cuts prompts. Drop the field, and long prompts from the data.",
    "vllm_device": "Set vllm_mode, and set CUDA_VISIBLE_DEVICES for the server.",
    "vllm_dtype": "Give --dtype to the server.",
    "vllm_max_model_len": "Set vllm_max_model_length.",
    "vllm_guided_decoding_regex": "Set vllm_structured_outputs_regex.",
    "use_liger_loss": "Set use_liger_kernel.",
    "wandb_log_unique_prompts": "Set log_unique_prompts.",
    "torch_dtype": "Set dtype.",
    "dataset_config": "Set dataset_name: here it is the data set's configuration, and dataset is its name.",
    "dataset_train_split": "Set dataset_split.",
    "warmup_ratio": "Set warmup_steps, where a number below 1 is a share of all updates.",
    "evaluation_strategy": "Set eval_strategy.",
    "no_cuda": "Set use_cpu.",
    "per_gpu_train_batch_size": "Set per_device_train_batch_size.",
    "overwrite_output_dir": "Drop it: an earlier run is never overwritten.",
    "save_safetensors": "Drop it: weights are always saved as safetensors.",
    "adafactor": "Set optim to adafactor.",
    "sort_by_length": "Set reduce_padding.",
    "serial_group": "Set trainer to s_grpo.",
}


def recipe_layers(path: Path, derived: Sequence[Path] = ()) -> list[tuple[Path, dict[str, Any]]]:
    """
    Return the files of a recipe and the fields that come from each: its own, then those of its `base`, and so on.

    Each field is listed once. `derived` are the files that have `path` as their base, for the error about a circle.
    """
    if path.resolve() in map(Path.resolve, derived):
        raise ValueError(f"base: {' -> '.join(map(str, [*derived, path]))} is a circle. Drop `base` from one of them.")
    if not path.is_file():
        raise FileNotFoundError(
            f"base: {derived[-1]} names {path}, which does not exist. Give a path relative to {derived[-1].name}."
            if derived
            else f"config: there is no file {path}. Give a recipe, such as recipes/step_grpo/paper.yaml."
        )
    own = _read_mapping(path)
    base = own.pop("base", None)
    if base is None:
        return [(path, own)]
    if not isinstance(base, str):
        raise ValueError(f"base: {base!r} of {path} is not a path. Give one file, relative to {path.name}.")
    inherited = recipe_layers(path.parent / base, [*derived, path])
    left = _fields_of_another_trainer(inherited, own.get("trainer"))
    return [(path, own)] + [
        (file, {name: value for name, value in fields.items() if name not in own.keys() | left})
        for file, fields in inherited
    ]


def _fields_of_another_trainer(layers: list[tuple[Path, dict[str, Any]]], trainer: str | None) -> set[str]:
    """Return the fields that a recipe does not take from its base, as only the base's trainer has them."""
    before = next((fields["trainer"] for _, fields in layers if "trainer" in fields), None)
    known = (*METHODS, *OTHER_TRAINERS)
    if trainer == before or trainer not in known or before not in known:
        return set()
    return {*_known(before)} - {*_known(trainer)}


def _taken(field: str, arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """Return the value of a field on the command line, and the other arguments."""
    parser = RecipeParser(add_help=False, allow_abbrev=False)
    parser.add_argument(f"--{field}")
    options, rest = parser.parse_known_args(list(arguments))
    return getattr(options, field), rest


def recipe_path(arguments: Sequence[str]) -> Path | None:
    """Return the file that `--config` names."""
    path, _ = _taken("config", arguments)
    return None if path is None else Path(path)


def load_recipe(path: Path) -> dict[str, Any]:
    """Return the fields of a recipe: its own, and those that it takes from its `base`."""
    return {name: value for _, fields in reversed(recipe_layers(path)) for name, value in fields.items()}


def _read_mapping(path: Path) -> dict[str, Any]:
    try:
        recipe = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(
            f"config: {path} is not a YAML file of plain values: {error}\nWrite text, numbers, lists and mappings; "
            "tags that make Python objects are refused."
        ) from None
    if not isinstance(recipe, dict):
        raise ValueError(f"config: {path} is not a mapping of fields to values.")
    return recipe


def read_recipe(arguments: Sequence[str]) -> tuple[dict[str, Any], list[dict[str, Any]], list[str]]:
    """
    Read the file that `--config` names.

    Returns its fields; the fields of each of its `stages`, which are trained one after another, or one empty mapping;
    and the other arguments of the command line.
    """
    path, rest = _taken("config", arguments)
    recipe = {} if path is None else load_recipe(Path(path))
    stages = recipe.pop("stages", [{}])
    if not isinstance(stages, list) or not stages or not all(isinstance(stage, dict) for stage in stages):
        raise ValueError(f"stages: {stages!r} is not a list of mappings. Give the fields that differ, stage by stage.")
    return recipe, stages, rest


class RecipeParser(TrlParser):
    """A [`~trl.TrlParser`] that reports an error in one line, without the usage of 300 options."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def parse(recipe: Mapping[str, Any], arguments: Sequence[str]) -> tuple[Any, ...]:
    """
    Parse the fields of a recipe and the `--FIELD VALUE` pairs of the command line, which take precedence.

    Returns:
        `tuple`: [`TrainArguments`], [`~trl.ModelConfig`] and the trainer's configuration. The first and the last are
        those of [`OTHER_TRAINERS`] if the trainer is one of them.

    Raises:
        `ValueError`: If the trainer or a field is not known. The message suggests known fields.
    """
    name = trainer_name(recipe, arguments)
    if unknown := unknown_fields(name, recipe, arguments):
        raise ValueError("\n".join(unknown.values()))
    return make_parser(name, recipe).parse_args_into_dataclasses(list(arguments))


def trainer_name(recipe: Mapping[str, Any], arguments: Sequence[str]) -> str:
    """Return the trainer of a recipe, one of `METHODS` and `OTHER_TRAINERS`, and raise an error for any other."""
    name = named_trainer(recipe, arguments)
    if name not in (known := [*METHODS, *OTHER_TRAINERS]):
        raise ValueError(f"trainer: {name!r} is not known. Set one of {', '.join(known)}.")
    return name


def named_trainer(recipe: Mapping[str, Any], arguments: Sequence[str]) -> str | None:
    """Return the trainer that a recipe or the command line names, known or not."""
    return _taken("trainer", arguments)[0] or recipe.get("trainer")


def make_parser(trainer: str, recipe: Mapping[str, Any], **options: Any) -> RecipeParser:
    """Return the parser of a trainer's fields, with those of a recipe as defaults; `options` are argparse's."""
    parser = RecipeParser(_kinds(trainer), **options)
    parser.set_defaults_with_config(**recipe)
    return parser


def unknown_fields(trainer: str, recipe: Mapping[str, Any], arguments: Sequence[str]) -> dict[str, str]:
    """Return the fields that the trainer does not have, each with a message that says what to set instead."""
    known = _known(trainer)
    keys = [*recipe, *(key for text in arguments if (key := field_of(text)) is not None)]
    return {
        key: f"{key}: not an option of trainer {trainer!r}. {_remedy(trainer, key)}"
        for key in keys
        if key not in known and key.removeprefix("no_") not in known
    }


def _remedy(trainer: str, key: str) -> str:
    known = _known(trainer)
    remedy = OBSOLETE_FIELDS.get(key)
    if remedy is not None and set(re.findall(r"Set (\w+)", remedy)) <= set(known):
        return remedy
    if trainer == DISTILL and key in DISTILL_FIELDS:
        return f"Set {DISTILL_FIELDS[key]}."
    others = [name for name in (*METHODS, *OTHER_TRAINERS) if key in _known(name)]
    if others:
        return f"Drop it: it is one of {', '.join(map(repr, others))}."
    close = difflib.get_close_matches(key, known, n=1)
    return f"Did you mean {close[0]}?" if close else "Drop it."


def parse_values(trainer: str, recipe: Mapping[str, Any], arguments: Sequence[str]) -> tuple[Namespace, list[str]]:
    """Return the values of all fields as parsed, and a message for each wrong field. Wrong fields are left out."""
    unknown = unknown_fields(trainer, recipe, arguments)
    wrong, dropped = list(unknown.values()), set(unknown)
    while True:
        kept = {"dataset": None} | {key: value for key, value in recipe.items() if key not in dropped}
        parser = make_parser(trainer, kept | {"trainer": trainer}, exit_on_error=False)
        try:
            values, rest = parser.parse_known_args(_without(arguments, dropped))
        except ArgumentError as error:
            if error.argument_name is None:
                raise
            wrong.append(str(error))
            dropped.add(str(field_of(error.argument_name.partition("/")[0])))
            continue
        if values.dataset is None and trainer != DPO:
            wrong.append("dataset: not set. Set a name on the Hub, a folder, a file, or 'testbed'.")
        return values, [*wrong, *(f"{text!r}: does not follow a field. Write --FIELD VALUE." for text in rest)]


def _without(arguments: Sequence[str], dropped: Container[str]) -> list[str]:
    kept, keep = [], True
    for text in arguments:
        name = field_of(text)
        keep = keep if name is None else name not in dropped
        if keep:
            kept.append(text)
    return kept


def field_of(argument: str) -> str | None:
    """Return the field that an argument of the command line sets, or `None` if the argument is a value."""
    return argument[2:].partition("=")[0].replace("-", "_") if argument.startswith("--") else None


def set_model_init_kwargs(config: GRPOConfig | SFTConfig | DPOConfig, model: ModelConfig) -> None:
    """Copy the loading options of [`~trl.ModelConfig`] to a trainer's configuration, whose own take precedence."""
    given = config.model_init_kwargs if isinstance(config.model_init_kwargs, dict) else {}
    config.model_init_kwargs = {
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
    } | given


def _known(trainer: str) -> list[str]:
    return [one.name for kind in _kinds(trainer) for one in fields(kind) if one.init]


def _kinds(trainer: str) -> list[Any]:
    arguments, config = OTHER_TRAINERS.get(trainer) or (TrainArguments, METHODS[trainer][1])
    return [arguments, ModelConfig, config]
