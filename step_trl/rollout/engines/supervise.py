"""
Run a command that must not outlive the process that asked for it: `python supervise.py PARENT_ID COMMAND...`.

[`~step_trl.rollout.engines.VLLMServer`] starts its server under this script, in a process group of their own. A parent
that is killed, by SIGTERM or SIGKILL, runs no `finally` and no `atexit`, and would leave the server on the GPU. The
script compares its parent's id instead, which changes when that process ends, whichever of its threads started the
server. It needs the standard library only, so that it starts in no time.
"""

import os
import signal
import subprocess
import sys
import threading
import time


POLL_SECONDS = 0.5
STOP_SECONDS = 20.0


def end_with(parent: int) -> None:
    """When `parent` has ended, end this process group: by SIGTERM, and by SIGKILL if that takes too long."""
    while os.getppid() == parent:
        time.sleep(POLL_SECONDS)
    os.killpg(0, signal.SIGTERM)
    time.sleep(STOP_SECONDS)
    os.killpg(0, signal.SIGKILL)


def main(parent: int, command: list[str]) -> int:
    """Run the command to its end. Returns its exit status, 128 and the signal's number where a signal ended it."""
    # SIGTERM to the group is for the command, whose end is waited for. It would inherit SIG_IGN, but not a handler.
    signal.signal(signal.SIGTERM, lambda *_: None)
    process = subprocess.Popen(command)
    threading.Thread(target=end_with, args=(parent,), daemon=True).start()
    status = process.wait()
    if os.getppid() != parent:
        os.killpg(0, signal.SIGKILL)  # what the command has left running: nobody else is there to end it
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
