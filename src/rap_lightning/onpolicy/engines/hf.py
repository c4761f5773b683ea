"""Engine that runs transformers in this process."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Literal

from rap_lightning.errors import ConfigError
from rap_lightning.onpolicy.engines.base import Completion, Engine, Request, chunks_by_length
from rap_lightning.onpolicy.model_source import ModelSource, default_device, free_memory, weights_dtype

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

    from rap_lightning.models.generation import Generation


class Transformers(Engine):
    """Batches of similar length through transformers' generate; needs no further installation.

    Every response has its own seed. A run that was stopped and resumed gives what an uninterrupted one would, bit for
    bit on a CPU; another batch size changes logits by rounding and so, rarely, a token.

    Args:
        batch_size: sequences in a batch; halved automatically if memory runs out.
        dtype: dtype of the weights; by default bfloat16 on an accelerator and float32 on a CPU.
        continuous: transformers' continuous batching: the next sequence takes the place of a finished one. Faster if
            responses differ much in length; greedy responses stay the same, sampled ones have no seed of their own.
        attn_implementation: "sdpa", "eager", "flash_attention_2", ...; by default transformers' choice.
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
        self._model: Any  # the policy, with its adapter if it has one
        self._tokenizer: PreTrainedTokenizerBase
        self._halved = False

    @property
    def sets_strength(self) -> bool:
        return not self.continuous  # whose rows come and go

    def settings(self) -> dict[str, Any]:
        """Return the options that change numbers by more than the order of sums."""
        return {"dtype": self.dtype, "continuous": self.continuous, "attn_implementation": self.attn_implementation}

    def no_guidance(self) -> str:
        """Return why guidance is unavailable: only with continuous batching, whose batch changes at every step."""
        return "with --engine.continuous rows come and go, and a second stream can't follow" if self.continuous else ""

    def no_floor(self) -> str:
        """Return why there is no floor: only with continuous batching, which samples by itself."""
        return "--engine.continuous samples without our logits processors" if self.continuous else ""

    def open(self, model: ModelSource, rank: int) -> None:
        from rap_lightning.models.token_strength import attach

        device = default_device(rank)
        self._model = model.load(weights_dtype(self.dtype, device), device)
        attach(self._model)
        if self.attn_implementation:
            try:
                self._model.set_attn_implementation(self.attn_implementation)
            except (ValueError, ImportError) as error:
                raise ConfigError(f"--engine.attn_implementation {self.attn_implementation}: {error}") from error
        self._tokenizer = model.tokenizer()

    def close(self) -> None:
        del self._model, self._tokenizer
        free_memory()

    def run(
        self, requests: Sequence[Request], generation: Generation, wanted: Collection[str]
    ) -> Iterator[list[Completion]]:
        """Yield one batch at a time. A partly finished batch is computed whole, so that its numbers stay the same.

        Raises:
            ConfigError: goals are strengths, and a part of the adapter has none.
        """
        from rap_lightning.models.token_strength import check_reach

        if hasattr(self._model, "peft_config") and any(request.strength is not None for request in requests):
            check_reach(self._model)
        if self.continuous:
            yield from self._run_continuously([r for r in requests if r.id in wanted], generation)
            return
        for chunk in chunks_by_length(requests, self.batch_size):
            if any(request.id in wanted for request in chunk):
                yield self._halve_until_it_fits(chunk, generation)

    def _halve_until_it_fits(self, chunk: list[Request], generation: Generation) -> list[Completion]:
        import torch

        try:
            return self._generate(chunk, generation)
        except torch.OutOfMemoryError as error:
            if len(chunk) == 1:
                raise ConfigError(
                    f"one sequence of {len(chunk[0].ids)} + {generation.max_new_tokens} tokens doesn't fit in memory. "
                    "Use a smaller --max_new_tokens or --max_prompt_length, or --engine.dtype bfloat16."
                ) from error
        if not self._halved:
            print(f"{len(chunk)} sequences don't fit in memory: continuing with half batches")
            self._halved = True
        torch.cuda.empty_cache()
        middle = len(chunk) // 2
        halves = (chunk[:middle], chunk[middle:])
        return [one for half in halves for one in self._halve_until_it_fits(half, generation)]

    def _generate(self, chunk: Sequence[Request], generation: Generation) -> list[Completion]:
        import torch
        from transformers import GenerationConfig, LogitsProcessorList

        from rap_lightning.batches.prompts import left_pad
        from rap_lightning.models.generation import guidance_of
        from rap_lightning.models.token_strength import at_strength
        from rap_lightning.onpolicy.engines.seeded_sampling import SeededSampling

        device = self._model.device
        strengths = [request.strength for request in chunk]
        batch = left_pad([request.ids for request in chunk], self._pad_id, [], strengths).to(device)
        width = batch.input_ids.shape[1]
        processors = LogitsProcessorList()
        low = None
        if generation.guidance:
            strengths = [request.low_strength for request in chunk]
            low = left_pad([request.against for request in chunk], self._pad_id, [], strengths).to(device)
        if guide := guidance_of(self._model, low, generation):
            processors.append(guide)
        if generation.temperature > 0:
            seeds = [request.seed for request in chunk]
            processors.append(
                SeededSampling(seeds, width, generation.max_new_tokens, generation.temperature, generation.top_p)
            )
        config, ends = self._greedy_config(generation)
        model = _causal_lm(self._model)
        own = model.generation_config
        try:  # transformers fills unset options from the model's config: a repetition penalty there must not apply
            model.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=self._pad_id)
            with torch.inference_mode(), at_strength(batch.strength):
                output = self._model.generate(
                    input_ids=batch.input_ids, attention_mask=batch.attention_mask, generation_config=config,
                    logits_processor=processors,
                )  # fmt: skip
        finally:
            model.generation_config = own
        return [self._completion(r, row, ends) for r, row in zip(chunk, output[:, width:].tolist(), strict=True)]

    def _greedy_config(self, generation: Generation) -> tuple[GenerationConfig, list[int]]:
        from transformers import GenerationConfig

        from rap_lightning.models.generation import end_of_turn_ids

        ends = end_of_turn_ids(self._tokenizer, _causal_lm(self._model))
        return GenerationConfig(
            max_new_tokens=generation.max_new_tokens, do_sample=False, eos_token_id=ends, pad_token_id=self._pad_id
        ), ends  # fmt: skip

    @property
    def _pad_id(self) -> int:
        ids = (self._tokenizer.pad_token_id, self._tokenizer.eos_token_id, 0)
        return next(i for i in ids if i is not None)

    def _completion(self, request: Request, ids: list[int], ends: Sequence[int]) -> Completion:
        end = next((place for place, token in enumerate(ids) if token in ends), None)
        text = str(self._tokenizer.decode(ids[:end], skip_special_tokens=True))
        if end is None:
            return Completion(request.id, text, len(ids), "length")
        return Completion(request.id, text, end + 1, "stop")

    def _run_continuously(self, requests: list[Request], generation: Generation) -> Iterator[list[Completion]]:
        try:
            from transformers import ContinuousBatchingConfig
        except ImportError:  # transformers 5.0 has an earlier API
            raise ConfigError(
                f"--engine.continuous needs a newer transformers than {version('transformers')}. Upgrade it, or leave "
                "the option out."
            ) from None
        if not requests:
            return
        model = _causal_lm(self._model)
        if not hasattr(model, "continuous_batching_context_manager"):
            raise ConfigError("--engine.continuous: this transformers, or this model, has no continuous batching.")
        config, ends = self._greedy_config(generation)
        if generation.temperature > 0:
            config.update(do_sample=True, temperature=generation.temperature, top_p=generation.top_p, top_k=0)
        # The seed depends on the first unfinished request, so that a resumed run doesn't repeat earlier draws.
        batching = ContinuousBatchingConfig(
            use_cuda_graph=False, max_requests_per_batch=self.batch_size, seed=requests[0].seed % 2**31
        )
        if model.device.type == "cpu":  # transformers measures free memory on accelerators only: size the cache here
            longest = max(len(request.ids) for request in requests) + generation.max_new_tokens
            batching.page_size, batching.num_blocks = 32, -(-longest // 32) * self.batch_size
            batching.max_batch_tokens = max(512, self.batch_size)
        by_id = {request.id: request for request in requests}
        with model.continuous_batching_context_manager(
            generation_config=config, continuous_batching_config=batching
        ) as manager:
            for request in requests:
                manager.add_request(list(request.ids), request_id=request.id, max_new_tokens=generation.max_new_tokens)
            left = len(requests)
            while left:
                result = manager.get_result(timeout=1)
                if result is None and not manager.is_running():
                    raise ConfigError(
                        "transformers' continuous batching ended early (its log says why). Finished responses are "
                        "kept; leave --engine.continuous out to resume without it."
                    )
                if result is None or not result.is_finished():
                    continue
                left -= 1
                request = by_id[result.request_id]
                if result.error is not None:
                    yield [Completion(request.id, error=str(result.error))]
                else:
                    yield [self._completion(request, list(result.generated_tokens), ends)]


def _causal_lm(model: Any) -> PreTrainedModel:
    found: PreTrainedModel = model.get_base_model() if hasattr(model, "get_base_model") else model
    return found
