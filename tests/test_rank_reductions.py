"""What several ranks say to each other within an optimizer step, counted by replacing torch's collectives."""

from __future__ import annotations

import json
import os
import signal
import traceback
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from cli_process import free_port
from conftest import build, make_trainer, sgd
from rap_lightning.callbacks import Guard, WholeSteps
from rap_lightning.losses import DPO
from rap_lightning.strategies import FSDP2
from rap_lightning.training.schedules import ConstantWithWarmup

ACCUMULATE, STEPS = 3, 2


class _Stop(pl.Callback):
    """Sends SIGTERM to rank 1 after the first batch of the second step."""

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if args[-1] == ACCUMULATE and trainer.global_rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)


def _on_a_rank(rank: int, port: int, folder: str, model: str, data: str) -> None:
    """Fit under DDP, under HSDP and under DDP with a signal; what each batch asked of the other rank goes to a file."""
    from lightning.pytorch.strategies import DDPStrategy

    os.environ |= {
        "MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "NODE_RANK": "0",
        "LOCAL_RANK": str(rank),
    }  # fmt: skip
    torch.set_num_threads(1)
    asked: list[str] = []
    for name in ("all_reduce", "broadcast", "all_gather", "barrier"):
        before = getattr(torch.distributed, name)

        def counted(*args: Any, name: str = name, before: Any = before, **options: Any) -> Any:
            size = args[0].numel() if args and isinstance(args[0], torch.Tensor) else 0
            asked.append(f"{name} of {size}" if size < 100 else f"{name} of weights")
            return before(*args, **options)

        setattr(torch.distributed, name, counted)
    found: dict[str, Any] = {}
    try:
        for case in ("ddp", "hsdp", "signal"):
            strategy = FSDP2(shard_size=1) if case == "hsdp" else DDPStrategy(process_group_backend="gloo")
            module, source = build(
                Path(model), Path(data), loss=DPO(0.5), optimizer=sgd, schedule=ConstantWithWarmup(), batch_size=1,
            )  # fmt: skip
            trainer = make_trainer(
                Path(folder) / case, strategy=strategy, devices=2, accumulate_grad_batches=ACCUMULATE,
                max_steps=9 if case == "signal" else STEPS, log_every_n_steps=100, limit_val_batches=0,
                callbacks=[Guard(), WholeSteps(), *([_Stop()] if case == "signal" else [])],
            )  # fmt: skip
            batches: list[list[str]] = []
            loop = trainer.fit_loop.epoch_loop
            advance = loop.advance

            def noted(*args: Any, batches: Any = batches, advance: Any = advance) -> None:
                asked.clear()
                advance(*args)
                batches.append(list(asked))

            loop.advance = noted
            stopped = 0
            try:
                trainer.fit(module, source)
            except SystemExit as stop:
                stopped = int(stop.code or 0)
            found[case] = {"batches": batches, "stopped": stopped, "step": trainer.global_step}
            if case == "hsdp":
                assert module.policy is not None
                weights = {name: p.full_tensor() for name, p in module.policy.named_parameters()}
                torch.save(weights, f"{folder}/hsdp-{rank}.pt")
            elif case == "ddp":
                torch.save(dict(module.policy.named_parameters()), f"{folder}/ddp-{rank}.pt")
    except BaseException:
        found["error"] = traceback.format_exc()
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    os._exit(0)


@pytest.fixture(scope="module")
def ranks(process_server: Any, tiny: Path, pairs_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder, port = tmp_path_factory.mktemp("ranks"), free_port()
    processes = [
        process_server.Process(target=_on_a_rank, args=(rank, port, str(folder), str(tiny), str(pairs_folder)))
        for rank in range(2)
    ]
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join(200)
    finally:
        for process in processes:
            process.kill()
    found = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]
    for one in found:
        assert "error" not in one, one["error"]
    return folder, found


def test_ranks_agree_once_per_step_and_never_while_accumulating(ranks: Any) -> None:
    """The guard's two flags and the two signals; the first step is logged too."""
    for found in ranks[1]:
        batches = found["ddp"]["batches"]
        assert len(batches) == ACCUMULATE * STEPS
        for number, asked in enumerate(batches[ACCUMULATE:], ACCUMULATE + 1):
            assert asked == (["all_reduce of 2"] * 2 if number % ACCUMULATE == 0 else [])
        assert batches[: ACCUMULATE - 1] == [[], []]


def test_replicas_are_added_up_once_per_step(ranks: Any) -> None:
    """HSDP with the gradients of DDP: each layer and the rest once, at the step's last backward pass."""
    folder, both = ranks
    for found in both:
        counts = [asked.count("all_reduce of weights") for asked in found["hsdp"]["batches"]]
        assert counts == [0, 0, 3] * STEPS
    for rank in range(2):
        ddp, hsdp = (torch.load(folder / f"{name}-{rank}.pt") for name in ("ddp", "hsdp"))
        for name, weight in ddp.items():
            torch.testing.assert_close(hsdp[name], weight, rtol=1e-5, atol=1e-6)


def test_a_signal_to_one_rank_stops_both_after_the_step_it_arrives_in(ranks: Any) -> None:
    for found in ranks[1]:
        assert (found["signal"]["stopped"], found["signal"]["step"]) == (143, 2)
