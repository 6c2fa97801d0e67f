"""
Measure whether the testbed model overthinks, and whether some of its checks matter.

    python benchmarks/testbed.py [--model DIR] [--problems 256]

Prints, per evaluation set and overall (mean over sets): accuracy and tokens of the vanilla model; its semantic steps;
the share of its steps that are redundant (a conclusion before them was already right); the share of problems whose
first pass was wrong and whose final answer is right; accuracy and tokens if every rollout is cut at its first trigger
word (the answer is induced there), and if it is cut when the induced answer is confident (DEER, 0.95).
"""

from __future__ import annotations

import argparse
import re

import pandas as pd
from transformers import AutoModelForCausalLM, AutoTokenizer

from step_trl import testbed
from step_trl.evaluation import evaluate
from step_trl.rollout import ConfidenceTruncation
from step_trl.text import THINK_END


EVALUATION = {"max_tokens": 512, "temperature": 0.6, "top_p": 0.9}
SMALLEST = ("--problems", "1")  # for tests


def conclusions(completion: str) -> list[int]:
    """Return the results that the thought states, one for each semantic step with a conclusion."""
    thought = completion.partition(THINK_END)[0]
    return [int(number) for number in re.findall(r"(?:So the answer is|This gives) (\d+)", thought)]


def overthinking(samples: pd.DataFrame, solutions: dict[tuple[str, str], int]) -> pd.DataFrame:
    """Return one row per sample: the redundant steps, and whether a wrong first pass was corrected."""
    rows = []
    for row in samples.itertuples():
        right = [result == solutions[row.benchmark, row.problem] for result in conclusions(row.completion)]
        rows.append(
            {
                "benchmark": row.benchmark,
                "steps": row.steps,
                "redundant": sum(any(right[:step]) for step in range(1, len(right))),
                "first_pass": bool(right) and right[0],
                "corrected": bool(right) and not right[0] and row.correct,
            }
        )
    return pd.DataFrame(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=testbed.MODEL_DIR)
    parser.add_argument("--problems", type=int, default=256, help="number of problems of each evaluation set")
    parser.add_argument("--print", type=int, default=0, help="number of completions to show")
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype="float32").eval()
    benchmarks = {
        name: testbed.load_dataset(name).select(range(options.problems)) for name in testbed.EVALUATION_SPLITS
    }
    solutions = {
        (name, str(i)): int(row["solution"]) for name, rows in benchmarks.items() for i, row in enumerate(rows)
    }

    def run(*callbacks) -> pd.DataFrame:
        return evaluate(model, benchmarks, tokenizer=tokenizer, callbacks=callbacks, **EVALUATION)

    vanilla = run()
    cut = run(ConfidenceTruncation(tokenizer, threshold=1e-9))
    confident = run(ConfidenceTruncation(tokenizer, threshold=0.95))
    steps = overthinking(vanilla, solutions).groupby("benchmark", sort=False)
    by_benchmark, cut, confident = (rows.groupby("benchmark", sort=False) for rows in (vanilla, cut, confident))
    table = pd.DataFrame(
        {
            "accuracy": by_benchmark["correct"].mean(),
            "tokens": by_benchmark["tokens"].mean(),
            "finished": vanilla["finish_reason"].eq("eos").groupby(vanilla["benchmark"], sort=False).mean(),
            "steps": steps["steps"].mean(),
            "redundant_share": steps["redundant"].sum() / steps["steps"].sum(),
            "first_pass_right": steps["first_pass"].mean(),
            "corrected": steps["corrected"].mean(),
            "cut_accuracy": cut["correct"].mean(),
            "cut_tokens": cut["tokens"].mean(),
            "deer_accuracy": confident["correct"].mean(),
            "deer_tokens": confident["tokens"].mean(),
        }
    )
    table.loc["overall"] = table.mean()
    print(table.T.round(3).to_string())
    for row in vanilla.sample(options.print, random_state=0).itertuples():
        print(f"\n--- {row.benchmark} {row.problem}, correct: {row.correct}\n{row.completion}")


if __name__ == "__main__":
    main()
