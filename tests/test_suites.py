"""evaluate --suite: the files that the judges' own tools read."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from conftest import called, make_model, read_jsonl, write_jsonl
from rap_lightning.onpolicy.suites.arena_hard import markdown_counts
from rap_lightning.preferences.goals import OverallGoal

called = partial(called, "evaluate")


@pytest.fixture(scope="module", params=["chatml", "gemma"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_model(tmp_path_factory.mktemp("suites") / f"my-{request.param}", request.param)
    (folder / "goal.json").write_text(json.dumps(OverallGoal().record()))
    return folder


def basic(model: Path, tmp_path: Path) -> list[object]:
    return ["--model", model, "--output", tmp_path / "out", "--max_new_tokens", 10]


def test_alpaca_eval_reads_the_outputs(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    questions = [{"instruction": text, "dataset": "d"} for text in ("one two", "three", "one two")]
    (tmp_path / "q.json").write_text(json.dumps(questions))
    args = [*basic(model, tmp_path), "--suite", "AlpacaEval", "--suite.questions", tmp_path / "q.json"]
    assert called(*args) == 0
    path = tmp_path / "out" / "alpaca_eval" / f"{model.name}-goal-10" / "model_outputs.json"
    rows = json.loads(path.read_text())
    assert [row["instruction"] for row in rows] == ["one two", "three", "one two"], "every question, in order"
    assert set(rows[0]) == {"dataset", "instruction", "output", "generator", "datasplit"}
    assert called(*args, "--suite.judge", "always") == 2
    reader = pytest.importorskip("alpaca_eval.utils", reason="alpaca_eval isn't installed")
    frame = reader.load_or_convert_to_dataframe(path)
    assert len(frame) == 3
    assert reader.get_generator_name(None, frame) == f"{model.name}-goal-10"


def test_the_second_turn_of_mt_bench_follows_the_models_own_first_answer(model: Path, tmp_path: Path) -> None:
    questions = [
        {"question_id": 90 - i, "category": category, "turns": [f"first {category}", "second"]}
        for i, category in enumerate(("writing", "math", "stem", "other"))
    ]
    args = [*basic(model, tmp_path), "--suite", "MTBench"]
    args += ["--suite.questions", write_jsonl(tmp_path / "question.jsonl", questions)]
    assert called(*args) == 0
    name = f"{model.name}-goal-10"
    path = tmp_path / "out" / "mt_bench" / "model_answer" / f"{name}.jsonl"
    rows = read_jsonl(path)
    assert [row["question_id"] for row in rows] == [87, 88, 89, 90]
    assert {row["model_id"] for row in rows} == {name}
    first = {row["question_id"]: row["choices"][0]["turns"][0] for row in rows}
    second: dict[str, Any] = {}
    for file in (tmp_path / "out" / "generations").glob("mt_bench-turn-2-*.jsonl"):
        second |= {row["messages"][0]["content"]: row for row in read_jsonl(file)}
    for question in questions:
        row = second[question["turns"][0]]
        assert [turn["role"] for turn in row["messages"]] == ["user", "assistant", "user"]
        assert row["messages"][1]["content"] == first[question["question_id"]]
        (answer,) = [r for r in rows if r["question_id"] == question["question_id"]]
        assert answer["choices"] == [{"index": 0, "turns": [first[question["question_id"]], row["response"].strip()]}]
    metas = sorted((tmp_path / "out" / "generations").glob("mt_bench-turn-1-*.meta.json"))
    temperatures = [json.loads(meta.read_text())["settings"]["generation"]["temperature"] for meta in metas]
    assert sorted(temperatures) == [0.0, 0.1, 0.7]
    assert called(*args, "--temperature", 1) == 2
    common = pytest.importorskip("fastchat.llm_judge.common", reason="fschat isn't installed")
    assert len(common.load_model_answers(str(path.parent))[name]) == 4


@pytest.mark.parametrize("version", ["v0.1", "v2.0"])
def test_arena_hard_has_both_layouts(version: str, model: Path, tmp_path: Path) -> None:
    old = [{"question_id": f"q{i}", "category": "c", "turns": [{"content": f"say {i}"}]} for i in range(3)]
    new = [{"uid": f"q{i}", "category": "c", "prompt": f"say {i}"} for i in range(3)]
    questions = write_jsonl(tmp_path / "question.jsonl", old if version == "v0.1" else new)
    args = [*basic(model, tmp_path), "--suite", "ArenaHard", "--suite.questions", questions]
    assert called(*args, "--goal", 3, "--name", "mine") == 0
    rows = read_jsonl(tmp_path / "out" / f"arena-hard-{version}" / "model_answer" / "mine.jsonl")
    if version == "v0.1":
        assert [row["question_id"] for row in rows] == ["q0", "q1", "q2"]
        assert rows[0]["conv_metadata"]["token_len"] == rows[0]["choices"][0]["turns"][0]["token_len"]
        assert rows[0]["model_id"] == "mine"
    else:
        assert [row["uid"] for row in rows] == ["q0", "q1", "q2"]
        assert [turn["role"] for turn in rows[0]["messages"]] == ["user", "assistant"]
        assert isinstance(rows[0]["messages"][1]["content"]["answer"], str)
        assert set(rows[0]["metadata"]) == {"token_len", "header_count", "list_count", "bold_count"}
    (generated,) = (tmp_path / "out" / "generations").glob("arena_hard.jsonl")
    assert {row["goal"] for row in read_jsonl(generated)} == {"3"}


def test_markdown_is_counted_outside_code() -> None:
    text = "# One\n## Two\n## Two again\n- a\n* b\n1. c\n  2. d\n**bold** and __bold__ and **more**\n"
    text += "```\n# not\n- not\n```\n"
    assert markdown_counts(text) == {
        "header_count": {"h1": 1, "h2": 2, "h3": 0, "h4": 0, "h5": 0, "h6": 0},
        "list_count": {"ordered": 2, "unordered": 2},
        "bold_count": {"**": 2, "__": 1},
    }


def test_lm_eval_runs_a_task_with_the_goal_in_the_prompt(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="lm_eval isn't installed")
    rows = [{"q": f"{i} and 1", "choices": ["red", "green"], "answer": i % 2} for i in range(4)]
    data = write_jsonl(tmp_path / "task.jsonl", rows)
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "own.yaml").write_text(
        f"task: own\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\ntest_split: test\n"
        'output_type: multiple_choice\ndoc_to_text: "Which is {{q}}?"\ndoc_to_target: answer\n'
        'doc_to_choice: "{{choices}}"\nmetric_list: [{metric: acc}]\n'
    )
    args = ["--model", model, "--output", tmp_path / "out", "--suite", "LMEval", "--suite.include", folder]
    assert called(*args, "--suite.tasks", "[own]", "--goal", 7) == 0
    out = tmp_path / "out" / "lm_eval" / f"{model.name}-goal-7"
    prompt = (out / "prompts.txt").read_text()
    assert prompt.count(OverallGoal().text(7)) == 1
    assert "Which is 0 and 1?" in prompt
    assert 0 <= json.loads((out / "results.json").read_text())["results"]["own"]["acc,none"] <= 1
    assert called(*args, "--suite.tasks", "[ownn]") == 2
    assert called(*args, "--suite.tasks", "[own]", "--max_new_tokens", 3) == 2


@pytest.mark.parametrize(
    ("questions", "said"),
    [("[]", "no questions"), ('[{"prompt": "x"}]', "no instruction"), ("[{", "is not JSON"), (None, "can't be read")],
)
def test_questions_of_another_form_are_refused(
    questions: str | None, said: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "q.json"
    if questions is not None:
        path.write_text(questions)
    assert called(*basic(model, tmp_path), "--suite", "AlpacaEval", "--suite.questions", path) == 2
    assert said in capsys.readouterr().err


def test_questions_that_the_hub_does_not_give_are_asked_for(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for suite in ("AlpacaEval", "MTBench", "ArenaHard"):
        assert called(*basic(model, tmp_path), "--suite", suite) == 2
        assert "Name a file of them with --suite.questions" in capsys.readouterr().err
