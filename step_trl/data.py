"""Data sets of math problems, as published, to rows with `prompt` (messages) and `solution` (text)."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import datasets
from transformers import PreTrainedTokenizerBase


logger = logging.getLogger(__name__)

FILE_FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
BATCH_SIZE = 10_000


@dataclass(frozen=True)
class Layout:
    """Columns that a published data set has, and how one of its rows gives the problem and the answer."""

    example: str
    columns: tuple[str, ...]
    read: Callable[[dict], tuple[Any, Any]]


def read_prompt_solution(row: dict) -> tuple[Any, Any]:
    return row["prompt"], row["solution"]


def read_dapo(row: dict) -> tuple[Any, Any]:
    return row["prompt"], (row["reward_model"] or {}).get("ground_truth")


def read_problem_answer(row: dict) -> tuple[Any, Any]:
    return row["problem"], row["answer"]


def read_gsm8k(row: dict) -> tuple[Any, Any]:
    """The answer is a worked solution that ends in `#### 1,234`; without this mark it is taken as a whole."""
    _, mark, number = str(row["answer"] or "").rpartition("####")
    return row["question"], number.replace(",", "") if mark else row["answer"]


LAYOUTS = (
    Layout("DAPO-Math-17k-Processed, and this package's own rows", ("prompt", "solution"), read_prompt_solution),
    Layout("DAPO-Math-17k", ("prompt", "reward_model"), read_dapo),
    Layout("DeepScaleR, MATH-500, AIME", ("problem", "answer"), read_problem_answer),
    Layout("GSM8K", ("question", "answer"), read_gsm8k),
)


def find_layout(columns: Sequence[str]) -> Layout:
    """The first layout whose columns are all there; an error that lists both sides if there is none."""
    for layout in LAYOUTS:
        if set(layout.columns) <= set(columns):
            return layout
    known = "\n".join(f"  {' + '.join(layout.columns)}  ({layout.example})" for layout in LAYOUTS)
    raise ValueError(
        f"Unknown column layout: found {', '.join(columns)}. Rename columns to match one of these:\n{known}"
    )


def open_source(source: str | Path | Sequence[str | Path], split: str, name: str | None = None) -> datasets.Dataset:
    """Load a split as it is published: local file(s), a local folder, or a data set on the hub."""
    if isinstance(source, str | Path):
        if Path(source).suffix not in FILE_FORMATS or Path(source).is_dir():
            return datasets.load_dataset(str(source), name, split=split)
        source = [source]
    files = [Path(file) for file in source]
    formats = {FILE_FORMATS.get(file.suffix) for file in files}
    if None in formats or len(formats) != 1:
        raise ValueError(f"Files must share one of the endings {', '.join(FILE_FORMATS)}, got {source}.")
    missing = [str(file) for file in files if not file.is_file()]
    if missing:
        raise FileNotFoundError(f"No such file: {', '.join(missing)}.")
    return datasets.load_dataset(formats.pop(), data_files={split: [str(file) for file in files]}, split=split)


def clean_answer(answer: Any) -> str:
    """An answer as text; empty if there is none."""
    if answer is None or (isinstance(answer, float) and math.isnan(answer)):  # NaN: a missing number in a CSV
        return ""
    if isinstance(answer, float) and answer.is_integer():  # integers of a column with missing values
        answer = int(answer)
    return str(answer).strip()


def build_prompt(problem: str | list[dict], template: str | None, system_prompt: str | None) -> list[dict]:
    """Messages for a problem; published messages stay as they are, but for what is asked for here."""
    if isinstance(problem, str):
        messages = [{"role": "user", "content": problem}]
    else:
        messages = [{"role": message["role"], "content": message["content"]} for message in problem]
    if template is not None:
        last = messages[-1]
        messages[-1] = {**last, "content": template.replace("{problem}", last["content"])}
    if system_prompt is not None:
        others = [message for message in messages if message["role"] != "system"]
        messages = [{"role": "system", "content": system_prompt}, *others]
    return messages


def rewrite_prompts(dataset: datasets.Dataset, template: str | None, system_prompt: str | None) -> datasets.Dataset:
    """Rows with another user or system message, where one is asked for."""
    if template is None and system_prompt is None:
        return dataset
    return dataset.map(lambda row: {"prompt": build_prompt(row["prompt"], template, system_prompt)})


def read_rows(dataset: datasets.Dataset, layout: Layout) -> Iterator[tuple[Any, str]]:
    """Problem and answer of each row, from the needed columns only, a batch in memory at a time."""
    table = dataset.select_columns(list(layout.columns)).with_format("arrow")
    for batch in table.iter(batch_size=BATCH_SIZE):
        for row in batch.to_pylist():
            problem, answer = layout.read(row)
            yield problem, clean_answer(answer)


def problem_text(problem: str | list[dict] | None) -> str:
    """What makes two rows the same problem."""
    if isinstance(problem, str):
        return problem.strip()
    return "\n".join(message["content"].strip() for message in problem or [])


def load_problems(
    source: str | Path | Sequence[str | Path],
    split: str = "train",
    *,
    name: str | None = None,
    prompt_template: str | None = None,
    system_prompt: str | None = None,
) -> datasets.Dataset:
    r"""
    Load math problems as rows with `prompt` (messages) and `solution` (text).

    Each problem is kept once, with its first solution; rows without a problem or an answer are dropped. A log line
    counts both.

    Args:
        source (`str`, `Path` or a sequence of these):
            Name on the hub, local folder as `datasets.load_dataset` reads it, or local JSONL, Parquet or CSV file(s),
            in one of the column layouts of `LAYOUTS`.
        split (`str`, *optional*, defaults to `"train"`):
            Split to load. All rows of local files are of this split, whatever its name.
        name (`str`, *optional*):
            Configuration of the data set: `"main"` for openai/gsm8k, `"en"` for open-r1/DAPO-Math-17k-Processed.
        prompt_template (`str`, *optional*):
            Text of the user message, with `{problem}` where the published text goes (other braces need no escape).
        system_prompt (`str`, *optional*):
            Text of a system message, in place of a published one.

    Example:
    ```python
    >>> load_problems("openai/gsm8k", name="main", prompt_template=r"{problem} Put the answer in \boxed{}.")
    ```
    """
    if prompt_template is not None and "{problem}" not in prompt_template:
        raise ValueError(f"`prompt_template` must contain '{{problem}}', got {prompt_template!r}.")
    dataset = open_source(source, split, name)
    solutions: dict[str, str] = {}
    rows = []
    incomplete, conflicts = 0, 0
    for problem, solution in read_rows(dataset, find_layout(dataset.column_names)):
        key = problem_text(problem)
        if not key or not solution:
            incomplete += 1
        elif key not in solutions:
            solutions[key] = solution
            rows.append({"prompt": build_prompt(problem, prompt_template, system_prompt), "solution": solution})
        elif solutions[key] != solution:
            conflicts += 1
    logger.log(
        logging.WARNING if incomplete else logging.INFO,
        f"{source} ({split}): {len(rows)} problems of {len(dataset)} rows; {incomplete} rows without a problem or an "
        f"answer dropped, {len(dataset) - len(rows) - incomplete} duplicates.",
    )
    if conflicts:
        logger.warning(f"{source} ({split}): {conflicts} duplicates differ in their solution; the first one is kept.")
    if not rows:
        raise ValueError(f"{source} ({split}) has no row with both a problem and an answer.")
    return datasets.Dataset.from_list(rows)


def validate_rows(
    dataset: datasets.Dataset | datasets.IterableDataset, needs_solution: bool, name: str = "dataset"
) -> None:
    """
    Raise an error that says what to do if a trainer cannot use the rows of `dataset`.

    Args:
        dataset (`Dataset` or `IterableDataset`):
            Rows for a trainer.
        needs_solution (`bool`):
            Whether the reward compares with the row's `solution`, as the default one does.
        name (`str`, *optional*, defaults to `"dataset"`):
            What the error calls it.
    """
    first = next(iter(dataset), None)
    if first is None:
        raise ValueError(f"{name}: it has no rows. Give at least one.")
    found = f"columns found: {', '.join(first)}."
    remedy = "Load it by `step_trl.data.load_problems`, or rename a column."
    if "prompt" not in first:
        raise ValueError(f"{name}: it needs a column 'prompt' (messages, or text); {found} {remedy}")
    if needs_solution and "solution" not in first:
        raise ValueError(
            f"{name}: the default reward needs a column 'solution' (the right answer as text); {found} {remedy} "
            "Or pass `reward_funcs`."
        )
    if needs_solution and not isinstance(first["solution"], str):
        raise ValueError(
            f"{name}: the column 'solution' must be text, got {type(first['solution']).__name__}. Convert it: "
            "`dataset.map(lambda row: {'solution': str(row['solution'])})`."
        )


def validate_prompt_lengths(
    dataset: datasets.Dataset | datasets.IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    context: int,
    max_completion_length: int,
    name: str = "dataset",
) -> None:
    """
    Raise an error if a prompt leaves no room for its completion in the model's context.

    A streamed dataset is not read ahead. Only prompts that are long enough in bytes are tokenized: no token of a
    prompt is shorter than a byte.

    Args:
        dataset (`Dataset` or `IterableDataset`):
            Rows with `prompt`.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The policy's tokenizer.
        context (`int`), max_completion_length (`int`):
            Tokens that the model takes at all, and those of the longest completion.
        name (`str`, *optional*, defaults to `"dataset"`):
            What the error calls it.
    """
    if isinstance(dataset, datasets.IterableDataset):
        return
    room = context - max_completion_length
    if room < 1:
        raise ValueError(
            f"max_completion_length: {max_completion_length} leaves no room for a prompt in the model's context of "
            f"{context} tokens. Set a smaller one."
        )
    for index, prompt in enumerate(dataset["prompt"]):
        if len(_render(prompt, tokenizer).encode()) > room:
            length = prompt_length(prompt, tokenizer)
            if length > room:
                raise ValueError(
                    f"{name}: the prompt of row {index} has {length} tokens; with max_completion_length="
                    f"{max_completion_length} it does not fit the model's context of {context}. Drop such rows, or "
                    "set a smaller max_completion_length."
                )


def prompt_length(prompt: str | list[dict], tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens of a prompt, rendered as trainers do."""
    return len(tokenizer(_render(prompt, tokenizer), add_special_tokens=isinstance(prompt, str))["input_ids"])


def _render(prompt: str | list[dict], tokenizer: PreTrainedTokenizerBase) -> str:
    if isinstance(prompt, str):
        return prompt
    return cast("str", tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True))
