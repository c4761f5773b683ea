"""The ways to compute attention over a forest on a GPU, on a CPU: which is chosen, and that each follows the rule.

The varlen path runs with its kernel replaced by a reference implementation of flash attention's contract; FlexAttention
runs unfused, or with a compiler that traces and generates no code. No test here needs or uses a GPU.
"""

from __future__ import annotations

import dataclasses
import re
import tracemalloc
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import yaml
from torch.nn.attention import flex_attention as torch_flex
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from conftest import ROOT
from rap_lightning.batches import layouts
from rap_lightning.batches.layouts import build_prefix_tree
from rap_lightning.batches.types import Forest
from rap_lightning.models import (
    attention,
    attention_check,
    attention_choice,
    flex_attention,
    masked_attention,
    private_api,
    varlen_attention,
)
from rap_lightning.models.attention import declared_windows
from rap_lightning.models.attention_check import passes, with_gradients
from rap_lightning.models.attention_choice import Demand, Machine, choices, choose
from rap_lightning.models.masked_attention import AttentionCall
from rap_lightning.models.model_checks import check_sharing
from test_layouts import SHARING, assert_same_gradients, batch_of, conversations, loss_and_gradients, naive, policy_of

HOPPER = Machine.cuda((9, 0))
CPU = torch.device("cpu")


# -- the kernels' contracts, written down -----------------------------------------------------------------------------


def sequences_of(query_ends: torch.Tensor, key_ends: torch.Tensor) -> Iterator[tuple[slice, slice]]:
    for ends in (query_ends, key_ends):
        assert ends.dtype == torch.int32
        assert (ends.diff() > 0).all(), "flash attention gives an empty sequence a log-sum-exp of infinity"
    ends = zip(query_ends.tolist(), key_ends.tolist(), strict=True)
    first, *others = ends
    for other in others:
        yield slice(first[0], other[0]), slice(first[1], other[1])
        first = other


