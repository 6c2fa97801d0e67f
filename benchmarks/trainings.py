"""What the scripts that train with several seeds share."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from step_trl.cli.train import run_train


def run_recipe(recipe: dict[str, Any], file: Path) -> None:
    """Write a recipe to a file, and train it."""
    file.write_text(json.dumps(recipe))
    run_train(["--config", str(file)])


def means_of_seeds(
    samples: pd.DataFrame, splits: Iterable[str], measures: Mapping[str, tuple[str, float, int]]
) -> pd.DataFrame:
    """
    Return the means of each arm and set, and of all sets, and their standard deviations between seeds.

    `measures` are columns of the samples, factors and numbers of digits.
    """
    rows: dict[str, dict[str, str]] = {}
    columns = [column for column, _, _ in measures.values()]
    for arm, part in samples.groupby("arm", sort=False):
        row = rows[str(arm)] = {"seeds": str(part["seed"].nunique())}
        sets = {split: part[part["benchmark"] == split] for split in splits} | {"all": part}
        for split, chosen in sets.items():
            by_seed = chosen.groupby("seed")[columns].mean()
            for name, (column, scale, digits) in measures.items():
                spread = f" ± {scale * by_seed[column].std():.{digits}f}" if len(by_seed) > 1 else ""
                row[f"{split}: {name}"] = f"{scale * by_seed[column].mean():.{digits}f}{spread}"
    return pd.DataFrame.from_dict(rows, orient="index").T
