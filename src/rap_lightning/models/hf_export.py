"""Write a policy as a Hugging Face folder that any serving stack loads.

:func:`export` writes what was trained, a whole model or an adapter; :func:`merge` adds an adapter to its base model.
Both write safetensors, tokenizer, chat template, generation config, card and ``goal.json``, all or nothing, and compare
what was written with what was meant before the folder appears.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rap_lightning.atomic_write import atomic_folder
from rap_lightning.errors import ConfigError
from rap_lightning.models.generation import end_of_turn_ids
from rap_lightning.models.goal_chat_template import with_goals_in_template
from rap_lightning.models.policy import Policy
from rap_lightning.models.policy_config import PolicyConfig
from rap_lightning.models.token_strength import at_strength, attach
from rap_lightning.preferences.goals import is_written

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MERGED = 10.0
"""Largest difference of logits, in float32, between adapter on base and merged weights, in units of :func:`_rounding`.
Correct merges were at 0.6 to 1.6 of them (9 models of 2 to 24 layers, 32 to 512 wide, three architectures)."""
ROUNDED = 0.1
"""Largest difference of logits, as a share of the largest one, that storing the weights in 16 bits may make; more in a
model that rounds more: three times its :func:`_rounding` at the epsilon of that dtype (correct ones: 0.1 to 1.4)."""
SHARD = "5GB"
"""Of one safetensors file."""


@dataclass(frozen=True)
class ExportOptions:
    """How a policy is written.

    Attributes:
        dtype: of the written weights; None keeps those of the policy.
        max_shard_size: of one safetensors file.
        goal: the record of the goal template that the policy was trained with.
        strength: factor on the adapter; the record says so.
        goal_in_template: write the best goal into the chat template.
        base_model: the name of an adapter's base model, if not where it was loaded from.
        card: the text of README.md.
    """

    dtype: torch.dtype | None = None
    max_shard_size: str = SHARD
    goal: dict[str, Any] | None = None
    strength: float = 1.0
    goal_in_template: bool = True
    base_model: str | None = None
    card: str | None = None


def full_state(policy: Policy) -> dict[str, Tensor]:
    """Return the policy's whole state on the CPU, gathered where it is sharded; every rank must call it."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state: dict[str, Any] = get_model_state_dict(policy, options=options)
    first: dict[int, str] = {}
    for name, p in policy.named_parameters(remove_duplicate=False):  # a tied head is gathered as a copy
        if name in state:
            state[name] = state[first.setdefault(id(p), name)]
    return state


def export(
    policy: Policy, state: dict[str, Tensor], tokenizer: PreTrainedTokenizerBase, output: Path, config: PolicyConfig,
    options: ExportOptions = ExportOptions(),
) -> None:  # fmt: skip
    """Write the policy; an adapter is written as an adapter.

    Args:
        policy: what was trained.
        state: its weights, as :func:`full_state` returns them.
        tokenizer: with the chat template that training used.
        output: a folder that doesn't exist yet, or is empty.
        config: of the policy, for the place of an adapter's base model.
        options: how to write it.

    Raises:
        ConfigError: ``output`` exists and is not empty, it can't be written, or a weight is not a finite number.
    """
    own = {name.removeprefix("model."): value for name, value in state.items()}
    if options.strength != 1:
        own = {name: value * options.strength if ".lora_B." in name else value for name, value in own.items()}
    expected = own
    if policy.has_adapter:
        from peft import get_peft_model_state_dict

        expected = get_peft_model_state_dict(policy.model, state_dict=own)
    _refuse_non_finite(expected)
    with atomic_folder(output) as partial:
        written = _cast(own, options.dtype)
        if policy.has_adapter:
            # the adapter's config names its base model; a relative path would only work from this working directory
            local = str(Path(config.path).resolve()) if Path(config.path).is_dir() else config.path
            policy.model.peft_config["default"].base_model_name_or_path = options.base_model or local
            policy.model.save_pretrained(partial, state_dict=written, selected_adapters=["default"])
            (partial / "README.md").unlink(missing_ok=True)  # peft's, which holds the path of the base model
            _sort_module_names(partial)
        else:
            policy.model.save_pretrained(partial, state_dict=written, max_shard_size=options.max_shard_size)
            _record_dtype(partial, options.dtype)
        _compare_written(partial, _cast(expected, options.dtype))
        _write_rest(partial, policy.causal_lm, tokenizer, options)


