"""A link between hosts that is cut, and a process that is killed: all end in time, with a message and exit code 3."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cli_process import free_port
from conftest import ROOT
from rap_lightning.distributed import rank_monitor
from rap_lightning.distributed.rank_monitor import LOST_RANK_STATUS, RankMonitor, RankStore


class Environment:
    """What a RankStore asks a cluster environment."""

    def __init__(self, rank: int, port: int) -> None:
        self.rank, self.main_address, self.main_port = rank, "127.0.0.1", port

    def global_rank(self) -> int:
        return self.rank

    def local_rank(self) -> int:
        return 0

    def node_rank(self) -> int:
        return self.rank


class Link:
    """A TCP proxy; once it is cut, it forwards nothing and closes nothing, as a cable that was pulled out."""

    def __init__(self, port: int) -> None:
        self.to, self.cut = port, threading.Event()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.sockets: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self.listener.accept()
                far = socket.create_connection(("127.0.0.1", self.to))
                self.sockets += [near, far]
                for one, other in ((near, far), (far, near)):
                    threading.Thread(target=self._forward, args=(one, other), daemon=True).start()

    def _forward(self, one: socket.socket, other: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while content := one.recv(65536):
                if self.cut.is_set():
                    return
                other.sendall(content)

    def close(self) -> None:
        for one in (self.listener, *self.sockets):
            one.close()


@pytest.fixture
def link() -> Iterator[tuple[int, Link]]:
    port = free_port()
    made = Link(port)
    yield port, made
    made.close()


def test_a_link_that_is_cut_ends_both_sides_in_time_with_a_message(
    link: tuple[int, Link], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    port, between = link
    monkeypatch.setattr(rank_monitor, "HEARTBEAT", 0.2)
    monkeypatch.setattr(rank_monitor, "GRACE", 0.5)
    monkeypatch.setattr(rank_monitor, "package_versions", dict)
    ended: dict[int, tuple[int, float]] = {}
    monitors = [
        RankMonitor({}, lambda code, rank=rank: ended.setdefault(rank, (code, time.monotonic()))) for rank in (0, 1)
    ]

    def begin(rank: int) -> None:
        store = RankStore(Environment(rank, port if rank == 0 else between.port), 2, 3.0)
        monitors[rank].begin(store)

    threads = [threading.Thread(target=begin, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
        time.sleep(0.2)
    for thread in threads:
        thread.join(20)
    time.sleep(1)
    assert not ended
    between.cut.set()
    cut = time.monotonic()
    while len(ended) < 2 and time.monotonic() < cut + 20:
        time.sleep(0.05)
    for monitor in monitors:
        monitor._stopped.set()
    assert {rank: code for rank, (code, _) in ended.items()} == {0: LOST_RANK_STATUS, 1: LOST_RANK_STATUS}
    assert max(when for _, when in ended.values()) - cut < 3.0 + 2 + 2 * 0.2 + 3 * 0.5  # patience and grace
    said = capfd.readouterr().err
    assert re.search(r"error: no sign of life from rank 1 \(.*\) for 3 s\. This run ends", said)
    assert re.search(r"error: rank 0 \(.*\), which hosts 127\.0\.0\.1:\d+, cannot be reached any more\. This run", said)


class Child:
    """As a subprocess.Popen that ends when told to."""

    code: int | None = None

    def poll(self) -> int | None:
        return self.code


def test_a_process_of_lightnings_launcher_that_dies_is_the_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    store = RankStore(Environment(0, free_port()), 1, 5.0)
    monitor = RankMonitor({})
    child = Child()
    observed = [child]
    launcher = type("Launcher", (), {"procs": observed})()
    monitor._watch_children(type("Strategy", (), {"launcher": launcher})(), store)
    assert observed == []
    assert launcher.procs == [child]
    store._hosts = ["a", "b"]
    child.code = -9
    until = time.monotonic() + 10
    while not store.keys.check(["verdict"]) and time.monotonic() < until:
        time.sleep(0.05)
    assert store.keys.get("verdict") == b"rank 1 (b) was killed by signal 9"
    monitor._stopped.set()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_exit_codes_under_ddp_are_the_documented_ones(tiny: Path, pairs_folder: Path, tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")])}
    command: list[Any] = [
        sys.executable, "-m", "rap_lightning.cli.main", "fit", "--model.policy.path", tiny, "--data.source",
        pairs_folder, "--data.max_length", "160", "--data.batch_size", "2", "--trainer.accelerator", "cpu",
        "--trainer.devices", "2", "--trainer.strategy", "ddp", "--trainer.max_epochs", "999",
        "--trainer.default_root_dir", tmp_path / "runs", "--trainer.log_every_n_steps", "1",
        "--model.loss", "failing_losses.Slow",
    ]  # fmt: skip
    with (tmp_path / "log").open("w") as log:
        run = subprocess.Popen([str(part) for part in command], env=environment, stderr=log, stdout=log)
        try:
            while "step 2" not in (tmp_path / "log").read_text():
                assert run.poll() is None, (tmp_path / "log").read_text()[-3000:]
                time.sleep(0.1)
            children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
            ranks = [pid for pid in children if "rap_lightning" in Path(f"/proc/{pid}/cmdline").read_text()]
            os.kill(int(ranks[0]), signal.SIGKILL)
            assert run.wait(60) == LOST_RANK_STATUS
        finally:
            run.kill()
    said = (tmp_path / "log").read_text()
    assert re.search(r"error: rank 1 \(.*\) was killed by signal 9\. This run ends", said)
    assert said.count("error: ") == 1
