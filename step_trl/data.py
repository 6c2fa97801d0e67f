"""Load published data sets of math problems as rows with `prompt` (messages) and `solution` (text)."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple, cast

import datasets
from transformers import PreTrainedTokenizerBase

from .text import completion_text
from .thoughts import continue_prompt, drop_thought


logger = logging.getLogger(__name__)

FILE_FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
BATCH_SIZE = 10_000
REVERSE_THINKING = (
    "Here is a question and its answer.\n\nQuestion: {question}\n\nAnswer: {answer}\n\nWrite the few steps of "
    "reasoning that lead from the question to the answer. Do not state the answer itself."
)


class Layout(NamedTuple):
    """The columns of a published data set, and how to read problem and answer of a row if they are not the columns."""

    example: str
    columns: tuple[str, str]
    read: Callable[[dict], tuple[Any, Any]] | None = None


def read_dapo(row: dict) -> tuple[Any, Any]:
    return row["prompt"], (row["reward_model"] or {}).get("ground_truth")


def read_gsm8k(row: dict) -> tuple[Any, Any]:
    """Return the question and the number after `####`, where a worked solution has its answer, or the whole answer."""
    _, mark, number = str(row["answer"] or "").rpartition("####")
    return row["question"], number.replace(",", "") if mark else row["answer"]


LAYOUTS = (
    Layout("DAPO-Math-17k-Processed, and this package's own rows", ("prompt", "solution")),
    Layout("DAPO-Math-17k", ("prompt", "reward_model"), read_dapo),
    Layout("DeepScaleR, MATH-500, AIME", ("problem", "answer")),
    Layout("GSM8K", ("question", "answer"), read_gsm8k),
)


def find_layout(columns: Sequence[str]) -> Layout:
    """Return the first layout whose columns all exist, or raise an error that lists the columns and all layouts."""
    for layout in LAYOUTS:
        if set(layout.columns) <= set(columns):
            return layout
    known = "\n".join(f"  {' + '.join(layout.columns)}  ({layout.example})" for layout in LAYOUTS)
    raise ValueError(
        f"Unknown column layout: found {', '.join(columns)}. Rename columns to match one of these:\n{known}"
    )


def open_source(source: str | Path | Sequence[str | Path], split: str, name: str | None = None) -> datasets.Dataset:
    """Load a split as published from local files, a local folder, or the Hub."""
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
    """Return an answer as text, empty if there is none."""
    if answer is None or (isinstance(answer, float) and math.isnan(answer)):  # NaN: a missing number in a CSV
        return ""
    if isinstance(answer, float) and answer.is_integer():  # an integer in a column with missing values
        answer = int(answer)
    return str(answer).strip()


def build_prompt(problem: str | list[dict], template: str | None, system_prompt: str | None) -> list[dict]:
    """Return messages for a problem; published messages change only as far as the arguments require."""
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
    """Return the rows with the user or system message replaced, if one is given."""
    if template is None and system_prompt is None:
        return dataset
    return dataset.map(lambda row: {"prompt": build_prompt(row["prompt"], template, system_prompt)})


def read_rows(dataset: datasets.Dataset, layout: Layout) -> Iterator[tuple[Any, str]]:
    """Yield problem and answer of each row. Reads only the needed columns, one batch at a time."""
    read = layout.read or itemgetter(*layout.columns)
    table = dataset.select_columns(list(layout.columns)).with_format("arrow")
    for batch in table.iter(batch_size=BATCH_SIZE):
        for row in batch.to_pylist():
            problem, answer = read(row)
            yield problem, clean_answer(answer)


def problem_text(problem: str | list[dict] | None) -> str:
    """Return the text that identifies a problem: rows with the same text are duplicates."""
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

    Duplicate problems are removed, keeping the first solution, and rows without a problem or an answer are dropped.
    The number of each is logged.

    Args:
        source (`str`, `Path` or a sequence of these):
            The name of a data set on the Hub, a local folder that `datasets.load_dataset` can read, or local JSONL,
            Parquet or CSV file(s), in one of the column layouts of `LAYOUTS`.
        split (`str`, *optional*, defaults to `"train"`):
            The split to load. All rows of local files belong to it, whatever its name.
        name (`str`, *optional*):
            The configuration of the data set: `"main"` for openai/gsm8k, `"en"` for open-r1/DAPO-Math-17k-Processed.
        prompt_template (`str`, *optional*):
            The text of the user message, with `{problem}` in place of the published text. Other braces need no
            escaping.
        system_prompt (`str`, *optional*):
            The text of a system message, which replaces a published one.

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


def thought_dropout(dataset: datasets.Dataset, probability: float = 0.5, seed: int = 0) -> datasets.Dataset:
    """
    Replace the thoughts of random rows by two newline characters, for supervised fine-tuning (TON, arXiv 2505.16854).

    Whether a row loses its thought depends on `seed` and its index alone. A row without `</think>` does not change.

    Args:
        dataset ([`~datasets.Dataset`]):
            Rows with `completion` (text or messages) or `messages`, whose last message is the assistant's.
        probability (`float`, *optional*, defaults to `0.5`):
            The probability with which a row loses its thought.
        seed (`int`, *optional*, defaults to `0`):
            The seed of the draw.
    """
    if not 0 <= probability <= 1:
        raise ValueError(f"probability: {probability} is not between 0 and 1. Set for example 0.5.")
    column = _example_column(dataset)

    def dropped(row: dict[str, Any], index: int) -> dict[str, Any]:
        completion = row[column]
        if isinstance(completion, str):
            return {column: drop_thought(completion, index, probability, seed)}
        *others, last = completion
        return {column: [*others, last | {"content": drop_thought(last["content"], index, probability, seed)}]}

    return dataset.map(dropped, with_indices=True)


def reverse_thinking_prompts(dataset: datasets.Dataset) -> datasets.Dataset:
    """
    Return prompts that ask for the thought that leads to a known answer (TON, arXiv 2505.16854; the words are ours).

    Args:
        dataset ([`~datasets.Dataset`]):
            Rows with `prompt` (messages, or text) and `solution`.
    """

    def asked(row: dict[str, Any]) -> dict[str, Any]:
        request = REVERSE_THINKING.format(question=problem_text(row["prompt"]), answer=row["solution"])
        return {"prompt": [{"role": "user", "content": request}]}

    return dataset.map(asked)


def tokenize_completion(
    prompt: str | list[dict], completion: str, tokenizer: PreTrainedTokenizerBase, *, ended: bool = True
) -> tuple[list[int], list[int]]:
    """
    Return the token ids of a prompt, rendered as the trainers do, and of a completion that follows it.

    The completion is not rendered: the chat templates of many reasoning models drop the thought of a message. If the
    prompt opens the thought, the completion's own `<think>` is left out. The EOS token is added unless `ended` is
    `False`.
    """
    text = _render(prompt, tokenizer)
    prompt_ids = tokenizer(text, add_special_tokens=isinstance(prompt, str))["input_ids"]
    ids = tokenizer.encode(continue_prompt(text, completion), add_special_tokens=False)
    return cast("list[int]", prompt_ids), [*ids, *[tokenizer.eos_token_id] * ended]


def tokenize_examples(dataset: datasets.Dataset, tokenizer: PreTrainedTokenizerBase) -> datasets.Dataset:
    """
    Return examples as rows with `input_ids` and `completion_mask`, which [`~trl.SFTTrainer`] trains on as they are.

    Args:
        dataset ([`~datasets.Dataset`]):
            Rows with `prompt` and `completion` (text or messages), or `messages`, whose last one is the assistant's.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The model's tokenizer.
    """

    def tokenized(row: dict[str, Any]) -> dict[str, list[int]]:
        prompt, completion = (
            (row["messages"][:-1], row["messages"][-1:]) if "messages" in row else (row["prompt"], row["completion"])
        )
        return training_example(*tokenize_completion(prompt, completion_text(completion), tokenizer))

    _example_column(dataset)
    return dataset.map(tokenized, remove_columns=dataset.column_names)


def training_example(prompt_ids: list[int], completion_ids: list[int]) -> dict[str, list[int]]:
    """Return the `input_ids` and `completion_mask` of an example, with the loss on the completion only."""
    return {
        "input_ids": [*prompt_ids, *completion_ids],
        "completion_mask": [0] * len(prompt_ids) + [1] * len(completion_ids),
    }


def _example_column(dataset: datasets.Dataset) -> str:
    """Return the column of the completions."""
    column = next((name for name in ("completion", "messages") if name in dataset.column_names), None)
    if column is None:
        raise ValueError(
            f"dataset: it needs a column 'completion' or 'messages'; columns found: {', '.join(dataset.column_names)}."
        )
    return column


def validate_rows(
    dataset: datasets.Dataset | datasets.IterableDataset, needs_solution: bool, name: str = "dataset"
) -> None:
    """
    Raise an error with a remedy if a trainer cannot use the rows of `dataset`, which the message calls `name`.

    `needs_solution` says that the reward needs the row's `solution`, as the default reward does.
    """
    first = next(iter(dataset), None)
    if first is None:
        raise ValueError(f"{name}: it has no rows. Give at least one.")
    found = f"columns found: {', '.join(first)}."
    remedy = "Load it with `step_trl.data.load_problems`, or rename a column."
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
    Raise an error if a prompt leaves no room for its completion in the model's `context`, a number of tokens.

    A streamed dataset is not checked. Only prompts with enough bytes are tokenized, since every token has at least one
    byte. The message calls the data set `name`.
    """
    if isinstance(dataset, datasets.IterableDataset):
        return
    room = context - max_completion_length
    if room < 1:
        raise ValueError(
            f"max_completion_length: {max_completion_length} leaves no room for a prompt in the model's context of "
            f"{context} tokens. Set a smaller value."
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
    """Return the number of tokens of a prompt, rendered as the trainers do."""
    return len(tokenizer(_render(prompt, tokenizer), add_special_tokens=isinstance(prompt, str))["input_ids"])


def _render(prompt: str | list[dict], tokenizer: PreTrainedTokenizerBase) -> str:
    if isinstance(prompt, str):
        return prompt
    return cast("str", tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True))