def merge(
    load: Callable[[], Any], tokenizer: PreTrainedTokenizerBase, output: Path, config: PolicyConfig,
    options: ExportOptions = ExportOptions(),
) -> str:  # fmt: skip
    """Write a base model with its adapter added to the weights.

    The logits of the adapter on its base are compared with those of the merged weights, and with those of the model
    that plain transformers loads from the written files.

    Args:
        load: returns a peft model in float32, on the CPU, and keeps no reference to it: two copies may not fit.
        tokenizer: with the chat template that training used.
        output: a folder that doesn't exist yet, or is empty.
        config: of the policy; only ``trust_remote_code`` is read.
        options: how to write it; the dtype is float32 by default.

    Returns:
        How it was checked, for a log.

    Raises:
        ConfigError: ``output`` exists and is not empty, it can't be written, or the logits differ.
    """
    from transformers import AutoModelForCausalLM

    dtype, model = options.dtype or torch.float32, load()
    vocabulary = model.get_base_model().config.get_text_config().vocab_size
    attach(model)
    with at_strength(None if options.strength == 1 else torch.full((4, 1), options.strength)):
        before = _logits(model, vocabulary)
        rounding = _rounding(model, vocabulary, before)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".lora_B." in name:
                weight.mul_(options.strength)
    merged = model.merge_and_unload(safe_merge=True)
    after = _logits(merged, vocabulary)
    largest = float(before.abs().max())
    bound = min(MERGED * rounding, ROUNDED * largest)
    difference = _compare(before, after, bound, "merging")
    checked = f"merged logits differ from adapter on base by {difference:.1e} in float32 (bound {bound:.1e})"
    state = merged.state_dict()
    _refuse_non_finite(state)
    with atomic_folder(output) as partial:
        merged.to(dtype).save_pretrained(partial, safe_serialization=True, max_shard_size=options.max_shard_size)
        _write_rest(partial, merged, tokenizer, options)
        del state, merged, model
        gc.collect()
        loaded = AutoModelForCausalLM.from_pretrained(
            partial, dtype=torch.float32, use_safetensors=True, trust_remote_code=config.trust_remote_code
        )
        again = _logits(loaded, vocabulary)
        name = str(dtype).removeprefix("torch.")
        if dtype != torch.float32:
            coarser = torch.finfo(dtype).eps / torch.finfo(torch.float32).eps
            bound = max(ROUNDED * largest, 3 * rounding * coarser)
        difference = _compare(before, again, bound, f"writing it in {name}")
        if dtype != torch.float32:
            checked += f"; rounded to {name} by {difference:.1e} (bound {bound:.1e})"
    return checked


def _compare(one: Tensor, other: Tensor, bound: float, what: str) -> float:
    difference = float((one - other).abs().max())
    if not difference <= bound:
        raise ConfigError(
            f"{what} changed the model: logits differ by {difference:.3g}, which may be at most {bound:.3g}. Nothing "
            "was written. Export the adapter as it is (without --merge), and please report the model."
        )
    return difference


@torch.no_grad()
def _logits(model: Any, vocabulary: int) -> Tensor:
    """Return [4, 32, V] float32 logits of fixed random tokens."""
    ids = torch.randint(vocabulary, (4, 32), generator=torch.Generator().manual_seed(0), device="cpu")
    logits: Tensor = model.eval()(input_ids=ids, use_cache=False).logits
    return logits.float()


