"""Save samples to disk as they are finished, so that an interrupted evaluation resumes where it stopped."""

from __future__ import annotations

import json
from collections.abc import Mapping
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


class SampleStore:
    """
    The rows of an evaluation in a folder: Parquet files that are added one after another, and `settings.json`.

    This is a context manager. While it is open, no other process can use the folder.

    Args:
        folder (`str` or `Path`):
            The folder. It is created if it does not exist.
        settings (`Mapping[str, Any]`):
            The settings that must not change between two runs, as JSON values. `"benchmarks"` is a mapping of
            fingerprints, to which later runs may add.

    Raises:
        `ValueError`: If another process writes to the folder, or if it contains samples with other settings. The
            message names each setting that differs.
    """

    def __init__(self, folder: str | Path, settings: Mapping[str, Any]):
        self.folder = Path(folder)
        self._settings: dict[str, Any] = json.loads(json.dumps(settings))
        self._lock = FileLock(self.folder / ".lock", timeout=0)

    def __enter__(self) -> SampleStore:
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire()
        except Timeout:
            raise ValueError(
                f"save_to: another process is writing to {self.folder}. Wait for it, or set another folder."
            ) from None
        try:
            path = self.folder / "settings.json"
            current = self._settings
            if path.exists():
                current = self._merged(json.loads(path.read_text()), current)
            with atomic_write(path) as partial:
                partial.write_text(json.dumps(current, indent=2) + "\n")
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def _merged(self, earlier: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
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
                f"save_to: {self.folder} holds samples of other settings ({'; '.join(lines)}). Set another folder."
            )
        return settings | {"benchmarks": known | settings["benchmarks"]}

    def add(self, rows: pd.DataFrame) -> None:
        """Write the rows to a new file atomically."""
        paths = _paths(self.folder)
        number = 1 + int(paths[-1].stem.split("-")[1]) if paths else 0
        with atomic_write(self.folder / f"samples-{number:06d}.parquet") as partial:
            rows.to_parquet(partial, index=False)
