"""A training as a terminal shows it: in a real pseudo-terminal, and in a file."""

import os
import re
import select
import sys
from pathlib import Path

import pytest
from preloaded import PreloadedPython, run_preloaded
from rich.console import Console

from step_trl import testbed
from step_trl.monitor.terminal import coloured_steps
from step_trl.steps import TriggerSegmenter


SCRIPT = Path(__file__).with_name("watched_training.py")
ENVIRONMENT = os.environ | {"PYTHONPATH": f"{SCRIPT.parents[1]}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}


@pytest.mark.skipif(sys.platform == "win32", reason="there are no pseudo-terminals")
@pytest.mark.parametrize("fails", [False, True], ids=["ends", "fails"])
def test_a_person_sees_a_live_view(tmp_path, fails):
    import fcntl
    import pty
    import struct
    import termios

    descriptor, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 110, 0, 0))
    arguments = [str(SCRIPT), str(tmp_path), *["fail"] * fails]
    process = PreloadedPython(arguments, os.ttyname(terminal), env=ENVIRONMENT | {"TERM": "xterm-256color"})
    shown = b""
    while process.poll() is None or select.select([descriptor], [], [], 0)[0]:
        if select.select([descriptor], [], [], 0.1)[0]:
            shown += os.read(descriptor, 65536)
    assert process.returncode == int(fails)
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.decode())
    assert re.search(r"update +1/2", text) or fails
    assert re.search(r"[1-8] of 8 rollouts · [\d,]+ tokens/s · \d exits", text)
    assert ("Step-GRPO" in text and "accuracy 0." in text) or "accuracy 1." in text or fails
    assert "a completion of the last rollouts" in text and "\x1b[36m" in shown.decode()  # a step in its colour
    assert shown.rindex(b"\x1b[?25h") > shown.rindex(b"\x1b[?25l")  # the cursor is back
    assert ("RuntimeError: no more" in text) == fails


def test_a_file_gets_a_line_per_log(tmp_path):
    status, output = run_preloaded([str(SCRIPT), str(tmp_path)], tmp_path / "output", env=ENVIRONMENT)
    assert status == 0, output[-3000:]
    lines = [line for line in output.splitlines() if line.startswith("Step-GRPO ")]
    number = r"[\d.,]+"
    pattern = (
        rf"Step-GRPO (\d)/2: reward -?{number}, accuracy {number}, tokens {number}, steps {number}, exits {number}, "
        rf"[\d,]+ tokens/s, \d+:\d\d left"
    )
    assert [re.fullmatch(pattern, line)[1] for line in lines] == ["1", "2"], output
    assert "\x1b" not in output and "update/s" not in output


def test_steps_differ_in_colour_and_hostile_text_does_nothing():
    tokenizer = testbed.load_tokenizer()
    ids = tokenizer.encode("4 + 5 = 9.\n\nWait, 4 + 5 = 8.\n</think>")
    injected = [False] * (len(ids) - 1) + [True]
    text = coloured_steps(ids, injected, tokenizer, TriggerSegmenter(tokenizer))
    assert text.plain == "4 + 5 = 9.\nWait, 4 + 5 = 8.\n</think>"
    styles = [(text.plain[span.start : span.end], str(span.style)) for span in text.spans]
    first = {style for piece, style in styles if piece.strip() in ("4", "9")}
    assert len({style.split()[0] for _, style in styles}) == 2 and len(first) == 2
    assert styles[-1][1].endswith("underline") and not styles[0][1].endswith("underline")
    console = Console(force_terminal=True, width=60)
    hostile = tokenizer.encode("\x1b[2J\x07 9")
    with console.capture() as captured:
        console.print(coloured_steps(hostile, [False] * len(hostile), tokenizer, TriggerSegmenter(tokenizer)))
    assert "\x1b[2J" not in captured.get() and "\x07" not in captured.get() and "9" in captured.get()
