"""A resumed run has the reference and the base model of its checkpoint: every number of them counts."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from conftest import build, make_model, make_trainer, scored_rows, sgd, write_jsonl
from rap_lightning.errors import ConfigError
from rap_lightning.losses import SimPO
from rap_lightning.models.digests import base_digest, same_base
from rap_lightning.models.policy import Policy
from rap_lightning.models.policy_config import PolicyConfig
from rap_lightning.models.references.frozen import Frozen
from rap_lightning.models.references.precomputed import Stored
from rap_lightning.preferences.pair_cache import stored_pairs
from rap_lightning.preferences.relabelling import Relabelling
from rap_lightning.preferences.rules import Rules
from rap_lightning.preferences.sources import Source, fingerprint

ROWS = scored_rows(12)


def nudge(folder: Path) -> None:
    """Change one number of one tensor, by an amount that no loss curve shows."""
    file = folder / "model.safetensors"
    with safe_open(file, "pt") as content:
        metadata = content.metadata()
    state = load_file(file)
    weight = state["model.layers.1.mlp.down_proj.weight"]
    weight[17, 23] += 0.01
    save_file(state, file, metadata)


def fit(model: Path, data: Path, folder: Path, ckpt: Path | None = None, **options: Any) -> Path:
    module, source = build(model, data, optimizer=sgd, **options)
    trainer = make_trainer(folder, max_steps=1 if ckpt is None else 2)
    trainer.fit(module, source, ckpt_path=None if ckpt is None else str(ckpt))
    trainer.save_checkpoint(folder / "end.ckpt")
    return folder / "end.ckpt"


@pytest.mark.parametrize("kind", ["frozen", "stored", "lora", "other frozen", "other stored", "lora, other frozen"])
def test_a_changed_reference_or_base_is_refused(kind: str, tiny: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny, tmp_path / "model"))
    other = Path(shutil.copytree(tiny, tmp_path / "other")) if "other" in kind else model
    nudge(other) if "other" in kind else None
    path, store = (str(other) if "other" in kind else None), str(tmp_path / "store")
    data = write_jsonl(tmp_path / "train.jsonl", ROWS)

    def options() -> dict[str, Any]:
        lora = {"lora": True} if "lora" in kind else {}
        if kind == "lora":
            return lora
        return lora | {"reference": Frozen(path) if "frozen" in kind else Stored(path, folder=store)}

    saved = fit(model, data, tmp_path / "first", **options())
    fit(model, data, tmp_path / "same", saved, **options())
    nudge(other)
    with pytest.raises(ConfigError, match="another base model" if kind == "lora" else "reference of the checkpoint's"):
        fit(model, data, tmp_path / "changed", saved, **options())


def test_without_a_reference_the_base_of_a_full_run_may_change(tiny: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny, tmp_path / "model"))
    data = write_jsonl(tmp_path / "train.jsonl", ROWS)
    saved = fit(model, data, tmp_path / "first", loss=SimPO())
    nudge(model)
    fit(model, data, tmp_path / "second", saved, loss=SimPO())


def test_the_digest_of_weights_covers_every_number_in_its_place(tmp_path: Path) -> None:
    policy = Policy(PolicyConfig(str(make_model(tmp_path / "model"))).load_model(torch.float32))
    weight = policy.causal_lm.model.layers[0].self_attn.q_proj.weight.data
    before, flat = base_digest(policy), weight.flatten()
    assert base_digest(policy) == before
    for place in (0, 1, 511, len(flat) - 1):
        kept = flat[place].clone()
        flat[place] = kept.nextafter(torch.tensor(9.0))
        assert not same_base(base_digest(policy), before), place
        flat[place] = kept
    weight[[3, 5]] = weight[[5, 3]]
    assert not same_base(base_digest(policy), before)
    weight[[3, 5]] = weight[[5, 3]]
    assert base_digest(policy) == before
    in_bf16 = base_digest(policy.to(torch.bfloat16))
    assert same_base(in_bf16, before)
    assert in_bf16 != before


def keeping_times(path: Path, text: str) -> None:
    """Write a file of the same size over another one, with its times, as rsync and tar do."""
    before = path.stat()
    assert len(text.encode()) == before.st_size
    path.write_text(text, encoding="utf-8")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("kind", ["jsonl", "csv", "folder of jsonl"])
def test_an_edit_that_keeps_size_and_time_is_read(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    path = write_jsonl(folder / "train.jsonl", ROWS)
    text = path.read_text()
    if kind == "csv":
        path.unlink()
        path = folder / "train.csv"
        lines = [f"question {i},good answer {i},bad answer {i},9,{i % 5}" for i in range(20)]
        text = "\n".join(["prompt,chosen,rejected,score_chosen,score_rejected", *lines])
        path.write_text(text)
    source = Source(str(path if kind == "jsonl" else folder))

    def texts() -> str:
        rules = Rules(None, Relabelling("none"))
        return str(stored_pairs(source, "train", rules, cache=tmp_path / "cache")[0][:]["responses"])

    before, digest = texts(), fingerprint(source, "train")
    old, new = ("good answer 3", "evil answer 3") if kind == "csv" else (" yes", " yea")
    keeping_times(path, text.replace(old, new))
    assert fingerprint(source, "train") != digest
    assert texts() == before.replace(old, new)


def test_swapped_scores_are_noticed(tiny: Path, tmp_path: Path) -> None:
    rows = scored_rows(30)
    for streaming in (False, True):
        data = write_jsonl(tmp_path / f"{streaming}.jsonl", rows)
        saved = fit(tiny, data, tmp_path / f"first-{streaming}", streaming=streaming)
        swapped = [
            row | {"score_chosen": row["score_rejected"], "score_rejected": row["score_chosen"]} if i < 10 else row
            for i, row in enumerate(rows)
        ]
        write_jsonl(data, swapped)
        with pytest.raises(ConfigError, match="trained on other data"):
            fit(tiny, data, tmp_path / f"second-{streaming}", saved, streaming=streaming)
