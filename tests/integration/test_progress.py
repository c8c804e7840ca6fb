"""On a terminal, progress bars and log lines of a run do not disturb each other."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from tests.helpers.children import launch
from tests.helpers.runs import ROOT, tiny

COLUMNS = 200


def run_on_terminal(*overrides: str) -> str:
    """Run a command on a pseudo-terminal and return everything that it wrote there."""
    terminal, child_side = pty.openpty()
    fcntl.ioctl(child_side, termios.TIOCSWINSZ, struct.pack("HHHH", 50, COLUMNS, 0, 0))
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "launch.py"), *overrides],
        stdin=child_side,
        stdout=child_side,
        stderr=child_side,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TERM": "xterm"},
    )
    os.close(child_side)
    chunks = []
    while True:
        try:
            chunk = os.read(terminal, 65536)
        except OSError:  # Linux reports the end of a terminal as an error
            break
        if not chunk:
            break
        chunks.append(chunk)
    os.close(terminal)
    output = b"".join(chunks).decode()
    assert process.wait() == 0, output
    return output


def screen_lines(output: str) -> list[str]:
    """Return the lines that a terminal shows after it has received the output."""
    lines, row, column = [""], 0, 0
    for token in re.findall(r"\x1b\[[0-9;]*[A-Za-z]|.", output, flags=re.DOTALL):
        if token == "\r":
            column = 0
        elif token == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif token == "\x1b[A":
            row -= 1
        elif not token.startswith("\x1b"):
            line = lines[row].ljust(column)
            lines[row] = line[:column] + token + line[column + 1 :]
            column += 1
    return [line.rstrip() for line in lines]


@pytest.mark.thorough
def test_log_lines_stand_on_lines_of_their_own_beside_the_bars(tmp_path: Path) -> None:
    output = run_on_terminal(*tiny(f"output_root={tmp_path}", "name=r", "probe.every=1"))
    for bar in ("probing the untrained network:", "probing:", "step/s"):
        assert bar in output, "each bar is shown"
    shown = screen_lines(output)
    logged = (tmp_path / "default" / "r" / "run.log").read_text().splitlines()
    messages = [line.split(" INFO ", 1)[1] for line in logged if " INFO " in line]
    assert sum(message.startswith("epoch ") for message in messages) == 2
    for message in messages:
        assert any(re.fullmatch(rf"\d\d:\d\d:\d\d {re.escape(message)}", line) for line in shown), (message, shown)
    assert not [line for line in shown if line.startswith("probing")], "the bars of the probes disappear"


def test_without_a_terminal_there_are_no_bars(tmp_path: Path) -> None:
    finished = launch(*tiny(f"output_root={tmp_path}", "name=r"))
    assert finished.returncode == 0
    assert "measuring the untrained network" in finished.stdout
    assert "\r" not in finished.stdout + finished.stderr
    assert "step/s" not in finished.stderr
