"""What the blocks share: rows that are saved one by one, and models with the shapes of published ones."""

from __future__ import annotations

import argparse
import gc
import json
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import transformers
import trl
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel, Qwen3Config

from step_trl import testbed
from step_trl.files import atomic_write
from step_trl.report.tables import to_markdown


MINUTES = 8.0  # a command on a lent machine ends after 10 minutes, and imports and the last row take time
Row = Mapping[str, Any]


def qwen3(hidden_size: int, **others: Any) -> Qwen3Config:
    """Return the configuration of a Qwen3, by default with the sizes that its smallest models share."""
    sizes: dict[str, Any] = {
        "vocab_size": 151_936, "intermediate_size": 3 * hidden_size, "num_hidden_layers": 28,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 40_960,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "tie_word_embeddings": True,
    }  # fmt: skip
    return Qwen3Config(hidden_size=hidden_size, **sizes | others)


SHAPES = {
    "0.6B": qwen3(1024),
    "1.7B": qwen3(2048),
    "toy": qwen3(32, vocab_size=1024, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16),
}
TESTBED = "testbed"  # the model of the package, whose weights are trained


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def build_model(name: str, dtype: str) -> PreTrainedModel:
    """Return the testbed model, or a model of one of the [`SHAPES`] with random weights. None ends with EOS."""
    if name == TESTBED:
        model = testbed.load_model().to(device(), getattr(torch, dtype))
    else:
        torch.manual_seed(0)
        with device():  # in float32 first: other dtypes draw other numbers
            model = AutoModelForCausalLM.from_config(SHAPES[name], dtype=torch.float32).to(getattr(torch, dtype))
    model.generation_config = GenerationConfig(pad_token_id=0)
    return model.eval()


def synchronize() -> None:
    """Wait for the GPU, whose work is asynchronous, before a clock is read."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def begin_peak() -> None:
    """Free what earlier rows have left, and begin to note the peak of the allocated memory."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_memory() -> int | None:
    """Return the most bytes that were allocated at once since [`begin_peak`], or `None` without a GPU."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None


def gib(count: int | None) -> float | None:
    return None if count is None else count / 2**30


def machine() -> dict[str, str]:
    """Describe what the rows were measured on."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    libraries = (torch, transformers, trl)
    return {"device": name} | {library.__name__: library.__version__ for library in libraries}


class OutOfTime(Exception):
    """Raised by a row that has saved what it has done so far, for the next call to go on."""


class Block:
    """
    The rows of a block, as they are measured. Each is saved to `NAME.json` at once, and a later call resumes.

    Args:
        name (`str`), options (`argparse.Namespace`):
            The block's name, and its options, among them those of [`make_parser`].
        settings (`Mapping[str, Any]`):
            What all rows share. A folder with rows of other settings, or of another machine, is refused.
    """

    def __init__(self, name: str, options: argparse.Namespace, settings: Mapping[str, Any]):
        self.name = name
        self.folder: Path = options.output_dir
        self.deadline = time.monotonic() + 60 * options.minutes
        self.header = json.loads(json.dumps({"machine": machine(), "settings": settings}))
        self.rows: dict[str, dict[str, Any]] = {}
        self.left: list[str] = []
        self.failed: list[str] = []
        self.folder.mkdir(parents=True, exist_ok=True)
        self._longest = 0.0  # seconds
        self._file = self.folder / f"{name}.json"
        if self._file.exists():
            self._resume()

    def _resume(self) -> None:
        earlier = json.loads(self._file.read_text())
        self.rows = earlier.pop("rows")
        if earlier != self.header:
            raise SystemExit(
                f"--output-dir: {self._file} has rows of {earlier}, not of {self.header}. Set another folder."
            )

    @property
    def seconds_left(self) -> float:
        return self.deadline - time.monotonic()

    def measure(self, key: str, run: Callable[[], Row]) -> None:
        """
        Measure a row, unless it is there, or the time that is left is shorter than the longest row of this call.

        A row that fails does not end the block: on a lent machine, the others must still be measured.
        """
        if key in self.rows:
            return
        if self.seconds_left < self._longest:
            self.left.append(key)
            return
        started = time.monotonic()
        try:
            row = dict(run())
        except OutOfTime:
            self.left.append(key)
            self._longest = float("inf")
            return
        except Exception:
            traceback.print_exc()
            self.failed.append(key)
            return
        seconds = time.monotonic() - started
        self._longest = max(self._longest, seconds)
        self.rows[key] = row | {"seconds": round(seconds, 1)}
        with atomic_write(self._file) as partial:
            partial.write_text(json.dumps(self.header | {"rows": self.rows}, indent=1) + "\n")
        print(f"{self.name}: {key}: {self.rows[key]}", flush=True)

    def finish(self) -> None:
        """Print the table, write it to `NAME.md`, and end with an error if a row has failed."""
        frame = pd.DataFrame.from_dict(self.rows, orient="index").map(cell).rename_axis(self.name)
        described = ", ".join(f"{name}: {value}" for part in self.header.values() for name, value in part.items())
        text = f"{described}\n\n{to_markdown(frame)}\n"
        (self.folder / f"{self.name}.md").write_text(text)
        print(f"\n{text}")
        if self.left:
            print(f"No time was left for {', '.join(self.left)}. The same command measures them.")
        if self.failed:
            raise SystemExit(f"{', '.join(self.failed)} failed, see above. The same command tries again.")


def cell(value: Any) -> str:
    """Return a value as it stands in a table."""
    if value is None or value != value:  # NaN
        return "–"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return str(value)


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """Return the parser of a block, with the options that all blocks have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output-dir", type=Path, default=Path("runs/gpu"), help="folder for rows and tables, by default %(default)s"
    )
    parser.add_argument(
        "--minutes", type=float, default=MINUTES, help="start no row after this time, by default %(default)g"
    )
    return parser
