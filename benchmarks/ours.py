"""rap-lightning on rows.jsonl, through its own trainer; prints one line of JSON."""

from __future__ import annotations

import json
import logging
import tempfile
import time
from pathlib import Path
from typing import Any

from measure import Clock, forget_peak, options, peak_gb, read_rows


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--layout", default="auto")
    parser.add_argument("--reference", choices=["stored", "frozen"], default="stored")
    parser.add_argument("--token-budget", type=int, help="0: that of the longest pair")
    a = parser.parse_args()

    import lightning.pytorch as pl
    import torch

    from rap_lightning import DPO, PreferenceDataModule, PreferenceModule, Stored
    from rap_lightning.batches.layouts import LAYOUTS
    from rap_lightning.models.policy_config import Lora, PolicyConfig
    from rap_lightning.models.references.frozen import Frozen
    from rap_lightning.training.schedules import ConstantWithWarmup
    from rap_lightning.training.step_logger import LogObserver

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    folder = Path(tempfile.mkdtemp())
    with (folder / "train.jsonl").open("w", encoding="utf-8") as file:
        for row in read_rows(a):  # relabelled already, so they are plain pairs here
            sides = {side: [*row["prompt"], *row[side]] for side in ("chosen", "rejected")}
            scores = {"score_chosen": 2.0, "score_rejected": 1.0}
            file.write(json.dumps({"prompt": row["prompt"][-1]["content"], **sides, **scores}) + "\n")

    class InOrder(PreferenceDataModule):  # the rows come shuffled: keep their order
        def train_dataloader(self) -> Any:
            if self.token_budget is None and a.token_budget == 0:
                tokens = LAYOUTS[self.layout].tokens
                self.token_budget = max(tokens([size]) for size in self._pairs[self.train_split].sizes())
            return self._loader(self.train_split, shuffle=False)

    clock, logs, counts = Clock(a.device), [], []

    class Steps(pl.Callback):
        def on_fit_start(self, *_: Any) -> None:
            forget_peak(a.device)

        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
            real = sum(len(part.forest.end) if part.forest else int(part.tokens) for part in batch)
            response = sum(int(part.lengths.sum()) for part in batch)
            counts.append([sum(part.input_ids.numel() for part in batch), real, response, len(batch)])
            clock.start()

        def on_train_batch_end(self, *_: Any) -> None:
            clock.stop()

    class Logs(LogObserver):
        def on_step_logged(self, trainer: Any, logged: Any) -> None:
            logs.append([round(logged.values[name], 5) for name in ("loss", "logps/chosen", "logps/rejected")])

    policy = PolicyConfig(
        a.model, lora=Lora(r=a.lora_rank, alpha=2 * a.lora_rank) if a.lora_rank else None,
        gradient_checkpointing=a.gradient_checkpointing,
    )  # fmt: skip
    reference = Stored(folder=str(folder / "store")) if a.reference == "stored" else Frozen()
    module = PreferenceModule(
        policy, DPO(a.beta), reference, schedule=ConstantWithWarmup(),
        optimizer=lambda params: torch.optim.AdamW(params, lr=a.lr, weight_decay=0.0, fused=True),
    )  # fmt: skip
    data = InOrder(
        str(folder), goal=None, max_length=a.max_length, batch_size=a.pairs_per_step, layout=a.layout,
        token_budget=a.token_budget or None,
    )  # fmt: skip
    trainer = pl.Trainer(
        accelerator=a.device, devices=1, max_steps=a.steps, precision="bf16-mixed" if a.bf16 else "32-true",
        log_every_n_steps=1, gradient_clip_val=1.0, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[Steps(), Logs()], default_root_dir=folder,
    )  # fmt: skip
    start, cpu = time.perf_counter(), time.process_time()
    trainer.fit(module, data)
    whole = [round(time.perf_counter() - start, 2), round(time.process_time() - cpu, 2)]
    print(json.dumps({
        "side": "ours", "wall": clock.wall, "cpu": clock.cpu, "whole": whole, "logs": logs,
        "peak_gb": peak_gb(a.device), "tokens_laid": [c[0] for c in counts], "tokens_real": [c[1] for c in counts],
        "tokens_response": [c[2] for c in counts], "passes": [c[3] for c in counts],
    }))  # fmt: skip


if __name__ == "__main__":
    main()
