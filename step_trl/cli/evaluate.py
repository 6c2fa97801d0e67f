"""`step-trl eval`: evaluate a model on benchmarks, and write samples, a summary and a picture to a folder."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import AutoProcessor, AutoTokenizer

from ..data import rewrite_prompts
from ..evaluation import evaluate, load_benchmark, read_samples, summarize
from ..evaluation.benchmarks import BENCHMARKS
from ..report import budgets_table, evaluation_report, markdown_table
from ..rollout import ConfidenceTruncation
from ..rollout.engines import VLLMServer, VLLMServerEngine
from ..rollout.engines.adapters import servable
from ..rollout.event_loop import run_to_end
from ..text import tokenizer_of
from ..token_targets import add_token_targets
from .sources import TESTBED, check_model, model_source


@contextmanager
def policy_of(
    model: str, engine: str, urls: Sequence[str] | None, max_tokens: int, log_file: Path
) -> Iterator[dict[str, Any]]:
    """
    Yield the arguments of [`~step_trl.evaluation.evaluate`] for the model itself, or for an engine of vLLM servers.

    The servers are those at `urls`, or one that is started here. It serves a LoRA adapter merged into its base model.
    """
    if engine == "transformers":
        yield {"model": model}
        return
    processor = AutoProcessor.from_pretrained(model)
    with ExitStack() as stack:
        if not urls:
            folder = stack.enter_context(servable(model, log_file.parent))
            urls = [stack.enter_context(VLLMServer(folder, log_file=log_file)).url]
        servers = VLLMServerEngine(urls, tokenizer_of(processor))
        run_to_end(servers.check(max_length=1 + max_tokens))
        yield {"model": servers, "tokenizer": processor, "name": name_of(model)}


def sample(
    model: str,
    problems: Mapping[str, Dataset],
    engine: str,
    urls: Sequence[str] | None,
    log_file: Path,
    *,
    max_tokens: int,
    n: int = 1,
    **options: Any,
) -> pd.DataFrame:
    """Run [`~step_trl.evaluation.evaluate`] with a progress bar, in process or on vLLM servers, see [`policy_of`]."""
    with (
        policy_of(model, engine, urls, max_tokens, log_file) as policy,
        tqdm(total=sum(map(len, problems.values())) * n, unit="sample") as bar,
    ):
        options |= {"n": n, "max_tokens": max_tokens, "on_sample": lambda rollout: bar.update()}
        return evaluate(benchmarks=problems, **policy, **options)


def name_of(model: str) -> str:
    """
    Return a name for a model that does not depend on the address of its server.

    It is the name on the Hub, or the folder with a fingerprint of the weights, which training changes.
    """
    files = sorted(Path(model).glob("*.safetensors"))
    if not files:
        return model
    digest = hashlib.blake2b(digest_size=8)
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for place in range(0, size, max(1, size // 1000)):
                file.seek(place)
                digest.update(file.read(64))
    return f"{Path(model).name} ({digest.hexdigest()})"


def run_eval(
    model: str,
    benchmarks: Sequence[str],
    report: Path,
    *,
    engine: str = "transformers",
    urls: Sequence[str] | None = None,
    source: Path | None = None,
    max_tokens: int = 32_768,
    limit: int | None = None,
    token_targets: Sequence[int] | None = None,
    at_most: bool = False,
    system_prompt: str | None = None,
    truncate: float | None = None,
    vanilla: Path | None = None,
    **options: Any,
) -> pd.DataFrame:
    """
    Evaluate a model, write `samples-*.parquet`, `settings.json`, `summary.csv`, `summary.md` and `report.png` to
    `report`, and return the summary.

    The arguments are the options of `step-trl eval`, and others of [`~step_trl.evaluation.evaluate`]. Samples that
    `report` already holds are not generated again, so `limit` cannot change within a report. With `token_targets`,
    each benchmark is evaluated once at each length, under a name such as `math500@512`; where `vanilla` has no samples
    for a length, its samples without one are used.
    """
    if truncate is not None and not 0 <= truncate <= 1:
        raise ValueError(f"truncate: {truncate:g} is not between 0 and 1. Set, for example, 0.95.")
    base = None if vanilla is None else read_samples(vanilla)
    if base is not None and base.empty:
        raise ValueError(f"vanilla: {vanilla} holds no samples. Give the --report of an earlier `step-trl eval`.")
    name = model_source(model)
    check_model(name)
    problems = load_problems(benchmarks, source, limit, system_prompt, token_targets, at_most)
    callbacks = (
        [] if truncate is None else [ConfidenceTruncation(AutoTokenizer.from_pretrained(name), threshold=truncate)]
    )
    report.mkdir(parents=True, exist_ok=True)
    samples = sample(
        name, problems, engine, urls, report / "vllm.log",
        max_tokens=max_tokens, callbacks=callbacks, save_to=report, **options,
    )  # fmt: skip
    if base is not None:
        base = with_budgets(base, problems)
        base = samples[["benchmark", "problem"]].drop_duplicates().merge(base, on=["benchmark", "problem"])
    table = summarize(samples, base)
    table.to_csv(report / "summary.csv")
    tables = [markdown_table({Path(model).name: table})]
    if token_targets:
        tables.append(budgets_table(table))
    (report / "summary.md").write_text("\n\n".join(tables) + "\n")
    evaluation_report(report / "report.png", {Path(model).name: table})
    print(table.round(3).to_string())
    return table


def load_problems(
    benchmarks: Sequence[str],
    source: Path | None,
    limit: int | None,
    system_prompt: str | None,
    token_targets: Sequence[int] | None,
    at_most: bool,
) -> dict[str, Dataset]:
    """Return the rows of each benchmark, at each budget, for the arguments of [`run_eval`]."""
    if at_most and not token_targets:
        raise ValueError("at_most: there are no token_targets. Set for example --token-targets 512 1024.")
    if limit is not None and limit < 1:
        raise ValueError(f"limit: {limit} leaves no problems. Set at least 1.")
    problems = {}
    for name in names_of_benchmarks(benchmarks):
        rows = load_benchmark(name, None if source is None else source / name)
        if limit is not None:
            rows = rows.select(range(min(limit, len(rows))))
        rows = rewrite_prompts(rows, None, system_prompt)
        if not token_targets:
            problems[name] = rows
        for target in token_targets or ():
            problems[f"{name}@{target}"] = add_token_targets(rows, target, target, at_most=at_most)
    return problems


def names_of_benchmarks(names: Sequence[str]) -> list[str]:
    """Expand `"testbed"` to its four benchmarks, drop duplicates, and raise an error for unknown names."""
    testbeds = [name for name in BENCHMARKS if name.startswith(f"{TESTBED}-")]
    known = list(dict.fromkeys(one for name in names for one in (testbeds if name == TESTBED else [name])))
    if unknown := [name for name in known if name not in BENCHMARKS]:
        raise ValueError(f"benchmarks: {', '.join(unknown)} is not known. Choose from {', '.join(BENCHMARKS)}.")
    return known


def with_budgets(vanilla: pd.DataFrame, names: Iterable[str]) -> pd.DataFrame:
    """Return another model's samples. For each missing budget, its samples without a budget are used."""
    parts = [vanilla]
    for name in set(names) - set(vanilla["benchmark"]):
        parts.append(vanilla[vanilla["benchmark"] == name.partition("@")[0]].assign(benchmark=name))
    return pd.concat(parts, ignore_index=True)
