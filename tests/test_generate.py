"""generate: the prompts of training, responses that don't depend on what happened to the process, every engine."""

import json
import math
import shutil
import sys
import types
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import transformers
from transformers import AutoTokenizer

from conftest import called, make_model, make_tokenizer, read_jsonl, scored_rows, write_jsonl
from faulty_endpoint import Server, echo, half, hang_up, raw, slow, status, unless
from rap_lightning.batches.encode import Encoder
from rap_lightning.errors import ConfigError
from rap_lightning.models.generation import Generation
from rap_lightning.models.guidance import PlausibilityFloor
from rap_lightning.onpolicy import chat_client
from rap_lightning.onpolicy import requested_goals as goals
from rap_lightning.onpolicy.engines import Endpoint, Transformers
from rap_lightning.onpolicy.engines.seeded_sampling import SeededSampling, draw
from rap_lightning.onpolicy.jsonl_ledger import parts_of, read_rows
from rap_lightning.onpolicy.model_source import ModelSource
from rap_lightning.onpolicy.response_generator import ResponseGenerator
from rap_lightning.preferences.goals import AttributeGoal, OverallGoal
from rap_lightning.preferences.scales import LinearScale, RewardScale
from rap_lightning.preferences.template_options import TemplateOptions

called = partial(called, "generate")


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "prompts.jsonl", scored_rows(11))


def options(prompts: Path, model: Path, output: Path, **more: object) -> list[object]:
    basic = {"prompts": prompts, "model": model, "output": output, "max_new_tokens": 12, "engine.batch_size": 4}
    return [part for name, value in (basic | more).items() for part in (f"--{name}", value)]


def rows_of(path: Path) -> dict[str, dict[str, Any]]:
    rows = list(read_rows(parts_of(path)))
    assert len({row["id"] for row in rows}) == len(rows), "no line twice"
    return {row["id"]: row for row in rows}


