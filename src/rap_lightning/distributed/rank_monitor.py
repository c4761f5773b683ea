"""Which rank of a distributed run is missing, differs, failed or was lost.

torch's own messages do not name that rank. ``init_process_group`` times out with a count of clients. A collective whose
peer has died fails with "connection closed by peer" (gloo), or after the process group's timeout (NCCL: 30 minutes by
default). torchrun names failed processes of its own node; SLURM and Lightning's launcher name none. So the ranks also
meet in a key-value store, ``torch.distributed.TCPStore`` at the main address, before the process group starts.

In order: `RankStore` connects the ranks and compares what they are about to run, `RankMonitor` exchanges heartbeats in
a thread and reports each failure once per node.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from rap_lightning.datamodule import PreferenceDataModule
from rap_lightning.distributed.consistency import device_name, difference, package_versions
from rap_lightning.errors import ConfigError, UserError

HEARTBEAT = 2.0
"""Seconds between two heartbeats."""
PATIENCE = 60.0
"""Seconds without a heartbeat after which a rank counts as lost; less where the strategy's timeout is shorter."""
GRACE = 10.0
"""Seconds that a process has to end by itself once another rank is lost."""
LOST_RANK_STATUS = 3
"""Exit code of a process that ends because another rank failed or was lost."""
ADVICE = "This run ends; to resume it, pass its newest checkpoint as --ckpt_path."


class RanksError(UserError):
    """A rank did not connect, or exited before the run began."""

    on_all_ranks = True


class RankStore:
    """The ranks of a run in a key-value store at the main address.

    Args:
        environment: Lightning's cluster environment, with its ranks set.
        size: number of ranks.
        timeout: seconds that ranks wait for each other.

    Attributes:
        keys: the store itself. Its operations are safe in any thread, and raise DistError where it cannot be reached.

    Raises:
        RanksError: nothing answers at the address.
    """

    def __init__(self, environment: Any, size: int, timeout: float) -> None:
        self.rank, self.local_rank = environment.global_rank(), environment.local_rank()
        self.node, self.size, self.timeout = environment.node_rank(), size, timeout
        self.main = (environment.main_address, environment.main_port)
        self.address = "{}:{}".format(*self.main)
        self._hosts, self._comparisons = [""] * size, 0
        hosted = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # by torchrun; else rank 0 hosts it
        try:
            server = TCPStore(
                *self.main, None, self.rank == 0 and not hosted,
                timeout=timedelta(seconds=timeout), wait_for_workers=False, multi_tenant=True,
            )  # fmt: skip
        except torch.distributed.DistError as error:
            raise RanksError(
                f"rank {self.rank} ({socket.gethostname()}): timed out after {timeout:.0f} s connecting to "
                f"{self.address}. Check that rank 0's node is up, the address is right, and the port is open."
            ) from error
        # torchrun keeps its store over the restarts of an elastic run
        restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self.keys = PrefixStore(f"rap-lightning/{restart}", server)

    def call_roll(self) -> None:
        """Wait until every rank has connected. Raises RanksError, which names the missing ones."""
        host = socket.gethostname()
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, suppress(OSError):
            probe.connect(self.main)  # sends nothing
            host += f", {probe.getsockname()[0]}"
        self.keys.set(f"heartbeat/{self.rank}", "0")
        self._hosts = self._gather("host", host)
        self.keys.set_timeout(timedelta(seconds=min(10.0, self.timeout)))  # of later operations, by the thread too

    def require_same(self, what: str, facts: dict[str, str]) -> None:
        """Raise ConfigError on every rank where one has other facts, short texts by name, than rank 0."""
        self._comparisons += 1  # every rank makes the same ones, in the same order
        key = f"facts/{self._comparisons}"
        if self.rank == 0:
            self.keys.set(key, json.dumps(facts))
        self._wait([key])
        mine = difference(facts, json.loads(self.keys.get(key)))
        for rank, text in enumerate(self._gather(f"difference/{self._comparisons}", mine)):
            if text:
                error = ConfigError(
                    f"{self.names([rank])}: {what} differs from {self.names([0])} in {text}. Start all ranks with the "
                    "same command, config, data and package versions."
                )
                error.on_all_ranks, error.saves = True, False
                raise error

    def report_devices(self, device: str) -> None:
        """Warn on rank 0 where ranks have different GPUs: each step takes as long as on the slowest, in its memory.

        They are no error: clusters have such nodes, and the run computes the same up to the kernels' rounding.
        """
        ranks_by_device: dict[str, list[int]] = {}
        for rank, name in enumerate(self._gather("device", device)):
            ranks_by_device.setdefault(name, []).append(rank)
        if self.rank == 0 and len(ranks_by_device) > 1:
            found = "; ".join(f"{name}: {self.names(ranks)}" for name, ranks in ranks_by_device.items())
            rank_zero_warn(
                f"ranks have different devices ({found}). Each step takes as long as on the slowest one, batches must "
                "fit the smallest, and attention may be computed by different kernels, which round differently."
            )

    def names(self, ranks: Sequence[int]) -> str:
        """``rank 3 (node-b, 10.0.0.4)`` or ``ranks 1, 2``; of many, the first."""
        shown = ", ".join(f"{rank} ({host})" if (host := self._hosts[rank]) else str(rank) for rank in ranks[:8])
        more = f" and {len(ranks) - 8} more" if len(ranks) > 8 else ""
        return f"rank{'s' * (len(ranks) > 1)} {shown}{more}"

    def _gather(self, name: str, value: str) -> list[str]:
        """A short text of each rank, in the order of the ranks."""
        keys = [f"{name}/{rank}" for rank in range(self.size)]
        self.keys.set(keys[self.rank], value)
        self._wait(keys)
        return [text.decode() for text in self.keys.multi_get(keys)]

    def _wait(self, keys: list[str]) -> None:
        """Wait for one key of each rank, from rank 0 on. Polls: a blocking wait would hold up the heartbeats."""
        started, notices = time.monotonic(), 1
        try:
            while not self.keys.check(keys):
                waited = time.monotonic() - started
                if waited > min(self.timeout, 15 * notices):
                    missing = [rank for rank, key in enumerate(keys) if not self.keys.check([key])]
                    if waited > self.timeout:
                        raise RanksError(
                            f"{len(keys) - len(missing)} of {len(keys)} ranks answered within {self.timeout:.0f} s; "
                            f"missing: {self.names(missing)}. Start the same command on every node, with the same main "
                            "address and number of nodes."
                        )
                    if self.rank == 0:
                        print(f"waiting for {self.names(missing)}", file=sys.stderr, flush=True)
                    notices += 1
                time.sleep(0.1)
        except torch.distributed.DistError as error:
            raise RanksError(f"{self.names([0])}, which hosts {self.address}, has exited.") from error


