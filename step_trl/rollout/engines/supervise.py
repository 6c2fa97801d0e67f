"""
Run a command that must not outlive its parent process: `python supervise.py PARENT_ID COMMAND...`.

[`~step_trl.rollout.engines.VLLMServer`] starts its server with this script, in a separate process group. A parent that
is killed by SIGTERM or SIGKILL runs neither `finally` nor `atexit` and would leave the server on the GPU. So the
script polls its parent's id, which changes when that process ends. It imports only the standard library, to start
fast.
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
    """End this process group once `parent` has ended: by SIGTERM, and by SIGKILL if that takes too long."""
    while os.getppid() == parent:
        time.sleep(POLL_SECONDS)
    os.killpg(0, signal.SIGTERM)
    time.sleep(STOP_SECONDS)
    os.killpg(0, signal.SIGKILL)


def main(parent: int, command: list[str]) -> int:
    """Run the command. Returns its exit status, or 128 plus the number of the signal that ended it."""
    # SIGTERM is meant for the command, not for this script. The command would inherit SIG_IGN, but not a handler.
    signal.signal(signal.SIGTERM, lambda *_: None)
    process = subprocess.Popen(command)
    threading.Thread(target=end_with, args=(parent,), daemon=True).start()
    status = process.wait()
    if os.getppid() != parent:
        os.killpg(0, signal.SIGKILL)  # orphans of the command, which nothing else would end
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
