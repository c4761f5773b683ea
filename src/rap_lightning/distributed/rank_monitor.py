"""Many processes, one run: who is there, whether all are about to do the same, and who was lost.

Collectives fail in words of their own ("connection closed by peer"), late, and on every rank but the one that matters.
So the ranks also meet in the key-value store that torch.distributed starts with. There each says that it is there and
what it is about to do, says again every few seconds that it still is there, and leaves its error when it fails. Rank
zero watches all of them, and all watch rank zero. What is printed then names a rank and its host, once on each node.
"""

from __future__ import annotations

import datetime
import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import lightning.pytorch as pl
import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from rap_lightning.datamodule import PreferenceDataModule
from rap_lightning.distributed.consistency import difference, versions
from rap_lightning.errors import ConfigError, UserError

BEAT = 2.0
"""Seconds between two signs of life."""
PATIENCE = 60.0
"""Seconds without one after which a rank counts as lost; less where the strategy's time-out is shorter."""
GRACE = 10.0
"""Seconds that a process has to end by itself once another is lost."""
STATUS = 3
"""What a process that lost others exits with."""
DONE = "done"
ADVICE = "This run ends; go on from its newest checkpoint with --ckpt_path."


class RanksError(UserError):
    """A rank never came, or was lost."""


class Meeting:
    """The ranks' connection to the store at the main address.

    Args:
        environment: Lightning's cluster environment, its ranks set.
        size: ranks in all.
        timeout: seconds that ranks wait for each other.

    Raises:
        RanksError: nothing answers at the address.
    """

    def __init__(self, environment: Any, size: int, timeout: float) -> None:
        self.rank, self.size, self.timeout = environment.global_rank(), size, timeout
        self.speaks = environment.local_rank() == 0  # one process of each node says what is to be said
        self.node = environment.node_rank()
        self.address = f"{environment.main_address}:{environment.main_port}"
        # torchrun's store outlives the attempts of an elastic run
        self.prefix = f"rap-lightning/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
        self.hosts = [""] * size
        agents = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun opens it, else rank zero does

        def connect(opens: bool) -> TCPStore:
            return TCPStore(
                environment.main_address, environment.main_port, None, opens,
                timeout=datetime.timedelta(seconds=timeout), wait_for_workers=False, multi_tenant=True,
            )  # fmt: skip

        try:
            self.store = connect(self.rank == 0 and not agents)  # held: rank zero's is where the others connect to
            self.beats = connect(False)  # of the thread
        except torch.distributed.DistError as error:
            raise RanksError(
                f"rank {self.rank} ({socket.gethostname()}) found nobody at {self.address} within {timeout:.0f} s. Is "
                "rank 0's node up, is the address right, and is the port open?"
            ) from error
        self.beats.set_timeout(datetime.timedelta(seconds=min(10.0, timeout)))

    def key(self, kind: str, number: int) -> str:
        """Of a rank, or a node."""
        return f"{self.prefix}/{kind}/{number}"

    def keys(self, kind: str) -> list[str]:
        """Of every rank."""
        return [self.key(kind, rank) for rank in range(self.size)]

    def call_roll(self, facts: dict[str, str]) -> None:
        """Wait until every rank is there, and about to do what rank zero is.

        Raises:
            RanksError: some never came; says which.
            ConfigError: a rank has other facts.
        """
        mine = self._own_name()
        self.store.set(self.key("beat", self.rank), "0")
        if self.rank == 0:
            self.store.set(f"{self.prefix}/facts", json.dumps(facts))
        self.store.set(self.key("host", self.rank), mine)
        self._wait(self.keys("host"), "started on every node, with the same main address and number of nodes")
        self.hosts = [host.decode() for host in self.store.multi_get(self.keys("host"))]
        self._compare("start", facts, json.loads(self.store.get(f"{self.prefix}/facts")))

    def compare(self, name: str, facts: dict[str, str]) -> None:
        """Raise ConfigError on every rank where one has other facts than rank zero."""
        key = f"{self.prefix}/facts/{name}"
        if self.rank == 0:
            self.store.set(key, json.dumps(facts))
        self._wait([key], "")
        self._compare(name, facts, json.loads(self.store.get(key)))

    def _compare(self, name: str, mine: dict[str, str], first: dict[str, str]) -> None:
        kind = f"differs-{name}"
        self.store.set(self.key(kind, self.rank), difference(mine, first))
        self._wait(self.keys(kind), "")
        for rank, text in enumerate(self.store.multi_get(self.keys(kind))):
            if text:
                error = ConfigError(
                    f"rank {rank} on {self.hosts[rank]} is about to do something else than rank 0 on {self.hosts[0]}. "
                    f"{text.decode()}. Start every node with the same command, config, data and packages."
                )
                error.on_all_ranks, error.saves = True, False
                raise error

    def _wait(self, keys: list[str], asked: str) -> None:
        """Until all keys are there; says on the way, and at the end, whose are not."""
        deadline = time.monotonic() + self.timeout
        tell = time.monotonic() + 15
        missing = keys
        while missing := [key for key in missing if not self.store.check([key])]:
            ranks = named([int(key.rpartition("/")[2]) for key in missing] if len(keys) > 1 else [0])
            if time.monotonic() > deadline:
                raise RanksError(
                    f"{self.size - len(missing)} of {self.size} processes came within {self.timeout:.0f} s; missing: "
                    f"{ranks}. {f'Was the command {asked}?' if asked else ''}".strip()
                )
            if time.monotonic() > tell and self.rank == 0:
                print(f"waiting for {ranks}", file=sys.stderr, flush=True)
                tell += 15
            time.sleep(0.1)

    def _own_name(self) -> str:
        """This host's name, and the address by which it reaches the others."""
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, suppress(OSError):
            probe.connect((self.store.host, self.store.port))  # sends nothing
            return f"{socket.gethostname()} ({probe.getsockname()[0]})"
        return socket.gethostname()


