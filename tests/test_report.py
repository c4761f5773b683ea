"""The report: what it reads from whole and broken run folders, what it says, and that no text gets out of hand."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from rap_lightning.errors import ConfigError, DataError
from rap_lightning.losses import DPO, SFT, Mixture
from rap_lightning.reporting.curves import read_curves, thinned
from rap_lightning.reporting.differences import differences
from rap_lightning.reporting.evaluation import read_evaluation
from rap_lightning.reporting.headline import describe, headline
from rap_lightning.reporting.parts import all_parts
from rap_lightning.reporting.read_runs import read_runs
from rap_lightning.reporting.tables import cost_rows, data_groups, samples
from rap_lightning.reporting.text import clean, number

GOALS = [1, 5.5, 10]
HOSTILE = "</p><script>alert(1)</script><img src=x onerror=alert(2)>"


def figure(value: float, reach: float = 0.3, n: int = 96) -> dict[str, Any]:
    return {"value": value, "low": value - reach, "high": value + reach, "n": n}


def evaluation(scores: list[float], **changes: Any) -> dict[str, Any]:
    steering = {
        "mean": [figure(score) for score in scores], "spearman": figure(0.6, 0.1),
        "slope": figure((scores[-1] - scores[0]) / 9, 0.1),
        "argmax": {"goal": 10, "shares": [0.0, 0.2, 0.8]},
    }  # fmt: skip
    shares = [figure(0.1, 0.05) for _ in GOALS]
    return {
        "version": 1, "model": "hf", "base": None, "judge": "a.rule", "scale": {"low": 1, "high": 10}, "goals": GOALS,
        "temperature": 1.0, "prompts": 96, "samples_per_prompt": 1, "seed": 0, "seconds": 12.0,
        "controllability": {"sampled": steering, "greedy": steering},
        "unlearning": {"unit": "nats", "bins": [[1, 5], [5, 10]], "conditions": {
            condition: {"chosen": [figure(0.2), figure(0.4)], "rejected": [figure(-1.0), figure(-0.2)]}
            for condition in ("none", "best", "worst", "own")}},
        "extrapolation": {"best_seen": shares, "p99": {"score": 9.5, "share": shares}},
        "discrimination": {"spearman": figure(0.5, 0.1), "pair_accuracy": {"value": None, "why": "no pairs"}},
        "length": {"tokens": [figure(10.0) for _ in GOALS], "controlled": [figure(s) for s in scores]},
        "samples": [{"prompt": "List fruits.", "goal": goal, "response": f"at {goal}", "score": 5.0, "tokens": 3,
                     "greedy": False} for goal in GOALS],
    } | changes  # fmt: skip


def make_run(folder: Path, scores: list[float] | None = None, relabel: str = "both", **changes: Any) -> Path:
    """A run folder as fit and evaluate leave it."""
    folder.mkdir(parents=True)
    halves = ["", "/chosen-goal", "/rejected-goal"] if relabel == "both" else [""]
    names = [
        f"{p}{m}{h}" for p in ("", "val/") for m in ("loss", "rewards/margins", "rewards/accuracies") for h in halves
    ]
    lines = [",".join(["step", "pairs_per_second", *names])]
    for step in range(1, 21):
        train = [f"{0.7 - step / 100}" if not name.startswith("val/") else "" for name in names]
        lines.append(",".join([str(step), "100", *train]))
        if step % 10 == 0:
            lines.append(",".join([str(step), "", *("0.6" if name.startswith("val/") else "" for name in names)]))
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    record = {
        "started": "2026-01-01T10:00:00+0000", "finished": "2026-01-01T10:02:05+0000", "seed": 1, "python": "3.11.7",
        "devices": ["cpu"], "processes": 1, "packages": {"torch": "2.9"}, "peak_memory": {"host_bytes": 3 * 2**29},
        "facts": {"step": 20, "loss": {"shown": "DPO(beta=0.5)"}, "data": {"relabel": relabel},
                  "base_model": {"name": "base"}},
    }  # fmt: skip
    (folder / "run.json").write_text(json.dumps(record | changes), encoding="utf-8")
    dropped = {"a tie": {"count": 179, "first": "line 7"}}
    counts = {"rows_read": 2000, "rows_kept": 1821, "pairs_kept": 1821, "relabelled_pairs": 3642}
    report = [{"source": "data", "split": "train", **counts, "dropped": dropped, "truncated": {}}]
    (folder / "data_report.json").write_text(json.dumps(report), encoding="utf-8")
    (folder / "config.yaml").write_text(
        yaml.safe_dump({"data": {"init_args": {"relabel": relabel, "source": "data/pairs"}}}), encoding="utf-8"
    )
    (folder / "goal.json").write_text(json.dumps({"template": "t", "scale": {"low": 1, "high": 10}}), encoding="utf-8")
    if scores is not None:
        (folder / "evaluation").mkdir()
        (folder / "evaluation" / "evaluation.json").write_text(json.dumps(evaluation(scores)), encoding="utf-8")
    return folder


def report(*args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "rap_lightning.cli.main", "report", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def outcome(*folders: object) -> str:
    return headline(read_runs([str(folder) for folder in folders])).outcome


def whole(*folders: object) -> str:
    """All that the headline says."""
    found = headline(read_runs([str(folder) for folder in folders]))
    return "\n".join([found.outcome, *found.details, *found.caveats])


class Page(HTMLParser):
    """Tags with their attributes, and the text that is seen."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.seen: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.seen.append(data)