def scores_of(query: Any, key: Any, rows: slice, columns: slice, causal: bool, scale: float) -> torch.Tensor:
    """[H, t, u]"""
    wide = torch.promote_types(query.dtype, torch.float32)
    k = key[columns].to(wide).repeat_interleave(query.shape[1] // key.shape[1], 1)
    scores = torch.einsum("thd,uhd->htu", query[rows].to(wide), k) * scale
    if causal:
        assert rows.stop - rows.start == columns.stop - columns.start
        scores = scores.masked_fill(torch.ones(scores.shape[1:], dtype=torch.bool).triu(1), float("-inf"))
    return scores


def reference_forward(
    query: Any, key: Any, value: Any, query_ends: Any, key_ends: Any, longest_query: int, longest_key: int,
    causal: bool, scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    assert query.dtype == key.dtype == value.dtype
    assert (longest_query, longest_key) == (int(query_ends.diff().max()), int(key_ends.diff().max()))
    assert (len(query), len(key)) == (int(query_ends[-1]), int(key_ends[-1]))
    wide = torch.promote_types(query.dtype, torch.float32)
    out, log_z = torch.empty_like(query), torch.empty(query.shape[1], len(query), dtype=wide)
    for rows, columns in sequences_of(query_ends, key_ends):
        scores = scores_of(query, key, rows, columns, causal, scale)
        v = value[columns].to(wide).repeat_interleave(query.shape[1] // key.shape[1], 1)
        log_z[:, rows] = scores.logsumexp(-1)
        out[rows] = torch.einsum("htu,uhd->thd", scores.softmax(-1), v).to(out.dtype)
    return out, log_z


def reference_backward(
    grad: Any, query: Any, key: Any, value: Any, out: Any, log_z: Any, query_ends: Any, key_ends: Any,
    longest_query: int, longest_key: int, causal: bool, scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """As FlashAttention-2's algorithm 2: from the log-sum-exp and D = Σ grad · out that it is given."""
    assert log_z.is_contiguous()
    wide = log_z.dtype
    group = query.shape[1] // key.shape[1]
    grads = [torch.zeros(x.shape, dtype=wide) for x in (query, key, value)]
    delta = (grad.to(wide) * out.to(wide)).sum(-1)
    for rows, columns in sequences_of(query_ends, key_ends):
        probabilities = (scores_of(query, key, rows, columns, causal, scale) - log_z[:, rows, None]).exp()
        k, v = (x[columns].to(wide).repeat_interleave(group, 1) for x in (key, value))
        g = grad[rows].to(wide)
        of_scores = probabilities * (torch.einsum("thd,uhd->htu", g, v) - delta[rows].T[..., None]) * scale
        grads[0][rows] = torch.einsum("htu,uhd->thd", of_scores, k)
        of_keys = torch.einsum("htu,thd->uhd", of_scores, query[rows].to(wide))
        of_values = torch.einsum("htu,thd->uhd", probabilities, g)
        for total, share in ((grads[1], of_keys), (grads[2], of_values)):
            total[columns] = share.unflatten(1, (-1, group)).sum(2)
    return tuple(x.to(query.dtype) for x in grads)  # type: ignore[return-value]


@pytest.fixture
def varlen_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(private_api, "varlen_flash", reference_forward)
    monkeypatch.setattr(private_api, "varlen_flash_backward", reference_backward)


@pytest.fixture
def hopper_on_cpu(varlen_on_cpu: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Paths are chosen as for an H100, float64 included, and run here."""
    monkeypatch.setattr(attention_choice, "HALVES", (torch.bfloat16, torch.float64))
    monkeypatch.setattr(Machine, "of", lambda device: HOPPER)
    # torch refuses to train with FlexAttention on a CPU, although its unfused one does
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *tensors: None)
    attention._working.cache_clear()
    yield
    attention._working.cache_clear()


# -- random forests ---------------------------------------------------------------------------------------------------


def random_forest(seed: int, monkeypatch: pytest.MonkeyPatch, *, longest: int = 24, count: int = 6) -> Forest:
    """Sequences of two letters, so that they branch at every depth, or none that share."""
    monkeypatch.setattr(layouts, "WORTH_SHARING", 1)
    rng = np.random.default_rng(seed)
    made = [rng.integers(0, 2, rng.integers(1, longest)) for _ in range(rng.integers(1, count))]
    made += [np.concatenate([x, rng.integers(0, 2, rng.integers(1, 9))]) for x in made if rng.random() < 0.5]
    forest = build_prefix_tree(made, shared=seed % 4 != 0).forest
    assert forest is not None
    return forest


def random_call(
    forest: Forest, dtype: torch.dtype, seed: int = 0, **options: Any
) -> tuple[AttentionCall, torch.Tensor]:
    generator, tokens = torch.Generator().manual_seed(seed), len(forest.end)
    q, up = (torch.randn(1, 4, tokens, 8, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    k, v = (torch.randn(1, 2, tokens, 8, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    return AttentionCall(q, k, v, forest, 0.4, **options), up


def by_the_rule(call: AttentionCall) -> torch.Tensor:
    """Query q sees key k exactly when k <= q < end[k], and within a window when their depths are that close."""
    forest, tokens = call.forest, len(call.forest.end)
    depth = [0] * tokens
    for path in forest.paths:
        for number, token in enumerate(token for span in path for token in range(*span)):
            depth[token] = number
    sees = torch.zeros(tokens, tokens, dtype=torch.bool)
    for q in range(tokens):
        for k in range(q + 1):
            near = call.window is None or depth[q] - depth[k] < call.window
            sees[q, k] = q < int(forest.end[k]) and near
    wide = torch.promote_types(call.query.dtype, torch.float32)
    key, value = (x.to(wide).repeat_interleave(2, 1) for x in (call.key, call.value))
    scores = call.query.to(wide) @ key.transpose(2, 3) * call.scale
    if call.softcap is not None:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    weights = scores.masked_fill(~sees, float("-inf"))
    if call.sinks is not None:
        weights = torch.cat([weights, call.sinks.to(wide).reshape(1, -1, 1, 1).expand(*weights.shape[:3], 1)], -1)
    return weights.softmax(-1)[..., :tokens] @ value


def assert_follows_the_rule(
    attend: Callable[[AttentionCall], torch.Tensor], call: AttentionCall, up: torch.Tensor, bound: float
) -> None:
    pairs = zip(with_gradients(attend, call, up), with_gradients(by_the_rule, call, up), strict=True)
    for found, expected in pairs:
        assert float((found - expected).abs().max()) <= bound * max(1.0, float(expected.abs().max()))


SEEDS = range(24)


@pytest.mark.parametrize("seed", SEEDS)
def test_varlen_attention_follows_the_rule_on_any_forest(
    seed: int, varlen_on_cpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    forest = random_forest(seed, monkeypatch)
    sinks = torch.linspace(-1, 2, 4, dtype=torch.float64) if seed % 2 else None
    assert_follows_the_rule(varlen_attention.attend, *random_call(forest, torch.float64, sinks=sinks), bound=1e-10)


def test_varlen_attention_takes_a_call_per_depth_and_copies_nothing_of_one_tree(
    varlen_on_cpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = ["a" * 20 + "b" * 20 + "c" * 20, "a" * 20 + "b" * 20 + "d" * 20, "a" * 20 + "e" * 9]
    forest = build_prefix_tree([np.frombuffer(x.encode(), np.uint8).astype(int) for x in deep], shared=True).forest
    assert forest is not None
    assert [part.causal for part in varlen_attention.parts(forest)] == [True, False, False]
    for part in varlen_attention.parts(forest):
        assert isinstance(part.queries.index, slice)
        assert isinstance(part.keys.index, slice)
    flat = batch_of("packed", conversations(goals_of_one=False)).forest
    assert flat is not None
    assert len(varlen_attention.parts(flat)) == 1


@pytest.mark.parametrize("seed", range(4))
def test_varlen_attention_in_bfloat16_is_as_close_as_sdpa(
    seed: int, varlen_on_cpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    call, up = random_call(random_forest(seed, monkeypatch), torch.bfloat16, seed)
    exact = dataclasses.replace(call, **{x: getattr(call, x).double() for x in ("query", "key", "value")})
    expected = with_gradients(by_the_rule, exact, up.double())
    sdpa = with_gradients(masked_attention.attend, call, up)
    ours = with_gradients(varlen_attention.attend, call, up)
    for truth, a, b in zip(expected, ours, sdpa, strict=True):
        assert float((a - truth).abs().max()) <= 2 * float((b - truth).abs().max()) + 1e-6


# -- block masks ------------------------------------------------------------------------------------------------------


def by_blocks(call: AttentionCall) -> torch.Tensor:
    """What FlexAttention's kernel does with a block mask: the rule in partial blocks, no rule in full ones."""
    mask, size = flex_attention.block_mask(call.forest, call.window), flex_attention.BLOCK
    tokens = len(call.forest.end)
    key, value = (x.repeat_interleave(2, 1) for x in (call.key, call.value))
    outs = []
    for block, first in enumerate(range(0, tokens, size)):
        q = torch.arange(first, min(first + size, tokens))
        seen = torch.zeros(len(q), tokens, dtype=torch.bool)
        lists = ((mask.kv_num_blocks, mask.kv_indices, True), (mask.full_kv_num_blocks, mask.full_kv_indices, False))
        for counts, indices, by_rule in lists:
            for column in indices[0, 0, block, : int(counts[0, 0, block])].tolist():
                k = torch.arange(column * size, min((column + 1) * size, tokens))
                assert not seen[:, k].any(), "a block is listed once"
                zero = torch.zeros((), dtype=torch.int64)
                seen[:, k] = mask.mask_mod(zero, zero, q[:, None], k) if by_rule else True
        scores = call.query[:, :, q] @ key.transpose(2, 3) * call.scale
        if call.softcap is not None:
            scores = flex_attention._capped(call.softcap)(scores, None, None, None, None)
        outs.append(scores.masked_fill(~seen, float("-inf")).softmax(-1) @ value)
    return torch.cat(outs, 2)


@pytest.mark.parametrize("seed", SEEDS)
def test_block_masks_follow_the_rule_on_any_forest(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex_attention, "BLOCK", (4, 8)[seed % 2])
    forest = random_forest(seed, monkeypatch)
    for window in (None, 1, 5, 13):
        options = {"window": window, "softcap": 2.0 if seed % 3 else None}
        assert_follows_the_rule(by_blocks, *random_call(forest, torch.float64, **options), bound=1e-10)
        mask = flex_attention.block_mask(forest, window)
        # the backward kernel reads the same table by columns
        for n, i, m, j in (
            (mask.kv_num_blocks, mask.kv_indices, mask.q_num_blocks, mask.q_indices),
            (mask.full_kv_num_blocks, mask.full_kv_indices, mask.full_q_num_blocks, mask.full_q_indices),
        ):
            rows = {(r, c) for r in range(i.shape[2]) for c in i[0, 0, r, : int(n[0, 0, r])].tolist()}
            columns = {(r, c) for c in range(j.shape[2]) for r in j[0, 0, c, : int(m[0, 0, c])].tolist()}
            assert rows == columns


def test_block_masks_leave_out_what_is_not_seen() -> None:
    long = [np.full(1000, letter) for letter in (1, 2, 3)]
    forest = build_prefix_tree(long, shared=False).forest
    assert forest is not None
    partly, fully = flex_attention.block_tables(forest, None)
    exact = masked_attention.tree_mask(forest, 0, 3000, None)
    size = flex_attention.BLOCK
    for i in range(len(partly)):
        for j in range(len(partly)):
            block = exact[i * size : (i + 1) * size, j * size : (j + 1) * size]
            assert (partly[i, j] | fully[i, j]) == bool(block.any())
            assert not fully[i, j] or bool(block.all())
    within, whole = flex_attention.block_tables(forest, 200)
    exact = masked_attention.tree_mask(forest, 0, 3000, 200)
    padded = torch.nn.functional.pad(exact, (0, -3000 % size, 0, -3000 % size))
    least = int(padded.unflatten(0, (-1, size)).unflatten(2, (-1, size)).any(1).any(2).sum())
    at_edges = 3 * 1000 // size  # a block of two sequences bounds positions badly
    assert least <= (within | whole).sum() <= least + at_edges < (partly | fully).sum()


class AllBytes(TorchDispatchMode):
    """Counts the bytes of every tensor that is made."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.total += sum(x.nbytes for x in tree_leaves(out) if isinstance(x, torch.Tensor))
        return out


@pytest.mark.parametrize("window", [None, 512])
def test_block_masks_take_bytes_in_proportion_to_the_tokens(window: int | None) -> None:
    for tokens in (2048, 4096, 8192):
        prompt = np.full(tokens // 4, 1)
        texts = [np.concatenate([prompt, np.full(tokens // 4, letter)]) for letter in (2, 3, 4)]
        forest = build_prefix_tree(texts, shared=True).forest
        assert forest is not None
        assert len(forest.end) == tokens
        with AllBytes():
            flex_attention.block_mask(forest, 3)  # what torch imports at the first call
        tracemalloc.start()
        with AllBytes() as made:
            flex_attention.block_mask(forest, window)
        peak = tracemalloc.get_traced_memory()[1]  # of NumPy
        tracemalloc.stop()
        assert peak + made.total <= 200 * tokens, "torch's create_block_mask takes 3 T² bytes: 24,576 T at 8,192"


@pytest.mark.parametrize("module", ["flex", "mask"])
def test_masks_are_made_once_for_all_layers(module: str, hopper_on_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    owner, name = {"flex": (flex_attention, "block_tables"), "mask": (masked_attention, "tree_mask")}[module]
    original = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args: made.append(1) or original(*args))
    policy = policy_of("Gemma2", torch.float32)
    policy.causal_lm.config.layer_types = ["full_attention"] * 2
    if module == "mask":
        monkeypatch.setattr(Machine, "of", lambda device: Machine("cpu"))
    batch = batch_of("tree", conversations(goals_of_one=True))
    assert batch.forest is not None
    with torch.no_grad():
        for _ in range(2):
            policy(batch)
    # a sliding and a full layer, one tree
    assert len(made) == 2 * len(batch.forest.roots)


@pytest.mark.parametrize("machine", [Machine("cpu"), HOPPER])
def test_a_batch_can_be_trained_on_after_a_reference_saw_it_in_inference_mode(
    machine: Machine, hopper_on_cpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Machine, "of", lambda device: machine)
    policy, batch = policy_of("Gemma2", torch.float32), batch_of("tree", conversations(goals_of_one=True))
    with torch.inference_mode():
        before = policy.logps(batch)
    after = policy.logps(batch)
    after.sum().backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(after.detach(), before)


# -- FlexAttention ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("sinks", [False, True])
def test_flex_attention_gives_what_the_rule_gives(
    window: int | None, softcap: float | None, sinks: bool, hopper_on_cpu: None
) -> None:
    forest = batch_of("tree", conversations(goals_of_one=False)).forest
    assert forest is not None
    logits = torch.linspace(-1, 2, 4, dtype=torch.float64) if sinks else None
    call, up = random_call(forest, torch.float64, window=window, softcap=softcap, sinks=logits)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*flex_attention called without torch.compile")
        assert_follows_the_rule(flex_attention.attend, call, up, 1e-6 if sinks else 1e-10)


@pytest.mark.parametrize(
    "kinds",
    [
        [(64, 50.0)],
        pytest.param([(w, c) for w in (None, 64) for c in (None, 50.0)], marks=pytest.mark.slow, id="all kinds"),
    ],
)
def test_flex_attention_compiles_once_for_each_kind_of_layer(
    kinds: list[tuple[int | None, float | None]], hopper_on_cpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With gradients for the policy and without for the reference; ``fullgraph`` refuses what can't be fused."""
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: compiler(f, backend="aot_eager", **options))
    torch._dynamo.reset()
    flex_attention.compiled.cache_clear()
    graphs: list[int] = []
    for seed in range(4):
        forest = random_forest(seed + 1, monkeypatch, longest=150 + 40 * seed, count=9)
        for window, softcap in kinds:
            for gradients in (False, True):
                call, _ = random_call(forest, torch.float32, window=window, softcap=softcap)
                call.query.requires_grad_(gradients)
                out = flex_attention.compiled()(
                    call.query, call.key, call.value, block_mask=flex_attention.block_mask(forest, window),
                    score_mod=None if softcap is None else flex_attention._capped(softcap), enable_gqa=True,
                )  # fmt: skip
                assert out.requires_grad == gradients
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    flex_attention.compiled.cache_clear()
    torch._dynamo.reset()
    assert graphs[-1] == graphs[1]


# -- which path -------------------------------------------------------------------------------------------------------


CONFIGS = sorted((ROOT / "configs").glob("*.yaml")) + sorted((ROOT / "configs" / "rounds").glob("*.yaml"))
ARCHITECTURES = {
    "llama": transformers.LlamaConfig(head_dim=128),
    "mistral": transformers.MistralConfig(head_dim=128),  # with a window of 4,096, which v0.3 does without
    "qwen2": transformers.Qwen2Config(),
    "gemma-2": transformers.Gemma2Config(),
    "smollm2": transformers.LlamaConfig(hidden_size=576, num_attention_heads=9),
    "gpt-oss": transformers.GptOssConfig(),
}


def demands_of(config: Any, dtype: torch.dtype, *, sinks: bool = False) -> list[Demand]:
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    softcap = getattr(config, "attn_logit_softcapping", None)
    return [Demand(dtype, size, size, softcap, window, sinks) for window in (None, *declared_windows(config))]


def models_named_in(text: str) -> list[str]:
    return [name for name in ARCHITECTURES if re.search(rf"path: \S*{name}", text, re.IGNORECASE)]


def test_every_shipped_recipe_has_a_fused_path_on_a_gpu() -> None:
    found = {name: text for path in CONFIGS for text in [path.read_text()] for name in models_named_in(text)}
    assert {"llama", "mistral", "qwen2", "gemma-2", "smollm2"} <= found.keys()
    for name in ("gpt-oss", *found):
        text = found.get(name, "")
        precision = yaml.safe_load(text)["trainer"]["precision"] if "trainer:" in text else "bf16-mixed"
        dtype = torch.bfloat16 if "bf16" in precision else torch.float32
        for machine in (HOPPER, Machine.cuda((8, 0)), Machine.cuda((8, 9)), Machine.cuda((10, 0))):
            for demand in demands_of(ARCHITECTURES[name], dtype, sinks=name == "gpt-oss"):
                path = choose(demand, machine).path
                plain = demand.softcap is None and demand.window is None and dtype == torch.bfloat16
                assert path == ("varlen" if plain else "flex"), (name, demand)


@pytest.mark.parametrize(
    ("demand", "machine", "path", "reason"),
    [
        (Demand(torch.bfloat16, 64, 64), HOPPER, "varlen", "flash attention"),
        (Demand(torch.bfloat16, 64, 64, sinks=True), HOPPER, "varlen", "flash attention"),
        (Demand(torch.float32, 64, 64), HOPPER, "flex", "FlexAttention"),
        (Demand(torch.bfloat16, 192, 128), HOPPER, "flex", "FlexAttention"),
        (Demand(torch.bfloat16, 60, 60), HOPPER, "flex", "FlexAttention"),
        (Demand(torch.bfloat16, 256, 256), Machine.cuda((8, 9)), "flex", "FlexAttention"),
        (Demand(torch.bfloat16, 64, 64, dropout=True), HOPPER, "mask", "no varlen: dropout; no flex: dropout"),
        (Demand(torch.bfloat16, 64, 64), Machine.cuda((7, 5)), "flex", "FlexAttention"),
        (Demand(torch.bfloat16, 64, 64), Machine.cuda((7, 5), "no gcc"), "mask", "7.5, .* needs 8.0.*no gcc"),
        (Demand(torch.bfloat16, 64, 64), Machine.cuda((6, 1)), "mask", "capability 6.1, .*capability below 7.0"),
        (Demand(torch.bfloat16, 64, 64, 30.0), Machine.cuda((9, 0), "no gcc"), "mask", "softcap; no flex: no gcc"),
        (Demand(torch.bfloat16, 64, 64), Machine.cuda((9, 0), "no gcc"), "varlen", "flash attention"),
        (Demand(torch.float32, 64, 64), Machine("cpu"), "blockwise", "run by run"),
        (Demand(torch.float32, 64, 64, None, 9), Machine("cpu"), "mask", "no blockwise: window"),
        (Demand(torch.bfloat16, 64, 64), Machine("mps"), "mask", "no varlen: device mps; no flex: device mps"),
    ],
)  # fmt: skip
def test_a_path_is_chosen_by_options_and_machine_alone(
    demand: Demand, machine: Machine, path: str, reason: str
) -> None:
    choice = choose(demand, machine)
    assert choice.path == path
    assert re.search(reason, choice.reason), choice.reason
    assert choices(demand, machine)[-1].path == "mask"


def test_what_a_gpu_offers_is_read_from_device_and_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(attention_choice, "find_spec", lambda name: None)
    attention_choice._machine.cache_clear()
    assert Machine.of(device) == Machine.cuda((7, 5), "Triton is not installed")
    monkeypatch.setattr(attention_choice, "find_spec", lambda name: name)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", "")
    attention_choice._machine.cache_clear()
    assert "no C compiler (gcc or clang, or the variable CC)" in str(Machine.of(device).no_flex)
    monkeypatch.setenv("CC", "cc")
    attention_choice._machine.cache_clear()
    assert Machine.of(device) == Machine.cuda((7, 5))
    attention_choice._machine.cache_clear()


@pytest.mark.parametrize("architecture", SHARING)
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_kernels_get_one_dtype_under_autocast(
    architecture: str, weights: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[AttentionCall] = []
    for name, attend in attention.PATHS.items():
        monkeypatch.setitem(attention.PATHS, name, lambda call, attend=attend: calls.append(call) or attend(call))  # type: ignore[arg-type]
    policy = policy_of(architecture, weights)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        policy(batch_of("tree", conversations(goals_of_one=False)))
    assert calls
    assert {x.dtype for call in calls for x in (call.query, call.key, call.value)} == {torch.bfloat16}


@pytest.mark.parametrize("architecture", ["Llama", "Qwen3", "Gemma2", "Mistral", "GptOss"])
def test_a_model_on_the_paths_of_a_gpu_has_the_loss_and_gradients_of_single_sequences(
    architecture: str, hopper_on_cpu: None, true_float64: None
) -> None:
    policy, used = policy_of(architecture, torch.float64), set[str]()
    examples = conversations(goals_of_one=True)
    policy.causal_lm.set_attn_implementation("eager")
    if architecture == "GptOss":
        policy.causal_lm.set_experts_implementation("eager")
    loss, gradients = loss_and_gradients(policy, naive(policy.model, examples))
    for layout in ("packed", "tree"):
        seen = attention.Seen()
        with attention.forest_attention(policy.causal_lm.config, seen):
            batch = batch_of(layout, examples)
            policy.hidden(batch.input_ids, batch.position_ids, forest=batch.forest)
        used |= {choice.path for choice in seen.paths}
        ours, grads = loss_and_gradients(policy, policy.logps(batch))
        bound = 1e-6 if architecture == "GptOss" else 1e-10  # FlexAttention's log-sum-exp is float32
        assert abs(float(ours - loss)) <= bound * abs(float(loss)), layout
        assert_same_gradients(grads, gradients, bound)
    expected = {"Gemma2": {"flex"}, "Mistral": {"flex"}, "GptOss": {"varlen", "flex"}}
    assert used == expected.get(architecture, {"varlen"})


# -- what fails is said -----------------------------------------------------------------------------------------------


@pytest.fixture
def checked_on_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A CPU is treated as an H100 whose paths have to pass their checks first."""
    monkeypatch.setattr(attention, "UNCHECKED", ())
    monkeypatch.setattr(Machine, "of", lambda device: HOPPER)
    for cached in (attention._working, passes):
        cached.cache_clear()
    attention._warned.clear()
    yield
    for cached in (attention._working, passes):
        cached.cache_clear()
    attention._warned.clear()


def test_kernels_that_fail_are_named_with_what_runs_instead_and_its_cost(checked_on_cpu: None) -> None:
    """On a CPU torch has neither kernel."""
    forest = batch_of("tree", conversations(goals_of_one=False)).forest
    assert forest is not None
    call, _ = random_call(forest, torch.bfloat16)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        choice = attention.path_of(call)
        attention.path_of(call)
    said = [str(one.message) for one in caught if "attention" in str(one.message)]
    assert choice.path == "mask"
    assert len(said) == 3
    assert re.match("attention path varlen is not used on cpu: NotImplementedError: .*flash_attention_forward", said[0])
    assert re.match("attention path flex is not used on cpu: .*backward", said[1])
    assert re.search(
        r"uses a dense mask on cpu: varlen failed its self-check; flex failed its self-check. It takes \d+ MiB for the "
        r"largest tree of this batch, of \d+ tokens, and up to \d+ MiB of scores in each layer", said[2],
    )  # fmt: skip


def test_a_kernel_that_computes_something_else_is_not_used(
    checked_on_cpu: None, varlen_on_cpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    demand = Demand(torch.bfloat16, 16, 16, sinks=True)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):  # as in the first validation
        assert passes("varlen", varlen_attention.attend, demand, 4, 2, CPU)
    passes.cache_clear()

    def not_scaled(*args: Any) -> Any:
        return reference_backward(*args[:-1], 1.1 * args[-1])

    monkeypatch.setattr(private_api, "varlen_flash_backward", not_scaled)
    with pytest.warns(UserWarning, match="varlen is not used on cpu: it differs from masked attention by 0"):
        assert not passes("varlen", varlen_attention.attend, demand, 4, 2, CPU)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no memory"), RuntimeError("a kernel's own fault")])
def test_an_error_in_our_attention_is_not_taken_for_a_model_that_cannot_share(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(call: AttentionCall) -> torch.Tensor:
        raise error

    monkeypatch.setitem(attention.PATHS, "blockwise", broken)  # type: ignore[arg-type]
    with pytest.raises(type(error), match=str(error)):
        check_sharing(policy_of("Llama", torch.float32))


def test_checks_draw_on_the_host_whatever_the_default_device() -> None:
    """Lightning builds the policy within a block that makes the GPU the default device."""
    call, up = attention_check.example(Demand(torch.float32, 16, 16, sinks=True), 4, 2, CPU)
    with torch.device("meta"):
        again, up_again = attention_check.example(Demand(torch.float32, 16, 16, sinks=True), 4, 2, CPU)
    assert torch.equal(up, up_again)
    assert torch.equal(call.query, again.query)
    assert again.forest.end.device == CPU
    policy = policy_of("Llama", torch.float32)
    with torch.device("meta"):
        assert check_sharing(policy) is None
    assert policy.attention == ["blockwise (flash attention run by run)"]
