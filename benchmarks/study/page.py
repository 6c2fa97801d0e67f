"""Write the study's page from its records: tables, figures and claims."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from step_trl.report import markdown_table
from step_trl.report.tables import to_markdown
from step_trl.testbed import EVALUATION_SPLITS

from .arms import ARMS, METHODS, SHORT_CONTEXT, THOUGHT_TABLES, Arm
from .budgets import budget_lines, compared
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

_CAPTIONS = {
    "budgets": "All methods at three budgets. A dashed line joins the arms on the Pareto front.",
    "accuracy": "Accuracy against tokens: large markers are the means over the four sets, small ones the sets.",
    "steps": "Left: what steps are for, as shares of all steps. Right: the tokens of a step.",
    "training": "The first training of each arm: pale lines are updates, bold lines moving averages.",
    "long": "The long trainings, one seed each. Top row: held-out problems.",
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
        "`python benchmarks/study` makes this page. It resumes where it was stopped, on any machine, because "
        "`samples.parquet` and `updates.parquet` record what is done. Several processes share the work. `--page-only` "
        "only writes the page again; with another `--page`, everything is run again. "
        f"{max_steps} updates per arm (times its budget), 64 completions each; "
        f"the first {results.samples[VANILLA]['problem'].nunique()} problems of each evaluation set, {SAMPLES} "
        f"samples per problem and seed. {_hours(results)}"
        "Brackets contain 95 % bootstrap intervals over problems, and ± is the standard deviation between trainings. "
        "The tuning protocol is in `benchmarks/study/arms.py`. `python benchmarks/smollm2` compares four of the arms "
        "on a model a hundred times larger.",
        "",
        *_old_lines(old),
        "## Claims",
        "",
        _chance(results),
        "",
        *claim_lines(results),
        "",
        f"A context of {SHORT_CONTEXT} tokens cuts off {results.cut_off(SHORT_CONTEXT):.0%} of the vanilla model's "
        "correct completions, which then count as failed (in SAS's paper, 4,096 instead of 8,192 tokens cut off about "
        "29 %).",
        "",
    ]
    if choices := choice_lines(results):
        told = "Each line compares another choice with the one that all other arms make:"
        lines += ["## Choices", "", told, "", *choices, ""]
    if len(compared(results)) > 1:
        lines += ["## All methods at three budgets", "", *budget_lines(results), ""]
    for title in dict.fromkeys(table for arm in done for table in arm.tables):
        members = [arm for arm in done if title in arm.tables]
        lines += [f"## {title}", "", _overall_table(results, tables, members), ""]
        if (method := METHODS.get(title)) in tables:
            others = [VANILLA, *(arm.name for arm in members if arm.name != method)]
            lines += ["Each arm compared with the paper's method:", "", order_table(results, method, others), ""]
    about = [arm for arm in done if THOUGHT_TABLES & {*arm.tables}]
    known = [arm for arm in about if not pd.isna(results.share(arm.name, "skipped"))]  # their texts are
    if known:
        lines += ["## Thoughts that are skipped, and thoughts that contradict their answers", ""]
        lines += [*_thought_lines(results, known), ""]
    if started := [arm for arm in done if results.before(arm.name)[0]]:
        lines += ["## Spoken to", "", *_start_lines(results, tables, started), ""]
    lines += ["## Seconds per update and phase", ""]
    lines += ["These are the seconds of the fastest training of each arm, on one core.", ""]
    lines += [_phase_table(results, [arm for arm in done if not arm.sweep]), ""]
    lines += ["## By benchmark", "", markdown_table({results.marked(name): rows for name, rows in tables.items()}), ""]
    for name in draw(results, tables, done, page):
        lines += [f"![{name}]({name}.png)", "", _CAPTIONS[name], ""]
    (page / "README.md").write_text("\n".join(lines).rstrip() + "\n")


def _old_lines(old: Mapping[str, str]) -> list[str]:
    if not old:
        return []
    return [
        "## To be run again",
        "",
        f"Arms that are marked {OLD} were trained with other settings than they have now. Until they are run again, "
        "their rows and the claims about them refer to the earlier settings:",
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
        "The intervals include two sources of chance: problems and trainings. Between two trainings of a usual arm, "
        f"the overall accuracy varies by {100 * accuracy:.1f} points and the length by {tokens:.0f} tokens "
        "(standard deviations, the median over all arms with several seeds); for an arm with a larger deviation, its "
        "own is used. No interval is corrected for the number of comparisons."
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
        "The vanilla model has never seen words that ask for a length, or that cut a thought off, and fails after "
        "them (benchmarks/README.md). These arms therefore start from `prompted` or `prompted-cuts`: the vanilla "
        "model, fine-tuned on its own correct completions of such prompts, with lengths drawn at random. Each arm is "
        "evaluated with the prompts that it is trained with.",
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


def _thought_lines(results: Results, arms: Sequence[Arm]) -> list[str]:
    rows: dict[str, dict[str, str]] = {}
    for name in (VANILLA, *(arm.name for arm in arms)):
        row = rows[results.marked(name)] = {}
        for measure in ("skipped", "inconsistent"):
            shares = {"": results.share(name, measure)}
            shares |= {f" ({split})": results.share(name, measure, split) for split in EVALUATION_SPLITS}
            row |= {
                f"{measure}{split}, %": "–" if pd.isna(value) else f"{100 * value:.1f}"
                for split, value in shares.items()
            }
    return [
        "A thought is skipped if it is closed and blank. It is inconsistent if its last boxed value or number is not "
        "the answer (`step_trl.preferences`). The mean over the four sets comes first.",
        "",
        to_markdown(pd.DataFrame.from_dict(rows, orient="index")),
    ]


def _phase_table(results: Results, arms: Sequence[Arm]) -> str:
    rows = []
    for arm in arms:
        for time, row in results.phases(arm.name).iterrows():
            seconds = {phase: f"{value:.2f}" for phase, value in zip((*PHASES, "sum"), (*row, row.sum()))}
            rows.append({"": results.marked(arm.name), "time": time, **seconds})
    return to_markdown(pd.DataFrame(rows, columns=["", "time", *PHASES, "sum"]).set_index(""))