def test_responses_do_not_depend_on_what_happened_to_the_process(
    prompts: Path, knowing: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = {"samples": 3, "top_p": 0.9}
    assert called(*options(prompts, knowing, tmp_path / "whole.jsonl", **args)) == 0
    whole = rows_of(tmp_path / "whole.jsonl")
    assert len(whole) == 33
    assert len({row["response"] for row in whole.values()}) > 25, "samples differ"
    real, calls = Transformers._generate, 0

    def killed(self: Any, *parts: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls in (3, 6):
            raise KeyboardInterrupt
        return real(self, *parts)

    monkeypatch.setattr(Transformers, "_generate", killed)
    stopped = tmp_path / "stopped.jsonl"
    for _ in range(2):
        assert called(*options(prompts, knowing, stopped, **args)) == 130
        stopped.write_bytes(stopped.read_bytes()[:-50])  # within a line, and so within a chunk
    assert 8 < stopped.read_text().count("\n") < 20
    assert called(*options(prompts, knowing, stopped, **args)) == 0
    assert rows_of(stopped) == whole
    before = stopped.read_bytes()
    monkeypatch.setattr(Transformers, "open", None)
    assert called(*options(prompts, knowing, stopped, **args)) == 0, "nothing to do, so nothing is loaded"
    assert stopped.read_bytes() == before


def test_more_samples_and_goals_go_on_in_the_same_file(prompts: Path, knowing: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    assert called(*options(prompts, knowing, output, samples=1)) == 0
    first = output.read_text()
    assert called(*options(prompts, knowing, output, samples=2, goal="[best, 3, none]")) == 0
    assert output.read_text().startswith(first)
    assert Counter(row["goal"] for row in rows_of(output).values()) == {"10": 22, "3": 22, None: 22}
    assert called(*options(prompts, knowing, output, temperature=0.5)) == 2


def test_prompts_are_those_of_training(prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for family in ("chatml", "llama3", "gemma"):
        model = make_model(tmp_path / family, family)
        (model / "goal.json").write_text(json.dumps(OverallGoal().record()))
        encoder = Encoder(make_tokenizer(family), OverallGoal(), 300)
        seen: dict[str, tuple[int, ...]] = {}

        def spy(self: Any, requests: Any, generation: Any, wanted: Any, seen: Any = seen) -> Any:
            seen.update({json.dumps(r.history): r.ids for r in requests})
            yield from ()

        monkeypatch.setattr(Transformers, "run", spy)
        called(*options(prompts, model, tmp_path / f"{family}.jsonl", goal=7.5))
        assert len(seen) == 11
        for history, ids in seen.items():
            text = OverallGoal().text(7.5)
            assert ids == tuple(encoder.prompt_ids(json.loads(history), text)), family


def test_greedy_responses_are_those_of_single_sequences(prompts: Path, knowing: Path, tmp_path: Path) -> None:
    assert called(*options(prompts, knowing, tmp_path / "a.jsonl", temperature=0)) == 0
    continuously = options(prompts, knowing, tmp_path / "b.jsonl", temperature=0, **{"engine.continuous": "true"})
    if not hasattr(transformers, "ContinuousBatchingConfig"):
        assert called(*continuously) == 2
        pytest.skip(f"transformers {transformers.__version__} has no such continuous batching; that is told")
    assert called(*continuously) == 0
    batched, continuous = rows_of(tmp_path / "a.jsonl"), rows_of(tmp_path / "b.jsonl")
    by_prompt = {row["prompt_id"]: row["response"] for row in continuous.values()}
    model = ModelSource(str(knowing)).load(torch.float32, "cpu")
    tokenizer = make_tokenizer("chatml")
    for row in batched.values():
        turns = [{"role": "system", "content": OverallGoal().text(10)}, *row["messages"]]
        if row["messages"][0]["role"] == "system":
            own = row["messages"][0]["content"]
            turns = [{"role": "system", "content": f"{OverallGoal().text(10)}\n\n{own}"}, *row["messages"][1:]]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
        output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
        alone = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
        assert row["response"] == alone == by_prompt[row["prompt_id"]]


def test_what_is_drawn_follows_the_probabilities_and_the_row_alone() -> None:
    torch.manual_seed(0)
    logits = torch.randn(1, 12) * 2
    draws = (torch.arange(20_000, dtype=torch.float64)[:, None] + 0.5)[:, 0] / 20_000
    for temperature, top_p in ((1.0, 1.0), (0.7, 1.0), (1.3, 0.8)):
        picked = draw(logits.expand(20_000, -1), draws, temperature, top_p)
        shares = torch.bincount(picked, minlength=12) / 20_000
        probs = torch.softmax(logits[0].double() / temperature, 0)
        if top_p < 1:
            order = probs.sort(descending=True).indices
            kept = next(n for n in range(1, 13) if probs[order[:n]].sum() >= top_p)
            probs[order[kept:]] = 0
            probs /= probs.sum()
        assert (shares - probs).abs().max() < 2e-4
    rows = torch.randn(3, 50)
    ids = torch.zeros(3, 7, dtype=torch.long)
    together = SeededSampling([1, 2, 3], 5, 4, 1.0, 1.0)(ids, rows)
    alone = SeededSampling([3], 5, 4, 1.0, 1.0)(ids[2:], rows[2:])
    assert together.argmax(-1)[2] == alone.argmax(-1)[0]
    assert torch.isfinite(together).sum(-1).tolist() == [1, 1, 1]
    extreme = torch.tensor([[float("-inf"), 100.0, float("-inf")]])
    assert draw(extreme, torch.tensor([1 - 2**-53], dtype=torch.float64), 1.0, 1.0).item() == 1


def test_a_prompt_beyond_the_context_is_cut_and_counted_with_its_goal(
    tmp_path: Path, knowing: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = write_jsonl(tmp_path / "long.jsonl", [{"prompt": "red green " * 900}, {"prompt": "short"}, {"prompt": " "}])
    assert called(*options(long, knowing, tmp_path / "out.jsonl")) == 0
    rows = list(rows_of(tmp_path / "out.jsonl").values())
    assert sorted(row.get("prompt_cut", 0) > 1000 for row in rows) == [False, True]
    shown = capsys.readouterr().out
    assert "1: prompt cut to fit, goal kept" in shown
    assert "1: dropped: an empty prompt" in shown
    assert called(*options(long, knowing, tmp_path / "o.jsonl", max_new_tokens=600)) == 2
    assert "the model takes 512 tokens, and --max_new_tokens 600 leaves no room" in capsys.readouterr().err
    assert called(*options(long, knowing, tmp_path / "o.jsonl", max_new_tokens=500, max_prompt_length=13)) == 2
    assert "--max_prompt_length can be up to 12, found 13" in capsys.readouterr().err


def test_a_baked_goal_is_not_written_twice(prompts: Path, knowing: Path, tmp_path: Path) -> None:
    baked = shutil.copytree(knowing, tmp_path / "baked")
    record = OverallGoal().record()
    own = make_tokenizer("chatml")
    own.chat_template = (
        "{%- if goal is not defined -%}{%- set messages = [{'role': 'system', 'content': "
        + json.dumps(record["best"])
        + "}] + messages -%}{%- endif -%}"
        + own.chat_template
    )
    own.save_pretrained(baked)
    assert goals.template_writes(AutoTokenizer.from_pretrained(baked), record["best"])
    for goal in ("best", "none", "4"):
        outputs = []
        for model in (knowing, baked):
            output = tmp_path / f"{model.parent.name}-{goal}.jsonl"
            assert called(*options(prompts, model, output, goal=goal)) == 0
            outputs.append({row["prompt_id"]: row["response"] for row in rows_of(output).values()})
        assert outputs[0] == outputs[1]
    with Server(echo) as server:
        served = at_endpoint(prompts, server.url, tmp_path / "served.jsonl", model=baked, max_new_tokens=12)
        assert called(*served) == 0
        assert all(body["chat_template_kwargs"] == {"goal": False} for _, body, _ in server.requests)
        assert all(record["best"] in body["messages"][0]["content"] for _, body, _ in server.requests)


def test_a_chat_template_that_only_the_server_can_choose_is_named(
    knowing: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Endpoint("http://localhost:9/v1").sends(ModelSource(str(knowing), template=TemplateOptions("loud")))
    assert "chat_template loud is not sent" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="--chat_template loud has no effect with Endpoint: the server writes"):
        ResponseGenerator(ModelSource("served", template=TemplateOptions("loud")), Endpoint("http://localhost:9/v1"))


def test_a_damaged_tokenizer_of_a_served_folder_ends_in_one_message(
    prompts: Path, knowing: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = shutil.copytree(knowing, tmp_path / "damaged")
    (damaged / "tokenizer.json").write_text("{}")
    with Server(echo) as server:
        assert called(*at_endpoint(prompts, server.url, tmp_path / "o.jsonl", model=damaged)) == 2
        assert not server.requests
    assert f"error: --model {damaged}: the folder exists, but no tokenizer" in capsys.readouterr().err


def test_checkpoints_and_adapters_are_sampled_from(
    prompts: Path, tiny: Path, pairs_folder: Path, tmp_path: Path
) -> None:
    from conftest import build, make_trainer
    from rap_lightning.callbacks import ExportHF

    for lora in (False, True):
        module, data = build(tiny, pairs_folder, lora=lora)
        trainer = make_trainer(tmp_path / str(lora), max_steps=2, callbacks=[ExportHF()])
        trainer.fit(module, data)
        checkpoint = tmp_path / f"{lora}.ckpt"
        trainer.save_checkpoint(checkpoint, weights_only=True)
        (exported,) = (tmp_path / str(lora)).rglob("hf")
        found = []
        for number, model in enumerate((checkpoint, exported)):
            output = tmp_path / f"{lora}-{number}.jsonl"
            assert called(*options(prompts, model, output)) == 0
            rows = rows_of(output).values()
            assert {row["goal"] for row in rows} == {"10"}, "the best goal is the default of a model that has one"
            found.append({row["prompt_id"]: row["response"] for row in rows})
        assert found[0] == found[1]


def test_goals_are_read_from_records() -> None:
    for template in (
        OverallGoal(RewardScale(0, 5, 2), "user"),
        OverallGoal(LinearScale(judge_low=-3.0, judge_high=2.0)),
        AttributeGoal(["a", "b_c"], RewardScale(1, 10), RewardScale(1, 5), overall=False),
    ):
        record = json.loads(json.dumps(template.record()))
        again = goals.template_of(record)
        assert again.write(3, [2.5] * len(template.attributes)) == template.write(3, [2.5] * len(template.attributes))
        assert goals.resolve(None, record, None).text == record["best"]
        assert goals.resolve(None, record, None).placement == template.placement
    foreign = OverallGoal().record() | {"template": "os.path.join"}
    assert goals.resolve("best", foreign, None).text == foreign["best"]
    with pytest.raises(goals.ConfigError, match="not of this package"):
        goals.resolve(3, foreign, None)


def test_shards_and_processes_share_the_work(prompts: Path, knowing: Path, tmp_path: Path) -> None:
    assert called(*options(prompts, knowing, tmp_path / "one.jsonl")) == 0
    for shard in range(3):
        assert called(*options(prompts, knowing, tmp_path / "parts.jsonl", shard=f"{shard}/3")) == 0
    one, parts = rows_of(tmp_path / "one.jsonl"), rows_of(tmp_path / "parts.jsonl")
    assert one.keys() == parts.keys()
    assert called(*options(prompts, knowing, tmp_path / "parts.jsonl")) == 0
    assert not (tmp_path / "parts.jsonl").read_text(), "what shards have done is not done again"
    assert called(*options(prompts, knowing, tmp_path / "own.jsonl", processes=2)) == 0
    assert rows_of(tmp_path / "own.jsonl").keys() == one.keys()
    assert len(parts_of(tmp_path / "own.jsonl")) == 2


def test_a_batch_script_of_slurm_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    from rap_lightning.onpolicy.work_split import own_part

    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_NTASKS", "8")
    assert own_part(None) == (0, 1, 0)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    monkeypatch.setenv("SLURM_PROCID", "3")
    monkeypatch.setenv("SLURM_LOCALID", "1")
    assert own_part(None) == (3, 8, 1)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert own_part(None) == (1, 2, 1), "torchrun's word counts"


class FakeSamplingParams:
    def __init__(
        self, *, n: int, temperature: float, top_p: float, max_tokens: int, seed: int, stop_token_ids: list[int],
        skip_special_tokens: bool, min_p: float = 0.0,
    ) -> None:  # fmt: skip
        assert n == 1
        FakeLLM.floors.add(min_p)
        assert skip_special_tokens
        vars(self).update(temperature=temperature, top_p=top_p, max_tokens=max_tokens, seed=seed, ends=stop_token_ids)


class FakeLLM:
    """vllm.LLM by its documented signatures."""

    made: dict[str, Any]
    floors: ClassVar[set[float]] = set()

    def __init__(
        self, model: str, *, tokenizer: str | None = None, revision: str | None = None, dtype: str = "auto",
        tensor_parallel_size: int = 1, gpu_memory_utilization: float = 0.9, max_model_len: int | None = None,
        trust_remote_code: bool = False, enable_lora: bool = False, max_lora_rank: int = 16,
    ) -> None:  # fmt: skip
        FakeLLM.made = {"model": model, "tokenizer": tokenizer, "lora": enable_lora, "remote": trust_remote_code}

    def generate(self, prompts: Any, sampling_params: Any, *, use_tqdm: bool = True, lora_request: Any = None) -> Any:
        assert len(prompts) == len(sampling_params)
        outputs = []
        for prompt, params in zip(prompts, sampling_params, strict=True):
            text = f"{len(prompt['prompt_token_ids'])} {params.seed} {params.ends}"
            one = types.SimpleNamespace(text=text, token_ids=[1, 2], finish_reason="length")
            outputs.append(types.SimpleNamespace(outputs=[one]))
        return outputs


def test_vllm_is_driven_as_its_documentation_says(
    prompts: Path, knowing: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["--prompts", prompts, "--model", knowing, "--output", tmp_path / "v.jsonl", "--engine", "VLLM"]
    args += ["--samples", 2, "--max_new_tokens", 9, "--engine.chunk", 5]
    monkeypatch.setitem(sys.modules, "vllm", None)
    assert called(*args) == 2
    assert "pip install vllm" in capsys.readouterr().err
    module = types.SimpleNamespace(LLM=FakeLLM, SamplingParams=FakeSamplingParams)
    request = types.SimpleNamespace(LoRARequest=lambda name, number, path: (name, number, path))
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setitem(sys.modules, "vllm.lora", types.SimpleNamespace())
    monkeypatch.setitem(sys.modules, "vllm.lora.request", request)
    assert called(*args) == 0
    assert FakeLLM.made == {"model": str(knowing), "tokenizer": str(knowing), "lora": False, "remote": False}
    rows = rows_of(tmp_path / "v.jsonl").values()
    assert len(rows) == 22
    end = make_tokenizer("chatml").eos_token_id
    assert all(row["response"].split()[1:] == [str(row["seed"]), f"[{end}]"] for row in rows)
    assert {row["finish"] for row in rows} == {"length"}
    assert FakeLLM.floors == {0.0}
    more = [tmp_path / "floor.jsonl" if one == tmp_path / "v.jsonl" else one for one in args]
    assert called(*more, "--plausibility", 0.25, "--temperature", 0.5) == 0
    assert FakeLLM.floors == {0.0, 0.0625}, "vLLM applies it after the temperature, and we before"
    assert called(*args, "--guidance", 1.0) == 2


def test_min_p_after_the_temperature_keeps_the_tokens_of_the_floor_before_it() -> None:
    logits = torch.randn(50, 200, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3
    kept = PlausibilityFloor(0.2)(torch.zeros(50, 1), logits) > -math.inf
    assert 1 < kept.sum(1).double().mean() < 100
    for temperature in (0.3, 1.0, 1.7):
        probs = torch.softmax(logits / temperature, dim=-1)
        floor = Generation(temperature=temperature, plausibility=0.2).min_p
        assert torch.equal(probs >= floor * probs.amax(-1, keepdim=True), kept)


# -- endpoints ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_client, "MAX_BACKOFF", 0.05)


def at_endpoint(prompts: Path, url: str, output: Path, **more: object) -> list[object]:
    basic = {"prompts": prompts, "model": "served", "output": output, "engine": "Endpoint", "engine.url": url}
    basic["engine.timeout"] = 5
    return [part for name, value in (basic | more).items() for part in (f"--{name}", value)]


def test_an_endpoint_that_misbehaves_answers_every_request_once_in_the_end(
    prompts: Path, tmp_path: Path, quick: None, capsys: pytest.CaptureFixture[str]
) -> None:
    trouble = [
        status(500), raw("{not json"), hang_up, raw('{"choices": []}'), half, status(429, Retry_After="0.3"), slow(1.2),
        raw('{"choices": [{"message": {"content": null}}]}'), status(503), raw("<html>busy</html>"),
    ]  # fmt: skip
    with Server(*trouble, echo) as server:
        options = {"engine.timeout": 1, "engine.concurrency": 3, "samples": 2, "engine.attempts": 8}
        assert called(*at_endpoint(prompts, server.url, tmp_path / "e.jsonl", **options)) == 0
        rows = rows_of(tmp_path / "e.jsonl")
        assert len(rows) == 22
        assert all(row["response"] == "answer to " + row["messages"][-1]["content"] for row in rows.values())
        assert len(server.requests) == 22 + len(trouble)
        seeds = {body["seed"] for _, body, _ in server.requests}
        assert len(seeds) == 22
        at = len(server.requests)
        assert called(*at_endpoint(prompts, server.url, tmp_path / "e.jsonl", **options)) == 0
        assert len(server.requests) == at, "nothing is asked twice"


def test_retry_after_holds_back_all_requests(prompts: Path, tmp_path: Path, quick: None) -> None:
    with Server(status(429, Retry_After="1"), echo) as server:
        options = {"engine.concurrency": 1, "limit": 3}
        assert called(*at_endpoint(prompts, server.url, tmp_path / "e.jsonl", **options)) == 0
        times = [when for when, _, _ in server.requests]
        assert times[1] - times[0] >= 0.95
    assert chat_client._retry_after({"Retry-After": "Wed, 21 Oct 2099 07:28:00 GMT"}) > 1e9
    assert chat_client._retry_after({"Retry-After": "soon"}) is None


def test_requests_per_minute_are_kept(prompts: Path, tmp_path: Path) -> None:
    with Server(echo) as server:
        assert (
            called(*at_endpoint(prompts, server.url, tmp_path / "e", limit=5, **{"engine.requests_per_minute": 300}))
            == 0
        )
        times = sorted(when for when, _, _ in server.requests)
        assert times[-1] - times[0] >= 4 * 60 / 300 - 0.05


def test_a_key_as_short_as_a_word_leaves_responses_as_they_are(
    prompts: Path, tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "answer")
    with Server(echo) as server:
        assert called(*at_endpoint(prompts, server.url, tmp_path / "e.jsonl")) == 0
    assert all(row["response"].startswith("answer to ") for row in rows_of(tmp_path / "e.jsonl").values())


def test_retries_and_keys_that_are_masked_in_responses_are_counted(
    prompts: Path, tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "answer to")
    with Server(status(503), echo) as server:
        assert called(*at_endpoint(prompts, server.url, tmp_path / "e.jsonl")) == 0
    made = rows_of(tmp_path / "e.jsonl").values()
    assert all(row["response"].startswith("*** ") for row in made)
    shown = capsys.readouterr().out
    assert "  1: requests tried again" in shown
    assert f"  {len(made)}: responses that repeat a key that was sent, which is replaced by ***" in shown


def test_what_an_endpoint_refuses_is_listed_and_asked_again_alone(
    prompts: Path, tmp_path: Path, quick: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    output = tmp_path / "e.jsonl"
    refuses = lambda handler, body: handler.send(400, "too long, sk-very-secret")  # noqa: E731
    with Server(unless("4: ", echo, refuses)) as server:
        assert called(*at_endpoint(prompts, server.url, output)) == 1
        (lost,) = read_jsonl(tmp_path / "e.jsonl.failed.jsonl")
        assert lost["messages"][-1]["content"].startswith("4: ")
        assert "HTTP 400" in lost["error"]
        assert all(headers["Authorization"] == "Bearer sk-very-secret" for _, _, headers in server.requests)
    everything = "".join(f.read_text() for f in tmp_path.iterdir()) + "".join(capsys.readouterr())
    assert "sk-very-secret" not in everything
    rows = output.read_text()
    with Server(echo) as server:
        assert called(*at_endpoint(prompts, server.url, output)) == 0  # at another address, as servers are
        assert [text[:3] for text in server.asked] == ["4: "]
    assert not (tmp_path / "e.jsonl.failed.jsonl").exists()
    assert output.read_text().startswith(rows)


def test_an_endpoint_that_is_down_or_refuses_everybody_ends_the_run(
    prompts: Path, tmp_path: Path, quick: None, capsys: pytest.CaptureFixture[str]
) -> None:
    with Server(*[echo] * 4, hang_up) as server:
        options = {"engine.attempts": 2, "engine.concurrency": 1}
        assert called(*at_endpoint(prompts, server.url, tmp_path / "e.jsonl", **options)) == 2
    assert "What is finished is kept" in capsys.readouterr().err
    assert len(rows_of(tmp_path / "e.jsonl")) == 4
    for code in (401, 404):
        with Server(status(code)) as server:
            assert called(*at_endpoint(prompts, server.url, tmp_path / f"{code}.jsonl")) == 2
        assert f"HTTP {code}" in capsys.readouterr().err
    with Server(status(302, Location="http://127.0.0.1:9/steal")) as server:
        assert called(*at_endpoint(prompts, server.url, tmp_path / "r.jsonl", limit=1)) == 1, "no key goes elsewhere"


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"goal": 11}, "on the scale from 1 to 10"),
        ({"goal": "[3, 3]"}, "two of them read the same"),
        ({"goal": "[]"}, "--goal is an empty list"),
        ({"goal": "none", "template": "OverallGoal"}, "--template has no effect"),
        ({"samples": 2, "temperature": 0}, "equal responses at temperature 0"),
        ({"shard": "4/4"}, "from 0/4 to 3/4"),
        ({"goal_from": "nowhere"}, "no goal.json there"),
        ({"column": "propmt"}, "no such column"),
        ({"revision": "main"}, "--revision has no effect"),
        ({"temperature": 0, "top_p": 0.5}, "top_p has no effect"),
        ({"goal": "bset"}, "goal"),
    ],
)
def test_options_without_effect_or_sense_are_refused(
    more: dict[str, object], said: str, prompts: Path, knowing: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert called(*options(prompts, knowing, tmp_path / "o.jsonl", **more)) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "o.jsonl").exists()


def test_a_number_is_asked_of_no_model_that_knows_no_goal(
    prompts: Path, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert called(*options(prompts, tiny, tmp_path / "o.jsonl", goal=5)) == 2
    assert "Name the template" in capsys.readouterr().err
    assert called(*options(prompts, tiny, tmp_path / "o.jsonl")) == 0
    assert {row["goal"] for row in rows_of(tmp_path / "o.jsonl").values()} == {None}
