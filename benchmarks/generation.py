"""Throughput of generate's transformers engine against a plain loop over ``model.generate``, in one process.

    python benchmarks/generation.py --model HuggingFaceTB/SmolLM2-135M-Instruct --prompts scored/test.parquet

Four ways over the same prompts, greedy, with the same number of new tokens: one prompt after another; batches in the
order of the file; the engine (batches of similar length), and its continuous batching. CPU seconds are the figure to
trust on a machine that others use. How many responses are the same as in the loop is counted.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter

import torch

from rap_lightning.batches.prompts import left_pad
from rap_lightning.models.generation import Generation
from rap_lightning.onpolicy.engines import Transformers
from rap_lightning.onpolicy.engines.base import Request, prompt_id_of
from rap_lightning.onpolicy.model_source import ModelSource
from rap_lightning.onpolicy.prompt_set import read_prompts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--prompts", required=True)
    parser.add_argument("--limit", type=int, default=32)
    parser.add_argument("--max_new_tokens", type=int, default=32)
    parser.add_argument("--batch_size", type=int, default=16)
    options = parser.parse_args()
    model = ModelSource(options.model)
    tokenizer = model.tokenizer()
    size = options.batch_size
    engines = {"engine": Transformers(size), "engine, continuous": Transformers(size, continuous=True)}
    for engine in engines.values():
        engine.open(model, 0)
    plain = engines["engine"]._model
    generation = Generation(options.max_new_tokens, 0.0)
    requests = []
    for history in read_prompts(options.prompts, None, None, options.limit).histories:
        text = tokenizer.apply_chat_template(history, tokenize=False, add_generation_prompt=True)
        ids = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
        key = prompt_id_of(history)
        requests.append(Request(key, key, tuple(history), tuple(history), ids, None, 0, 0))

    def in_batches(size: int) -> dict[str, str]:
        found = {}
        for first in range(0, len(requests), size):
            part = requests[first : first + size]
            batch = left_pad([r.ids for r in part], tokenizer.pad_token_id, [])
            with torch.inference_mode():
                output = plain.generate(
                    input_ids=batch.input_ids, attention_mask=batch.attention_mask, do_sample=False,
                    max_new_tokens=options.max_new_tokens, pad_token_id=tokenizer.pad_token_id,
                )  # fmt: skip
            texts = tokenizer.batch_decode(output[:, batch.input_ids.shape[1] :], skip_special_tokens=True)
            found |= {r.id: text for r, text in zip(part, texts, strict=True)}
        return found

    def by(engine: Transformers) -> dict[str, str]:
        wanted = {r.id for r in requests}
        return {a.id: a.text for answers in engine.run(requests, generation, wanted) for a in answers}

    ways = {
        "one after another": lambda: in_batches(1),
        "batches in the file's order": lambda: in_batches(options.batch_size),
        **{name: (lambda engine=engine: by(engine)) for name, engine in engines.items()},
    }
    first: dict[str, str] = {}
    for name, way in ways.items():
        wall, cpu = time.perf_counter(), time.process_time()
        found = way()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        first = first or found
        tokens = sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in found.values())
        same = Counter(found[key] == text for key, text in first.items())[True]
        row = {"way": name, "seconds": round(wall, 1), "cpu_seconds": round(cpu, 1), "tokens": tokens, "same": same}
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
