"""Save samples to disk as they are finished, so that an interrupted evaluation resumes where it stopped."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
from filelock import FileLock, Timeout

from ..files import atomic_write


KEY = ["benchmark", "problem", "sample"]


def read_samples(folder: str | Path) -> pd.DataFrame:
    """Return all rows in a folder, in the order in which they were added."""
    parts = [pd.read_parquet(path) for path in _paths(folder)]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=KEY)


def _paths(folder: str | Path) -> list[Path]:
    return sorted(Path(folder).glob("samples-*.parquet"))


def add_samples(folder: str | Path, rows: pd.DataFrame) -> None:
    """Write the rows to a new file atomically."""
    paths = _paths(folder)
    number = 1 + int(paths[-1].stem.split("-")[1]) if paths else 0
    with atomic_write(Path(folder) / f"samples-{number:06d}.parquet") as partial:
        rows.to_parquet(partial, index=False)


@contextmanager
def locked_folder(folder: str | Path, settings: Mapping[str, Any]) -> Iterator[None]:
    """
    Create the folder of an evaluation with its `settings.json`, or check that it has these settings, and lock it.

    `settings` are JSON values that must not change between two runs, except that later runs may add to the mapping
    `"benchmarks"`, which holds fingerprints.

    Raises:
        `ValueError`: If another process writes to the folder, or if it contains samples with other settings. The
            message names each setting that differs.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise ValueError(
            f"save_to: another process is writing to {folder}. Wait for it, or set another folder."
        ) from None
    try:
        path = folder / "settings.json"
        current = json.loads(json.dumps(settings))
        if path.exists():
            current = _merged(folder, json.loads(path.read_text()), current)
        with atomic_write(path) as partial:
            partial.write_text(json.dumps(current, indent=2) + "\n")
        yield
    finally:
        lock.release()


def _merged(folder: Path, earlier: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    known = earlier["benchmarks"]
    differing = [key for key in {**earlier, **settings} if earlier.get(key) != settings.get(key)]
    lines = [f"{key}: {earlier.get(key)!r}, now {settings.get(key)!r}" for key in differing if key != "benchmarks"]
    lines += [
        f"benchmarks: the problems of {name} have changed"
        for name, fingerprint in settings["benchmarks"].items()
        if known.get(name, fingerprint) != fingerprint
    ]
    if lines:
        raise ValueError(
            f"save_to: {folder} holds samples of other settings ({'; '.join(lines)}). Set another folder."
        )
    return settings | {"benchmarks": known | settings["benchmarks"]}