class RankMonitor(pl.Callback):
    """Compare the ranks before a run begins, watch them while it lasts, and report failures once per node.

    Rank 0 expects every rank's heartbeat, the other ranks expect rank 0's. The first failure, or the first rank whose
    heartbeats stop, is the verdict: every process reads it, the first of each node prints it, and all of them end.

    Args:
        facts: what must be equal on all ranks apart from the data, as short texts by name: the parsed config.
        end: ends a process that cannot end by itself.
    """

    def __init__(self, facts: dict[str, str] | None = None, end: Callable[[int], Any] = os._exit) -> None:
        self.facts, self._end = facts or {}, end
        self.store: RankStore | None = None
        self.patience = PATIENCE
        self._stopped, self._lost = threading.Event(), threading.Event()
        self._printing, self._printed = threading.Lock(), False  # by the thread or by the run, whichever is first
        self._reached = 0.0  # time.monotonic() of the last answer of the store
        self._alone: bool | None = None  # whether what ended the run was raised on this rank only

    def attach(self, strategy: Any) -> None:
        """Connect the ranks just before the strategy starts its process group: no hook of a callback is that early."""
        start = strategy.setup_environment

        def connect_first() -> None:
            self._connect(strategy)
            start()

        strategy.setup_environment = connect_first

    def _connect(self, strategy: Any) -> None:
        environment = getattr(strategy, "cluster_environment", None)
        size = int(getattr(strategy, "num_nodes", 1) or 1) * int(getattr(strategy, "num_processes", 1) or 1)
        if environment is None or size == 1 or torch.distributed.is_initialized() or self.store is not None:
            return
        if hasattr(strategy, "set_world_ranks"):
            strategy.set_world_ranks()
        timeout = getattr(strategy, "_timeout", None) or timedelta(minutes=30)
        store = RankStore(environment, size, timeout.total_seconds())
        self.begin(store)
        self._watch_children(strategy, store)

    def begin(self, store: RankStore) -> None:
        """Call the roll, start to watch the ranks, and compare what they are about to run."""
        self.store, self.patience = store, min(PATIENCE, store.timeout)
        store.call_roll()
        self._reached = time.monotonic()
        for watch in (self._watch, self._watch_store):
            threading.Thread(target=watch, args=(store,), name="rank-monitor", daemon=True).start()
        store.require_same("config", self.facts | package_versions())
        store.report_devices(device_name(store.local_rank))

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Compare the data: they have been read, and no model is loaded yet."""
        data: Any = getattr(trainer, "datamodule", None)
        if self.store is not None and isinstance(data, PreferenceDataModule):
            self.store.require_same("data", data.digests())

    # -- the thread ---------------------------------------------------------------------------------------------------

    def _watch(self, store: RankStore) -> None:
        watched = range(1, store.size) if store.rank == 0 else [0]
        last = dict.fromkeys(watched, (b"", self._reached))  # each rank's last heartbeat, and when it changed
        for number in itertools.count(1):
            try:
                store.keys.set(f"heartbeat/{store.rank}", str(number))
                verdict = store.keys.get("verdict") if store.keys.check(["verdict"]) else b""
                beats = store.keys.multi_get([f"heartbeat/{rank}" for rank in watched])
            except torch.distributed.DistError:
                if time.monotonic() - self._reached >= min(self.patience, 3 * HEARTBEAT):
                    self._end_unreachable(store)
                    return
            else:
                reached = self._reached = time.monotonic()
                for rank, beat in zip(watched, beats, strict=True):
                    if beat != last[rank][0]:
                        last[rank] = beat, reached
                silent = [rank for rank, (_, since) in last.items() if reached - since > self.patience]
                if silent and not verdict:
                    text = f"no sign of life from {store.names(silent)} for {self.patience:.0f} s"
                    with suppress(torch.distributed.DistError):
                        verdict = store.keys.compare_set("verdict", "", text)
                if verdict:
                    self._end_run(store, verdict.decode())
                    return
            if self._stopped.wait(HEARTBEAT):
                return

    def _watch_store(self, store: RankStore) -> None:
        """Watch the other thread: where a link is cut, it waits for the store's answer until TCP gives up."""
        while not self._stopped.wait(HEARTBEAT):
            if time.monotonic() - self._reached > self.patience:
                self._end_unreachable(store)
                return

    def _watch_children(self, strategy: Any, store: RankStore) -> None:
        """Watch the processes that Lightning's launcher has started, in the place of its own observer.

        That kills this process as soon as one of them has ended, before it can say why and with another exit code. It
        stops when it has no processes to look at (Lightning 2.6.6).
        """
        launcher = getattr(strategy, "launcher", None)
        observed = getattr(launcher, "procs", None)
        if launcher is None or not observed:
            return
        children = launcher.procs = list(observed)
        observed.clear()

        def watch() -> None:
            while not self._stopped.wait(1.0):
                for rank, child in enumerate(children, store.rank + 1):
                    if code := child.poll():  # a rank that fails with an error of its own has published that
                        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
                        with suppress(torch.distributed.DistError):
                            store.keys.compare_set("verdict", "", f"{store.names([rank])} {how}")
                        return

        threading.Thread(target=watch, name="child-monitor", daemon=True).start()

    def _end_unreachable(self, store: RankStore) -> None:
        self._end_run(store, f"{store.names([0])}, which hosts {store.address}, cannot be reached any more")

    def _end_run(self, store: RankStore, verdict: str) -> None:
        if self._stopped.is_set():
            return
        if store.local_rank == 0:  # at once: the launcher may end this process too
            self._print(store, f"{verdict}. {ADVICE}")
        self._lost.set()
        # a collective that waits for the lost rank may do so for half an hour: the process ends without it
        if not self._stopped.wait(GRACE):
            self._end(LOST_RANK_STATUS)

    # -- the end of a run ---------------------------------------------------------------------------------------------

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Publish an error of this rank at once, so that the others do not wait for it."""
        self._alone = not (is_from_other_ranks(exception) or getattr(exception, "on_all_ranks", False))
        if self.store is not None and self._alone:
            self._publish(self.store, exception)

    @contextmanager
    def reporting(self) -> Iterator[None]:
        """A block in which the whole run takes place: what ends it is printed once on each node.

        The first process of a node prints any rank's UserError; a traceback is printed by the rank it is of.
        """
        try:
            yield
            if self.store is not None and torch.distributed.is_initialized():
                torch.distributed.barrier()  # the store ends with rank 0
        except BaseException as error:
            if self.store is None or (isinstance(error, SystemExit) and not error.code):
                raise
            if self._report(self.store, error):
                raise SystemExit(2) from None
            raise
        finally:
            self._stopped.set()

    def _report(self, store: RankStore, error: BaseException) -> bool:
        """Report what ended the run; whether this process has nothing more to print."""
        if is_from_other_ranks(error):
            if self._lost.wait(self.patience + 2 * HEARTBEAT):
                sys.stdout.flush(), sys.stderr.flush()
                self._keep_store(store)
                self._end(LOST_RANK_STATUS)  # at once: the process group's cleanup would wait for the lost rank too
            return False
        # Lightning turns Ctrl-C into SystemExit, which does not say who else received it: on_exception has seen it
        alone = not getattr(error, "on_all_ranks", False)
        alone = self._alone if isinstance(error, SystemExit) and self._alone is not None else alone
        first = self._publish(store, error) if alone else ""
        if not isinstance(error, Exception):
            silent = False  # Ctrl-C has its own message and exit code
        elif store.local_rank == 0 and (first or isinstance(error, UserError)):
            # ranks that fail at the same time mostly fail alike, and then it is this node's error too
            self._print(store, str(error) if not first or str(error) in first else f"{first}. {ADVICE}")
            silent = True
        else:
            silent = self._is_printed(store) if isinstance(error, UserError) else bool(first)
        if alone or not torch.distributed.is_initialized():
            self._keep_store(store)
        else:  # an error of all ranks
            with suppress(RuntimeError):
                torch.distributed.barrier()
        return silent

    def _publish(self, store: RankStore, error: BaseException) -> str:
        """Set this rank's error as the verdict; return that of another rank which failed earlier, or nothing."""
        text = "stopped by Ctrl-C" if isinstance(error, KeyboardInterrupt) else str(error) or type(error).__name__
        if isinstance(error, Exception) and not isinstance(error, UserError):
            text = f"{type(error).__name__}: {text}"
        mine = f"{store.names([store.rank])} failed: {text[:2000]}"
        self._stopped.set()
        with suppress(torch.distributed.DistError):
            first: str = store.keys.compare_set("verdict", "", mine).decode()
            return "" if first == mine else first
        return ""

    def _print(self, store: RankStore, text: str) -> None:
        """Print why the run ends, for this node; later reasons are not printed."""
        with self._printing:
            if self._printed:
                return
            self._printed = True
            print(f"error: {text}", file=sys.stderr, flush=True)

        def publish() -> None:
            with suppress(torch.distributed.DistError):
                store.keys.set(f"printed/{store.node}", "1")

        publishing = threading.Thread(target=publish, daemon=True)
        publishing.start()
        publishing.join(HEARTBEAT)  # not longer: without a link it would wait until TCP gives up

    def _is_printed(self, store: RankStore) -> bool:
        """Whether this node's first process prints the error; wait for it, since a launcher ends all with the first."""
        deadline = time.monotonic() + self.patience
        with suppress(torch.distributed.DistError):
            while time.monotonic() < deadline:
                if store.keys.check([f"printed/{store.node}"]):
                    return True
                time.sleep(0.1)
        return False

    def _keep_store(self, store: RankStore) -> None:
        """Let the other ranks read the verdict: the store ends with rank 0."""
        if store.rank == 0:
            time.sleep(2 * HEARTBEAT)


def is_from_other_ranks(error: BaseException) -> bool:
    """Whether an error only says that other ranks do not answer.

    NCCL raises DistBackendError; gloo's errors are plain RuntimeErrors, known by their text alone.
    """
    if isinstance(error, torch.distributed.DistError):
        return True
    words = r"gloo|nccl|connection (closed|reset)"
    return isinstance(error, RuntimeError) and re.search(words, str(error), re.I) is not None
