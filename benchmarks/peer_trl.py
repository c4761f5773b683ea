"""TRL's DPOTrainer on rows.jsonl; prints one line of JSON."""

from __future__ import annotations

import json
import tempfile
import time
from importlib.util import find_spec

from measure import Clock, forget_peak, options, peak_gb, read_rows


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--precompute", action="store_true", help="precompute_ref_log_probs")
    parser.add_argument(
        "--compact-head", action="store_true", help="score response positions only, as TRL does on CUDA"
    )
    a = parser.parse_args()

    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    if a.compact_head:
        import trl.trainer.utils

        trl.trainer.utils._use_triton = lambda device: True
    data = Dataset.from_list(read_rows(a))
    # the fastest attention that is installed
    attention = "flash_attention_2" if a.device != "cpu" and find_spec("flash_attn") else "sdpa"
    model = AutoModelForCausalLM.from_pretrained(a.model, dtype=torch.float32, attn_implementation=attention)
    lora = None
    if a.lora_rank:
        from peft import LoraConfig

        lora = LoraConfig(r=a.lora_rank, lora_alpha=2 * a.lora_rank, target_modules="all-linear")
    config = DPOConfig(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=a.pairs_per_step, max_steps=a.steps,
        max_length=a.max_length, gradient_checkpointing=a.gradient_checkpointing, bf16=a.bf16,
        use_cpu=a.device == "cpu", precompute_ref_log_probs=a.precompute,
        learning_rate=a.lr, lr_scheduler_type="constant", beta=a.beta,
        logging_steps=1, report_to="none", save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    clock, logs = Clock(a.device), []

    class Steps(TrainerCallback):
        def on_step_begin(self, *_, **__):
            clock.start()

        def on_step_end(self, *_, **__):
            clock.stop()

        def on_log(self, args, state, control, logs=None, _all=logs, **__):
            if logs and "loss" in logs:
                _all.append([round(float(logs[k]), 5) for k in ("loss", "logps/chosen", "logps/rejected")])

    class InOrder(DPOTrainer):  # the rows come shuffled: keep their order
        def _get_train_sampler(self, *_, **__):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    start, cpu = time.perf_counter(), time.process_time()
    tokenizer = AutoTokenizer.from_pretrained(a.model)
    trainer = InOrder(
        model, args=config, train_dataset=data, processing_class=tokenizer, peft_config=lora, callbacks=[Steps()]
    )
    counts, collate = [], trainer.data_collator

    def counting(examples):
        batch = collate(examples)
        masks = batch["attention_mask"], batch["completion_mask"]
        counts.append([batch["input_ids"].numel(), *(int(m.sum()) for m in masks)])
        return batch

    trainer.data_collator = counting
    forget_peak(a.device)
    trainer.train()
    whole = [round(time.perf_counter() - start, 2), round(time.process_time() - cpu, 2)]
    counts = counts[-a.steps :]
    print(json.dumps({
        "side": "trl", "wall": clock.wall, "cpu": clock.cpu, "whole": whole, "logs": logs, "peak_gb": peak_gb(a.device),
        "tokens_laid": [c[0] for c in counts], "tokens_real": [c[1] for c in counts],
        "tokens_response": [c[2] for c in counts],
    }))  # fmt: skip


if __name__ == "__main__":
    main()
