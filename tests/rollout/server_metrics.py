"""The metrics of a vLLM server about its requests."""

from __future__ import annotations

import re
import time
import urllib.request
from collections.abc import Callable


def metric(url: str, names: str) -> int:
    """Sum of the server's metrics whose names match."""
    text = urllib.request.urlopen(f"{url}/metrics", timeout=10).read().decode()
    return sum(int(float(value)) for value in re.findall(rf"^vllm:(?:{names})\{{.*\}} (\S+)$", text, re.M))


def open_requests(url: str) -> int:
    return metric(url, "num_requests_running|num_requests_waiting")


def generated_tokens(url: str) -> int:
    return metric(url, "generation_tokens_total")


def until(condition: Callable[[], bool], seconds: float) -> bool:
    """Wait until a condition is true, and return whether it became true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True
