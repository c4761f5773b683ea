"""Many processes, one run: who is there, whether all are about to do the same, and who was lost.

Collectives fail in words of their own ("connection closed by peer"), late, and on every rank but the one that matters.
So the ranks also meet in the key-value store that torch.distributed starts with: each says that it is there, says again
every few seconds that it still is, and leaves its error when it fails. What the others print then names a rank and its
host.
"""

from __future__ import annotations

import datetime
import hashlib
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from rap_lightning.datamodule import PreferenceDataModule
from rap_lightning.errors import ConfigError, UserError
from rap_lightning.module import PreferenceModule

PACKAGES = ("rap-lightning", "torch", "transformers", "peft", "lightning")

BEAT = 2.0
"""Seconds between two signs of life."""
PATIENCE = 30.0
"""Seconds without one after which a rank counts as lost; less where the strategy's time-out is shorter."""
GRACE = 10.0
"""Seconds that a rank has to end by itself once somebody is lost."""
PREFIX = "rap-lightning"
STATUS = 3
"""What a process that lost others exits with."""
ADVICE = "This run ends; go on from its newest checkpoint with --ckpt_path."
OF_A_NODE = (
    "config",
    "trainer.default_root_dir",
    "model.policy.path",
    "data.source",
    "model.reference.init_args.folder",
)
"""Options that may differ from node to node: where things lie. What lies there is compared itself."""


class RanksError(UserError):
    """A rank never came, or was lost."""


def connect(environment: Any, timeout: float) -> TCPStore:
    """A connection of our own to the store at the main address; rank zero opens it where torchrun hasn't."""
    agents = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    hosts = environment.global_rank() == 0 and not agents
    return TCPStore(
        environment.main_address, environment.main_port, None, hosts,
        timeout=datetime.timedelta(seconds=timeout), wait_for_workers=False, multi_tenant=True,
    )  # fmt: skip


def roll_call(store: TCPStore, rank: int, size: int, timeout: float) -> list[str]:
    """The host of every rank, once all are there.

    Raises:
        RanksError: some never came; says which.
    """
    store.set(f"{PREFIX}/host/{rank}", own_name(store))
    deadline = time.monotonic() + timeout
    missing = list(range(size))
    told = time.monotonic()
    while missing:
        missing = [r for r in missing if not store.check([f"{PREFIX}/host/{r}"])]
        if missing and time.monotonic() > deadline:
            raise RanksError(
                f"{size - len(missing)} of {size} processes came within {timeout:.0f} s; missing: {_ranks(missing)}. "
                "Was the command started on every node, with the same main address and number of nodes?"
            )
        if missing and time.monotonic() - told > 15:
            told = time.monotonic()
            if rank == 0:
                print(f"waiting for {_ranks(missing)}", file=sys.stderr, flush=True)
        if missing:
            time.sleep(0.2)
    return [store.get(f"{PREFIX}/host/{r}").decode() for r in range(size)]


