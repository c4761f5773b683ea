"""Every loss trains a few steps on relabelled real pairs: test values before and after, and time per step against DPO.

    python benchmarks/losses.py --model HuggingFaceTB/SmolLM2-135M-Instruct --data my-pairs/ --output losses.jsonl
    python benchmarks/losses.py --output losses.jsonl --table

One line of JSON per loss; those already in the output are left out, so that a stopped run goes on. The shortest pairs
of the data are taken, the adapter sits on the last layers, and the reference's log-probabilities, the same for all
losses, are remembered, so that a CPU is enough. A loss's values are in its own units and say nothing against another's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from torch import Tensor

import rap_lightning.losses as family
from rap_lightning import DPO, PreferenceDataModule, PreferenceModule
from rap_lightning.batches.types import Batch
from rap_lightning.losses import BCO, IPO, SFT, Mixture
from rap_lightning.models.policy import Policy
from rap_lightning.models.policy_config import Lora, PolicyConfig
from rap_lightning.models.references.adapters_off import AdaptersOff
from rap_lightning.models.references.synchronised import Synchronised
from rap_lightning.training.schedules import ConstantWithWarmup


def contenders() -> dict[str, dict[str, Any]]:
    """Name to the module's options: DPO first, every concrete class with its defaults, and some special settings."""
    classes = [getattr(family, name) for name in family.__all__]
    plain = [c for c in classes if not c.__abstractmethods__ and c is not Mixture]
    found: dict[str, dict[str, Any]] = {"DPO": {"loss": DPO()}}
    found |= {c.__name__: {"loss": c()} for c in sorted(plain, key=lambda c: c.__name__)}
    found["DPO (2 pairs a step)"] = {"loss": DPO(), "batch_size": 2}
    found["cDPO (label_smoothing 0.3)"] = {"loss": DPO(label_smoothing=0.3)}
    found["IPO (per_token)"] = {"loss": IPO(per_token=True)}
    found["MPO (0.8 DPO + 0.2 BCO + 1.0 SFT)"] = {"loss": Mixture([DPO(), BCO(0.1), SFT()], [0.8, 0.2, 1.0])}
    found["TR-DPO (every 5, alpha 1)"] = {"loss": DPO(), "reference": Synchronised(every=5, alpha=1.0)}
    return found


class Remembered(AdaptersOff):
    """AdaptersOff that computes a batch once: the base model and the order of the data are the same for all losses.

    What it computes is left out of the times.
    """

    known: ClassVar[dict[bytes, Tensor]] = {}
    spent = (0.0, 0.0)

    def token_logps(self, policy: Policy, batch: Batch) -> Tensor:
        """From memory, where the batch has been there."""
        key = batch.input_ids.numpy().tobytes() + batch.predict_from.numpy().tobytes()
        if key not in self.known:
            start = clocks()
            self.known[key] = super().token_logps(policy, batch)
            Remembered.spent = tuple(a + b - c for a, b, c in zip(self.spent, clocks(), start, strict=True))
        return self.known[key]


def clocks() -> tuple[float, float]:
    """CPU seconds of this process, and wall seconds."""
    return time.process_time(), time.perf_counter()


def shortest(source: Path, target: Path, count: int) -> None:
    """Write the ``count`` shortest pairs of a parquet file that are neither ties nor empty."""
    import datasets

    rows = datasets.load_dataset("parquet", data_files=str(source), split="train").to_list()
    good = [r for r in rows if r["score_chosen"] > r["score_rejected"] and r["rejected"][-1]["content"].strip()]
    good.sort(key=lambda r: len(r["prompt"]) + max(len(r[c][-1]["content"]) for c in ("chosen", "rejected")))
    target.write_text("".join(json.dumps(row) + "\n" for row in good[:count]), encoding="utf-8")


class StepTimes(pl.Callback):
    """CPU and wall seconds of each optimizer step, without the remembered reference's."""

    def __init__(self) -> None:
        self.cpu: list[float] = []
        self.wall: list[float] = []
        self._start: tuple[float, ...] = (0.0, 0.0)

    def on_train_batch_start(self, *_: Any) -> None:
        """Start the clocks."""
        self._start = tuple(now - out for now, out in zip(clocks(), Remembered.spent, strict=True))

    def on_train_batch_end(self, *_: Any) -> None:
        """Stop them."""
        cpu, wall = (now - out for now, out in zip(clocks(), Remembered.spent, strict=True))
        self.cpu.append(cpu - self._start[0])
        self.wall.append(wall - self._start[1])


