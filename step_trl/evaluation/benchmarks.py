r"""
The benchmarks of both papers, from the Hub or from a local folder in the published format, and the testbed's four.

A benchmark is a [`~datasets.Dataset`] with the columns `problem` (id, text), `prompt` (messages), `solution` (text)
and `grader` (`"math"`, `"choice"`, `"text"` or `"block"`). Your own benchmark needs nothing else.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

from .. import testbed
from ..data import FILE_FORMATS, clean_answer, read_gsm8k
from ..testbed import vision


MATH_PROMPT = "{question}\n\nPlease reason step by step, and put your final answer within \\boxed{}."
CHOICE_PROMPT = (
    "{question}\n\nPlease reason step by step, and put the letter of your answer, and nothing else, within \\boxed{}."
)
# These answers are not boxed: answers such as `} ]` would close the box.
TEXT_PROMPT = '{question}\n\nPlease reason step by step, and end with "The answer is", your answer, and nothing else.'
PROMPTS = {"math": MATH_PROMPT, "choice": CHOICE_PROMPT, "text": TEXT_PROMPT}  # by grader
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_DOLLAR = re.compile(r"(?<!\\)\$")
_LSAT_ENDING = re.compile(r"\s*A: Among A through E, the answer is\s*$")


@dataclass(frozen=True)
class Published:
    """
    The published form of a benchmark.

    Attributes:
        source (`str`), split (`str`), configs (`tuple[str, ...]`):
            The name on the Hub, the split, and all configurations of the benchmark, if the data set has any.
        columns (`tuple[str, ...]`), read (`Callable[[dict], tuple[str, Any] | None]`, *optional*):
            The columns that `read` needs to return question and solution of a row, by default two columns that hold
            them. `read` returns `None` for rows that are not in the benchmark.
        grader (`str`):
            A key of [`PROMPTS`].
        id_column (`str`, *optional*):
            The column with the id of the problem. By default, the id is the index of the row.
        size (`int`, *optional*):
            The number of problems to draw from all of them, with a fixed seed.
    """

    source: str
    split: str
    columns: tuple[str, ...]
    read: Callable[[dict], tuple[str, Any] | None] | None = None
    grader: str = "math"
    configs: tuple[str, ...] = ()
    id_column: str | None = None
    size: int | None = None


def with_options(question: str, options: Sequence[str]) -> str:
    lines = [f"({letter}) {str(option).strip()}" for letter, option in zip(LETTERS, options)]
    return "\n".join([question.strip(), *lines])


def read_amc_2023(row: dict) -> tuple[str, Any] | None:
    """Select the 40 problems of 2023 among AI-MO's 83 of 2022 and 2023. Only the URL contains the year."""
    return (row["problem"], row["answer"]) if "2023_AMC" in row["url"] else None


def read_olympiad(row: dict) -> tuple[str, Any]:
    """Join the list of answers, each between dollar signs, to a single answer."""
    return row["question"], ", ".join(_DOLLAR.sub("", str(answer)).strip() for answer in row["final_answer"])


def read_gpqa(row: dict) -> tuple[str, Any]:
    """Shuffle the options in an order that depends only on the problem: the correct one is always published first."""
    right = row["Correct Answer"]
    options = [right, *(row[f"Incorrect Answer {number}"] for number in (1, 2, 3))]
    random.Random(f"0 {row['Record ID']}").shuffle(options)
    return with_options(row["Question"], options), LETTERS[options.index(right)]


def read_lsat(row: dict) -> tuple[str, Any]:
    """Read five options, A to E, usually part of the question. `gold` is a list with the index of the correct one."""
    question = _LSAT_ENDING.sub("", row["query"]).removeprefix("Q: ")
    if "Answer Choices:" not in question:
        question = with_options(question, [option.split(")", 1)[-1] for option in row["choices"]])
    gold = row["gold"]
    return question, LETTERS[gold[0] if isinstance(gold, list) else gold]


def read_mmlu(row: dict) -> tuple[str, Any]:
    return with_options(row["question"], row["choices"]), LETTERS[row["answer"]]


BBH_TASKS = (
    "boolean_expressions", "causal_judgement", "date_understanding", "disambiguation_qa", "dyck_languages",
    "formal_fallacies", "geometric_shapes", "hyperbaton", "logical_deduction_five_objects",
    "logical_deduction_seven_objects", "logical_deduction_three_objects", "movie_recommendation",
    "multistep_arithmetic_two", "navigate", "object_counting", "penguins_in_a_table",
    "reasoning_about_colored_objects", "ruin_names", "salient_translation_error_detection", "snarks",
    "sports_understanding", "temporal_sequences", "tracking_shuffled_objects_five_objects",
    "tracking_shuffled_objects_seven_objects", "tracking_shuffled_objects_three_objects", "web_of_lies",
    "word_sorting",
)  # fmt: skip
_GPQA_COLUMNS = ("Question", "Correct Answer", *(f"Incorrect Answer {n}" for n in (1, 2, 3)), "Record ID")
_AMC = "AI-MO/aimo-validation-amc"