def _rounding(model: Any, vocabulary: int, logits: Tensor) -> float:
    """Return how far a model's float32 rounding moves its logits.

    It is measured, because it follows from no formula of width and depth alone: between initialisations of one tiny
    model it was from 5 to 134 times eps times the largest logit, and it depends on the CPU's kernels. Embeddings that
    are moved by one unit in the last place make every operation after them round in another way, as merging does, so
    the logits move as far as rounding moves them on this machine. A logit's own last places are the least.
    """
    eps, generator = torch.finfo(torch.float32).eps, torch.Generator().manual_seed(1)

    def nudge(module: torch.nn.Module, args: Any, output: Tensor) -> Tensor:
        steps = torch.randint(-1, 2, output.shape, generator=generator, device="cpu")
        return output * (1 + eps * steps)

    hook = model.get_input_embeddings().register_forward_hook(nudge)
    try:
        moved = _logits(model, vocabulary)
    finally:
        hook.remove()
    return max(float((moved - logits).abs().max()), 2 * eps * float(logits.abs().max()))


def _cast(state: dict[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Return a new dict, which ``save_pretrained`` may change, in another dtype; tied tensors stay tied."""
    if dtype is None:
        return dict(state)
    made: dict[tuple[int, torch.Size], Tensor] = {}
    for value in state.values():
        made.setdefault((value.data_ptr(), value.shape), value.to(dtype) if value.is_floating_point() else value)
    return {name: made[value.data_ptr(), value.shape] for name, value in state.items()}


def _refuse_non_finite(state: dict[str, Tensor]) -> None:
    for name, value in state.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise ConfigError(f"the weight {name} holds NaN or infinity: training diverged. Nothing was written.")


def _compare_written(folder: Path, expected: dict[str, Tensor]) -> None:
    """Compare the written tensors with those expected.

    A missing one must be a tied copy of one that was written. Experts, which transformers joins in memory and writes
    one by one under other names, are compared by how many numbers they hold.
    """
    written, converted = set(), 0
    for name, value in read_tensors(folder):
        if name not in expected:
            converted += value.numel()
        elif torch.equal(value, expected[name].cpu()):
            written.add(name)
        else:
            raise ConfigError(f"the written files don't hold {name} as it was trained. Nothing was left there.")
    present = {(expected[name].data_ptr(), expected[name].shape) for name in written}
    missing = [n for n, value in expected.items() if (value.data_ptr(), value.shape) not in present]
    if sum(expected[name].numel() for name in missing) != converted:
        raise ConfigError(f"the written files lack {missing[0] if missing else 'weights'}. Nothing was left there.")


def read_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Read the safetensors files of a folder, tensor by tensor."""
    from safetensors import safe_open

    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                yield name, file.get_tensor(name)


def _sort_module_names(folder: Path) -> None:
    """Sort the module names in an adapter's config: peft writes a set, whose order differs from process to process."""
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    for name in ("target_modules", "exclude_modules"):
        if isinstance(config.get(name), list):
            config[name] = sorted(config[name])
    path.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")


def _record_dtype(folder: Path, dtype: torch.dtype | None) -> None:
    """Make the config name the dtype of the files, not that of the policy in memory."""
    if dtype is not None:
        path = folder / "config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        config["dtype"] = str(dtype).removeprefix("torch.")
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _write_rest(
    folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, options: ExportOptions
) -> None:
    """Write everything but weights and config."""
    ends = end_of_turn_ids(tokenizer, model)
    generation = type(model.generation_config).from_dict(model.generation_config.to_dict())
    generation.eos_token_id = ends if len(ends) > 1 else ends[0] if ends else None
    # `save_pretrained` refuses what it only warns about in a file that somebody published: a temperature beside greedy
    # decoding, say. Nothing but the ends of a turn was changed here, so the other values are written as they were read
    generation.to_json_file(folder / "generation_config.json", use_diff=True, keys_to_pop=["compile_config"])
    if is_written(options.goal) and options.goal_in_template:
        tokenizer = with_goals_in_template(tokenizer, options.goal)
    tokenizer.init_kwargs.pop("local_files_only", None)  # how it was loaded here
    tokenizer.save_pretrained(folder)
    if options.goal is not None:
        text = json.dumps(options.goal, indent=2, ensure_ascii=False) + "\n"
        (folder / "goal.json").write_text(text, encoding="utf-8")
    if options.card is not None:
        (folder / "README.md").write_text(options.card, encoding="utf-8")
