"""transformers in this process."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Literal

from rap_lightning.errors import ConfigError
from rap_lightning.onpolicy.engines.base import Engine
from rap_lightning.onpolicy.requests import Answer, Request, chunks_by_length
from rap_lightning.onpolicy.sampled_model import Model, free_memory, weights_dtype

if TYPE_CHECKING:
    from rap_lightning.models.generation import Generation


class Transformers(Engine):
    """Batches of similar length through transformers' generate; nothing else to install.

    Every response has a seed of its own. A run that was stopped and resumed gives what an uninterrupted one would, bit
    for bit on a CPU; another batch size changes logits by rounding, and with them, seldom, a token.

    Args:
        batch_size: sequences at a time; halved by itself where memory runs out.
        dtype: of the weights; by default bfloat16 on an accelerator and float32 on a CPU.
        continuous: transformers' continuous batching: a finished sequence's place is taken by the next one. Faster
            where responses differ much in length; greedy responses stay the same, sampled ones have no seed of their
            own.
        attn_implementation: "sdpa", "eager", "flash_attention_2", ...; transformers' own choice by default.
    """

    def __init__(
        self,
        batch_size: int = 16,
        dtype: Literal["float32", "bfloat16", "float16"] | None = None,
        continuous: bool = False,
        attn_implementation: str | None = None,
    ) -> None:
        if batch_size < 1:
            raise ConfigError(f"--engine.batch_size must be at least 1, found {batch_size}")
        self.batch_size, self.dtype, self.continuous = batch_size, dtype, continuous
        self.attn_implementation = attn_implementation
        self._model: Any = None
        self._tokenizer: Any = None
        self._halved = False

    def settings(self) -> dict[str, Any]:
        """What changes numbers by more than the order of sums."""
        return {"dtype": self.dtype, "continuous": self.continuous, "attn_implementation": self.attn_implementation}

    def no_guidance(self) -> str:
        """Only with continuous batching, whose rows come and go."""
        return "with --engine.continuous rows come and go, and a second stream can't follow" if self.continuous else ""

    def open(self, model: Model, rank: int) -> None:
        """Load the model onto this process's device."""
        import torch

        device = torch.device("cpu")
        if torch.cuda.is_available():
            device = torch.device("cuda", rank % torch.cuda.device_count())
        elif torch.backends.mps.is_available():
            device = torch.device("mps")
        self._model = model.load(weights_dtype(self.dtype, device), device)
        if self.attn_implementation:
            try:
                self._model.set_attn_implementation(self.attn_implementation)
            except (ValueError, ImportError) as error:
                raise ConfigError(f"--engine.attn_implementation {self.attn_implementation}: {error}") from error
        self._tokenizer = model.tokenizer()

    def close(self) -> None:
        """Free the model."""
        self._model = self._tokenizer = None
        free_memory()

    def run(
        self, requests: Sequence[Request], generation: Generation, wanted: Collection[str]
    ) -> Iterator[list[Answer]]:
        """A chunk at a time; a chunk that is finished in part is computed whole, so that its numbers stay the same."""
        if self.continuous:
            yield from self._continuously([r for r in requests if r.id in wanted], generation)
            return
        for chunk in chunks_by_length(requests, self.batch_size):
            if any(request.id in wanted for request in chunk):
                yield self._chunk(chunk, generation)

    def _chunk(self, chunk: list[Request], generation: Generation) -> list[Answer]:
        import torch

        try:
            return self._generate(chunk, generation)
        except torch.OutOfMemoryError as error:
            if len(chunk) == 1:
                raise ConfigError(
                    f"one sequence of {len(chunk[0].ids)} + {generation.max_new_tokens} tokens doesn't fit in "
                    "memory. Use a "
                    "smaller --max_new_tokens or --max_prompt_length, or --engine.dtype bfloat16."
                ) from error
        if not self._halved:
            print(f"{len(chunk)} sequences don't fit in memory: going on with halves")
            self._halved = True
        torch.cuda.empty_cache()
        middle = len(chunk) // 2
        return self._chunk(chunk[:middle], generation) + self._chunk(chunk[middle:], generation)

    def _config(self, generation: Generation) -> tuple[Any, list[int]]:
        from transformers import GenerationConfig

        from rap_lightning.models.generation import end_of_turn_ids

        ends = end_of_turn_ids(self._tokenizer, _causal_lm(self._model))
        return GenerationConfig(
            max_new_tokens=generation.max_new_tokens, do_sample=False, eos_token_id=ends, pad_token_id=self._pad
        ), ends  # fmt: skip

    @property
    def _pad(self) -> int:
        ids = (self._tokenizer.pad_token_id, self._tokenizer.eos_token_id, 0)
        return next(i for i in ids if i is not None)

    def _generate(self, chunk: Sequence[Request], generation: Generation) -> list[Answer]:
        import torch
        from transformers import GenerationConfig, LogitsProcessorList

        from rap_lightning.models.generation import guidance_of, left_pad
        from rap_lightning.onpolicy.engines.seeded_sampling import SeededSampling

        batch = left_pad([request.ids for request in chunk], self._pad, [])
        width = batch.input_ids.shape[1]
        processors = LogitsProcessorList()
        low = None
        if generation.guidance:
            low = left_pad([request.against for request in chunk], self._pad, []).to(self._model.device)
        if guide := guidance_of(self._model, low, generation):
            processors.append(guide)
        if generation.temperature > 0:
            seeds = [request.seed for request in chunk]
            processors.append(
                SeededSampling(seeds, width, generation.max_new_tokens, generation.temperature, generation.top_p)
            )
        config, ends = self._config(generation)
        model = _causal_lm(self._model)
        own = model.generation_config
        try:  # what is left out is filled from the model's own config: a repetition penalty there must not stand
            model.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=self._pad)
            with torch.inference_mode():
                output = self._model.generate(
                    input_ids=batch.input_ids.to(self._model.device),
                    attention_mask=batch.attention_mask.to(self._model.device),
                    generation_config=config, logits_processor=processors,
                )  # fmt: skip
        finally:
            model.generation_config = own
        return [self._answer(r, row, ends) for r, row in zip(chunk, output[:, width:].tolist(), strict=True)]

    def _answer(self, request: Request, ids: list[int], ends: Sequence[int]) -> Answer:
        end = next((place for place, token in enumerate(ids) if token in ends), None)
        kept = ids if end is None else ids[:end]
        text = self._tokenizer.decode(kept, skip_special_tokens=True)
        if end is None:
            return Answer(request.id, text, len(ids), "length")
        return Answer(request.id, text, end + 1, "stop")

    def _continuously(self, requests: list[Request], generation: Generation) -> Iterator[list[Answer]]:
        try:
            from transformers import ContinuousBatchingConfig
        except ImportError:  # transformers 5.0 has an earlier form of it
            raise ConfigError(
                f"--engine.continuous needs a newer transformers than {version('transformers')}. Upgrade it, or leave "
                "the option out."
            ) from None

        if not requests:
            return
        config, ends = self._config(generation)
        if generation.temperature > 0:
            config.update(do_sample=True, temperature=generation.temperature, top_p=generation.top_p, top_k=0)
        size = self.batch_size
        # the first seed depends on what is left, so that a resumed run doesn't draw what it drew before
        cache = ContinuousBatchingConfig(
            use_cuda_graph=False, max_requests_per_batch=size, seed=requests[0].seed % 2**31
        )
        model = _causal_lm(self._model)
        longest = max(len(request.ids) for request in requests)
        if not hasattr(model, "continuous_batching_context_manager"):
            raise ConfigError("--engine.continuous: this transformers, or this model, has no continuous batching.")
        if model.device.type == "cpu":  # memory is measured on accelerators; here the cache is as large as is used
            page = 32
            rows = -(-(longest + generation.max_new_tokens) // page)
            cache.page_size, cache.num_blocks = page, rows * size
            cache.max_batch_tokens = max(512, size)
        by_id = {request.id: request for request in requests}
        with model.continuous_batching_context_manager(
            generation_config=config, continuous_batching_config=cache
        ) as manager:
            for request in requests:
                manager.add_request(list(request.ids), request_id=request.id, max_new_tokens=generation.max_new_tokens)
            left = len(requests)
            while left:
                result = manager.get_result(timeout=1)
                if result is None:
                    if not manager.is_running():
                        raise ConfigError(
                            "transformers' continuous batching ended before its work did (its log says why). What is "
                            "finished is kept; leave --engine.continuous out to go on without it."
                        )
                    continue
                if not result.is_finished():
                    continue
                left -= 1
                request = by_id[result.request_id]
                if result.error is not None:
                    yield [Answer(request.id, error=str(result.error))]
                else:
                    yield [self._answer(request, list(result.generated_tokens), ends)]


def _causal_lm(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model
