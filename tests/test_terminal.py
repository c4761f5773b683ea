"""What a command writes where no colours are wanted, where no terminal is, and where nobody reads any more."""

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from rap_lightning import progress_bar as bars

COMMAND = [sys.executable, "-m", "rap_lightning.cli.main"]


def on_a_terminal(*args: str, **env: str) -> bytes:
    """What a command writes to a terminal of 100 columns."""
    child, terminal = pty.fork()
    if not child:
        fcntl.ioctl(1, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
        os.execve(sys.executable, [*COMMAND, *args], {**os.environ, "TERM": "xterm", **env})
    written = b""
    while True:
        try:
            read = os.read(terminal, 65536)
        except OSError:  # how Linux says that the other end is closed
            break
        if not read:
            break
        written += read
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    return written


def test_no_color_leaves_no_escape_code(pairs_folder: Path) -> None:
    assert b"\x1b[" in on_a_terminal("inspect", "--source", str(pairs_folder), NO_COLOR="")
    for env in ({"NO_COLOR": "1"}, {"TERM": "dumb"}):
        plain = on_a_terminal("inspect", "--source", str(pairs_folder), **env)
        assert b"rewards of both responses" in plain
        assert b"\x1b" not in plain


@pytest.mark.parametrize("args", [["--help"], ["inspect", "--help"], ["schema", "--help"], ["inspect"]])
def test_a_reader_that_leaves_gets_no_traceback(args: list[str], pairs_folder: Path) -> None:
    source = ["--source", str(pairs_folder), "--json"] if args == ["inspect"] else []
    closed, end = os.pipe()
    os.close(closed)
    done = subprocess.run([*COMMAND, *args, *source], stdout=end, stderr=subprocess.PIPE, text=True, timeout=120)
    os.close(end)
    assert done.returncode in (0, 141), "argparse drops what it can't print of a help"
    assert not done.stderr


def test_a_log_gets_lines_now_and_then(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(bars, "LINE_EVERY", 0.1)
    for _ in bars.progress(range(20), desc="working", mininterval=9):
        time.sleep(0.02)
    shown = capsys.readouterr().err
    assert "\r" not in shown
    assert 1 <= len(shown.splitlines()) <= 6
    assert all(line.startswith("working: ") and "/20" in line for line in shown.splitlines())
    for _ in bars.progress(range(20), desc="hidden", disable=True):
        time.sleep(0.01)
    assert not capsys.readouterr().err


def test_a_log_of_fit_has_no_carriage_returns(tiny: Path, pairs_folder: Path, tmp_path: Path) -> None:
    args = ["--model.policy.path", str(tiny), "--data.source", str(pairs_folder), "--data.max_length", "160"]
    args += ["--trainer.accelerator", "cpu", "--trainer.max_steps", "1", "--trainer.default_root_dir", str(tmp_path)]
    done = subprocess.run([*COMMAND, "fit", *args], capture_output=True, timeout=300)
    assert done.returncode == 0
    for written in (done.stdout, done.stderr):
        assert b"\r" not in written
        assert b"\x1b" not in written
    assert b"step 1/1" in done.stdout
