"""What `relabel` writes gives TRL's DPOTrainer the ids and masks that we train on."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from conftest import encode, make_model, make_tokenizer, scored_rows, write_jsonl
from rap_lightning.batches.layouts import LAYOUTS, lay_out
from rap_lightning.batches.sampler import BatchPlan
from rap_lightning.commands.relabel import relabel

trl = pytest.importorskip("trl", reason="TRL is not installed: pip install trl")


def sequences(ids: Any, attention: Any, completion: Any) -> list[tuple[Any, ...]]:
    """(ids, mask of the response) of each row without its padding."""
    found = []
    for row, seen, response in zip(ids.tolist(), attention.tolist(), completion.tolist(), strict=True):
        kept = [i for i, flag in enumerate(seen) if flag]
        found.append((tuple(row[i] for i in kept), tuple(int(response[i]) for i in kept)))
    return found


@pytest.mark.parametrize("family", ["chatml", "llama3"])
def test_step_zero_has_the_same_ids_and_masks(family: str, tmp_path: Path) -> None:
    import datasets
    import torch

    rows = scored_rows(50)
    tokenizer = make_tokenizer(family)
    source = write_jsonl(tmp_path / "rows.jsonl", rows)
    model = make_model(tmp_path / "model", family)
    relabel(str(source), str(tmp_path / "out"), tokenizer=str(model))
    written = datasets.load_dataset(str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache"))
    assert len(written) == 100
    trainer = trl.DPOTrainer(
        str(model),
        args=trl.DPOConfig(
            str(tmp_path / "trl"), per_device_train_batch_size=100, max_length=512, use_cpu=True, bf16=False,
            report_to=[], disable_tqdm=True, gradient_checkpointing=False,
        ),
        train_dataset=written,
        processing_class=tokenizer,
    )  # fmt: skip
    theirs = next(iter(trainer.get_train_dataloader()))
    ours, _, _ = encode(tokenizer, rows)
    plan = BatchPlan(tuple(range(100)), (1.0,) * 100, 100, (tuple(range(100)),))
    batch = lay_out(LAYOUTS["padded"], [ours.example(i) for i in range(100)], plan, tokenizer.pad_token_id)
    mask = torch.zeros(batch.input_ids.numel(), dtype=torch.int64)
    mask[batch.predict_from + 1] = 1  # the token that a state predicts stands right behind it
    own = sequences(batch.input_ids, batch.attention_mask, mask.view_as(batch.input_ids))
    peer = sequences(theirs["input_ids"], theirs["attention_mask"], theirs["completion_mask"])
    assert len(own) == len(peer) == 200
    chosen, rejected = own[0::2], own[1::2]
    assert Counter(chosen) == Counter(peer[:100])
    assert Counter(rejected) == Counter(peer[100:])
    together = Counter(zip(chosen, rejected, strict=True))
    assert together == Counter(zip(peer[:100], peer[100:], strict=True)), "the same pairs, the same way round"