PUBLISHED: dict[str, Published] = {
    "gsm8k": Published("openai/gsm8k", "test", ("question", "answer"), read_gsm8k, configs=("main",)),
    "math500": Published("HuggingFaceH4/MATH-500", "test", ("problem", "answer"), id_column="unique_id"),
    "amc23": Published(_AMC, "train", ("problem", "answer", "url"), read_amc_2023),
    "amc": Published(_AMC, "train", ("problem", "answer")),
    "aime24": Published("HuggingFaceH4/aime_2024", "train", ("problem", "answer")),
    "aime25": Published("math-ai/aime25", "test", ("problem", "answer")),
    "gpqa_diamond": Published(
        "Idavidrein/gpqa", "train", _GPQA_COLUMNS, read_gpqa, "choice", ("gpqa_diamond",), "Record ID"
    ),
    "olympiadbench": Published(
        "Hothan/OlympiadBench", "train", ("question", "final_answer"), read_olympiad, configs=("OE_TO_maths_en_COMP",)
    ),
    "lsat_ar": Published("dmayhem93/agieval-lsat-ar", "test", ("query", "choices", "gold"), read_lsat, "choice"),
    "mmlu": Published("cais/mmlu", "test", ("question", "choices", "answer"), read_mmlu, "choice", ("all",), size=500),
    "bbh": Published("lukaemon/bbh", "test", ("input", "target"), grader="text", configs=BBH_TASKS),
}
_TESTBED, _VISION = "testbed-", "vision-testbed-"
BENCHMARKS = (
    *PUBLISHED,
    *(_TESTBED + split for split in testbed.EVALUATION_SPLITS),
    *(_VISION + split for split in vision.EVALUATION_SPLITS),
)


def load_benchmark(name: str, source: str | Path | None = None) -> datasets.Dataset:
    """
    Load a benchmark.

    Args:
        name (`str`):
            The name, one of [`BENCHMARKS`].
        source (`str` or `Path`, *optional*):
            A local folder to use instead of the Hub, with files in the published format, such as a clone of the Hub's
            repository. For a benchmark with several configurations, it contains a folder or a file for each, with its
            name.

    Returns:
        [`~datasets.Dataset`]: The rows, with `problem`, `prompt`, `solution` and `grader`.
    """
    if name not in BENCHMARKS:
        raise ValueError(f"name: {name!r} is not a known benchmark. Choose from {', '.join(BENCHMARKS)}.")
    for prefix, module, grader in ((_TESTBED, testbed, "math"), (_VISION, vision, "block")):
        if name.startswith(prefix):
            rows = module.load_dataset(name.removeprefix(prefix))
            rows = rows.add_column("problem", [str(place) for place in range(len(rows))])
            return rows.add_column("grader", [grader] * len(rows))
    published = PUBLISHED[name]
    several = len(published.configs) > 1
    rows = [
        row
        for config in published.configs or (None,)
        for row in _read(name, published, config if several else None, _open(name, published, config, source))
    ]
    if not rows:
        raise ValueError(f"source: {source or published.source} has no problem of {name}. Check its version.")
    if published.size is not None and len(rows) > published.size:
        rows = random.Random(0).sample(rows, published.size)
    return datasets.Dataset.from_list(rows)


def _open(name: str, published: Published, config: str | None, source: str | Path | None) -> datasets.Dataset:
    if source is None:
        try:
            part = datasets.load_dataset(published.source, config, split=published.split)
        except OSError as error:  # no connection, or no access to a gated data set
            reason = str(error).splitlines()[0].rstrip(".")
            raise ValueError(
                f"{name}: {published.source} cannot be loaded: {reason}. Set `source` (`--source`) to a folder "
                "with a copy of it."
            ) from error
    else:
        part = _open_folder(Path(source), published.split, config)
    if missing := [column for column in published.columns if column not in part.column_names]:
        raise ValueError(
            f"{name}: {source or published.source} lacks the column {', '.join(missing)}; it has "
            f"{', '.join(part.column_names)}. Set `source` to data in the format of {published.source} on the Hub."
        )
    return part


def _open_folder(folder: Path, split: str, config: str | None) -> datasets.Dataset:
    if not folder.is_dir():
        raise FileNotFoundError(f"source: {folder} is not a folder. Set a folder with files in the published format.")
    if config is not None:
        for ending, kind in FILE_FORMATS.items():
            if (file := folder / f"{config}{ending}").is_file():
                return datasets.load_dataset(kind, data_files=str(file), split="train")
        if (folder / config).is_dir():
            folder = folder / config
    splits = datasets.load_dataset(str(folder))
    if split in splits:
        return splits[split]
    if len(splits) == 1:
        return next(iter(splits.values()))
    raise ValueError(f"source: {folder} has the splits {', '.join(splits)}, but not {split}. Rename its files.")


def _read(name: str, published: Published, task: str | None, part: datasets.Dataset) -> Iterator[dict]:
    for place, row in enumerate(part):
        read = published.read(row) if published.read else tuple(row[column] for column in published.columns)
        if read is None:
            continue
        question, solution = read[0], clean_answer(read[1])
        if not question or not solution:
            raise ValueError(f"{name}: row {place} has no question or no answer. Fix or drop it.")
        own_id = row.get(published.id_column) if published.id_column else None
        problem = str(place if own_id is None else own_id)
        text = PROMPTS[published.grader].replace("{question}", question.strip())
        yield {
            "problem": problem if task is None else f"{task}/{problem}",
            "prompt": [{"role": "user", "content": text}],
            "solution": solution,
            "grader": published.grader,
        }
