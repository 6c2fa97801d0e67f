"""A headless browser, for pages that are opened from the disk."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path

from filelock import FileLock


QUIET = ("--disable-background-networking", "--disable-component-update", "--disable-sync")


def chromium() -> str:
    """Return the path of chromium. If it is missing, the first process that asks for it installs it."""
    with FileLock(Path(tempfile.gettempdir()) / "step_trl-chromium.lock"):
        if shutil.which("chromium") is None:
            for command in (["apt-get", "update", "-qq"], ["apt-get", "install", "-y", "-qq", "chromium"]):
                done = subprocess.run(command, capture_output=True, text=True, timeout=600)
                assert done.returncode == 0, f"No chromium on PATH, and `{' '.join(command)}` fails: {done.stderr}"
    found = shutil.which("chromium")
    assert found, "apt-get installed chromium, yet it is not on PATH."
    return found


def browse(address: str, profile: Path, *options: str) -> str:
    """Open a page in chromium with a new profile, and return what it prints. `--dump-dom` prints the page."""
    command = [chromium(), "--headless", "--no-sandbox", "--disable-gpu", *QUIET, "--window-size=800,900"]
    command += [f"--user-data-dir={profile}", *options, address]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout
