"""Layouts are different roads to the same numbers: tree ≡ packed ≡ padded ≡ one sequence at a time."""

from __future__ import annotations

from functools import partialmethod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch.autograd.graph import saved_tensors_hooks

from conftest import make_model
from rap_lightning.batches import layouts
from rap_lightning.batches.dataset import Example
from rap_lightning.batches.layouts import LAYOUTS, build_prefix_tree, lay_out
from rap_lightning.batches.sampler import BatchPlan, PairSize
from rap_lightning.batches.types import Batch
from rap_lightning.errors import ConfigError
from rap_lightning.models import activation_offload as memory
from rap_lightning.models.model_checks import check_head, check_sharing
from rap_lightning.models.policy import Policy, compile_layers
from rap_lightning.models.policy_config import Lora, PolicyConfig, silence_dropout
from test_logps import examples

VOCABULARY = 97


def config_of(architecture: str) -> Any:
    sizes = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": VOCABULARY, "head_dim": 8, "initializer_range": 0.3, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 256,
    }  # fmt: skip
    moe = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    special: dict[str, dict[str, Any]] = {
        "Qwen2": {"tie_word_embeddings": True},
        "Qwen3": {"tie_word_embeddings": True},
        "Gemma2": {
            "final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0, "sliding_window": 9,
            "query_pre_attn_scalar": 8, "layer_types": ["sliding_attention", "full_attention"],
        },
        "Gemma3Text": {
            "sliding_window": 9, "query_pre_attn_scalar": 8, "layer_types": ["sliding_attention", "full_attention"],
        },
        "Mistral": {"sliding_window": 9},
        "Cohere": {"logit_scale": 0.25},
        "Granite": {"logits_scaling": 4.0},
        "Mixtral": moe,
        "Qwen3Moe": moe,
        "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256},
        "GptOss": moe | {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 9},
        "Mamba": {"state_size": 4, "num_heads": 4},
        "Lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    }  # fmt: skip
    if architecture == "GPT2":
        sizes = {k: sizes[k] for k in ("vocab_size", "initializer_range", "bos_token_id", "eos_token_id")}
    return getattr(transformers, f"{architecture}Config")(**(sizes | special.get(architecture, {})))


def policy_of(architecture: str, dtype: torch.dtype, *, lora: bool = False, checkpointing: bool = False) -> Policy:
    torch.manual_seed(0)
    spec = config_of(architecture)
    silence_dropout(spec)
    model = transformers.AutoModelForCausalLM.from_config(spec, dtype=dtype)
    config = PolicyConfig("random", gradient_checkpointing=checkpointing, lora=Lora(r=3) if lora else None)
    object.__setattr__(config, "load_model", lambda _: model)
    policy = config.build(dtype)
    if lora:
        for name, parameter in policy.named_parameters():  # both halves of an adapter at work
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.3)
    return policy


def conversations(*, goals_of_one: bool) -> list[Example]:
    """Prompts that begin alike, of one original pair at two goals or of distinct ones; some longer than any window."""
    rng = np.random.default_rng(0)

    def ids(count: int) -> list[int]:
        return rng.integers(3, VOCABULARY, count).tolist()

    system, user, tail = ids(18), ids(14), ids(3)
    if goals_of_one:
        a, b = ids(12), ids(5)
        prompts = [[*system, 5, *user, *tail], [*system, 6, *user, *tail]]
        return [
            Example("one", half, "g", (9.0, 1.0), prompt, first, second)
            for half, (prompt, first, second) in enumerate([(prompts[0], a, b), (prompts[1], b, a)])
        ]
    same = system + ids(9)
    return [
        Example("a", 0, "g", (9.0, 1.0), system + ids(5), ids(11), ids(4)),
        Example("b", 0, "g", (9.0, 1.0), same, ids(1), ids(23)),
        Example("c", 1, "g", (1.0, 9.0), same, ids(6), ids(6)),
        Example("d", 1, "g", (1.0, 9.0), ids(2), ids(5), ids(1)),
    ]


def batch_of(layout: str, examples: list[Example]) -> Batch:
    count = len(examples)
    plan = BatchPlan(tuple(range(count)), (1.0,) * count, count, (tuple(range(count)),))
    return lay_out(LAYOUTS[layout], examples, plan, pad_id=0)


def naive(model: Any, examples: list[Example]) -> torch.Tensor:
    """[2B]: each sequence alone through the model's own forward, full logits, full log-softmax."""
    found = []
    for example in examples:
        for response in (example.chosen_ids, example.rejected_ids):
            ids = torch.tensor([[*example.prompt_ids, *response]])
            table = model(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
            places = torch.arange(len(example.prompt_ids), ids.shape[1])
            found.append(table[places - 1, ids[0, places]].sum())
    return torch.stack(found)


def loss_and_gradients(policy: Policy, logps: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """A loss that weighs every response differently, so that no error can cancel, and every gradient."""
    weights = torch.linspace(0.5, 2.0, len(logps), dtype=logps.dtype) * torch.tensor([1, -1]).repeat(len(logps) // 2)
    loss = torch.nn.functional.softplus(-(weights * logps).unflatten(0, (-1, 2)).sum(1) / 100).sum()
    names = {n: p for n, p in policy.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(loss, list(names.values()), allow_unused=True)
    return loss.detach(), {n: torch.zeros(()) if g is None else g for n, g in zip(names, grads, strict=True)}


def assert_same_gradients(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], bound: float) -> None:
    assert a.keys() == b.keys()
    largest = max(float(g.norm()) for g in b.values())
    assert largest > 0
    for name, expected in b.items():
        # a gradient that is zero but for rounding (a key's bias) is compared to what the others are
        size = max(float(expected.norm()), 1e-4 * largest)
        assert float((a[name] - expected).norm()) <= bound * size, name


def assert_as_single_sequences(policy: Policy, examples: list[Example], loss_bound: float, bound: float) -> None:
    """Every layout gives the loss (relative bound) and the gradients of single sequences."""
    loss, gradients = loss_and_gradients(policy, naive(policy.model, examples))
    for layout in LAYOUTS:
        ours, grads = loss_and_gradients(policy, policy.logps(batch_of(layout, examples)))
        assert abs(float(ours - loss)) <= loss_bound * abs(float(loss)), layout
        assert_same_gradients(grads, gradients, bound)


SHARING = [
    "Llama", "Qwen2", "Qwen3", "Gemma2", "Gemma3Text", "Mistral", "Phi3", "GPT2", "Cohere", "Granite", "Mixtral",
    "Qwen3Moe", "GptOss",
]  # fmt: skip


@pytest.mark.parametrize("goals_of_one", [False, True])
@pytest.mark.parametrize("architecture", SHARING)
def test_every_layout_gives_the_loss_and_gradients_of_single_sequences_in_float64(
    architecture: str, goals_of_one: bool, true_float64: None
) -> None:
    policy = policy_of(architecture, torch.float64)
    examples = conversations(goals_of_one=goals_of_one)
    policy.causal_lm.set_attn_implementation("eager")
    if hasattr(policy.causal_lm.config, "num_experts_per_tok"):
        policy.causal_lm.set_experts_implementation("eager")  # the grouped kernel has no float64
    assert_as_single_sequences(policy, examples, 1e-10, 1e-10)


@pytest.mark.parametrize("architecture", SHARING)
def test_every_layout_agrees_in_float32_on_distinct_originals(architecture: str) -> None:
    policy = policy_of(architecture, torch.float32)
    assert check_sharing(policy) is None
    assert_as_single_sequences(policy, conversations(goals_of_one=False), 1e-5, 5e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("architecture", ["Llama", "Gemma2", "GPT2"])
def test_an_adapter_and_checkpointing_change_nothing(
    architecture: str, checkpointing: bool, true_float64: None
) -> None:
    """Layers computed again in the backward pass must find the forest's attention, not the model's own."""
    policy = policy_of(architecture, torch.float64, lora=True, checkpointing=checkpointing)
    policy.causal_lm.set_attn_implementation("eager")
    assert all("lora_" in name for name, p in policy.named_parameters() if p.requires_grad)
    assert_as_single_sequences(policy, conversations(goals_of_one=False), 1e-10, 1e-10)


@pytest.mark.parametrize("architecture", ["Mamba", "Lfm2"])
def test_a_model_that_mixes_tokens_outside_attention_is_found_out_and_runs_one_at_a_time(architecture: str) -> None:
    policy = policy_of(architecture, torch.float32)
    reason = check_sharing(policy)
    assert reason is not None
    assert "change each other" in reason or "can't be replaced" in reason
    assert_as_single_sequences(policy, conversations(goals_of_one=False), 1e-5, 5e-5)


def test_a_window_that_the_check_is_too_short_to_see_must_reach_our_attention() -> None:
    policy = policy_of("Llama", torch.float32)
    assert check_sharing(policy) is None
    policy.causal_lm.config.attention_chunk_size = 8192  # as Llama 4 has, through a mask of its own
    assert "within 8,192 tokens in a way of its own" in str(check_sharing(policy))
    assert not policy.shares


def test_the_model_keeps_its_own_attention_outside_our_forward() -> None:
    policy = policy_of("Llama", torch.float32)
    before = policy.causal_lm.config._attn_implementation
    policy.logps(batch_of("tree", conversations(goals_of_one=False)))
    assert policy.causal_lm.config._attn_implementation == before == "sdpa"
    ids, mask = torch.arange(3, 15)[None], torch.ones(1, 12, dtype=torch.int64)
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.int64), ids], 1)
    hidden = torch.cat([torch.zeros(1, 4, dtype=torch.int64), mask], 1)
    with torch.no_grad():
        alone = policy.model(input_ids=ids, attention_mask=mask).logits[0, -1]
        left = policy.model(
            input_ids=padded, attention_mask=hidden, position_ids=(hidden.cumsum(1) - 1).clamp(min=0)
        ).logits[0, -1]
    torch.testing.assert_close(left, alone, rtol=1e-4, atol=1e-4)


def sequences(*texts: str) -> list[Any]:
    return [np.frombuffer(text.encode(), np.uint8).astype(np.int64) for text in texts]


@pytest.mark.parametrize("shared", [False, True])
def test_a_forest_holds_every_sequence_and_sees_exactly_its_path(shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layouts, "WORTH_SHARING", 1)
    texts = ["abcdef", "abcxy", "abcxyz", "b", "abcdef", "bcd", "abqqq", "abcd"]
    tree = build_prefix_tree(sequences(*texts), shared=shared)
    tokens = tree.input_ids.numel()
    assert tokens == (len("abcdef" + "xyz" + "qqq" + "bcd") if shared else sum(map(len, texts)))
    end = tree.forest.end
    index = torch.arange(tokens)
    sees = (index <= index[:, None]) & (index[:, None] < end)
    for text, places in zip(texts, tree.places, strict=True):
        assert bytes(tree.input_ids[0, places].to(torch.uint8).numpy()).decode() == text
        assert tree.position_ids[0, places].tolist() == list(range(len(text)))
        for depth, place in enumerate(places):
            assert sees[place].nonzero()[:, 0].tolist() == places[: depth + 1].tolist()
    covered = [i for start, stop, _ in tree.forest.runs for i in range(start, stop)]
    assert covered == list(range(tokens))
    on_paths = [[i for a, b in path for i in range(a, b)] for path in tree.forest.paths]
    assert {tuple(p) for p in on_paths} <= {tuple(p.tolist()) for p in tree.places}
    assert {i for p in on_paths for i in p} == set(range(tokens))


def test_a_branch_that_would_share_next_to_nothing_starts_at_the_one_before() -> None:
    head = "s" * layouts.WORTH_SHARING
    few, more = "t" * (layouts.WORTH_SHARING - 1), "t" * layouts.WORTH_SHARING
    for middle, tokens in [(few, len(head) + 2 * len(few + "x")), (more, len(head + more) + 2)]:
        tree = build_prefix_tree(sequences(head + "a", head + middle + "x", head + middle + "y"), shared=True)
        assert tree.input_ids.numel() == tokens + 1


def test_layouts_estimate_no_fewer_tokens_than_they_lay_out() -> None:
    examples = conversations(goals_of_one=False)
    sizes = [PairSize(len(e.prompt_ids), len(e.chosen_ids), len(e.rejected_ids)) for e in examples]
    laid = {name: batch_of(name, examples).input_ids.numel() for name in LAYOUTS}
    assert laid["tree"] < laid["packed"] < laid["padded"]
    for name, layout in LAYOUTS.items():
        assert laid[name] <= layout.tokens(sizes)
    assert laid["padded"] == LAYOUTS["padded"].tokens(sizes)


def test_the_goals_of_one_pair_share_what_their_prompts_begin_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layouts, "WORTH_SHARING", 1)
    batch = batch_of("tree", conversations(goals_of_one=True))
    assert batch.input_ids.numel() == 18 + 2 * (1 + 14 + 3 + 12 + 5)
    with_goal_last = [
        Example("one", half, "g", (9.0, 1.0), [*range(3, 33), 40 + half, 50], first, second)
        for half, (first, second) in enumerate([([60, 2], [70, 71, 2]), ([70, 71, 2], [60, 2])])
    ]
    assert batch_of("tree", with_goal_last).input_ids.numel() == 30 + 2 * (2 + 2 + 3), "four responses, one prompt"


def test_a_batch_moves_with_its_forest() -> None:
    batch = batch_of("tree", conversations(goals_of_one=False)).to("meta")
    assert batch.forest is not None
    assert batch.forest.end.device.type == "meta"


def test_a_saved_model_passes_both_checks(tmp_path: Path) -> None:
    policy = PolicyConfig(str(make_model(tmp_path / "model"))).build(torch.float32)
    assert check_head(policy) < 1e-4
    assert check_sharing(policy) is None


def test_sizes_are_those_of_the_examples(tiny: Path) -> None:
    for max_length in (160, 95):
        pairs = examples(tiny, rows=12, max_length=max_length)
        expected = [pairs.example(i) for i in range(len(pairs))]
        assert pairs.sizes() == [PairSize(len(e.prompt_ids), len(e.chosen_ids), len(e.rejected_ids)) for e in expected]


@pytest.mark.parametrize("attention", ["flash_attention_2", "nothing_like_it"])
def test_an_attention_that_the_machine_lacks_is_named(attention: str, tiny: Path) -> None:
    with pytest.raises(ConfigError, match=rf"attn_implementation {attention}: this model or this machine has no such"):
        PolicyConfig(str(tiny), attn_implementation=attention).load_model(torch.float32)


@pytest.mark.parametrize(
    ("lora", "checkpointing", "backend"),
    [
        (False, False, "aot_eager"),  # traces as the real compiler does, and writes no code
        *(
            pytest.param(lora, checkpointing, "inductor", marks=pytest.mark.slow)
            for lora in (False, True) for checkpointing in (False, True)
        ),
    ],
)  # fmt: skip
def test_compiled_layers_give_the_same_gradients_and_are_compiled_once_for_all_lengths(
    lora: bool, checkpointing: bool, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(compiler, backend=backend))
    plain = policy_of("Llama", torch.float32, lora=lora, checkpointing=checkpointing)
    compiled = policy_of("Llama", torch.float32, lora=lora, checkpointing=checkpointing)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compile_layers(compiled)
    examples = conversations(goals_of_one=False)
    for some in (examples, examples[:2], examples[1:], examples[3:]):
        for layout in ("tree", "padded"):
            batch = batch_of(layout, some)
            loss, gradients = loss_and_gradients(plain, plain.logps(batch))
            ours, grads = loss_and_gradients(compiled, compiled.logps(batch))
            assert abs(float(ours - loss)) <= 1e-5 * abs(float(loss)), layout
            assert_same_gradients(grads, gradients, 5e-5)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs <= 12
    rng = np.random.default_rng(0)
    for size in range(6):  # ten sizes with the four above
        prompt, chosen, rejected = (rng.integers(3, VOCABULARY, x).tolist() for x in rng.integers(4, 60 + 9 * size, 3))
        batch = batch_of("tree", [Example("a", 0, "g", (9.0, 1.0), prompt, chosen, rejected)])
        loss_and_gradients(compiled, compiled.logps(batch))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


def test_offloading_is_refused_without_a_gpu(tiny: Path) -> None:
    with pytest.raises(ConfigError, match="activation_offloading has no effect without a GPU"):
        PolicyConfig(str(tiny), activation_offloading=True)


@pytest.mark.parametrize("lora", [False, True])
def test_offloading_takes_activations_and_leaves_weights(lora: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, batch = policy_of("Llama", torch.float32, lora=lora), batch_of("tree", conversations(goals_of_one=False))
    loss, gradients = loss_and_gradients(policy, policy.logps(batch))
    taken: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> tuple[torch.Tensor, None]:
        taken.append(tensor.detach())
        return tensor.clone(), None

    host = saved_tensors_hooks(pack, lambda packed: packed[0])
    monkeypatch.setattr(memory, "save_on_cpu", lambda **_: host)
    policy.offload = True
    ours, grads = loss_and_gradients(policy, policy.logps(batch))
    assert torch.equal(ours, loss)
    assert_same_gradients(grads, gradients, 0.0)
    weights = {p.untyped_storage().data_ptr() for p in policy.parameters()}
    assert not [t.shape for t in taken if t.untyped_storage().data_ptr() in weights]
    assert sum(t.shape[-2:] == (batch.input_ids.shape[1], 32) for t in taken) >= 4  # hidden states of each layer
