"""Engine that runs vLLM offline, in this process."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from rap_lightning.errors import ConfigError
from rap_lightning.onpolicy.engines.base import Completion, Engine, Request, chunks_by_length
from rap_lightning.onpolicy.model_source import ModelSource, free_memory
from rap_lightning.provenance import masked

if TYPE_CHECKING:
    from rap_lightning.models.generation import Generation


class VLLM(Engine):
    """vLLM offline, if it is installed. Each response has its own seed.

    Run with vLLM 0.32.0 on a CPU, not yet on a GPU; the tests drive it against a module with its documented signatures.

    Args:
        chunk: requests passed to vLLM at a time; a killed run repeats at most these.
        dtype: dtype of the weights; by default vLLM's choice.
        tensor_parallel_size: GPUs that share the model.
        gpu_memory_utilization: fraction of a GPU's memory that vLLM uses.
        max_model_len: longest sequence in tokens; by default the model's own.
        options: further arguments of ``vllm.LLM``.
    """

    def __init__(
        self,
        chunk: int = 512,
        dtype: str = "auto",
        tensor_parallel_size: int = 1,
        gpu_memory_utilization: float = 0.9,
        max_model_len: int | None = None,
        options: dict[str, Any] | None = None,
    ) -> None:
        if chunk < 1:
            raise ConfigError(f"--engine.chunk must be at least 1, found {chunk}")
        self.chunk, self.dtype, self.tensor_parallel_size = chunk, dtype, tensor_parallel_size
        self.gpu_memory_utilization, self.max_model_len = gpu_memory_utilization, max_model_len
        self.options = options or {}
        self._llm: Any = None
        self._lora: Any = None
        self._ends: list[int] = []

    def settings(self) -> dict[str, Any]:
        """Return the options that change numbers by more than the order of sums."""
        return {"dtype": self.dtype, "options": {key: str(value) for key, value in masked(self.options).items()}}

    def context(self, model: ModelSource) -> int:
        """Return the model's context, or ``max_model_len`` if that is less."""
        return min(model.context(), self.max_model_len or model.context())

    def no_guidance(self) -> str:
        """Return why guidance is unavailable: vLLM's sequences are independent of each other."""
        return "vLLM's logits processors see one sequence, and can't run the model on another"

    def no_floor(self) -> str:
        """Return "": without guidance, the floor is vLLM's own min_p."""
        return ""

    def open(self, model: ModelSource, rank: int) -> None:
        """Load the model; an adapter is loaded as a LoRA request on its base."""
        try:
            from vllm import LLM
            from vllm.lora.request import LoRARequest
        except ImportError as error:
            raise ConfigError(f"--engine VLLM: vLLM can't be imported ({error}). pip install vllm") from error
        if model.is_checkpoint:
            raise ConfigError(
                "--engine VLLM reads Hugging Face folders, not checkpoints: rap-lightning export --checkpoint "
                f"{model.path} --output DIR"
            )
        path, options = model.path, dict(self.options)
        if model.is_adapter:
            path = model.adapter_base()
            options = {"enable_lora": True, "max_lora_rank": 256} | options
            self._lora = LoRARequest("policy", 1, model.path)
        self._llm = LLM(
            model=path, tokenizer=model.path, revision=model.revision, dtype=self.dtype,
            tensor_parallel_size=self.tensor_parallel_size, gpu_memory_utilization=self.gpu_memory_utilization,
            max_model_len=self.max_model_len, trust_remote_code=model.trust_remote_code, **options,
        )  # fmt: skip
        from transformers import GenerationConfig

        from rap_lightning.models.generation import end_of_turn_ids

        try:
            own = GenerationConfig.from_pretrained(path, revision=model.revision)
        except OSError:  # the model has none
            own = GenerationConfig()
        self._ends = end_of_turn_ids(model.tokenizer(), SimpleNamespace(generation_config=own))

    def close(self) -> None:
        """Shut the engine down, its own process included."""
        core: Any = getattr(getattr(self._llm, "llm_engine", None), "engine_core", None)
        if hasattr(core, "shutdown"):
            core.shutdown()
        self._llm = None
        free_memory()

    def run(
        self, requests: Sequence[Request], generation: Generation, wanted: Collection[str]
    ) -> Iterator[list[Completion]]:
        """Yield ``chunk`` completions at a time; vLLM batches them itself."""
        from vllm import SamplingParams

        floor = {} if generation.min_p is None else {"min_p": generation.min_p}
        for chunk in chunks_by_length([request for request in requests if request.id in wanted], self.chunk):
            params = [
                SamplingParams(
                    n=1, temperature=generation.temperature, top_p=generation.top_p,
                    max_tokens=generation.max_new_tokens, seed=request.seed, stop_token_ids=self._ends,
                    skip_special_tokens=True, **floor,
                )
                for request in chunk
            ]  # fmt: skip
            prompts = [{"prompt_token_ids": list(request.ids)} for request in chunk]
            outputs = self._llm.generate(prompts, params, use_tqdm=False, lora_request=self._lora)
            responses = [output.outputs[0] for output in outputs]
            yield [
                Completion(request.id, one.text, len(one.token_ids), str(one.finish_reason))
                for request, one in zip(chunk, responses, strict=True)
            ]
