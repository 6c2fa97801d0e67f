"""Write the study's page from its records: tables, figures and claims."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from step_trl.report import markdown_table
from step_trl.report.tables import to_markdown

from .arms import ARMS, METHODS, SHORT_CONTEXT, Arm
from .claims import choice_lines, claim_lines, order_table
from .pictures import draw
from .records import PHASES, Records
from .results import OLD, Results
from .run import SAMPLES, VANILLA


# Column, scale and digits of each measure.
_MEASURES = {
    "accuracy": ("accuracy, %", 100, 1),
    "tokens": ("tokens", 1, 0),
    "steps": ("steps", 1, 2),
    "cr": ("CR", 1, 2),
    "aes": ("AES", 1, 2),
}


def write_page(records: Records, page: Path, max_steps: int, old: Mapping[str, str] | None = None) -> None:
    """
    Write `README.md`, `summary.csv` and the pictures to the folder `page`.

    `old` are the arms that were trained with other settings than they have now, and these settings.
    """
    old = old or {}
    results = Results(records, old)
    page.mkdir(parents=True, exist_ok=True)
    done = [arm for arm in ARMS if arm.name in results.samples]
    tables = {name: results.table(name) for name in (VANILLA, *(arm.name for arm in done))}
    pd.concat(tables, names=["arm"]).to_csv(page / "summary.csv", float_format="%.5g")
    lines = [
        "# The testbed study",
        "",
        "Made by `python benchmarks/study`, which resumes where it stopped, on any machine: `samples.parquet` and "
        "`updates.parquet` say what is done. Processes side by side share the work; `--page-only` makes this page "
        "anew, and with another `--page` all is run anew. "
        f"{max_steps} updates per arm (times its budget), 64 completions each; "
        f"the first {results.samples[VANILLA]['problem'].nunique()} problems of each evaluation set, {SAMPLES} "
        f"samples per problem and seed. {_hours(results)}"
        "Brackets hold 95 % bootstrap intervals over problems, ± the standard deviation from training to training. "
        "The tuning protocol is in `benchmarks/study/arms.py`.",
        "",
        *_old_lines(old),
        "## Claims",
        "",
        _chance(results),
        "",
        *claim_lines(results),
        "",
        f"A context of {SHORT_CONTEXT} tokens cuts off {results.cut_off(SHORT_CONTEXT):.0%} of the vanilla model's "
        "correct completions, which makes failures of them (SAS: about 29 %, of 4,096 tokens against 8,192).",
        "",
    ]
    if choices := choice_lines(results):
        lines += ["## Choices", "", "Another choice against the one that the other arms make:", "", *choices, ""]
    for title in dict.fromkeys(table for arm in done for table in arm.tables):
        members = [arm for arm in done if title in arm.tables]
        lines += [f"## {title}", "", _overall_table(results, tables, members), ""]
        if (method := METHODS.get(title)) in tables:
            others = [VANILLA, *(arm.name for arm in members if arm.name != method)]
            lines += ["Each against the paper's method:", "", order_table(results, method, others), ""]
    if started := [arm for arm in done if results.before(arm.name)[0]]:
        lines += ["## Spoken to", "", *_start_lines(results, tables, started), ""]
    lines += ["## Seconds per update and phase", "", "Of the fastest training of each arm, on one core.", ""]
    lines += [_phase_table(results, [arm for arm in done if not arm.sweep]), ""]
    lines += ["## By benchmark", "", markdown_table({results.marked(name): rows for name, rows in tables.items()}), ""]
    for name in draw(results, tables, done, page):
        lines += [f"![{name}]({name}.png)", ""]
    (page / "README.md").write_text("\n".join(lines).rstrip() + "\n")


def _old_lines(old: Mapping[str, str]) -> list[str]:
    if not old:
        return []
    return [
        "## To be run again",
        "",
        f"Arms that are marked {OLD} were trained with other settings than they have now. Their rows, and the claims "
        "that they are part of, are about those settings until they are run again:",
        "",
        *(f"- `{name}`: {changes}." for name, changes in old.items()),
        "",
    ]


def _hours(results: Results) -> str:
    if (seconds := results.seconds()).empty:
        return ""
    return f"The {len(seconds)} trainings whose seconds are known took {seconds.sum() / 3600:.1f} hours of one core. "


def _chance(results: Results) -> str:
    accuracy, tokens = (results.pooled_spread(measure) for measure in ("accuracy", "tokens"))
    if pd.isna(accuracy):
        return (
            "Their intervals are over problems only, since no arm has several seeds: they are about these trainings."
        )
    return (
        "Their intervals know two sources of chance, problems and trainings. From one training of a usual arm to "
        f"another, the overall accuracy changes by {100 * accuracy:.1f} points and the length by {tokens:.0f} tokens "
        "(standard deviations, the median over all arms with several seeds); an arm whose own deviation is larger is "
        "taken with its own. No interval is corrected for the number of comparisons."
    )


def _overall_table(results: Results, tables: dict[str, pd.DataFrame], arms: Sequence[Arm]) -> str:
    rows = {}
    for name in (VANILLA, *(arm.name for arm in arms)):
        overall = tables[name].loc["overall"]
        row = rows[results.marked(name)] = {"seeds": str(len(results.seeds[name]))}
        for measure, (column, scale, digits) in _MEASURES.items():
            value, low, high = (f"{scale * overall[f'{measure}{end}']:.{digits}f}" for end in ("", "_low", "_high"))
            row[column] = f"{value} [{low}, {high}]"
        for measure, scale in (("accuracy", 100), ("tokens", 1)):
            spread = scale * results.spread(name, measure)
            row[f"± {measure}"] = "–" if pd.isna(spread) else f"{spread:.1f}"
    return to_markdown(pd.DataFrame.from_dict(rows, orient="index"))


def _start_lines(results: Results, tables: dict[str, pd.DataFrame], arms: Sequence[Arm]) -> list[str]:
    lines = [
        "The vanilla model has never read words that ask for a length, or that cut a thought off, and fails behind "
        "them (benchmarks/README.md). These arms start from `prompted` or `prompted-cuts`: the vanilla model, "
        "fine-tuned on its own right completions behind such words, with lengths drawn at random. Each is evaluated "
        "under the prompts that it is trained with.",
        "",
    ]
    rows = {}
    for arm in arms:
        seeds, before = results.before(arm.name)
        after = tables[arm.name].loc["overall"]
        row = rows[results.marked(arm.name)] = {}
        for when, number, overall in (("before", seeds, before), ("after", seeds, after)):
            row[f"seeds {when}"] = str(number)
            row[f"accuracy {when}, %"] = f"{100 * overall['accuracy']:.1f}"
            row[f"tokens {when}"] = f"{overall['tokens']:.0f}"
    return [*lines, to_markdown(pd.DataFrame.from_dict(rows, orient="index"))]


def _phase_table(results: Results, arms: Sequence[Arm]) -> str:
    rows = []
    for arm in arms:
        for time, row in results.phases(arm.name).iterrows():
            seconds = {phase: f"{value:.2f}" for phase, value in zip((*PHASES, "sum"), (*row, row.sum()))}
            rows.append({"": results.marked(arm.name), "time": time, **seconds})
    return to_markdown(pd.DataFrame(rows, columns=["", "time", *PHASES, "sum"]).set_index(""))