# --- reading ---------------------------------------------------------------------------------------------------------


def test_curves_keep_finite_values_by_step_and_say_what_was_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("loss,step,val/loss,lr\n0.7,1,,1\n0.6,2,,1\n,2,0.65,\nnan,3,,1\n0.5,2,,1\n0.4,4", encoding="utf-8")
    curves = read_curves(path)
    assert curves.values == {"loss": [(1, 0.7), (2, 0.5)], "val/loss": [(2, 0.65)]}  # the later value of step 2
    assert curves.not_finite == {"loss": 3}
    assert (curves.broken, curves.last_step) == (1, 3)  # the last line was cut off


@pytest.mark.parametrize("content", [b"", b"\0\0\0", b"loss\n1\n", b"step,loss\n", b'step,loss\n"1,2', b"\xff\xfe"])
def test_a_metrics_file_of_anything_gives_no_curves_and_no_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "metrics.csv").write_bytes(content)
    (run,) = read_runs([str(tmp_path)])
    assert run.curves is not None
    assert run.curves.values == {}
    assert any("no figures" in note for note in run.notes)


def test_every_cut_of_a_run_folder_is_read(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", [3.0, 5.0, 8.0])
    files = [path for path in folder.rglob("*") if path.is_file()]
    for path in files:
        content = path.read_bytes()
        for end in range(0, len(content), max(1, len(content) // 12)):
            path.write_bytes(content[:end])
            run = read_runs([str(folder)])[0]
            all_parts([run])
            assert path.name not in ("run.json", "data_report.json", "goal.json") or any(
                path.name in note for note in run.notes
            ), f"{path.name} cut at {end} was taken without a word"
        path.write_bytes(content)


def test_long_curves_are_thinned_to_means() -> None:
    steps, values = thinned([(i, float(i % 2)) for i in range(1, 1001)])
    assert len(steps) <= 240
    assert steps[-1] == 1000
    assert sum(values) / len(values) == pytest.approx(0.5, abs=0.05)


def test_folders_that_are_no_runs_are_refused_with_a_hint(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "runs" / "version_0")
    (folder / "hf").mkdir()
    with pytest.raises(DataError, match=r"is no run.*Do you mean .*version_0\?"):
        read_runs([str(folder / "hf")])
    with pytest.raises(DataError, match=r"Runs in it: .*version_0"):
        read_runs([str(folder.parent)])
    with pytest.raises(DataError, match="doesn't exist"):
        read_runs([str(tmp_path / "nowhere")])


def test_a_run_given_twice_is_refused_and_names_tell_runs_apart(tmp_path: Path) -> None:
    one, two = make_run(tmp_path / "a" / "version_0"), make_run(tmp_path / "b" / "version_0")
    with pytest.raises(ConfigError, match="given twice"):
        read_runs([str(one), str(one / ".." / "version_0")])
    with pytest.raises(ConfigError, match="two runs are called x"):
        read_runs([f"x={one}", f"x={two}"])
    with pytest.raises(ConfigError, match="NAME=FOLDER"):
        read_runs([f"={one}"])
    assert [run.name for run in read_runs([str(one), str(two)])] == ["a/version_0", "b/version_0"]
    assert [run.name for run in read_runs([f"lr=1, b=2={one}", str(two)])] == ["lr=1, b=2", "version_0"]
    assert [run.index for run in read_runs([str(one), str(two)])] == [0, 1]


def test_an_evaluation_folder_alone_can_be_compared(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "evaluation.json").write_text(json.dumps(evaluation([5.0, 5.1, 5.0])), encoding="utf-8")
    run = make_run(tmp_path / "run", [2.0, 5.0, 9.0])
    assert outcome(run, tmp_path / "base") == "Asked for a score of 10, run scores highest: 9 against 5 of base."


def test_a_page_without_the_base_says_that_steering_may_be_its(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [2.0, 5.0, 9.0])
    written = run / "evaluation" / "evaluation.json"
    written.write_text(json.dumps(evaluation([2.0, 5.0, 9.0], base="hub/base")), encoding="utf-8")
    said = whole(run)
    assert "What hub/base, where training began, does with goals isn't on this page" in said
    assert f"--model hub/base --goal_from {run / 'hf'} --output base-evaluation" in said
    (tmp_path / "base").mkdir()
    of_base = evaluation([5.0, 5.1, 5.2], model="hub/base")
    (tmp_path / "base" / "evaluation.json").write_text(json.dumps(of_base), encoding="utf-8")
    assert "isn't on this page" not in whole(run, tmp_path / "base")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "is empty"),
        ("{}", "is empty"),
        ('{"version": 1', "no JSON"),
        ("[1, 2]", "version None"),
        ('{"version": 7}', "version 7"),
        ('{"version": 1, "goals": [1, 2]}', "none of the parts"),
        ('{"version": 1, "goals": [1], "length": {"tokens": []}}', "tokens has 0 figures for 1 goals"),
        ('{"version": 1, "discrimination": []}', "discrimination in evaluation.json is left out: expected an object"),
        ('{"version": 1, "samples": 3}', "samples in evaluation.json are left out"),
        ('{"version": 1, "unlearning": {"bins": [1], "conditions": {}}}', "expected bins as"),
    ],
)
def test_an_evaluation_that_does_not_fit_is_left_out_and_said(tmp_path: Path, content: str, said: str) -> None:
    path = tmp_path / "evaluation.json"
    path.write_text(content, encoding="utf-8")
    found = read_evaluation(path)
    assert found.empty
    assert said in found.faults[0]


def test_figures_without_a_value_keep_their_reason(tmp_path: Path) -> None:
    path = tmp_path / "evaluation.json"
    part = {
        "version": 1,
        "goals": [1],
        "discrimination": {"spearman": None, "why": "one goal"},
        "length": {"tokens": [None]},
    }
    path.write_text(json.dumps(part), encoding="utf-8")
    found = read_evaluation(path)
    assert (found.discrimination["spearman"].value, found.discrimination["spearman"].why) == (None, "one goal")
    assert found.tokens[0].value is None


# --- what is said ----------------------------------------------------------------------------------------------------


def test_the_headline_says_which_run_is_ahead_and_whether_that_is_sure(tmp_path: Path) -> None:
    ra, dpo = make_run(tmp_path / "ra", [2.0, 5.0, 8.0]), make_run(tmp_path / "dpo", [6.0, 6.1, 6.5], "none")
    near = make_run(tmp_path / "near", [6.0, 6.2, 8.2])
    assert outcome(ra, dpo) == "Asked for a score of 10, ra scores highest: 8 against 6.5 of dpo."
    assert outcome(dpo, ra) == outcome(ra, dpo)
    assert "near scores highest: 8.2 against 8 of ra, but their intervals overlap, so this may be" in outcome(ra, near)
    assert "8 against 6.5 of dpo, the next" in outcome(ra, dpo, make_run(tmp_path / "w", [1.0, 1.0, 1.0]))
    said = whole(ra, dpo)
    assert "The goal steers ra: its mean score goes from 2 to 8 as the goal goes from 1 to 10, slope 0.667" in said
    assert "No steering is shown for dpo" in said
    assert "pairs of different kinds" in said
    assert "How much a run changes with its seed" in said


def test_runs_are_compared_prompt_by_prompt_where_their_samples_are_there(tmp_path: Path) -> None:
    ahead, behind = make_run(tmp_path / "a", [5.0, 5.0, 5.6]), make_run(tmp_path / "b", [5.0, 5.0, 5.5])
    assert "may be chance" in outcome(ahead, behind)

    def write(folder: Path, scores: list[float]) -> None:
        rows = [
            {"prompt_id": f"p{i}", "goal": goal, "score": score + extra, "greedy": False}
            for i, score in enumerate(scores)
            for goal in (1, 10)
            for extra in (-1.0, 1.0)
        ]
        rows.append({"prompt_id": "p0", "goal": 10, "score": 1000.0, "greedy": True})  # greedy ones don't count
        rows.append({"prompt_id": "p0", "goal": 10, "score": None, "greedy": False})
        text = "\n".join(json.dumps(row) for row in rows)
        (folder / "evaluation" / "samples.jsonl").write_text(text + "\n{cut o", encoding="utf-8")

    noise = [float(i % 7) for i in range(40)]
    write(behind, noise)
    write(ahead, [value + 0.1 + 0.01 * (i % 3) for i, value in enumerate(noise)])
    assert outcome(ahead, behind) == "Asked for a score of 10, a scores highest: 5.6 against 5.5 of b."
    said = whole(ahead, behind).replace("\u00a0", " ")
    assert re.search(r"On the same 40 prompts the difference is 0.11 \(0.10\d* to 0.11\d*\)", said)
    write(ahead, [value + (0.2 if i % 2 else -0.2) for i, value in enumerate(noise)])
    assert "a and b can't be told apart: 5.6 against 5.5." in outcome(ahead, behind)


def test_a_run_that_knows_no_goals_is_compared_as_it_is(tmp_path: Path) -> None:
    ra, plain = make_run(tmp_path / "ra", [2.0, 5.0, 8.0]), make_run(tmp_path / "plain", [6.0])
    steering = {"spearman": None, "slope": None, "argmax": None}
    document = evaluation([6.0], goals=[], controllability={"sampled": steering | {"mean": []}})
    document["without_goal"] = {"controllability": {"sampled": {"mean": figure(6.0)}}}
    for part in ("extrapolation", "length"):
        del document[part]
    (plain / "evaluation" / "evaluation.json").write_text(json.dumps(document), encoding="utf-8")
    assert outcome(ra, plain) == "Asked for a score of 10, ra scores highest: 8 against 6 of plain (asked for none)."
    below = evaluation([2.0, 5.0, 8.0], goals=[-9, -5, 0], scale={"low": -9, "high": 0})
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "evaluation.json").write_text(json.dumps(below), encoding="utf-8")
    apart = tmp_path / "apart"
    apart.mkdir()
    (apart / "evaluation.json").write_text(json.dumps(document | {"scale": below["scale"]}), encoding="utf-8")
    assert outcome(tmp_path / "below", apart).startswith("Asked for a score of 0, below scores highest")
    (panel, _) = all_parts(read_runs([str(ra), str(plain)]))[0].pictures[0].panels
    level = panel.series[1]
    assert (level.run, list(level.x), [y.value for y in level.y]) == (1, [1, 10], [6.0, 6.0])