def own_name(store: TCPStore) -> str:
    """This host's name, and the address by which it reaches the others."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((store.host, store.port))  # sends nothing
            return f"{socket.gethostname()} ({probe.getsockname()[0]})"
        except OSError:
            return socket.gethostname()


class Watch:
    """Signs of life of every rank, in a thread.

    Args:
        store: a connection that nobody else uses.
        rank, hosts: this rank, and the host of each.
        address: of the store, for messages.
        patience: seconds without a sign after which a rank counts as lost.
        end: what ends this process when it doesn't end by itself.
    """

    def __init__(
        self, store: TCPStore, rank: int, hosts: list[str], address: str, patience: float,
        end: Callable[[int], Any] = os._exit,
    ) -> None:  # fmt: skip
        self.store, self.rank, self.hosts, self.address = store, rank, hosts, address
        self.patience, self.end = patience, end
        self.verdict = ""
        self.told = self.first = False
        self._stopped = threading.Event()
        self._found = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="ranks", daemon=True)
        self._speaks = rank == 0 or hosts.index(hosts[rank]) == rank  # one on each host

    def start(self) -> None:
        """From now on."""
        self._thread.start()

    def stop(self) -> None:
        """All went well here: from now on silence is no sign."""
        if self._stopped.is_set():
            return
        self._stopped.set()
        self._try(lambda: self.store.set(self._key("done"), "1"))
        others = [f"{PREFIX}/done/{r}" for r in range(len(self.hosts))]
        deadline = time.monotonic() + 3 * BEAT
        while self.rank == 0 and time.monotonic() < deadline:  # the store may go with this process
            try:
                if all(self.store.check([key]) for key in others):
                    return
            except RuntimeError:
                return
            time.sleep(0.05)

    def failed(self, message: str) -> None:
        """Leave this rank's error for the others, unless another was first."""

        def leave() -> None:
            mine = f"{self.rank}\n{message[:2000]}"
            self.first = self.store.compare_set(f"{PREFIX}/failed", "", mine).decode() == mine

        self._stopped.set()
        self._try(leave)
        if self.rank == 0:
            time.sleep(2 * BEAT)  # the store may go with this process, and the others must have read

    def explain(self) -> str:
        """Who was lost, if that turns out within the patience; empty where everybody is still there."""
        self._found.wait(self.patience + 2 * BEAT)
        return self.verdict

    def _key(self, kind: str) -> str:
        return f"{PREFIX}/{kind}/{self.rank}"

    def _try(self, call: Callable[[], Any]) -> None:
        try:
            with self._lock:
                call()
        except RuntimeError:  # the store is gone: there is nobody to tell
            pass

    def _run(self) -> None:
        size, number = len(self.hosts), 0
        seen = dict.fromkeys(range(size), (b"", time.monotonic()))
        lost_store: float | None = None
        while not self._stopped.wait(BEAT):
            number += 1
            try:
                with self._lock:
                    self.store.set(self._key("beat"), str(number))
                    failed = self.store.get(f"{PREFIX}/failed") if self.store.check([f"{PREFIX}/failed"]) else b""
                    if failed:
                        rank, _, message = failed.decode().partition("\n")
                        self._conclude(f"{self._who(int(rank))} failed: {message}")
                        return
                    lost_store = None
                    for r in seen if self._speaks else [0]:
                        beat = self.store.get(f"{PREFIX}/beat/{r}") if self.store.check([f"{PREFIX}/beat/{r}"]) else b""
                        if beat != seen[r][0] or self.store.check([f"{PREFIX}/done/{r}"]):
                            seen[r] = (beat, time.monotonic())
            except RuntimeError:
                lost_store = lost_store or time.monotonic()
                if time.monotonic() - lost_store >= min(self.patience, 3 * BEAT):
                    self._conclude(f"{self._who(0)}, where the ranks meet ({self.address}), can't be reached any more")
                    return
                continue
            silent = [r for r, (_, since) in seen.items() if time.monotonic() - since > self.patience]
            if self._speaks and silent:
                self._conclude(f"no sign of {_ranks(silent, self.hosts)} for {self.patience:.0f} s")
                return

    def _conclude(self, verdict: str) -> None:
        self.verdict = verdict
        if self._speaks and not self._stopped.is_set():  # at once: a launcher may end this process as well
            self.told = True
            print(f"error: {verdict}. {ADVICE}", file=sys.stderr, flush=True)
        self._found.set()
        # a collective that waits for the lost may do so for half an hour: the process ends without it
        if not self._stopped.wait(GRACE):
            self.end(STATUS)

    def _who(self, rank: int) -> str:
        return _ranks([rank], self.hosts)


def by_others(error: BaseException) -> bool:
    """Whether an error only says that other ranks don't answer."""
    if isinstance(error, torch.distributed.DistError):
        return True
    return (
        isinstance(error, RuntimeError)
        and re.search("gloo|nccl|connection (closed|reset)", str(error), re.I) is not None
    )


def _ranks(ranks: list[int], hosts: list[str] | None = None) -> str:
    shown = ", ".join(f"{r} on {hosts[r]}" if hosts is not None else str(r) for r in ranks[:8])
    more = f" and {len(ranks) - 8} more" if len(ranks) > 8 else ""
    return f"rank{'s' * (len(ranks) > 1)} {shown}{more}"