def measure(options: dict[str, Any], args: argparse.Namespace, data: Path) -> dict[str, Any]:
    """Test, train, test again."""
    options = ({"reference": Remembered()} if "reference" in options["loss"].requires else {}) | options
    size = options.pop("batch_size", max(args.batch_size, options["loss"].least_pairs))
    pl.seed_everything(args.seed, verbose=False)
    times = StepTimes()
    trainer = pl.Trainer(
        accelerator="cpu", precision=args.precision, max_steps=args.steps, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, limit_val_batches=0,
        gradient_clip_val=1.0, log_every_n_steps=args.steps, callbacks=[times], default_root_dir=data,
    )  # fmt: skip
    module = PreferenceModule(
        PolicyConfig(args.model, lora=Lora(r=16, target_modules=args.target_modules)), schedule=ConstantWithWarmup(),
        optimizer=lambda params: torch.optim.AdamW(params, lr=args.lr, weight_decay=0.0), **options,
    )  # fmt: skip
    pairs = PreferenceDataModule(str(data), max_length=args.max_length, batch_size=size)
    before = tested(trainer, module, pairs)
    trainer.fit(module, pairs)
    after = tested(trainer, module, pairs)
    weights = [p for p in module.parameters() if p.requires_grad]
    return {
        "before": before, "after": after, "finite": all(bool(w.isfinite().all()) for w in weights),
        "steps": trainer.global_step, "pairs": size,
        "cpu_s": statistics.median(times.cpu), "wall_s": statistics.median(times.wall),
    }  # fmt: skip


def tested(trainer: pl.Trainer, module: PreferenceModule, pairs: PreferenceDataModule) -> dict[str, float]:
    """Loss, margin and accuracy on the test split."""
    trainer.test(module, pairs, verbose=False)
    names = ("loss", "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected")
    return {name: float(trainer.callback_metrics[f"test/{name}"]) for name in names}


def table(path: Path) -> str:
    """The results as Markdown."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    base = {row["pairs"]: row for row in rows if row["name"].startswith("DPO (") or row["name"] == "DPO"}
    lines = [
        "| loss | test loss, before → after | margin after | accuracy after | CPU time per step / DPO's |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        before, after = row["before"], row["after"]
        broken = "" if row["finite"] else " (not finite)"
        lines.append(
            f"| {row['name']}{broken} | {before['loss']:.5g} → {after['loss']:.5g} | {after['rewards/margins']:.3g} | "
            f"{after['rewards/accuracies']:.2f} | {row['cpu_s'] / base[row['pairs']]['cpu_s']:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--data", type=Path, help="folder with train.parquet and test.parquet of scored pairs")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--only", nargs="*", help="names, e.g. DPO KTO")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=1, help="pairs a step; those that need 2 get 2")
    parser.add_argument("--test-pairs", type=int, default=8, help="before relabelling, which doubles them")
    parser.add_argument("--target-modules", default=r".*layers\.2[0-9]\..*_proj", help="of the adapter, a pattern")
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--precision", default="32-true", help="of Lightning's Trainer")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--table", action="store_true", help="print the table of what is there, and stop")
    args = parser.parse_args()
    if args.table:
        print(table(args.output))
        return
    warnings.filterwarnings("ignore")
    lines = args.output.read_text(encoding="utf-8").splitlines() if args.output.is_file() else []
    done = {json.loads(line)["name"] for line in lines}
    with TemporaryDirectory() as folder:
        data = Path(folder)
        shortest(args.data / "train.parquet", data / "train.jsonl", args.steps)
        shortest(args.data / "test.parquet", data / "test.jsonl", args.test_pairs)
        for name, options in contenders().items():
            if name in done or (args.only and name not in args.only):
                continue
            row = {"name": name} | measure(options, args, data)
            with args.output.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
