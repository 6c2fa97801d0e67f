"""Read what a trainer logged, from its output folder or from Weights & Biases."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any


History = Sequence[Mapping[str, float]]
WANDB = "wandb:"  # the prefix of a run on the W&B server
# A run's file is a LevelDB log: blocks of this size contain records in one or several pieces. Each piece follows a
# header of checksum, length and kind (1 whole, 2 first, 3 middle, 4 last). The file has a header of the same size.
_BLOCK, _HEADER = 32768, 7
_LEAVES = {"reward": "spo/leaves/reward", "completions/mean_length": "spo/leaves/length"}


def read_history(run: str | Path) -> list[dict[str, float]]:
    """
    Read what a trainer logged.

    Args:
        run (`str` or `Path`):
            The output folder of a trainer, where the latest checkpoint is read if training did not finish; the folder
            of a W&B run on this machine, `wandb/run-...` or `wandb/offline-run-...`, which may still be running; or
            `"wandb:entity/project/run"`, for a run on the W&B server.

    Returns:
        `list[dict[str, float]]`: The history, as in `trainer.state.log_history`. From W&B, it does not include values
        that are not numbers, TRL's profile, and the totals at the end of a training.
    """
    if str(run).startswith(WANDB):
        import wandb

        return _as_logged(wandb.Api().run(str(run).removeprefix(WANDB)).scan_history())
    folder = Path(run)
    for path in folder.glob("run-*.wandb"):
        return _as_logged(_history_records(path))
    checkpoints = sorted(folder.glob("checkpoint-*/trainer_state.json"), key=lambda path: int(path.parent.name[11:]))
    for path in (folder / "trainer_state.json", *reversed(checkpoints)):
        if path.exists():
            return json.loads(path.read_text())["log_history"]
    raise FileNotFoundError(
        f"run: {folder} contains no trainer_state.json, no checkpoint and no W&B run. Pass the output folder of a "
        "trainer, which writes the file at a checkpoint or in `trainer.save_state()`; the folder of a W&B run; or "
        f"{WANDB}entity/project/run."
    )


def whole_completions(history: History) -> list[dict[str, float]]:
    """
    Return a history in which the reward and the length of completions are those of whole completions.

    SPO trains on segments of trees, so that TRL's metrics are those of segments. If there is one reward function, its
    mean is replaced, too. Other histories are returned as they are.
    """
    whole = []
    for entry in history:
        functions = [key for key in entry if re.fullmatch("rewards/.+/mean", key)]
        leaves = _LEAVES | (dict.fromkeys(functions, _LEAVES["reward"]) if len(functions) == 1 else {})
        whole.append({**entry, **{key: entry[leaf] for key, leaf in leaves.items() if leaf in entry}})
    return whole


def _as_logged(rows: Iterator[Mapping[str, Any]]) -> list[dict[str, float]]:
    """Undo the changes of transformers' `WandbCallback` to names, and of W&B to numbers that JSON does not support."""
    history = []
    for row in rows:
        entry: dict[str, float] = {}
        for key, value in row.items():
            number = float(value) if value in ("NaN", "Infinity", "-Infinity") else value
            if isinstance(number, int | float) and not key.startswith(("_", "profiling/")):
                entry[re.sub("^eval/", "eval_", key.removeprefix("train/"))] = number
        if "global_step" in entry and entry.keys() - {"global_step", "epoch"}:
            history.append({"step": entry.pop("global_step")} | entry)
    return history


def _history_records(path: Path) -> Iterator[dict[str, Any]]:
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]

    for content in _records(path.read_bytes()):
        record = Record.FromString(content)
        if record.WhichOneof("record_type") == "history":
            # The parts of a table, an image or a histogram have nested keys.
            items = [item for item in record.history.item if len(item.nested_key) < 2]
            yield {item.key or item.nested_key[0]: json.loads(item.value_json) for item in items}


def _records(log: bytes) -> Iterator[bytes]:
    """Yield the records of a LevelDB log, up to the first incomplete one."""
    place, record = _HEADER, b""
    while place + _HEADER <= len(log):
        left = _BLOCK - place % _BLOCK
        if left < _HEADER:  # the end of a block is empty if no header fits
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", log, place)
        piece = log[place + _HEADER : place + _HEADER + length]
        if len(piece) < length:
            return
        record += piece
        place += _HEADER + length
        if kind in (1, 4):
            yield record
            record = b""