class Watch:
    """Signs of life, in a thread: rank zero waits for everybody's, the others for rank zero's.

    Args:
        meeting: where they are left.
        patience: seconds without a sign after which a rank counts as lost.
        end: what ends this process when it doesn't end by itself.
    """

    def __init__(self, meeting: Meeting, patience: float, end: Callable[[int], Any] = os._exit) -> None:
        self.meeting, self.patience, self.end = meeting, patience, end
        self.verdict = ""
        self._verdict_key = f"{meeting.prefix}/verdict"
        self._stopped, self._found, self._lock = threading.Event(), threading.Event(), threading.Lock()
        self._saying, self._said = threading.Lock(), False  # the thread and the run may come to it at once
        threading.Thread(target=self._run, name="ranks", daemon=True).start()

    def stop(self) -> None:
        """All went well here: from now on silence is no sign. Rank zero waits for the others, whose store it holds."""
        if self._stopped.is_set():
            return
        self._stopped.set()
        with suppress(RuntimeError), self._lock:
            self._set_beat(DONE)
            deadline = time.monotonic() + self.patience
            while self.meeting.rank == 0 and time.monotonic() < deadline:
                if all(beat == DONE.encode() for beat in self.meeting.beats.multi_get(self.meeting.keys("beat"))):
                    return
                time.sleep(0.05)

    def failed(self, message: str) -> str:
        """Leave this rank's error for the others; what another had left before it, empty where this was the first."""
        mine = f"{self._name(self.meeting.rank)} failed: {message[:2000]}"
        self._stopped.set()
        with suppress(RuntimeError), self._lock:
            found: str = self.meeting.beats.compare_set(self._verdict_key, "", mine).decode()
            return "" if found == mine else found
        return ""

    def explain(self) -> str:
        """Who was lost, if that turns out within the patience; empty where everybody is still there."""
        self._found.wait(self.patience + 2 * BEAT)
        return self.verdict

    def say(self, text: str) -> None:
        """Print why the run ends, and leave word that this node has said it; what comes second is not printed."""
        with self._saying:
            if self._said:
                return
            self._said = True
            print(f"error: {text}", file=sys.stderr, flush=True)
        with suppress(RuntimeError), self._lock:
            self.meeting.beats.set(self.meeting.key("told", self.meeting.node), "1")

    def is_told(self) -> bool:
        """Whether this node says it, within the patience: its first process may be slow to come to it."""
        deadline = time.monotonic() + self.patience
        with suppress(RuntimeError):
            while time.monotonic() < deadline:
                with self._lock:  # not for all of the time: signs of life go on meanwhile
                    if self.meeting.beats.check([self.meeting.key("told", self.meeting.node)]):
                        return True
                time.sleep(0.1)
        return False

    def linger(self) -> None:
        """The store goes with rank zero: let the others read first."""
        if self.meeting.rank == 0:
            time.sleep(2 * BEAT)

    def _set_beat(self, beat: str) -> None:
        self.meeting.beats.set(self.meeting.key("beat", self.meeting.rank), beat)

    def _name(self, rank: int) -> str:
        return named([rank], self.meeting.hosts)

    def _run(self) -> None:
        meeting, number = self.meeting, 0
        watched = list(range(1, meeting.size)) if meeting.rank == 0 else [0]
        seen = dict.fromkeys(watched, (b"", time.monotonic()))
        reached = time.monotonic()
        while not self._stopped.wait(BEAT):
            number += 1
            try:
                with self._lock:
                    self._set_beat(str(number))
                    verdict = meeting.beats.get(self._verdict_key) if meeting.beats.check([self._verdict_key]) else b""
                    beats = meeting.beats.multi_get([meeting.key("beat", rank) for rank in watched])
            except RuntimeError:
                if time.monotonic() - reached >= min(self.patience, 3 * BEAT):
                    where = f"{self._name(0)}, where the ranks meet ({meeting.address})"
                    self._conclude(f"{where}, can't be reached any more")
                    return
                continue
            reached = time.monotonic()
            for rank, beat in zip(watched, beats, strict=True):
                if beat == DONE.encode() or beat != seen[rank][0]:
                    seen[rank] = beat, reached
            silent = [rank for rank, (_, since) in seen.items() if reached - since > self.patience]
            if silent and not verdict:
                text = f"no sign of {named(silent, meeting.hosts)} for {self.patience:.0f} s"
                with suppress(RuntimeError), self._lock:
                    verdict = meeting.beats.compare_set(self._verdict_key, "", text)
            if verdict:
                self._conclude(verdict.decode())
                return

    def _conclude(self, verdict: str) -> None:
        self.verdict = verdict
        if self._stopped.is_set():
            return
        if self.meeting.speaks:  # at once: a launcher may end this process as well
            self.say(f"{verdict}. {ADVICE}")
        self._found.set()
        # a collective that waits for the lost may do so for half an hour: the process ends without it
        if not self._stopped.wait(GRACE):
            self.end(STATUS)