class Together(pl.Callback):
    """Calls the roll before the process group starts, watches the ranks, and compares what they are about to do.

    Args:
        facts: what must be the same on every rank beside data and model: the parsed config, say.
    """

    def __init__(self, facts: dict[str, str] | None = None) -> None:
        self.facts = facts or {}
        self.watch: Watch | None = None
        self._store: TCPStore | None = None

    def attach(self, strategy: Any) -> None:
        """Meet before the strategy starts its process group."""
        start = strategy.setup_environment

        def meet_first() -> None:
            self._meet(strategy)
            start()

        strategy.setup_environment = meet_first

    def _meet(self, strategy: Any) -> None:
        from torch.distributed import DistNetworkError, DistStoreError

        environment = getattr(strategy, "cluster_environment", None)
        size = int(getattr(strategy, "num_nodes", 1) or 1) * int(getattr(strategy, "num_processes", 1) or 1)
        if environment is None or size == 1 or torch.distributed.is_initialized() or self.watch is not None:
            return
        if hasattr(strategy, "set_world_ranks"):
            strategy.set_world_ranks()
        given = getattr(strategy, "_timeout", None)
        timeout = given.total_seconds() if given is not None else 1800.0
        rank = environment.global_rank()
        address = f"{environment.main_address}:{environment.main_port}"
        try:
            self._store = connect(environment, timeout)  # held: rank zero's is where all the others connect to
            hosts = roll_call(self._store, rank, size, timeout)
            mine = connect(environment, timeout)
        except (DistNetworkError, DistStoreError) as error:
            raise RanksError(
                f"rank {rank} ({socket.gethostname()}) found nobody at {address} within {timeout:.0f} s. Is rank 0's "
                "node up, is the address right, and is the port open?"
            ) from error
        mine.set_timeout(datetime.timedelta(seconds=min(10.0, timeout)))
        self.watch = Watch(mine, rank, hosts, address, min(PATIENCE, timeout))
        self.watch.start()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Compare, when the data are known and no model is loaded yet."""
        if trainer.world_size == 1:
            return
        data: Any = getattr(trainer, "datamodule", None)
        facts = self.facts | {f"version of {name}": metadata.version(name) for name in PACKAGES}
        if isinstance(pl_module, PreferenceModule):
            facts |= model_facts(pl_module.policy_config.path)
        if isinstance(data, PreferenceDataModule):
            facts |= data.digests()
        compare(facts, trainer.global_rank, trainer.world_size)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """The first error is everybody's."""
        if self.watch is not None and isinstance(exception, Exception) and not by_others(exception):
            self.watch.failed(str(exception) or type(exception).__name__)

    @contextmanager
    def explained(self) -> Iterator[None]:
        """A block in which the whole run takes place: the error of a lost rank says who was lost, and is told once."""
        try:
            yield
        except Exception as error:
            watch = self.watch
            if watch is None:
                raise
            if by_others(error):
                if not (verdict := watch.explain()):
                    raise
                if not watch.told:
                    print(f"error: {verdict}. {ADVICE}", file=sys.stderr)
                sys.stdout.flush(), sys.stderr.flush()
                watch.end(STATUS)  # at once: what a process group cleans up at exit waits for the lost as well
            if isinstance(error, UserError) and watch.rank > 0 and not watch.first:
                raise SystemExit(2) from None  # another rank's to tell
            raise
        if self.watch is not None:
            self.watch.stop()


def model_facts(path: str) -> dict[str, str]:
    """What can be known of a model's folder without reading its weights; nothing of a Hub id."""
    folder = Path(path)
    if not folder.is_dir():
        return {}
    sizes = {file.name: file.stat().st_size for file in sorted(folder.glob("*.safetensors"))}
    config = (folder / "config.json").read_bytes() if (folder / "config.json").is_file() else b""
    return {
        "model config": hashlib.sha256(config).hexdigest()[:12],
        "model files": hashlib.sha256(str(sizes).encode()).hexdigest()[:12],
    }


def flat(options: Any, prefix: str = "") -> dict[str, str]:
    """Nested options as dotted names, without those that may differ from node to node."""
    if not isinstance(options, dict):
        text = re.sub(r" at 0x[0-9a-f]+", "", str(options))  # where a process happens to hold a default
        return {} if prefix in OF_A_NODE else {prefix: text}
    found: dict[str, str] = {}
    for name, value in options.items():
        found |= {} if f"{prefix}.{name}".strip(".") in OF_A_NODE else flat(value, f"{prefix}.{name}".strip("."))
    return found


def compare(facts: dict[str, str], rank: int, size: int) -> None:
    """Raise ConfigError on every rank where one has another value than rank zero.

    Args:
        facts: name to value or digest. All ranks must have the same names.
        rank, size: of this process.
    """
    everyone: list[Any] = [None] * size
    torch.distributed.all_gather_object(everyone, (socket.gethostname(), facts))
    first = everyone[0][1]
    for other, (host, theirs) in enumerate(everyone):
        names = [name for name in sorted({*first, *theirs}) if first.get(name) != theirs.get(name)]
        if names:
            shown = "; ".join(f"{name}: {theirs.get(name)} there, {first.get(name)} on rank 0" for name in names[:4])
            raise ConfigError(
                f"rank {other} on {host} is about to do something else than rank 0 on {everyone[0][0]}. {shown}. "
                "Start every node with the same command, config, data and packages."
            )
