"""Goal guidance against the formula by hand: padded, cached, with samples and beams, in every place that samples."""

from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import build, make_trainer, read_jsonl, scored_rows, write_jsonl
from rap_lightning import GoalGuidance
from rap_lightning.batches.prompts import PredictPrompts, left_pad
from rap_lightning.callbacks import WritePredictions
from rap_lightning.errors import ConfigError
from rap_lightning.models.generation import Generation, generate
from rap_lightning.models.policy_config import PolicyConfig
from rap_lightning.onpolicy.engines import VLLM, Endpoint, Transformers
from rap_lightning.preferences.goals import AttributeGoal, OverallGoal, StatedGoal
from test_generate import called, options, rows_of

ASKED = [[5, 6, 7, 8, 9], [10, 11], [12, 13, 14]]
LOW = [[5, 6, 17, 8], [10, 21, 22, 23, 11], [12]]
WEIGHT = 1.7


STATEFUL = {"mamba"}


def tiny_of(kind: str) -> Any:
    """A random model of a family, in float64."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {
        "llama": {"num_key_value_heads": 2, "intermediate_size": 32, "initializer_range": 0.4},
        "mistral": {"num_key_value_heads": 2, "intermediate_size": 32, "sliding_window": 4, "initializer_range": 0.4},
        "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "initializer_range": 0.4},
        "opt": {"ffn_dim": 32, "word_embed_proj_dim": 16, "max_position_embeddings": 64, "init_std": 0.4},
        "mamba": {"state_size": 4, "initializer_range": 0.4, "num_layers": 2},
        "lfm2": {
            "num_key_value_heads": 2,
            "intermediate_size": 32,
            "initializer_range": 0.4,
            "layer_types": ["conv", "full_attention"],
        },
    }[kind]
    basic = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2} if kind != "gpt2" else {}
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, vocab_size=64, bos_token_id=1, eos_token_id=2, pad_token_id=0, **basic, **sizes)
    return AutoModelForCausalLM.from_config(config).double().eval()


def by_hand(model: Any, goal: list[int], low: list[int], response: list[int]) -> torch.Tensor:
    """[V] float64: (1 + w) log p(. | goal) - w log p(. | low), a sequence at a time, from its beginning."""
    with torch.no_grad():
        own, other = (
            torch.log_softmax(model(torch.tensor([ids + response])).logits[0, -1].double(), -1) for ids in (goal, low)
        )
    return (1 + WEIGHT) * own - WEIGHT * other


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("kind", ["llama", "mistral", "gpt2", "opt", "mamba", "lfm2"])
def test_padded_rows_get_the_formula_of_single_sequences(kind: str, use_cache: bool) -> None:
    model = tiny_of(kind)
    batch, low = left_pad(ASKED, 0, []), left_pad(LOW, 0, [])
    guide = GoalGuidance(model, vars(low), WEIGHT, use_cache=use_cache)
    assert guide.use_cache is (use_cache and kind not in STATEFUL), "a recurrent state computes all again"
    ids, responses = batch.input_ids, [[] for _ in ASKED]
    for step in range(6):
        with torch.no_grad():
            own = torch.stack([
                model(torch.tensor([goal + said])).logits[0, -1] for goal, said in zip(ASKED, responses, strict=True)
            ])  # fmt: skip
        found = guide(ids, own)
        assert found.dtype == own.dtype
        expected = torch.stack(
            [by_hand(model, *three) for three in zip(ASKED, LOW, responses, strict=True)]
        )  # fmt: skip
        exact = own.dtype == torch.float64  # Mamba's logits are float32 whatever it is asked for
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-9 if exact else 1e-4)
        fresh = torch.tensor([(7 * step + 3 * row) % 60 + 3 for row in range(len(ASKED))])
        ids = torch.cat([ids, fresh[:, None]], 1)
        for said, token in zip(responses, fresh.tolist(), strict=True):
            said.append(token)


def greedy_by_hand(model: Any, steps: int, plausibility: float | None = None) -> list[list[int]]:
    texts = []
    for goal, low in zip(ASKED, LOW, strict=True):
        said: list[int] = []
        for _ in range(steps):
            scores = by_hand(model, goal, low, said)
            if plausibility is not None:
                own = torch.softmax(model(torch.tensor([goal + said])).logits[0, -1], -1)
                scores[own < plausibility * own.max()] = -torch.inf
            said.append(int(scores.argmax()))
        texts.append(said)
    return texts


def generated(model: Any, low: list[list[int]] = LOW, weight: float = WEIGHT, **more: Any) -> torch.Tensor:
    plausibility, use_cache = more.pop("plausibility", None), more.pop("use_cache", True)
    batch = left_pad(ASKED, 0, [])
    guide = GoalGuidance(model, vars(left_pad(low, 0, [])), weight, plausibility, use_cache)
    output = model.generate(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, max_new_tokens=8, min_new_tokens=8,
        logits_processor=[guide], **({"do_sample": False} | more),
    )  # fmt: skip
    return output[:, batch.input_ids.shape[1] :]


@pytest.mark.parametrize("plausibility", [None, 0.3])
def test_transformers_generate_follows_the_formula(plausibility: float | None) -> None:
    model = tiny_of("llama")
    expected = greedy_by_hand(model, 8, plausibility)
    found = generated(model, plausibility=plausibility).tolist()
    assert found == expected
    plain = generated(model, weight=0.0).tolist()
    assert found != plain, "or guidance would have nothing to show"
    if plausibility is not None:
        assert found != generated(model).tolist(), "or the floor would have nothing to show"


def test_weight_zero_is_plain_sampling_bit_for_bit_and_the_same_goal_changes_nothing() -> None:
    model = tiny_of("llama")
    batch = left_pad(ASKED, 0, [])
    scores = torch.randn(3, 64)
    assert GoalGuidance(model, vars(batch), 0.0)(batch.input_ids, scores) is scores
    drawn = []
    for more in ({"logits_processor": [GoalGuidance(model, vars(left_pad(LOW, 0, [])), 0.0)]}, {}):
        torch.manual_seed(0)
        drawn.append(
            model.generate(
                batch.input_ids, attention_mask=batch.attention_mask, do_sample=True, max_new_tokens=8, **more
            )
        )
    assert torch.equal(*drawn)
    assert torch.equal(generated(model, low=ASKED), generated(model, weight=0.0)), "pushed away from itself"


@pytest.mark.parametrize(
    "more",
    [
        {"do_sample": True, "num_return_sequences": 3, "temperature": 0.7, "top_p": 0.9},
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2},
    ],
)
def test_samples_and_beams_are_the_same_with_the_second_stream_cached(more: dict[str, Any]) -> None:
    model = tiny_of("llama")
    found = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        found.append(generated(model, use_cache=use_cache, **more))
    assert torch.equal(*found)
    torch.manual_seed(0)
    assert not torch.equal(found[0], generated(model, weight=0.0, **more))


def test_the_floor_alone_is_min_p_bit_for_bit(tiny: Path) -> None:
    policy, tokenizer = PolicyConfig(str(tiny)).build(torch.float32), PolicyConfig(str(tiny)).load_tokenizer()
    batch = left_pad(ASKED, tokenizer.pad_token_id, [{}] * 3)
    found = {}
    for alpha in (None, 0.3):
        torch.manual_seed(1)
        found[alpha] = generate(policy, tokenizer, batch, Generation(12, plausibility=alpha))
    torch.manual_seed(1)
    output = policy.model.generate(
        batch.input_ids, attention_mask=batch.attention_mask, max_new_tokens=12, do_sample=True, min_p=0.3, top_k=0
    )
    theirs = tokenizer.batch_decode(output[:, batch.input_ids.shape[1] :], skip_special_tokens=True)
    assert found[0.3] == theirs
    assert found[None] != theirs


def test_it_is_for_one_batch_and_begins_anew_with_the_same() -> None:
    model = tiny_of("llama")
    batch, low = left_pad(ASKED, 0, []), left_pad(LOW, 0, [])
    guide = GoalGuidance(model, vars(low), WEIGHT)
    first, second = (
        model.generate(
            batch.input_ids, attention_mask=batch.attention_mask, do_sample=False, max_new_tokens=8,
            logits_processor=[guide],
        )
        for _ in range(2)
    )  # fmt: skip
    assert torch.equal(first, second)
    other = batch.input_ids.flip(0)
    with pytest.raises(ConfigError, match="one batch of prompts"):
        guide(other, torch.zeros(3, 64))
    with pytest.raises(ConfigError, match="one batch of prompts"):
        GoalGuidance(model, vars(low), WEIGHT)(batch.input_ids[:2], torch.zeros(2, 64))
    right = {"input_ids": torch.tensor([[5, 6, 0]]), "attention_mask": torch.tensor([[1, 1, 0]])}
    with pytest.raises(ConfigError, match="on the left"):
        GoalGuidance(model, right, 1.0)


def test_a_token_that_is_ruled_out_stays_so() -> None:
    model = tiny_of("llama")
    batch = left_pad(ASKED, 0, [])
    scores = torch.randn(3, 64)
    scores[:, 5] = -torch.inf
    found = GoalGuidance(model, vars(batch), 3.0)(batch.input_ids, scores)
    assert (found[:, 5] == -torch.inf).all()
    assert not found.isnan().any()
    assert found[:, 6].isfinite().all()


@pytest.mark.parametrize(
    "wrong",
    [
        {"guidance": -0.5}, {"guidance": float("nan")}, {"guidance": float("inf")}, {"against": 1.0},
        {"against": "none"}, {"plausibility": 0.1, "temperature": 0}, {"guidance": 1.0, "plausibility": 0.0},
        {"guidance": 1.0, "plausibility": 1.0},
    ],
)  # fmt: skip
def test_options_without_effect_or_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="guidance"):
        Generation(**wrong)


def test_low_goals_are_the_scales_lowest_with_the_lowest_attributes() -> None:
    overall, several = OverallGoal(), AttributeGoal(["helpfulness"])
    assert overall.low() == (StatedGoal(overall.text(1.0)), "1")
    assert overall.low(2.5) == (StatedGoal(overall.text(2.5)), "2.5")
    assert overall.low("none") == (StatedGoal(), "none")
    assert several.low() == (StatedGoal(several.text(1.0, [1.0])), "1 1")
    assert several.low(3) == (StatedGoal(several.text(3, [10.0])), "10 3")
    with pytest.raises(ConfigError, match="on the scale from 1 to 10"):
        overall.low(0)


def test_predict_samples_with_guidance_and_says_so(tiny: Path, pairs_folder: Path, tmp_path: Path) -> None:
    plain = Generation(max_new_tokens=6, temperature=0)
    written = {}
    for name, generation in (
        ("plain", plain),
        ("guided", Generation(6, temperature=0, guidance=4.0)),
        ("none", Generation(6, temperature=0, guidance=4.0, against="none")),
        ("same", Generation(6, temperature=0, guidance=4.0, against=9.5)),
    ):
        goal = 9.5 if name == "same" else None
        module, data = build(tiny, pairs_folder, predict=PredictPrompts(limit=5, goal=goal), generation=generation)
        trainer = make_trainer(tmp_path / name, callbacks=[WritePredictions()])
        if name == "same":
            with pytest.raises(ConfigError, match=r"pushes away from, 9.5, is the one that is asked for"):
                trainer.predict(module, data)
            continue
        trainer.predict(module, data)
        (path,) = (tmp_path / name).rglob("predictions.jsonl")
        written[name] = read_jsonl(path)
    assert "guidance" not in written["plain"][0]
    assert {(r["goal"], r["guidance"], r["against"]) for r in written["guided"]} == {("10", 4.0, "1")}
    assert {r["against"] for r in written["none"]} == {"none"}
    texts = {name: [row["response"] for row in rows] for name, rows in written.items()}
    assert texts["plain"] != texts["guided"] != texts["none"]
    module, data = build(
        tiny, pairs_folder, predict=PredictPrompts(limit=5), generation=Generation(6, temperature=0, guidance=4.0)
    )
    make_trainer(tmp_path / "again").predict(module, data)
    batch = data.prompt_batch(data.histories()[:5], 10.0, module.generation)
    assert generate(module.policy, module.tokenizer, batch, module.generation) == texts["guided"]
    with pytest.raises(ConfigError, match="low goal too"):
        generate(module.policy, module.tokenizer, left_pad([[5]], 0, [{}]), module.generation)
    module, data = build(tiny, pairs_folder, goal=None, generation=Generation(6, guidance=4.0))
    with pytest.raises(ConfigError, match="needs goals to push away from"):
        make_trainer(tmp_path / "bare").predict(module, data)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "prompts.jsonl", scored_rows(7))


def test_generate_samples_with_guidance_alone_as_in_batches(prompts: Path, knowing: Path, tmp_path: Path) -> None:
    found = {}
    for name, more in (
        ("batch", {"guidance": WEIGHT, "engine.batch_size": 4}),
        ("single", {"guidance": WEIGHT, "engine.batch_size": 1}),
        ("plain", {}),
        ("near", {"guidance": WEIGHT, "against": 9}),
    ):
        path = tmp_path / f"{name}.jsonl"
        assert called(*options(prompts, knowing, path, temperature=0, goal="[10, 4]", **more)) == 0
        found[name] = {(r["prompt_id"], r["goal"]): r["response"] for r in rows_of(path).values()}
    assert found["batch"] == found["single"]
    assert found["batch"] != found["plain"]
    assert found["near"] != found["batch"]
    # by hand, from the text of the prompts
    model, tokenizer = (
        PolicyConfig(str(knowing)).build(torch.float32).causal_lm,
        PolicyConfig(str(knowing)).load_tokenizer(),
    )
    row = next(r for r in rows_of(tmp_path / "batch.jsonl").values() if r["goal"] == "10" and len(r["messages"]) == 1)
    goal, low = (
        tokenizer.apply_chat_template(
            [{"role": "system", "content": OverallGoal().text(g)}, *row["messages"]], add_generation_prompt=True
        )["input_ids"]
        for g in (10, 1)
    )  # fmt: skip
    said: list[int] = []
    for _ in range(12):
        said.append(int(by_hand(model, goal, low, said).argmax()))
        if said[-1] == tokenizer.eos_token_id:
            break
    assert tokenizer.decode(said, skip_special_tokens=True) == row["response"]


def test_a_file_made_with_another_guidance_is_not_gone_on_with(
    prompts: Path, knowing: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "samples.jsonl"
    assert called(*options(prompts, knowing, path, goal=10, guidance=1.0)) == 0
    before = path.read_bytes()
    for more in ({"guidance": 2.0}, {"guidance": 1.0, "against": 3}, {}):
        assert called(*options(prompts, knowing, path, goal=10, **more)) != 0
    assert called(*options(prompts, knowing, path, goal=10, guidance=1.0)) == 0
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"goal": 1, "guidance": 1.0}, "is the one that is asked for"),
        ({"goal": 10, "guidance": 1.0, "against": 0}, "on the scale from 1 to 10"),
        ({"goal": 10, "against": 3}, "against has no effect"),
        ({"goal": 10, "guidance": 1.0, "engine.continuous": "true"}, "rows come and go"),
    ],
)
def test_generate_refuses_in_words(
    more: dict[str, Any], message: str, prompts: Path, knowing: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert called(*options(prompts, knowing, tmp_path / "out.jsonl", **more)) != 0
    assert message in " ".join(capfd.readouterr().err.split())


def test_engines_that_cannot_guide_say_why() -> None:
    assert Transformers().no_guidance() == Transformers().no_floor() == ""
    assert "without our logits processors" in Transformers(continuous=True).no_floor()
    assert "one sequence" in VLLM().no_guidance()
    assert "second prompt" in Endpoint("http://localhost:1/v1").no_guidance()


def test_a_model_that_knows_no_goal_is_not_guided(
    prompts: Path, tiny: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert called(*options(prompts, tiny, tmp_path / "out.jsonl", guidance=1.0)) != 0
    assert "no goal.json" in capfd.readouterr().err


def test_an_exported_folder_is_guided_by_plain_transformers(tiny: Path, pairs_folder: Path, tmp_path: Path) -> None:
    """The lines of GoalGuidance's docstring."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from rap_lightning.callbacks import ExportHF

    module, data = build(tiny, pairs_folder, generation=Generation(6, temperature=0, guidance=WEIGHT))
    make_trainer(tmp_path / "run", max_steps=2, callbacks=[ExportHF()]).fit(module, data)
    (folder,) = (tmp_path / "run").rglob("hf")
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    conversations = [h for h in data.histories() if len(h) == 1][:3]
    template = {"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt", "padding": True}
    asked = tokenizer.apply_chat_template(conversations, goal=10, **template)
    low = tokenizer.apply_chat_template(conversations, goal=1, **template)
    output = model.generate(
        **asked, do_sample=False, max_new_tokens=6, logits_processor=[GoalGuidance(model, low, weight=WEIGHT)]
    )
    found = tokenizer.batch_decode(output[:, asked["input_ids"].shape[1] :], skip_special_tokens=True)
    batch = data.prompt_batch(conversations, 10.0, module.generation)
    assert found == generate(module.policy, module.tokenizer, batch, module.generation)
