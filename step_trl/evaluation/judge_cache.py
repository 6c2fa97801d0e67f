"""Parse the answers of a judge of steps, and cache them on disk."""

from __future__ import annotations

import json
import re
from pathlib import Path

from .composition import LABELS


class AnswerCache:
    """Answers on disk: one JSON line each, in an append-only file."""

    def __init__(self, folder: str | Path):
        self.path = Path(folder) / "judge.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = self.path.read_text() if self.path.exists() else ""
        # A killed run may have left part of a line, which must not corrupt the next one.
        self._prefix = "\n" if text and not text.endswith("\n") else ""
        self._labels: dict[str, list[str] | None] = {}
        for line in text.splitlines():
            try:
                entry = json.loads(line)
                self._labels[entry["key"]] = entry["labels"]
            except (ValueError, KeyError, TypeError):
                continue

    def __contains__(self, key: str) -> bool:
        return key in self._labels

    def __getitem__(self, key: str) -> list[str] | None:
        """Return the labels, `None` if the judge gave no valid ones."""
        return self._labels[key]

    def add(self, key: str, labels: list[str] | None) -> None:
        with self.path.open("a") as file:
            file.write(f"{self._prefix}{json.dumps({'key': key, 'labels': labels})}\n")
        self._prefix, self._labels[key] = "", labels


def read_labels(answer: str, steps: int) -> list[str]:
    """
    Return the labels in a judge's answer: its last JSON object, whatever text surrounds it.

    Raises:
        `ValueError`: If there is not exactly one label for each step. The message tells the judge what is wrong.
    """
    objects = re.findall(r"\{[^{}]*\}", answer)
    try:
        given = json.loads(objects[-1]) if objects else None
    except ValueError:
        given = None
    if given is None:
        raise ValueError("It contains no valid JSON object.")
    if given.keys() != {str(number) for number in range(1, steps + 1)}:
        raise ValueError(f"Its keys are not the numbers 1 to {steps}, each once ({len(given)} keys).")
    labels = [str(given[str(number)]).strip().lower() for number in range(1, steps + 1)]
    if not set(labels) <= set(LABELS):
        raise ValueError(f"Its values are not all among {', '.join(LABELS)}.")
    return labels
