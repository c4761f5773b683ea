"""Response log-probabilities: chunked ≡ full logits, padded ≡ one sequence at a time, for several architectures."""

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import encode, make_model, scored_rows
from rap_lightning.batches.dataset import EncodedPairs
from rap_lightning.batches.layouts import LAYOUTS, lay_out
from rap_lightning.batches.sampler import BatchPlan
from rap_lightning.batches.types import Batch
from rap_lightning.errors import ConfigError
from rap_lightning.models import logps
from rap_lightning.models.logps import Head
from rap_lightning.models.model_checks import check_head
from rap_lightning.models.policy import Policy
from rap_lightning.models.policy_config import PolicyConfig


def naive(
    hidden: torch.Tensor, weight: torch.Tensor, bias: Any, target: torch.Tensor, scale: float, cap: float | None
) -> torch.Tensor:
    logits = torch.nn.functional.linear(hidden, weight, bias) * scale
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    return logits.log_softmax(-1)[torch.arange(len(target)), target]


@pytest.mark.parametrize("chunk", [1, 3, 1000])
@pytest.mark.parametrize(("scale", "cap"), [(1.0, None), (2.0, None), (0.25, None), (1.0, 2.0), (3.0, 1.5)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_value_and_every_gradient_equal_full_logits(
    chunk: int, scale: float, cap: float | None, with_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    vocabulary = 11
    monkeypatch.setattr(logps, "CHUNK_BYTES", chunk * vocabulary * 8)
    torch.manual_seed(1)
    inputs = [torch.randn(7, 5), torch.randn(vocabulary, 5)] + ([torch.randn(vocabulary)] if with_bias else [])
    inputs = [x.double().requires_grad_() for x in inputs]
    bias = inputs[2] if with_bias else None
    target, up = torch.randint(vocabulary, (7,)), torch.randn(7).double()
    ours = Head(inputs[1], bias, scale, cap).token_logps(inputs[0], target)
    theirs = naive(inputs[0], inputs[1], bias, target, scale, cap)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    for a, b in zip(torch.autograd.grad(ours, inputs, up), torch.autograd.grad(theirs, inputs, up), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("cap", [30.0, 50.0, 60.0])  # from 52 on, e^(-2 cap) is 0 in float32
@pytest.mark.parametrize("kept", [0, 2**20])
def test_gradients_survive_logits_that_stand_at_both_ends_of_a_wide_soft_cap(
    cap: float, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logps, "KEPT_BYTES", kept)
    torch.manual_seed(0)
    inputs = [(torch.randn(6, 8) * 60).requires_grad_(), torch.randn(97, 8, requires_grad=True)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    target = torch.randint(97, (6,))
    ours = torch.autograd.grad(Head(inputs[1], None, 1.0, cap).token_logps(inputs[0], target).sum(), inputs)
    theirs = torch.autograd.grad(naive(*exact, None, target, 1.0, cap).sum(), exact)
    for a, b in zip(ours, theirs, strict=True):
        assert float((a - b).abs().max()) <= 3e-5 * float(b.abs().max())


def test_collision_probabilities_are_exact_in_chunks_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(11, 8, generator=generator, dtype=torch.float64)
    weight = torch.randn(50, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(50, generator=generator, dtype=torch.float64)
    for scale, softcap in ((1.0, None), (0.3, 2.0)):
        logits = (hidden @ weight.T + bias) * scale
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        wanted = logits.softmax(-1).square().sum(-1).log()
        for size in (1, 50 * 8, 3 * 50 * 8, 10**9):
            monkeypatch.setattr(logps, "CHUNK_BYTES", size)
            found = Head(weight, bias, scale, softcap).log_collisions(hidden)
            torch.testing.assert_close(found, wanted)
            assert not found.requires_grad


def test_a_frozen_head_gets_no_gradient_and_hidden_states_still_do() -> None:
    hidden, weight = torch.randn(4, 3, requires_grad=True), torch.randn(6, 3)
    Head(weight, None).token_logps(hidden, torch.tensor([0, 1, 2, 3])).sum().backward()
    assert weight.grad is None
    assert hidden.grad is not None
    assert hidden.grad.abs().sum() > 0


def test_log_probabilities_are_float32_under_bf16() -> None:
    hidden, weight = torch.randn(64, 32), torch.randn(100, 32)
    target = torch.randint(100, (64,))
    with torch.autocast("cpu", torch.bfloat16):
        ours = Head(weight, None).token_logps(hidden.bfloat16(), target)
    assert ours.dtype == torch.float32
    # exact log-softmax of bf16 logits; a log-softmax in bf16 would be off by up to 2^-8 of its size
    rounded = (hidden.bfloat16() @ weight.bfloat16().T).float().log_softmax(-1)[torch.arange(64), target]
    torch.testing.assert_close(ours, rounded, rtol=1e-5, atol=1e-5)


def test_collision_probabilities_are_float32_under_bf16() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(64, 32), torch.randn(100, 32)
    with torch.autocast("cpu", torch.bfloat16):
        ours = Head(weight, None).log_collisions(hidden)
    assert ours.dtype == torch.float32
    rounded = (hidden.bfloat16() @ weight.bfloat16().T).float().softmax(-1).square().sum(-1).log()
    torch.testing.assert_close(ours, rounded, rtol=1e-5, atol=1e-5)
    stored = Head(weight.bfloat16(), None).log_collisions(hidden.bfloat16())
    torch.testing.assert_close(stored, rounded, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("dtype", "rows"), [(torch.float32, 2), (torch.float64, 1)])
def test_no_more_logits_exist_at_a_time_than_fit_a_chunk_and_one_row_at_least(
    dtype: torch.dtype, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logps, "CHUNK_BYTES", 2 * 100 * 4 + 399)
    assert logps._chunks(5, 100, dtype) == [slice(i, min(i + rows, 5)) for i in range(0, 5, rows)]
    assert logps._chunks(2, 10**9, dtype) == [slice(0, 1), slice(1, 2)]
    assert logps._chunks(0, 100, dtype) == []


def test_gradients_under_autocast_are_those_of_rounded_states_and_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """States stay float32 (a norm's output), products are taken in bf16, whether logits were kept or not."""
    monkeypatch.setattr(logps, "CHUNK_BYTES", 7 * 30 * 4)
    torch.manual_seed(0)
    inputs = [torch.randn(20, 16), torch.randn(30, 16), torch.randn(30)]
    inputs = [x.bfloat16().float().requires_grad_() for x in inputs]
    target, up = torch.randint(30, (20,)), torch.randn(20)
    found = []
    for kept in (0, 2**20):
        monkeypatch.setattr(logps, "KEPT_BYTES", kept)
        with torch.autocast("cpu", torch.bfloat16):
            ours = Head(inputs[1], inputs[2]).token_logps(inputs[0], target)
        found.append(torch.autograd.grad(ours, inputs, up))
    exact = [x.detach().double().requires_grad_() for x in inputs]
    wanted = torch.autograd.grad(naive(*exact, target, 1.0, None), exact, up.double())
    for again, kept_ones, expected in zip(*found, wanted, strict=True):
        assert torch.equal(again, kept_ones), "computed again in the dtype of the first time"
        assert again.dtype == torch.float32
        assert 1e-5 < float((again - expected).norm() / expected.norm()) < 0.01


def test_states_of_another_dtype_than_the_head_are_taken_in_the_heads() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(9, 16, requires_grad=True), torch.randn(30, 16).bfloat16().requires_grad_()
    target = torch.randint(30, (9,))
    ours = Head(weight, None).token_logps(hidden, target)
    rounded = (hidden.bfloat16() @ weight.T).float().log_softmax(-1)[torch.arange(9), target]
    torch.testing.assert_close(ours, rounded, rtol=1e-5, atol=1e-5)
    grads = torch.autograd.grad(ours.sum(), (hidden, weight))
    assert [g.dtype for g in grads] == [torch.float32, torch.bfloat16]
    collisions = Head(weight, None).log_collisions(hidden)
    exact = (hidden.bfloat16() @ weight.T).float().softmax(-1).square().sum(-1).log()
    torch.testing.assert_close(collisions, exact, rtol=1e-5, atol=1e-5)


def test_logits_whose_exponentials_overflow_do_no_harm() -> None:
    torch.manual_seed(0)
    inputs = [(torch.randn(19, 8) * 100).requires_grad_(), torch.randn(23, 8, requires_grad=True)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    assert float((inputs[0] @ inputs[1].T).max()) > 200, "e^89 is too large for float32"
    target = torch.randint(23, (19,))
    ours, theirs = Head(inputs[1], None).token_logps(inputs[0], target), naive(*exact, None, target, 1.0, None)
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-3)
    for a, b in zip(torch.autograd.grad(ours.sum(), inputs), torch.autograd.grad(theirs.sum(), exact), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-2)
    found, wanted = Head(inputs[1], None).log_collisions(inputs[0]), (exact[0] @ exact[1].T).softmax(-1).square()
    torch.testing.assert_close(found.double(), wanted.sum(-1).log(), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("frozen", [False, True])
def test_a_batch_without_response_tokens_has_gradients_of_zero(frozen: bool) -> None:
    hidden, bias = torch.zeros(0, 4, requires_grad=True), torch.zeros(6, requires_grad=True)
    weight = torch.randn(6, 4, requires_grad=not frozen)
    torch.use_deterministic_algorithms(True)  # memory that is not written holds NaN then
    try:
        Head(weight, bias).token_logps(hidden, torch.zeros(0, dtype=torch.int64)).sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert weight.grad is None if frozen else torch.equal(weight.grad, torch.zeros(6, 4))  # type: ignore[arg-type]
    assert bias.grad is not None
    assert torch.equal(bias.grad, torch.zeros(6))


def test_everything_is_made_on_the_device_of_the_states(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device, which no tensor made elsewhere fits in; only autocasting does not know it."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)
    monkeypatch.setattr(torch, "autocast", lambda device, enabled: contextlib.nullcontext())
    inputs = [torch.empty(*shape, device="meta", requires_grad=True) for shape in ((20, 4), (6, 4), (6,))]
    head, target = Head(inputs[1], inputs[2], 0.5, 30.0), torch.empty(20, dtype=torch.int64, device="meta")
    ours = head.token_logps(inputs[0], target)
    assert (ours.device.type, ours.shape, ours.dtype) == ("meta", (20,), torch.float32)
    grads = torch.autograd.grad(ours.sum(), inputs)
    assert [(g.device.type, g.shape) for g in grads] == [("meta", x.shape) for x in inputs]
    assert head.log_collisions(inputs[0]).device.type == "meta"


def test_the_heads_bias_and_the_configs_factors_are_taken(tiny: Path) -> None:
    model = PolicyConfig(str(tiny)).build(torch.float32).model
    plain = Head.of(model)
    assert (plain.bias, plain.scale, plain.softcap) == (None, 1.0, None)
    layer = torch.nn.Linear(32, model.config.vocab_size)
    model.set_output_embeddings(layer)
    model.config.logit_scale, model.config.logits_scaling, model.config.final_logit_softcapping = 0.5, 4.0, 30.0
    head = Head.of(model)
    assert head.weight is layer.weight
    assert head.bias is layer.bias
    assert (head.scale, head.softcap) == (0.125, 30.0)
    layer.base_layer = torch.nn.Linear(2, 2)  # as adapters have one
    for other in (layer, torch.nn.Bilinear(2, 2, 2)):
        model.set_output_embeddings(other)
        with pytest.raises(ConfigError, match=f"expected a plain linear output layer, found {type(other).__name__}"):
            Head.of(model)


def test_logits_take_the_memory_that_is_documented() -> None:
    """256 MiB of float32 logits at a time, and twice as much kept: what plans of memory count with."""
    rows = 256 * 1024 * 1024 // (49152 * 4)
    assert logps._chunks(2 * rows + 1, 49152, torch.float32) == [
        slice(0, rows), slice(rows, 2 * rows), slice(2 * rows, 2 * rows + 1),
    ]  # fmt: skip
    assert logps.KEPT_BYTES == 512 * 1024 * 1024


def test_logits_are_kept_up_to_the_bound_and_only_for_a_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logps, "CHUNK_BYTES", 2 * 10 * 4)
    monkeypatch.setattr(logps, "KEPT_BYTES", 2 * (2 * 10 * 4))
    made: list[int] = []
    original = logps._logits
    monkeypatch.setattr(logps, "_logits", lambda *args: made.append(len(args[0])) or original(*args))
    hidden, weight = torch.randn(7, 3, requires_grad=True), torch.randn(10, 3)
    target = torch.zeros(7, dtype=torch.int64)
    out = Head(weight, None).token_logps(hidden, target)
    assert made == [2, 2, 2, 1]
    assert list(out.grad_fn.kept) == [0, 1], "two chunks fill the bound to the byte"  # type: ignore[union-attr]
    out.sum().backward()
    assert made == [2, 2, 2, 1, 2, 1]
    monkeypatch.setattr(logps, "KEPT_BYTES", 2 * (2 * 10 * 4) - 1)
    fewer = Head(weight, None).token_logps(hidden, target)
    assert list(fewer.grad_fn.kept) == [0]  # type: ignore[union-attr]
    monkeypatch.setattr(logps, "KEPT_BYTES", 2 * (2 * 10 * 4))
    assert not out.grad_fn.kept, "let go as they are used"  # type: ignore[union-attr]
    made.clear()
    Head(weight, None).log_collisions(hidden)
    assert made == [2, 2, 2, 1]
    wide_cap = Head(weight, None, 1.0, 40.5).token_logps(hidden, target)
    assert not wide_cap.grad_fn.kept, "logits can't be had back from such powers"  # type: ignore[union-attr]
    at_cap = Head(weight, None, 1.0, 40.0).token_logps(hidden, target)
    assert list(at_cap.grad_fn.kept) == [0, 1]  # type: ignore[union-attr]


def examples(model: Path, rows: int = 6, max_length: int = 160) -> EncodedPairs:
    tokenizer = PolicyConfig(str(model)).load_tokenizer()
    return encode(tokenizer, scored_rows(rows), max_length=max_length)[0]


def laid(layout: str, pairs: EncodedPairs, indices: tuple[int, ...]) -> Batch:
    plan = BatchPlan(indices, (1.0,) * len(indices), len(indices), (tuple(range(len(indices))),))
    return lay_out(LAYOUTS[layout], [pairs.example(i) for i in indices], plan, pad_id=0)


def tiny_of(architecture: str, folder: Path) -> Path:
    import transformers

    tokenizer = Path(make_model(folder / "tokenizer"))
    sizes = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 600, "head_dim": 8, "initializer_range": 0.3,
    }  # fmt: skip
    extra = {
        "Gemma2": {"final_logit_softcapping": 3.0, "sliding_window": 16, "query_pre_attn_scalar": 8},
        "Mistral": {"sliding_window": 16},
        "Cohere": {"logit_scale": 0.25, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
        "Granite": {"logits_scaling": 4.0},
        "Qwen2": {"tie_word_embeddings": True},
        "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "bos_token_id": 0, "eos_token_id": 2},
    }
    config_class = getattr(transformers, f"{architecture}Config")
    options = extra.get(architecture, {})
    options = {"vocab_size": 600, "initializer_range": 0.3, **options} if architecture == "GPT2" else sizes | options
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config_class(**options))
    model.save_pretrained(folder / "model")
    PolicyConfig(str(tokenizer)).load_tokenizer().save_pretrained(folder / "model")
    return folder / "model"


@pytest.mark.parametrize("architecture", ["Llama", "Qwen2", "Gemma2", "Mistral", "Cohere", "Granite", "GPT2"])
def test_padded_batches_equal_one_sequence_at_a_time(architecture: str, tmp_path: Path) -> None:
    path = tiny_of(architecture, tmp_path)
    policy = PolicyConfig(str(path), attn_implementation="eager").build(torch.float64)
    assert check_head(policy) < 1e-6
    pairs = examples(path)
    chosen = [pairs.example(i) for i in (0, 3, 5)]
    batch = laid("padded", pairs, (0, 3, 5))
    ours = policy.logps(batch)
    expected = []
    for example in chosen:
        for response in (example.chosen_ids, example.rejected_ids):
            ids = torch.tensor([[*example.prompt_ids, *response]])
            table = policy.causal_lm(input_ids=ids).logits[0].double().log_softmax(-1)
            places = range(len(example.prompt_ids), ids.shape[1])
            expected.append(sum(table[p - 1, ids[0, p]] for p in places))
    # float64, but the norms of most architectures compute in float32
    torch.testing.assert_close(ours, torch.stack(expected), rtol=1e-6, atol=1e-6)
    grads = torch.autograd.grad(ours.sum(), list(policy.parameters()), allow_unused=True)
    reference = torch.autograd.grad(torch.stack(expected).sum(), list(policy.parameters()), allow_unused=True)
    for a, b in zip(grads, reference, strict=True):
        if b is None:
            assert a is None
        else:
            assert (a - b).norm() <= 1e-5 * b.norm() + 1e-9


def test_gradient_checkpointing_changes_no_gradient(tiny: Path) -> None:
    pairs = examples(tiny)
    batch = laid("padded", pairs, (0,))
    results = []
    for checkpointing in (False, True):
        policy = PolicyConfig(str(tiny), gradient_checkpointing=checkpointing).build(torch.float64)
        assert policy.causal_lm.is_gradient_checkpointing is checkpointing
        results.append(torch.autograd.grad(policy.logps(batch).sum(), list(policy.parameters())))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_a_head_that_does_more_than_is_known_is_refused(tiny: Path) -> None:
    policy = PolicyConfig(str(tiny)).build(torch.float32)
    forward = policy.model.forward

    def scaled(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        output.logits = output.logits * 2
        return output

    policy.model.forward = scaled
    with pytest.raises(ConfigError, match="output layer does something that is not known"):
        check_head(policy)


def test_dropout_is_off_unless_asked_for(tmp_path: Path) -> None:
    path = tiny_of("GPT2", tmp_path)
    pairs = examples(path)
    batch = laid("padded", pairs, (0,))
    silent, noisy = (PolicyConfig(str(path), dropout=d).build(torch.float32) for d in (False, True))
    assert torch.equal(silent.logps(batch), silent.logps(batch))
    assert not torch.equal(noisy.logps(batch), noisy.logps(batch))


def test_policy_is_a_module_whose_head_runs_inside_forward(tiny: Path) -> None:
    """Sharding strategies gather weights around ``Policy.forward``: nothing may be used outside it."""
    policy = PolicyConfig(str(tiny)).build(torch.float32)
    pairs = examples(tiny)
    batch = laid("padded", pairs, (0,))
    inside: list[bool] = []
    original = Head.token_logps
    state = {"inside": False}
    policy.register_forward_pre_hook(lambda *_: state.update(inside=True))
    policy.register_forward_hook(lambda *_: state.update(inside=False))

    def spy(self: Head, *args: Any) -> torch.Tensor:
        inside.append(state["inside"])
        return original(self, *args)

    Head.token_logps = spy  # type: ignore[method-assign]
    try:
        policy.logps(batch)
    finally:
        Head.token_logps = original  # type: ignore[method-assign]
    assert inside == [True]
    assert isinstance(policy, Policy)


def test_an_accelerator_computes_a_gibibyte_of_logits_at_a_time_in_whole_tiles() -> None:
    meta = torch.device("meta")
    for vocabulary, rows in ((128_256, 2048), (256_000, 1024), (49_152, 5376), (3_000_000, 128)):
        first, *_, last = logps._chunks(10_000, vocabulary, torch.float32, meta)
        assert first == slice(0, rows)
        assert last.stop == 10_000
    chunks: list[int] = []
    made = torch.zeros(3000, 4, dtype=torch.bfloat16, device=meta)
    with pytest.MonkeyPatch.context() as patch:
        original = logps._logits
        patch.setattr(logps, "_logits", lambda *args: chunks.append(len(args[0])) or original(*args))
        weight = torch.zeros(128_256, 4, dtype=torch.bfloat16, device=meta, requires_grad=True)
        target = torch.zeros(3000, dtype=torch.int64, device=meta)
        Head(weight, None).token_logps(made, target).sum().backward()
        Head(weight, None).log_collisions(made)
    assert chunks == [2048, 952] * 3


def mixed_product(a: torch.Tensor, b: torch.Tensor, *, out_dtype: torch.dtype) -> torch.Tensor:
    """What torch.mm does on CUDA: bfloat16 factors, sums in float32 that are not rounded."""
    assert (a.dtype, b.dtype, out_dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    return a.float() @ b.float()


def test_bfloat16_logits_are_summed_in_float32_where_the_device_can(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(300, 64).bfloat16().requires_grad_()
    weight = (torch.randn(1000, 64) * 0.5).bfloat16().requires_grad_()
    target, up = torch.randint(1000, (300,)), torch.randn(300)
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    table = (exact[0] @ exact[1].T).log_softmax(-1)
    truth = table[torch.arange(300), target]
    expected = torch.autograd.grad(truth, exact, up.double())
    head = Head(weight, None)
    rounded = float((head.token_logps(hidden, target) - truth).detach().abs().mean())

    add, multiply = torch.addmm, torch.mm

    def add_mixed(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, beta: int, out: torch.Tensor, **more: Any):  # type: ignore[no-untyped-def]
        return add(total, a.float(), b.float(), beta=beta, out=out) if more else add(total, a, b, beta=beta, out=out)

    monkeypatch.setattr(logps, "multiplies_into_float32", lambda device, dtype: dtype == torch.bfloat16)
    monkeypatch.setattr(torch, "mm", lambda a, b, **more: mixed_product(a, b, **more) if more else multiply(a, b))
    monkeypatch.setattr(torch, "addmm", add_mixed)
    monkeypatch.setattr(logps, "CHUNK_BYTES", 128 * 1000 * 4)
    for kept in (0, 2**30):
        monkeypatch.setattr(logps, "KEPT_BYTES", kept)
        logps_now = head.token_logps(hidden, target)
        assert float((logps_now - truth).detach().abs().mean()) < 1e-5 < 1e-3 < rounded
        for ours, theirs in zip(torch.autograd.grad(logps_now, (hidden, weight), up), expected, strict=True):
            assert float((ours - theirs).norm() / theirs.norm()) < 4e-3  # half a unit in the last place of bfloat16


def test_a_device_that_does_not_multiply_into_float32_is_found_by_trying() -> None:
    """CPUs can't, in torch 2.13."""
    assert not logps.multiplies_into_float32(torch.device("cpu"), torch.bfloat16)
    assert not logps.multiplies_into_float32(torch.device("meta"), torch.bfloat16)