def by_others(error: BaseException) -> bool:
    """Whether an error only says that other ranks don't answer."""
    if isinstance(error, torch.distributed.DistError):
        return True
    words = r"gloo|nccl|connection (closed|reset)"
    return isinstance(error, RuntimeError) and re.search(words, str(error), re.I) is not None


def named(ranks: list[int], hosts: list[str] | None = None) -> str:
    """``rank 3 on node-1`` or ``ranks 1, 2``; of many, the first."""
    shown = ", ".join(f"{r} on {hosts[r]}" if hosts is not None else str(r) for r in ranks[:8])
    more = f" and {len(ranks) - 8} more" if len(ranks) > 8 else ""
    return f"rank{'s' * (len(ranks) > 1)} {shown}{more}"


class Together(pl.Callback):
    """Calls the roll before the process group starts, compares what the ranks are about to do, and watches them.

    Args:
        facts: what must be the same on every rank beside the data: the parsed config, say.
    """

    def __init__(self, facts: dict[str, str] | None = None) -> None:
        self.facts = facts or {}
        self.meeting: Meeting | None = None
        self.watch: Watch | None = None
        self.alone: bool | None = None  # whether what ended the run did so on this rank only

    def attach(self, strategy: Any) -> None:
        """Meet before the strategy starts its process group."""
        start = strategy.setup_environment

        def meet_first() -> None:
            self._meet(strategy)
            start()

        strategy.setup_environment = meet_first

    def _meet(self, strategy: Any) -> None:
        environment = getattr(strategy, "cluster_environment", None)
        size = int(getattr(strategy, "num_nodes", 1) or 1) * int(getattr(strategy, "num_processes", 1) or 1)
        if environment is None or size == 1 or torch.distributed.is_initialized() or self.watch is not None:
            return
        if hasattr(strategy, "set_world_ranks"):
            strategy.set_world_ranks()
        given = getattr(strategy, "_timeout", None)
        timeout = given.total_seconds() if given is not None else 1800.0
        self.meeting = Meeting(environment, size, timeout)
        self.meeting.call_roll(self.facts | versions())
        self.watch = Watch(self.meeting, min(PATIENCE, timeout))

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Compare the data, when they are known and no model is loaded yet."""
        data: Any = getattr(trainer, "datamodule", None)
        if self.meeting is not None and isinstance(data, PreferenceDataModule):
            self.meeting.compare(f"data-{stage}", data.digests())

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Whoever fails alone tells the others at once."""
        self.alone = _alone(exception)
        if self.watch is not None and self.alone:
            self._failed(exception)

    def _failed(self, error: BaseException) -> str:
        """Tell the others; what another rank had told before, empty where this was the first."""
        assert self.watch is not None, "known to those who call this"
        text = "stopped by Ctrl-C" if isinstance(error, KeyboardInterrupt) else str(error) or type(error).__name__
        if isinstance(error, Exception) and not isinstance(error, UserError):
            text = f"{type(error).__name__}: {text}"
        return self.watch.failed(text)

    @contextmanager
    def explained(self) -> Iterator[None]:
        """A block in which the whole run takes place: what ends it is said once on each node.

        An error of the user's is printed by the first process of each node, whichever rank it is of; a stack by the
        rank that was the first to fail.
        """
        try:
            yield
        except BaseException as error:
            if self.meeting is None or (isinstance(error, SystemExit) and not error.code):
                raise
            if self.watch is None:
                self._leave_early(self.meeting, error)
            else:
                self._leave(self.meeting, self.watch, error)
            raise
        if self.watch is not None:
            self.watch.stop()

    @staticmethod
    def _leave_early(meeting: Meeting, error: BaseException) -> None:
        """Before the roll has been called there is nobody to watch."""
        if by_others(error):
            error = RanksError(f"rank 0 at {meeting.address} has left")
        if isinstance(error, UserError):
            if meeting.speaks:
                print(f"error: {error}", file=sys.stderr, flush=True)
            time.sleep(BEAT)  # the others read from rank zero's store, and a launcher ends all with the first that ends
            raise SystemExit(2) from None

    def _leave(self, meeting: Meeting, watch: Watch, error: BaseException) -> None:
        if by_others(error):
            if watch.explain():
                sys.stdout.flush(), sys.stderr.flush()
                watch.linger()
                watch.end(STATUS)  # at once: what a process group cleans up at exit waits for the lost as well
            return
        # Lightning makes Ctrl-C an exit, which doesn't say who else has it
        alone = self.alone if isinstance(error, SystemExit) and self.alone is not None else _alone(error)
        before = self._failed(error) if alone else ""
        shown = False
        if meeting.speaks and isinstance(error, Exception) and (before or isinstance(error, UserError)):
            # ranks that fail at once mostly say the same, and then it is this node's error too
            watch.say(str(error) if str(error) in before or not before else f"{before}. {ADVICE}")
            shown = True
        elif isinstance(error, UserError):
            shown = watch.is_told()
        if alone:
            watch.linger()
        else:
            watch.stop()
        if shown or (before and isinstance(error, Exception) and not isinstance(error, UserError)):
            raise SystemExit(2) from None


def _alone(error: BaseException) -> bool:
    """Whether other ranks can't know of it."""
    return not (by_others(error) or getattr(error, "on_all_ranks", False))