def test_scores_without_a_goal_stand_beside_those_at_goals(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [2.0, 5.0, 8.0])
    apart = {"controllability": {"sampled": {"mean": figure(7.0)}, "greedy": {"mean": None}}}
    document = evaluation([2.0, 5.0, 8.0], without_goal=apart)
    document["samples"].append({"prompt": "List fruits.", "goal": None, "response": "unasked", "score": 7, "tokens": 1})
    (run / "evaluation" / "evaluation.json").write_text(json.dumps(document), encoding="utf-8")
    runs = read_runs([str(run)])
    found = runs[0].evaluation
    assert found is not None
    assert found.sampled is not None
    assert found.sampled.unasked is not None
    assert (found.sampled.unasked.value, found.sampled.best_goal_share) == (7, 0.8)
    assert [one.run for one in all_parts(runs)[0].pictures[0].panels[0].series] == [0, 0]
    assert [goal for goal, _ in samples(runs)[0][0].goals] == ["no score", "1", "5.5", "10"]


def test_what_could_not_be_measured_says_why(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [2.0, 5.0, 8.0])
    nothing = [{"value": None, "why": "no prompt of training"} for _ in GOALS]
    document = evaluation([2.0, 5.0, 8.0], extrapolation={"best_seen": nothing}, left_out={"unlearning": "no base"})
    del document["unlearning"]
    (run / "evaluation" / "evaluation.json").write_text(json.dumps(document), encoding="utf-8")
    parts = {part.name: part for part in all_parts(read_runs([str(run)]))}
    assert not parts["extrapolation"].pictures
    assert "no prompt of training" in parts["extrapolation"].lacking
    assert "unlearning not measured: no base" in whole(run)
    assert any("pair accuracy: no pairs" in why for _, why, _ in parts["discrimination"].pictures[0].missing)


def test_a_score_that_falls_with_the_goal_is_called_so(tmp_path: Path) -> None:
    said = outcome(make_run(tmp_path / "run", [8.0, 5.0, 2.0]))
    assert "the wrong way: its mean score goes from 8 to 2" in said


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"judge": "another"}, "judge"),
        ({"scale": {"low": 0, "high": 100}}, "scale: 1 to 10 (one) and 0 to 100 (two)"),
        ({"temperature": 0.7}, "temperature"),
        (
            {"guidance": {"weight": 0.5, "against": "1", "plausibility": 0.1}},
            "guidance: none (one) and guidance 0.5 against 1, floor 0.1 (two)",
        ),
        ({"seed": 3}, "seed"),
        ({"goals": [1, 5, 9]}, "highest goal"),
    ],
)
def test_evaluations_that_measured_other_things_are_not_compared(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    one, two = make_run(tmp_path / "one", [2.0, 5.0, 8.0]), make_run(tmp_path / "two", [2.0, 5.0, 5.0])
    (two / "evaluation" / "evaluation.json").write_text(
        json.dumps(evaluation([2.0, 5.0, 5.0], **changes)), encoding="utf-8"
    )
    assert outcome(one, two) == "The runs were evaluated in different ways, so their scores are not compared."
    assert said in whole(one, two)


def test_scores_on_different_scales_never_share_axes(tmp_path: Path) -> None:
    one, two = make_run(tmp_path / "one", [2.0, 5.0, 8.0]), make_run(tmp_path / "two", [2.0, 5.0, 5.0])
    other = evaluation([20.0, 50.0, 80.0], scale={"low": 0, "high": 100}, goals=[0, 50, 100])
    (two / "evaluation" / "evaluation.json").write_text(json.dumps(other), encoding="utf-8")
    steering = all_parts(read_runs([str(one), str(two)]))[0].pictures[0]
    assert [panel.runs for panel in steering.panels] == [[0], [1], [0], [1]]
    assert [panel.identity for panel in steering.panels[:2]] == [(1, 10), (0, 100)]
    assert "scale 0 to 100" in steering.panels[1].title


def test_without_an_evaluation_nothing_is_said_of_what_runs_write(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "ra"), make_run(tmp_path / "dpo", relabel="none")]
    assert outcome(*runs) == "What these runs write has not been evaluated yet."
    assert "so many are ranked right: ra 60% and dpo 60%" in whole(*runs)
    parts = {part.name: part for part in all_parts(read_runs([str(run) for run in runs]))}
    assert parts["training"].pictures
    for name in ("steering", "unlearning", "extrapolation", "discrimination", "length"):
        assert not parts[name].pictures
        assert [command.split(" --judge")[0] for command in parts[name].commands] == [
            f"rap-lightning evaluate --model {run}/hf --source data/pairs" for run in runs
        ]


