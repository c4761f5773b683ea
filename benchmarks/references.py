"""What a reference costs in memory, and whether that of a continued adapter is the adapter as it was loaded.

python benchmarks/references.py --model MODEL --source PAIRS

Each row is a process of its own: some optimizer steps of the same pairs in float32 on the CPU. Peak memory is the
process's own, from the first step on ("steps") and with loading and preparing ("whole").
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from measure import forget_peak, peak_gb

KINDS = {
    "full, Frozen": {"reference": "Frozen"},
    "full, Stored": {"reference": "Stored"},
    "LoRA, AdaptersOff": {"reference": "AdaptersOff", "lora": True},
    "LoRA, Frozen": {"reference": "Frozen", "lora": True},
    "continued adapter, AdapterAsLoaded": {"reference": "AdapterAsLoaded", "adapter": True},
}


def make_adapter(model: str, folder: Path) -> None:
    """A LoRA adapter that changes what the model says: its second factors are no longer 0."""
    import torch

    from rap_lightning.models.policy_config import Lora, PolicyConfig

    policy = PolicyConfig(model, lora=Lora(r=16)).build(torch.float32)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in policy.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.01)
    policy.model.save_pretrained(folder)


def measure(a: argparse.Namespace) -> dict[str, Any]:
    import logging

    import lightning.pytorch as pl
    import torch

    from rap_lightning import AdaptersOff, Frozen, PreferenceDataModule, PreferenceModule, Stored
    from rap_lightning.models.policy_config import Lora, PolicyConfig
    from rap_lightning.models.references.policy_copy import AdapterAsLoaded
    from rap_lightning.training.schedules import ConstantWithWarmup

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    kind, work = KINDS[a.kind], Path(a.work)
    references = {"Frozen": Frozen, "AdaptersOff": AdaptersOff, "AdapterAsLoaded": AdapterAsLoaded}
    stored = kind["reference"] == "Stored"
    reference = Stored(folder=str(work / "store")) if stored else references[str(kind["reference"])]()
    policy = PolicyConfig(
        a.model, lora=Lora(r=16) if kind.get("lora") else None, gradient_checkpointing=False,
        adapter=str(work / "adapter") if kind.get("adapter") else None,
    )  # fmt: skip

    class Peak(pl.Callback):
        whole = steps = 0.0
        times: list[float] = []  # noqa: RUF012

        def on_train_start(self, *_: Any) -> None:
            Peak.whole = peak_gb()
            forget_peak()

        def on_train_batch_start(self, *_: Any) -> None:
            self.start = time.process_time()

        def on_train_batch_end(self, *_: Any) -> None:
            self.times.append(round(time.process_time() - self.start, 1))

        def on_train_end(self, *_: Any) -> None:
            Peak.steps = peak_gb()

    module = PreferenceModule(
        policy, reference=reference, schedule=ConstantWithWarmup(),
        optimizer=lambda params: torch.optim.AdamW(params, lr=1e-6, weight_decay=0.0),
    )  # fmt: skip
    data = PreferenceDataModule(
        a.source, max_length=a.max_length, batch_size=a.pairs, layout="tree", outside_scale="drop", val_split="train"
    )
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=a.steps, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[Peak()], limit_val_batches=0, num_sanity_val_steps=0,
        default_root_dir=work,
    )  # fmt: skip
    trainer.fit(module, data)
    found = {
        "kind": a.kind, "steps_gb": Peak.steps, "whole_gb": max(Peak.whole, Peak.steps), "cpu_s": Peak.times,
        "trainable": sum(p.numel() for p in module.parameters() if p.requires_grad),
    }  # fmt: skip
    if kind.get("adapter"):
        found |= compare(module, data, a, work / "adapter")
    return found


def compare(module: Any, data: Any, a: argparse.Namespace, adapter: Path) -> dict[str, float]:
    """The reference of a trained policy against plain transformers and peft, one response at a time, whole logits."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from rap_lightning.batches.layouts import Collate

    data.batch_size = 1
    batches = []
    for batch in data._loader("train", shuffle=False):
        batches += list(batch)
        if len(batches) >= a.compared // 2:
            break
    padded = Collate("padded", data.pad_id)
    plans = list(data._loader("train", shuffle=False).plan)[: len(batches)]
    rows = [part for plan in plans for part in padded(data._pairs["train"][plan])]
    found = torch.cat([module.reference.logps(module.policy, batch) for batch in batches])
    moved = torch.cat([module.policy.logps(batch).detach() for batch in batches])

    def road(net: Any) -> Any:
        values = []
        with torch.no_grad():
            for row in rows:
                for s, ids in enumerate(row.input_ids):
                    mine = row.segment == s
                    logps = net(input_ids=ids[None]).logits[0].double().log_softmax(-1)  # float32 loses digits
                    places = row.predict_from[mine] - s * row.input_ids.shape[1]
                    values.append(logps[places].gather(-1, row.target[mine][:, None]).sum())
        return torch.stack(values)

    base = AutoModelForCausalLM.from_pretrained(a.model, dtype=torch.float32).eval()
    bare = road(base)
    loaded = road(PeftModel.from_pretrained(base, str(adapter)).eval())
    lengths = torch.cat([batch.lengths for batch in batches])
    return {
        "responses": len(found), "tokens": int(lengths.sum()),
        "reference_against_adapter_as_loaded": float((found - loaded).abs().max()),
        "the_same_per_token": float(((found - loaded).abs() / lengths).max()),
        "adapter_against_bare_base": float((loaded - bare).abs().max()),
        "policy_against_reference": float((moved - found).abs().max()),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--source", required=True)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--pairs", type=int, default=2, help="in a step")
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--compared", type=int, default=16, help="responses of the comparison")
    parser.add_argument("--kinds", nargs="*", default=list(KINDS))
    parser.add_argument("--kind", help=argparse.SUPPRESS)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.kind:
        print(json.dumps(measure(a)))
        return
    with tempfile.TemporaryDirectory() as work:
        make_adapter(a.model, Path(work) / "adapter")
        rows = Path(work) / "rows.jsonl"
        from rap_lightning.preferences.sources import Source, chunks_of

        with rows.open("w", encoding="utf-8") as file:
            count = 0
            for chunk in chunks_of(Source(a.source), "train"):
                for _, row in chunk.rows():
                    if isinstance(row, dict) and count < 40:
                        file.write(json.dumps(row, default=str) + "\n")
                        count += 1
                if count >= 40:
                    break
        print("| policy and reference | trained weights | peak GB, steps | peak GB, whole | CPU s of the steps |")
        print("|---|---|---|---|---|")
        for kind in a.kinds:
            options = {
                "model": a.model,
                "source": str(rows),
                "steps": a.steps,
                "pairs": a.pairs,
                "compared": a.compared,
            }
            arguments = [x for key, value in options.items() for x in (f"--{key}", str(value))]
            call = [
                sys.executable,
                __file__,
                *arguments,
                "--max-length",
                str(a.max_length),
                "--kind",
                kind,
                "--work",
                work,
            ]
            done = subprocess.run(call, capture_output=True, text=True)
            if done.returncode:
                sys.exit(done.stderr[-3000:])
            one = json.loads(done.stdout.splitlines()[-1])
            seconds = ", ".join(map(str, one["cpu_s"]))
            print(f"| {kind} | {one['trainable']:,} | {one['steps_gb']} | {one['whole_gb']} | {seconds} |", flush=True)
            if "responses" in one:
                print(
                    json.dumps({k: v for k, v in one.items() if k not in ("kind", "cpu_s")}),
                    file=sys.stderr,
                    flush=True,
                )


if __name__ == "__main__":
    main()
