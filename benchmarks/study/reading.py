"""``python -m benchmarks.study.reading``: the study's second laboratory, a real instruct model judged by reading ease.

Its settings are not tuned: those of the trials that this study was planned from (rate 3e-4, β 0.1, 48 steps of 8).
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path

from benchmarks.study.arms import ARMS, Trial
from benchmarks.study.settings import Size

TRIAL, SFT_TRIAL = Trial(3e-4, 0.1), Trial(3e-4, 0.0)
SIZE = Size(steps=48, batch=8, samples=2)


def main() -> None:
    """Run what reading.jsonl has no line of."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study.reading", description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="folder of the instruct model")
    parser.add_argument("--scored", type=Path, required=True, help="its responses, as `rap-lightning generate` writes")
    parser.add_argument("--prompts", type=Path, required=True, help="json lines of held-out prompts")
    parser.add_argument("--arms", nargs="+", default=["dpo", "strength+best", "text"], choices=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--work", type=Path, default=Path("runs/study"))
    parser.add_argument("--output", type=Path, default=Path("docs/study"))
    options = parser.parse_args()
    import torch
    from benchmarks.study import laboratory, run

    torch.set_num_threads(1)
    lab = laboratory.reading(options.work, options.model, options.scored, options.prompts)
    results = options.output / "reading.jsonl"
    lines = [json.loads(line) for line in results.read_text().splitlines()] if results.is_file() else []
    done = {(line["arm"], line["seed"]) for line in lines}
    for seed in options.seeds:
        for arm in options.arms:
            if (arm, seed) in done:
                continue
            start, trial = time.process_time(), SFT_TRIAL if arm == "sft" else TRIAL
            found = run.run(lab, arm, trial, SIZE.steps, SIZE, seed, tune=False)
            line = {"stage": "reading", "arm": arm, "seed": seed, "setting": asdict(trial)}
            with results.open("a") as file:
                line |= {"cpu_s": round(time.process_time() - start), **found}
                file.write(json.dumps(line, separators=(",", ":")) + "\n")
            print(f"{arm}, seed {seed}: {line['cpu_s']} CPU seconds", flush=True)


if __name__ == "__main__":
    main()