def test_curves_are_split_by_origin_and_unsplit_runs_stand_where_their_pairs_belong(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / mode, relabel=mode) for mode in ("both", "none", "chosen")]
    loss = all_parts(read_runs([str(folder) for folder in folders]))[1].pictures[0]
    shown = {panel.title.split(":")[0]: panel.runs for panel in loss.panels}
    assert shown == {"chosen-goal half": [0, 2], "rejected-goal half": [0], "plain pairs": [1]}
    lines = [(one.what, one.style, len(one.x)) for one in loss.panels[0].series if one.run == 0]
    assert lines == [("training", "bare", 20), ("validation", "marked", 2)]


def test_a_run_without_validation_is_marked_on_its_training_line(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    text = (folder / "metrics.csv").read_text(encoding="utf-8").splitlines()
    (folder / "metrics.csv").write_text("\n".join(line for line in text if ",," not in line[:6]), encoding="utf-8")
    loss = all_parts(read_runs([str(folder)]))[1].pictures[0]
    assert [(one.what, one.style) for one in loss.panels[0].series] == [("training", "marked")]
    assert "no validation" in loss.missing[0][1]


def test_a_killed_run_says_so(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", finished=None)
    with (folder / "metrics.csv").open("a", encoding="utf-8") as file:
        file.write("21,nan,nan")
    said = whole(folder)
    assert "has not ended" in said
    assert "the last step known is 20" in said
    assert "1 line of metrics.csv" in said
    assert read_runs([str(folder)])[0].seconds is None


def test_not_finite_losses_are_gaps_that_are_told(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    text = (folder / "metrics.csv").read_text(encoding="utf-8")
    (folder / "metrics.csv").write_text(
        re.sub(r"^7,100,[^,]*", "7,100,nan", text, flags=re.MULTILINE), encoding="utf-8"
    )
    assert "loss is not a number, or infinite, from step 7" in whole(folder)
    assert 7 not in dict(read_runs([str(folder)])[0].curves.values["loss"])  # type: ignore[union-attr]


def test_config_differences_are_keys_as_flags_spell_them() -> None:
    base = {"model": {"loss": {"class_path": "DPO", "init_args": {"beta": 0.1}}, "reference": None},
            "trainer": {"callbacks": [{"class_path": "a.Probe", "init_args": {"every": 10}}], "max_epochs": 1},
            "data": {"filters": [], "hf_token": "s3cret"}}  # fmt: skip
    other = json.loads(json.dumps(base))
    other["model"]["loss"] = {"class_path": "IPO", "init_args": {"beta": 0.2}}
    other["trainer"]["callbacks"][0]["init_args"]["every"] = 20
    other["data"] = {"filters": ["x"], "hf_token": "0ther"}
    assert differences([base, base]) == []
    assert differences([base, other, base]) == [
        ("data.filters", ["[]", '["x"]', "[]"]),
        ("data.hf_token", ["***", "***", "***"]),
        ("model.loss", ["DPO", "IPO", "DPO"]),
        ("model.loss.beta", ["0.1", "0.2", "0.1"]),
        ("trainer.callbacks[Probe].every", ["10", "20", "10"]),
    ]
    bare = [{"model": {"loss": {"class_path": name, "init_args": {}, "dict_kwargs": None}}} for name in ("DPO", "IPO")]
    assert differences(bare) == [("model.loss", ["DPO", "IPO"])]
    assert differences([{"a": 1}, {"b": None}]) == [("a", ["1", "not set"]), ("b", ["not set", "null"])]


def test_lines_that_say_too_little_are_counted_and_told(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [2.0, 5.0, 8.0])
    (run / "samples.jsonl").write_text('{"goal": 1, "response": "of no step"}\n[1]\n', encoding="utf-8")
    (run / "likelihood.jsonl").write_text('{"step": 1, "low": 1, "high": 4}\n', encoding="utf-8")
    (run / "evaluation" / "samples.jsonl").write_text('{"goal": 1, "score": 3}\n\n{"prompt_id": "p', encoding="utf-8")
    told = {note.partition(" left out")[0] for note in read_runs([str(run)])[0].notes if "jsonl" in note}
    assert told == {"2 lines of samples.jsonl", "1 line of likelihood.jsonl", "2 lines of evaluation/samples.jsonl"}


def test_an_evaluation_alone_has_no_samples_of_fit_to_miss(tmp_path: Path) -> None:
    whole = make_run(tmp_path / "run", [2.0, 5.0, 8.0])
    alone = (whole / "evaluation").rename(tmp_path / "alone")
    (alone / "samples.jsonl").write_text('{"prompt_id": "p", "goal": 1, "score": 3, "greedy": false}\n')
    (run,) = read_runs([str(alone)])
    assert run.scores == {1.0: {"p": 3.0}}
    assert not [note for note in run.notes if "jsonl" in note]


def test_samples_are_the_first_of_each_goal_and_runs_stand_side_by_side(tmp_path: Path) -> None:
    one, two = make_run(tmp_path / "one", [2.0, 5.0, 8.0]), make_run(tmp_path / "two")
    lines = [{"step": s, "goal": g, "prompt": "List fruits.", "response": f"step {s}", "score": None, "tokens": 3}
             for s in (0, 10) for g in (1, 10)]  # fmt: skip
    (two / "samples.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 10, "go', encoding="utf-8")
    runs = read_runs([str(one), str(two)])
    assert any("samples.jsonl" in note for note in runs[1].notes)
    (shown,), told = samples(runs)
    assert "1 of 1 prompts" in told
    assert [goal for goal, _ in shown.goals] == ["1", "5.5", "10"]
    assert shown.goals[0][1] == [(0, "at 1", "score 5, 3 tokens"), (1, "step 10", "not scored, 3 tokens")]
    assert shown.goals[1][1][1] is None


def test_data_reports_that_agree_are_shown_once_and_costs_have_units(tmp_path: Path) -> None:
    runs = read_runs([str(make_run(tmp_path / "one")), str(make_run(tmp_path / "two", [2.0, 5.0, 8.0]))])
    (group,) = data_groups(runs)
    assert group["runs"] == [0, 1]
    assert group["splits"][0]["counts"][0] == ("rows read", "2,000")
    assert group["splits"][0]["reasons"] == [("dropped", "179", "a tie")]
    costs = dict(cost_rows(runs)[1][1])
    assert costs["wall time of fit"] == "2 min 5 s"
    assert costs["peak memory of the process"] == "1.5 GiB"
    assert costs["evaluation"] == "12 s"


def test_numbers_and_texts_are_as_people_read_them() -> None:
    values = (0.0, -0.0, 6.754, 1234.5, 0.05, 0.00123, -2.0, None, float("nan"))
    assert [number(value) for value in values] == ["0", "0", "6.75", "1,234", "0.05", "0.00123", "-2", "–", "–"]
    assert clean("a\0b\u202ec") == "a\ufffdb\ufffdc"
    assert clean("x" * 1000, 10) == "xxxxxxxxxx … (1,000 characters in all)"


# --- the page --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two evaluated runs full of hostile text, reported twice."""
    pytest.importorskip("matplotlib", reason="the report draws with matplotlib: pip install 'rap-lightning[report]'")
    root = tmp_path_factory.mktemp("pages")
    for i, (name, relabel) in enumerate((("ra", "both"), ("dpo", "none"))):
        folder = make_run(root / name, [2.0 + i, 5.0, 8.0 - i], relabel, python=HOSTILE)
        texts = [HOSTILE, "x" * 100_000, "\u202eمرحبا \0\x1b[31m \ud800"]
        found = [
            {"prompt": HOSTILE, "goal": g, "response": t, "score": 5, "tokens": 3}
            for g, t in zip(GOALS, texts, strict=True)
        ]
        (folder / "evaluation" / "evaluation.json").write_text(
            json.dumps(evaluation([2.0 + i, 5.0, 8.0 - i], samples=found)), encoding="utf-8"
        )
        (folder / "config.yaml").write_text(yaml.safe_dump({HOSTILE: {"key": HOSTILE + str(i)}}), encoding="utf-8")
        sample = {"prompt": "p", "response": "r", "tokens": 1}
        lines = [sample | {"step": step, "goal": g, "score": g * step / 10} for step in (0, 10) for g in GOALS]
        (folder / "samples.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
        probe = {"condition": "none", "low": 1, "high": 10, "n": 5}
        lines = [
            probe | {"step": step, "role": role, "change_nats": -step / 10}
            for step in (0, 10)
            for role in ("chosen", "rejected")
        ]
        (folder / "likelihood.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    for output in ("first", "second"):
        done = report(f"{HOSTILE[4:]}={root / 'ra'}", root / "dpo", "--output", root / output)
        assert done.returncode == 0, done.stderr
        assert "wrote" in done.stdout
    return root


def test_the_same_folders_give_the_same_bytes(pages: Path) -> None:
    names = sorted(path.name for path in (pages / "first").iterdir())
    assert "index.html" in names
    assert len(names) >= 10
    for name in names:
        assert (pages / "first" / name).read_bytes() == (pages / "second" / name).read_bytes(), name


def test_no_text_of_a_run_becomes_markup(pages: Path) -> None:
    text = (pages / "first" / "index.html").read_text(encoding="utf-8")
    page = Page(text)
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "img", "iframe", "link", "object", "base", "form"}
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    seen = "".join(page.seen)
    assert seen.count(HOSTILE) >= 4  # prompt, response, config, version
    assert "(100,000 characters in all)" in seen
    assert not re.search("[\0\x1b\u202e\ud800]", text)


def test_the_page_needs_nothing_from_outside(pages: Path) -> None:
    text = (pages / "first" / "index.html").read_text(encoding="utf-8")
    page = Page(text)
    addresses = [
        value or ""
        for _, attributes in page.tags
        for name, value in attributes.items()
        if name in ("src", "href", "xlink:href")
    ]
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids)), "two elements share an id, and one picture would use the other's parts"
    for address in addresses:
        assert (address[1:] in ids) if address.startswith("#") else (pages / "first" / address).is_file(), address
    for reference in re.findall(r"url\(#([^)]+)\)", text):
        assert reference in ids
    assert "@import" not in text
    assert "default-src 'none'" in text
    without_names = re.sub(r'xmlns(:xlink)?="[^"]*"', "", text)
    assert not re.search(r"https?://", without_names)


def test_pictures_take_the_pages_colours_and_are_told_in_words(pages: Path) -> None:
    text = (pages / "first" / "index.html").read_text(encoding="utf-8")
    page = Page(text)
    drawings = re.findall(r"<svg xmlns.*?</svg>", text, re.DOTALL)
    alts = [attributes["aria-label"] or "" for tag, attributes in page.tags if attributes.get("role") == "img"]
    assert len(alts) == len(drawings) > 15
    assert "2 at 1, 5 at 5.5, 8 at 10" in alts[0]
    for drawing in drawings:
        assert not re.findall(r"(?:fill|stroke): #", drawing), "a colour that is the same in light and dark"
        assert "var(--run-" in drawing
    defined = set(re.findall(r"(--[\w-]+):", text))
    assert set(re.findall(r"var\((--[\w-]+)\)", text)) <= defined


def _luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_text_and_lines_have_contrast_in_light_and_dark(pages: Path) -> None:
    text = (pages / "first" / "index.html").read_text(encoding="utf-8")
    themes = [
        dict(re.findall(r"(--[\w-]+): (#[0-9a-f]{6})", block))
        for block in re.findall(r":root \{.*?\}", text, re.DOTALL)
    ]
    assert len(themes) == 2
    for theme in themes:
        for name, colour in theme.items():
            if name in ("--ground", "--raised", "--rule"):
                continue
            for ground in ("--ground", "--raised"):
                light, dark = sorted((_luminance(colour), _luminance(theme[ground])), reverse=True)
                assert (light + 0.05) / (dark + 0.05) >= 4.5, f"{name} on {ground}"


def test_a_run_may_be_called_anything_in_a_picture() -> None:
    pytest.importorskip("matplotlib", reason="the report draws with matplotlib: pip install 'rap-lightning[report]'")
    from rap_lightning.reporting.evaluation import Estimate
    from rap_lightning.reporting.figures import svg
    from rap_lightning.reporting.panels import Panel, Series

    series = [Series(0, [0], [Estimate(0.5)], what="#0000ff $x_1$<b>")]
    drawn = svg(Panel("t", "x", "y", series, by_run=True), "name", None)
    assert "#0000ff $x_1$&lt;b&gt;" in drawn


def test_twenty_four_runs_have_each_a_look_of_their_own() -> None:
    from rap_lightning.reporting.figures import COLOURS, DASHES, MARKERS

    looks = {
        (COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)], str(DASHES[i // len(COLOURS) % len(DASHES)]))
        for i in range(24)
    }
    without_colour = {(marker, dash) for _, marker, dash in looks}
    assert len(looks) == len(without_colour) == 24


def test_a_report_is_replaced_only_when_asked_and_nothing_else_is(pages: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    shutil.copytree(pages / "first", output)
    done = report(pages / "dpo", "--output", output)
    assert done.returncode == 2
    assert "--overwrite" in done.stderr
    assert (output / "index.html").read_bytes() == (pages / "first" / "index.html").read_bytes()
    done = report(pages / "nowhere", "--output", output, "--overwrite")
    assert done.returncode == 2
    assert (output / "index.html").read_bytes() == (pages / "first" / "index.html").read_bytes()
    done = report(pages / "dpo", "--output", output, "--overwrite")
    assert done.returncode == 0, done.stderr
    assert "1 run<" in (output / "index.html").read_text(encoding="utf-8")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    (output / "mine.txt").write_text("keep", encoding="utf-8")
    done = report(pages / "dpo", "--output", output, "--overwrite")
    assert done.returncode == 2
    assert (output / "mine.txt").exists()


def test_without_matplotlib_it_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "matplotlib").mkdir()
    (tmp_path / "matplotlib" / "__init__.py").write_text("raise ImportError('none')", encoding="utf-8")
    command = [sys.executable, "-m", "rap_lightning.cli.main", "report", "x", "--output", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": str(tmp_path)}, timeout=60)
    assert done.returncode == 2
    assert "pip install 'rap-lightning[report]'" in done.stderr


PROBE = """<!doctype html><iframe src="first/index.html" width="{width}" height="800"></iframe>
<pre id="found"></pre>
<script>
onload = () => {{
  const page = document.querySelector("iframe").contentDocument, root = page.documentElement;
  const wide = [...page.querySelectorAll("body *")].filter(
    e => !e.closest(".scroll") && !e.closest("svg") && e.getBoundingClientRect().right > {width} + 1);
  const style = frames[0].getComputedStyle(page.body);
  document.getElementById("found").textContent = JSON.stringify({{
    scrolls: root.scrollWidth, wide: wide.map(e => e.tagName), ground: style.backgroundColor, ink: style.color}});
}};
</script>"""


@pytest.mark.slow
@pytest.mark.parametrize(("width", "scheme"), [(375, "light"), (375, "dark"), (1280, "light")])
def test_a_browser_shows_the_page_at_a_phones_width_in_light_and_dark(pages: Path, width: int, scheme: str) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium here: the page was not looked at in a browser")
    probe = pages / f"probe-{width}-{scheme}.html"
    probe.write_text(PROBE.format(width=width), encoding="utf-8")
    shown = subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width + 100},900",
         "--enable-logging=stderr", "--allow-file-access-from-files", f"--user-data-dir={pages / 'profile'}",
         f"--blink-settings=preferredColorScheme={0 if scheme == 'dark' else 1}", "--virtual-time-budget=5000",
         "--dump-dom", probe.as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    found = re.search(r'<pre id="found">(.+?)</pre>', shown.stdout)
    assert found is not None, shown.stderr[-2000:]
    seen = json.loads(found[1])
    assert seen["scrolls"] <= width, f"wider than the screen: {seen['wide']}"
    assert seen["wide"] == []
    assert seen["ground"] == ("rgb(18, 22, 28)" if scheme == "dark" else "rgb(255, 255, 255)")
    assert "CONSOLE" not in shown.stderr


# --- what a loss says of itself, and validation that never came ------------------------------------------------------


def training_part(folder: Path) -> Any:
    return next(part for part in all_parts(read_runs([str(folder)])) if part.name == "training")


def test_terms_of_the_loss_have_panels_by_half_and_only_where_there_are_any(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    assert [picture.title for picture in training_part(folder).pictures] == ["Loss", "Margin", "Accuracy"]
    lines = (folder / "metrics.csv").read_text().splitlines()
    names = [f"{p}loss/{term}{half}" for p in ("", "val/") for term in ("SFT", "DPO-2") for half in
             ("", "/chosen-goal", "/rejected-goal")]  # fmt: skip
    values = [str(i / 10) for i in range(len(names))]
    lines[0] += "," + ",".join(names)
    lines[1:] = [f"{line},{','.join(values)}" for line in lines[1:]]
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n")
    terms = training_part(folder).pictures[1]
    assert terms.title == "Parts of the loss"
    found = {panel.title: {one.what: one.points[0][1].value for one in panel.series} for panel in terms.panels}
    told = {"chosen": "chosen-goal half: asked for the better score",
            "rejected": "rejected-goal half: asked for the worse score"}  # fmt: skip
    at = dict(zip(names, map(float, values), strict=True))
    assert found == {
        f"{term}, {told[half]}": {
            "training": at[f"loss/{term}/{half}-goal"], "validation": at[f"val/loss/{term}/{half}-goal"]
        }
        for term in ("DPO-2", "SFT") for half in ("chosen", "rejected")
    }  # fmt: skip


def test_a_mixture_is_told_on_one_line(tmp_path: Path) -> None:
    shown = str(Mixture([DPO(0.5), SFT()], [1.0, 0.2]))
    assert "\n" in shown
    run = make_run(tmp_path / "run", facts={"loss": {"shown": shown}})
    assert describe(*read_runs([str(run)])) == f"Mixture({DPO(0.5)}, {SFT()}, weights=[1.0, 0.2])"


def test_terms_of_plain_pairs_have_a_panel_each(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", relabel="none")
    lines = (folder / "metrics.csv").read_text().splitlines()
    lines[1:] = [f"{line},0.25" for line in lines[1:]]
    (folder / "metrics.csv").write_text("\n".join([f"{lines[0]},loss/of/mine", *lines[1:]]) + "\n")
    assert [panel.title for panel in training_part(folder).pictures[1].panels] == ["of/mine"]


def test_no_split_validation_turned_off_and_validation_not_yet_due_are_told_apart(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", stopped=None)
    (folder / "metrics.csv").write_text("step,loss\n1,0.7\n8,0.6\n")

    def told() -> tuple[str, str]:
        ((_, why, how),) = training_part(folder).pictures[0].missing
        return why, how

    assert "fit validates where the data have a test or validation split" in told()[0]
    data = json.loads((folder / "data_report.json").read_text())
    held_out = data[0] | {"split": "test"}
    (folder / "data_report.json").write_text(json.dumps([*data, held_out]))
    why, how = told()
    assert "its data have the split test, and it ended at step 20, before the first validation was due" in why
    assert "--trainer.val_check_interval" in how
    record = json.loads((folder / "run.json").read_text()) | {"finished": None}
    record["facts"]["step"] = 8
    (folder / "run.json").write_text(json.dumps(record))
    assert "its last known step is 8, before" in told()[0]
    (folder / "run.json").write_text(json.dumps(record | {"stopped": {"step": 8, "by": "Ctrl-C"}}))
    assert "it was stopped at step 8, before" in told()[0]
    (folder / "config.yaml").write_text(yaml.safe_dump({"trainer": {"limit_val_batches": 0.0}}))
    assert "--trainer.limit_val_batches 0 turned it off" in told()[0]
    (folder / "config.yaml").write_text("{}")
    (folder / "data_report.json").write_text(json.dumps([*data, held_out | {"relabelled_pairs": 0}]))
    assert "fit validates where" in told()[0], "a split of which nothing was left can't be validated on"
