"""
Run by the executable of `preloaded.preloaded_executable`: asks for a fork, and stands for it until it ends.

It passes on the signals that ask a process to end. If it is killed, the fork is killed.
"""

import json
import os
import signal
import socket
import sys


def main(address: str, executable: str, arguments: list[str]) -> int:
    """Return the exit status of the fork, or end by the signal that has ended it."""
    with socket.socket(socket.AF_UNIX) as connection, connection.makefile() as answers:
        connection.connect(address)
        socket.send_fds(connection, [b"\n"], [0, 1, 2])
        asked = {"arguments": arguments, "environment": dict(os.environ), "cwd": os.getcwd(), "executable": executable}
        connection.sendall(json.dumps(asked).encode() + b"\n")
        process = int(answers.readline())

        def pass_on(number: int, _: object) -> None:
            try:
                os.kill(process, number)
            except ProcessLookupError:
                pass

        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, pass_on)
        status = int(answers.readline())
    if status < 0:
        if -status != signal.SIGKILL:
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    return status


if __name__ == "__main__":
    address, executable, *arguments = sys.argv[1:]
    has_other_option = arguments[0].startswith("-") and arguments[0] not in ("-c", "-m", "-u")
    # A worker that grades limits its memory, to less than a fork has from its start.
    if has_other_option or arguments[0].endswith("rewards/grading.py"):
        os.execv(sys.executable, [sys.executable, *arguments])
    sys.exit(main(address, executable, arguments))
