"""The report: its figures are the files' figures, broken files are read as far as they go, and text stays text."""

from __future__ import annotations

import base64
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

from conftest import call
from rap_lightning.errors import ConfigError, DataError
from rap_lightning.evaluation import Figure
from rap_lightning.losses import DPO, SFT, Mixture
from rap_lightning.preferences.relabelling import ORIGINS
from rap_lightning.reporting.charts import COLOURS, DASHES, MARKERS, Chart, Line, draw, shared_limits
from rap_lightning.reporting.config_differences import differences
from rap_lightning.reporting.curves import read_curves, thinned
from rap_lightning.reporting.evaluation_file import read_evaluation
from rap_lightning.reporting.page import write
from rap_lightning.reporting.read_runs import Run, read_runs
from rap_lightning.reporting.sections import ORIGIN_TITLES, Section, all_sections
from rap_lightning.reporting.tables import cost_rows, data_rows, describe, headline, missing, notes, samples
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


def read(*folders: object) -> list[Run]:
    return read_runs([str(folder) for folder in folders])


def sections(*folders: object) -> dict[str, Section]:
    return {section.name: section for section in all_sections(read(*folders))}


def cells(*folders: object) -> list[dict[str, str]]:
    """The headline table: a dict per run."""
    head, rows = headline(read(*folders))
    return [dict(zip(head, (cell.replace("\u00a0", " ") for cell in row), strict=True)) for row in rows]


def told(*folders: object) -> str:
    return "\n".join(notes(read(*folders)))


def lacking(*folders: object) -> dict[str, str]:
    runs = read(*folders)
    return dict(missing(runs, all_sections(runs)))


def values(line: Line) -> list[float | None]:
    return [figure.value for figure in line.y]


def write_evaluation(run: Path, content: object) -> None:
    (run / "evaluation").mkdir(exist_ok=True)
    (run / "evaluation" / "evaluation.json").write_text(json.dumps(content), encoding="utf-8")


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
    assert curves.values == {
        "loss": [(1, 0.7), (2, 0.5)],
        "lr": [(1, 1), (2, 1), (3, 1)],
        "val/loss": [(2, 0.65)],
    }  # the later value of step 2
    assert curves.not_finite == {"loss": 3}
    assert (curves.broken, curves.last_step) == (1, 3)  # the last line was cut off


@pytest.mark.parametrize("content", [b"", b"\0\0\0", b"loss\n1\n", b"step,loss\n", b'step,loss\n"1,2', b"\xff\xfe"])
def test_a_metrics_file_of_anything_gives_no_curves_and_no_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "metrics.csv").write_bytes(content)
    (run,) = read_runs([str(tmp_path)])
    assert run.curves is not None
    assert run.curves.values == {}
    assert any("no values" in note for note in run.notes)


def test_every_cut_of_a_run_folder_is_read(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", [3.0, 5.0, 8.0])
    files = [path for path in folder.rglob("*") if path.is_file()]
    for path in files:
        content = path.read_bytes()
        for end in range(0, len(content), max(1, len(content) // 12)):
            path.write_bytes(content[:end])
            run = read_runs([str(folder)])[0]
            all_sections([run])
            assert path.name not in ("run.json", "data_report.json", "goal.json") or any(
                path.name in note for note in run.notes
            ), f"{path.name} cut at {end} was read without a note"
        path.write_bytes(content)


def test_long_curves_are_thinned_to_means() -> None:
    steps, values = thinned([(i, float(i % 2)) for i in range(1, 1001)])
    assert len(steps) <= 240
    assert steps[-1] == 1000
    assert sum(values) / len(values) == pytest.approx(0.5, abs=0.05)


def test_folders_that_are_no_runs_are_refused_with_a_hint(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "runs" / "version_0")
    (folder / "hf").mkdir()
    with pytest.raises(DataError, match=r"is not a run directory.*Did you mean .*version_0\?"):
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


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "not valid JSON"),
        ('{"version": 1', "not valid JSON"),
        ("{}", "version None"),
        ("[1, 2]", "version None"),
        ('{"version": 7}', "version 7"),
    ],
)
def test_an_evaluation_that_can_not_be_used_is_left_out_with_a_note(tmp_path: Path, content: str, said: str) -> None:
    path = tmp_path / "evaluation.json"
    path.write_text(content, encoding="utf-8")
    found = read_evaluation(path)
    assert found.document == {}
    assert said in found.notes[0]


@pytest.mark.parametrize(
    "part",
    [
        {"length": {"tokens": []}}, {"length": {"tokens": [None, None, None]}}, {"discrimination": []},
        {"samples": 3}, {"goals": "x"}, {"controllability": {"sampled": {"mean": 3, "argmax": None}}},
        {"unlearning": {"bins": [1], "conditions": {}}}, {"unlearning": {"bins": [[1, "x"]], "conditions": []}},
        {"scale": [1, 10]}, {"left_out": "x"}, {"without_goal": 3}, {"guidance": "x"},
    ],
)  # fmt: skip
def test_a_part_of_an_evaluation_that_is_malformed_is_not_shown(tmp_path: Path, part: dict[str, Any]) -> None:
    run = make_run(tmp_path / "run")
    write_evaluation(run, evaluation([2.0, 5.0, 8.0]) | part)
    shown = sections(run)
    assert shown["steering"].charts or "goals" in part or "controllability" in part
    assert not any(chart.title == "length" for chart in shown["length"].charts) or "length" not in part
    cells(run)
    lacking(run)


def test_a_figure_without_a_value_keeps_its_reason(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    nothing = [{"value": None, "why": "no prompt of training"} for _ in GOALS]
    document = evaluation([2.0, 5.0, 8.0], extrapolation={"best_seen": nothing}, left_out={"unlearning": "no base"})
    del document["unlearning"]
    document["discrimination"] = {
        "spearman": None,
        "pair_accuracy": {"value": None, "why": "no pairs"},
        "why": "one goal",
    }
    write_evaluation(run, document)
    shown = sections(run)
    assert not shown["extrapolation"].charts
    assert "Responses as good as the best of the data: no evaluation has figures for it." in lacking(run)
    assert "Responses as good as the best of the data, best seen: no prompt of training." in lacking(run)
    assert shown["discrimination"].tables[0][1] == [["run", "– (one goal)", "– (no pairs)"]]
    assert "unlearning was not measured: no base" in told(run)


# --- figures ---------------------------------------------------------------------------------------------------------


def test_charts_have_the_figures_of_the_files(tmp_path: Path) -> None:
    shown = sections(make_run(tmp_path / "run", [2.0, 5.0, 8.0]))
    for chart in shown["steering"].charts:
        (line,) = chart.lines
        assert (line.x, values(line), line.y[0].low) == (GOALS, [2, 5, 8], 1.7)
        assert chart.diagonal == (1, 10)
    assert shown["steering"].tables[0][1][0][0] == "run, sampled"
    rejected = next(one for one in shown["unlearning"].charts if one.title == "rejected responses, no goal")
    assert (rejected.lines[0].x, values(rejected.lines[0])) == ([3.0, 7.5], [-1.0, -0.2])
    assert [chart.title for chart in shown["extrapolation"].charts] == ["best seen", "above the 99th percentile"]
    assert [values(chart.lines[0]) for chart in shown["length"].charts] == [[10, 10, 10], [2, 5, 8]]
    assert shown["discrimination"].tables[0][1][0][1].replace("\u00a0", " ") == "0.5 (0.4 to 0.6)"


def test_a_sentence_gives_first_and_last_value_and_a_table_all() -> None:
    lines = [Line(i, [1, 5, 10], [Figure(i), Figure(None, why="none"), Figure(i + 0.5, i, i + 1.0)]) for i in range(6)]
    chart = Chart("t", "goal", "mean score", lines)
    said = chart.sentence(list("abcdef"))
    assert said.startswith(
        "Mean score goes from 0 at goal 1 to 0.5 at goal 10 in a, and goes from 1 at goal 1 to 1.5 at"
    )
    assert said.endswith("in d; 2 more are in the table.")
    head, rows = chart.table(list("abcdef"))
    assert head == ["goal", *"abcdef"]
    assert [row[:2] for row in rows] == [["1", "0"], ["10", "0.5 (0\u00a0to\u00a01)"]]


def test_the_headline_has_scores_and_steering_of_each_run(tmp_path: Path) -> None:
    ra, dpo = make_run(tmp_path / "ra", [2.0, 5.0, 8.0]), make_run(tmp_path / "dpo", relabel="none")
    first, second = cells(ra, dpo)
    assert first["score at the best goal"] == "8 (7.7 to 8.3) at goal 10"
    assert (first["Spearman"], first["slope"]) == ("0.6 (0.5 to 0.7)", "0.667 (0.567 to 0.767)")
    assert (first["steps"], first["held-out accuracy"]) == ("20", "60%")
    assert first["method"] == "DPO(beta=0.5), pairs at both goals, from base"
    assert second["score at the best goal"] == "not evaluated"
    assert "different kinds of held-out pairs" in told(ra, dpo)
    assert "variation between seeds" in told(ra, dpo)


def test_runs_are_compared_prompt_by_prompt(tmp_path: Path) -> None:
    ahead, behind = make_run(tmp_path / "a", [5.0, 5.0, 5.6]), make_run(tmp_path / "b", [5.0, 5.0, 5.5])
    assert cells(behind, ahead)[1]["difference from b"] == "– (fewer than two prompts in common)"

    def write_samples(folder: Path, scores: list[float]) -> None:
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
    write_samples(behind, noise)
    write_samples(ahead, [value + 0.1 + 0.01 * (i % 3) for i, value in enumerate(noise)])
    first, second = cells(behind, ahead)
    assert first["difference from b"] == "–"
    assert re.fullmatch(r"0.11 \(0.10\d* to 0.11\d*\), 40 prompts", second["difference from b"])
    assert re.fullmatch(r"-0.11 \(-0.11\d* to -0.10\d*\), 40 prompts", cells(ahead, behind)[1]["difference from a"])
    write_evaluation(ahead, evaluation([5.0, 5.0, 5.6], judge="another"))
    assert cells(behind, ahead)[1]["difference from b"] == "–"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"judge": "another"}, "judge: a.rule (one) and another (two)"),
        ({"scale": {"low": 0, "high": 100}}, "scale: (1.0, 10.0) (one) and (0.0, 100.0) (two)"),
        ({"temperature": 0.7}, "temperature: 1.0 (one) and 0.7 (two)"),
        (
            {"guidance": {"weight": 0.5, "against": "1", "plausibility": 0.1}},
            "guidance: none (one) and guidance 0.5 against 1, floor 0.1 (two)",
        ),
        ({"seed": 3}, "seed: 0 (one) and 3 (two)"),
        ({"goals": [1, 5, 9]}, "best goal: 10.0 (one) and 9.0 (two)"),
    ],
)
def test_evaluations_with_other_settings_are_not_compared(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    one, two = make_run(tmp_path / "one", [2.0, 5.0, 8.0]), make_run(tmp_path / "two")
    write_evaluation(two, evaluation([2.0, 5.0, 5.0], **changes))
    assert f"The evaluations differ in {said}. Their scores are not compared." in told(one, two)
    assert cells(one, two)[1]["difference from one"] == "–"


def test_an_evaluation_folder_alone_is_a_run(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "evaluation.json").write_text(json.dumps(evaluation([5.0, 5.1, 5.0], model="hub/base")), encoding="utf-8")
    run = make_run(tmp_path / "run")
    write_evaluation(run, evaluation([2.0, 5.0, 9.0], base="hub/base"))
    assert f"--model hub/base --goal_from {run / 'hf'}" in told(run)
    assert "base model" not in told(run, base)
    assert cells(run, base)[1]["score at the best goal"] == "5 (4.7 to 5.3) at goal 10"


def test_scores_without_a_goal_are_level_lines(tmp_path: Path) -> None:
    ra, plain = make_run(tmp_path / "ra"), make_run(tmp_path / "plain")
    apart = {"controllability": {"sampled": {"mean": figure(7.0)}, "greedy": {"mean": None}}}
    document = evaluation([2.0, 5.0, 8.0], without_goal=apart)
    document["samples"].append({"prompt": "List fruits.", "goal": None, "response": "unasked", "score": 7, "tokens": 1})
    write_evaluation(ra, document)
    never: dict[str, Any] = {"spearman": None, "slope": None, "argmax": None, "mean": []}
    write_evaluation(plain, document | {"goals": [], "controllability": {"sampled": never}})
    chart = sections(ra, plain)["steering"].charts[0]
    levels = [(line.run, line.x, values(line)) for line in chart.lines if line.style == "level"]
    assert levels == [(0, (1, 10), [7, 7]), (1, (1, 10), [7, 7])]
    assert [row["score at the best goal"] for row in cells(ra, plain)] == ["8 (7.7 to 8.3) at goal 10",
                                                                        "7 (6.7 to 7.3) at no goal"]  # fmt: skip
    assert [goal for goal, _ in samples(read(ra))[0][0].goals] == ["no goal", "goal 1", "goal 5.5", "goal 10"]


def test_scores_on_different_scales_never_share_axes(tmp_path: Path) -> None:
    one, two = make_run(tmp_path / "one", [2.0, 5.0, 8.0]), make_run(tmp_path / "two")
    write_evaluation(two, evaluation([20.0, 50.0, 80.0], scale={"low": 0, "high": 100}, goals=[0, 50, 100]))
    charts = sections(one, two)["steering"].charts
    assert [chart.runs for chart in charts] == [[0], [1], [0], [1]]
    assert [chart.diagonal for chart in charts[:2]] == [(1, 10), (0, 100)]
    assert charts[1].title == "sampled, scale 0 to 100"


def test_without_an_evaluation_the_command_is_given(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "ra")
    shown = sections(folder)
    assert [name for name, section in shown.items() if not section.empty] == ["training"]
    command = lacking(folder)["ra has not been evaluated."]
    assert command.startswith(f"rap-lightning evaluate --model {folder}/hf --source data/pairs --judge RewardModel")
    assert any("callbacks.GoalSamples" in command for command in lacking(folder).values())
    lines = (folder / "metrics.csv").read_text().splitlines()
    extended = [f"{lines[0]},steering/goal-1,steering/goal-10", *(f"{line},2.5,6.5" for line in lines[1:])]
    (folder / "metrics.csv").write_text("\n".join(extended) + "\n")
    (chart,) = sections(folder)["steering"].charts
    assert (chart.lines[0].x, values(chart.lines[0])) == ([1, 10], [2.5, 6.5])


def test_curves_are_split_by_origin(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / mode, relabel=mode) for mode in ("both", "none", "chosen")]
    loss = sections(*folders)["training"].rows[0]
    shown = {chart.title: chart.runs for chart in loss}
    assert shown == {"loss, chosen-goal pairs": [0, 2], "loss, rejected-goal pairs": [0], "loss, plain pairs": [1]}
    lines = [(line.label, line.style, len(line.x)) for line in loss[0].lines if line.run == 0]
    assert lines == [("training", "thin", 20), ("validation", "marked", 2)]
    assert len({chart.limits for chart in loss}) == 1


def test_without_validation_the_training_curve_is_marked(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    text = (folder / "metrics.csv").read_text(encoding="utf-8").splitlines()
    (folder / "metrics.csv").write_text("\n".join(line for line in text if ",," not in line[:6]), encoding="utf-8")
    loss = sections(folder)["training"].charts[0]
    assert [(line.label, line.style) for line in loss.lines] == [("training", "marked")]
    assert any("run has no validation metrics" in what for what in lacking(folder))


def test_terms_of_the_loss_have_charts_by_origin(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    assert len(sections(folder)["training"].rows) == 3
    lines = (folder / "metrics.csv").read_text().splitlines()
    names = [f"{p}loss/{term}{half}" for p in ("", "val/") for term in ("SFT", "DPO-2") for half in
             ("", "/chosen-goal", "/rejected-goal")]  # fmt: skip
    column = dict(zip(names, (i / 10 for i in range(len(names))), strict=True))
    lines[0] += "," + ",".join(names)
    lines[1:] = [f"{line},{','.join(map(str, column.values()))}" for line in lines[1:]]
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n")
    found = {
        chart.title: [values(line)[0] for line in chart.lines]
        for row in sections(folder)["training"].rows[1:3]
        for chart in row
    }
    assert found == {
        f"loss term {term}, {half}-goal pairs": [column[f"{p}loss/{term}/{half}-goal"] for p in ("", "val/")]
        for term in ("DPO-2", "SFT") for half in ("chosen", "rejected")
    }  # fmt: skip


def test_a_spike_of_a_curve_does_not_flatten_the_others() -> None:
    dense = Line(0, range(300), [Figure(1000.0 if i == 7 else i / 300) for i in range(300)], style="thin")
    limits = shared_limits([dense])
    assert limits is not None
    assert limits[1] < 2


def test_a_killed_run_and_not_finite_losses_are_noted(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", finished=None)
    text = (folder / "metrics.csv").read_text(encoding="utf-8") + "21,nan,nan"
    (folder / "metrics.csv").write_text(
        re.sub(r"^7,100,[^,]*", "7,100,nan", text, flags=re.MULTILINE), encoding="utf-8"
    )
    said = told(folder)
    assert "has not finished" in said
    assert "the last known step is 20" in said
    assert "1 line of metrics.csv" in said
    assert "loss is nan or infinite from step 7" in said
    (run,) = read(folder)
    assert run.seconds is None
    assert run.curves is not None
    assert 7 not in dict(run.curves.values["loss"])


def test_samples_are_the_first_of_each_goal_side_by_side(tmp_path: Path) -> None:
    one, two = make_run(tmp_path / "one", [2.0, 5.0, 8.0]), make_run(tmp_path / "two")
    lines = [{"step": s, "goal": g, "prompt": "List fruits.", "response": f"step {s}", "score": s + g, "tokens": 3}
             for s in (0, 10) for g in (1, 10)]  # fmt: skip
    (two / "samples.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 10, "go', encoding="utf-8")
    runs = read(one, two)
    assert any("samples.jsonl" in note for note in runs[1].notes)
    (shown,), prompts = samples(runs)
    assert prompts == 1
    assert [goal for goal, _ in shown.goals] == ["goal 1", "goal 5.5", "goal 10"]
    assert shown.goals[0][1] == [(0, "at 1", "score 5, 3 tokens"), (1, "step 10", "score 11, 3 tokens")]
    assert shown.goals[1][1][1] is None
    during = sections(one, two)["steering"].rows[1][0]
    assert [(line.label, line.x, values(line)) for line in during.lines] == [
        ("goal 10", [0, 10], [10, 20]), ("goal 1", [0, 10], [1, 11])
    ]  # fmt: skip


def test_data_and_cost_have_counts_and_units(tmp_path: Path) -> None:
    runs = read(make_run(tmp_path / "one"), make_run(tmp_path / "two", [2.0, 5.0, 8.0]))
    assert data_rows(runs)[1][1] == ["two", "train", "2,000", "1,821", "3,642", "179 dropped: a tie"]
    head, rows = cost_rows(runs)
    assert dict(zip(head, rows[1], strict=True)) == {
        "run": "two", "wall time of fit": "2 min 5 s", "pairs/s (median)": "100", "peak process memory": "1.5 GiB",
        "devices": "cpu", "evaluation": "12 s",
    }  # fmt: skip


def test_a_mixture_is_described_on_one_line(tmp_path: Path) -> None:
    shown = str(Mixture([DPO(0.5), SFT()], [1.0, 0.2]))
    assert "\n" in shown
    run = make_run(tmp_path / "run", facts={"loss": {"shown": shown}})
    assert describe(*read(run)) == f"Mixture({DPO(0.5)}, {SFT()}, weights=[1.0, 0.2])"


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
    told = {note.partition(" can't")[0] for note in read_runs([str(run)])[0].notes if "jsonl" in note}
    assert told == {"2 lines of samples.jsonl", "1 line of likelihood.jsonl", "2 lines of evaluation/samples.jsonl"}


def test_an_evaluation_alone_has_no_samples_of_fit_to_miss(tmp_path: Path) -> None:
    whole = make_run(tmp_path / "run", [2.0, 5.0, 8.0])
    alone = (whole / "evaluation").rename(tmp_path / "alone")
    (alone / "samples.jsonl").write_text('{"prompt_id": "p", "goal": 1, "score": 3, "greedy": false}\n')
    (run,) = read_runs([str(alone)])
    assert run.evaluation is not None
    assert run.evaluation.scores == {1.0: {"p": 3.0}}
    assert not [note for note in run.notes if "jsonl" in note]


def test_numbers_and_texts_are_as_people_read_them() -> None:
    values = (0.0, -0.0, 6.754, 1234.5, 0.05, 0.00123, -2.0, None, float("nan"))
    assert [number(value) for value in values] == ["0", "0", "6.75", "1,234", "0.05", "0.00123", "-2", "–", "–"]
    assert clean("a\0b\u202ec") == "a\ufffdb\ufffdc"
    assert clean("x" * 1000, 10) == "xxxxxxxxxx … (1,000 characters in all)"


# --- the page --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of two evaluated runs full of hostile text, and a small run."""
    pytest.importorskip("matplotlib", reason="the report needs matplotlib: pip install 'rap-lightning[report]'")
    root = tmp_path_factory.mktemp("pages")
    for i, (name, relabel) in enumerate((("ra", "both"), ("dpo", "none"))):
        folder = make_run(root / name, [2.0 + i, 5.0, 8.0 - i], relabel, python=HOSTILE)
        texts = [HOSTILE, "x" * 100_000, "\u202eمرحبا \0\x1b[31m \ud800"]
        found = [
            {"prompt": HOSTILE, "goal": g, "response": t, "score": 5, "tokens": 3}
            for g, t in zip(GOALS, texts, strict=True)
        ]
        write_evaluation(folder, evaluation([2.0 + i, 5.0, 8.0 - i], samples=found))
        (folder / "config.yaml").write_text(yaml.safe_dump({HOSTILE: {"key": HOSTILE + str(i)}}), encoding="utf-8")
        sample = {"prompt": "p", "response": "r", "tokens": 1}
        lines = [sample | {"step": step, "goal": g, "score": g * step / 10} for step in (0, 10) for g in GOALS]
        (folder / "samples.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
        probe = {"condition": "none", "low": 1, "high": 10, "n": 5, "role": "rejected"}
        lines = [probe | {"step": step, "change_nats": -step / 10} for step in (0, 10)]
        (folder / "likelihood.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    (root / "first").mkdir()
    write(read_runs([f"{HOSTILE[4:]}={root / 'ra'}", str(root / "dpo")]), root / "first")
    (root / "small").mkdir()
    whole = evaluation([2.0, 5.0, 8.0])
    few = {key: whole[key] for key in ("version", "goals", "scale", "controllability", "samples")}
    (root / "small" / "evaluation.json").write_text(json.dumps(few), encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def text(pages: Path) -> str:
    return (pages / "first" / "index.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(text: str) -> Page:
    return Page(text)


def test_the_same_folders_give_the_same_bytes(pages: Path, tmp_path: Path) -> None:
    written = []
    for output in ("one", "two"):
        (tmp_path / output).mkdir()
        files = write(read(pages / "small"), tmp_path / output)
        written.append({path.name: path.read_bytes() for path in files})
    assert set(written[0]) == {"index.html", "steering-1.png", "steering-2.png"}
    assert written[0] == written[1]


def test_no_text_of_a_run_becomes_markup(text: str, page: Page) -> None:
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "iframe", "link", "object", "base", "form"}
    assert all(
        (attributes["src"] or "").startswith("data:image/svg+xml") for tag, attributes in page.tags if tag == "img"
    )
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    seen = "".join(page.seen)
    assert seen.count(HOSTILE) >= 4  # prompt, response, config, version
    assert "(100,000 characters in all)" in seen
    assert not re.search("[\0\x1b\u202e\ud800]", text)


def test_the_page_needs_nothing_from_outside(pages: Path, text: str, page: Page) -> None:
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for address in [attributes["href"] or "" for _, attributes in page.tags if "href" in attributes]:
        assert (address[1:] in ids) if address.startswith("#") else (pages / "first" / address).is_file(), address
    assert "@import" not in text
    assert "default-src 'none'" in text
    assert not re.search(r"https?://", text)


def drawings(page: Page) -> list[str]:
    sources = [attributes["src"] or "" for tag, attributes in page.tags if tag == "img"]
    return [base64.b64decode(source.partition("base64,")[2]).decode() for source in sources]


def test_pictures_can_be_read_in_light_and_dark_and_have_alternative_texts(page: Page) -> None:
    found = drawings(page)
    assert len(found) > 15
    alts = [attributes["alt"] or "" for tag, attributes in page.tags if tag == "img"]
    assert alts[0] == f"Line chart of mean score against goal, sampled: {HOSTILE[4:]} and dpo"
    assert len(set(alts)) == len(alts) == sum(tag == "figcaption" for tag, _ in page.tags)
    neutral = {"#808080", "#000000", "#e8ecf1"}  # black becomes #e8ecf1 in the dark
    for drawing in found:
        assert "prefers-color-scheme: dark" in drawing
        assert set(re.findall(r"(?:fill|stroke): (#[0-9a-f]+)", drawing)) <= neutral | set(COLOURS)
        assert not re.search(r"fill: #0{6}", drawing), "black text would stay black in the dark"


def _luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    light, dark = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_text_and_lines_have_contrast_in_light_and_dark(text: str) -> None:
    themes = [
        dict(re.findall(r"(--[\w-]+): (#[0-9a-f]{6})", block))
        for block in re.findall(r":root \{.*?\}", text, re.DOTALL)
    ]
    assert len(themes) == 2
    for theme in themes:
        for name in ("--ink", "--quiet", "--accent"):
            for ground in ("--ground", "--raised"):
                assert contrast(theme[name], theme[ground]) >= 4.5, f"{name} on {ground}"
        for colour in COLOURS:
            assert contrast(colour, theme["--ground"]) >= 3, colour


def test_a_run_may_be_called_anything_in_a_picture() -> None:
    pytest.importorskip("matplotlib", reason="the report needs matplotlib: pip install 'rap-lightning[report]'")
    names = ["_#0000ff $x_1$<b>", "مرحبا"]
    drawn, png = draw(Chart("t", "x", "y", [Line(i, [0, 1], [Figure(0.5)] * 2) for i in (0, 1)]), names, "s")
    assert "_#0000ff $x_1$&lt;b&gt;" in drawn
    assert png.startswith(b"\x89PNG")


def test_twenty_four_runs_each_look_different_also_without_colour() -> None:
    looks = {(MARKERS[i % len(MARKERS)], str(DASHES[i // len(COLOURS) % len(DASHES)])) for i in range(24)}
    assert len(looks) == 24


# --- the command -----------------------------------------------------------------------------------------------------


def test_a_report_is_replaced_only_when_asked_and_nothing_else_is(
    pages: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    shutil.copytree(pages / "first", output)
    assert call(monkeypatch, "report", pages / "small", "--output", output) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert call(monkeypatch, "report", pages / "nowhere", "--output", output, "--overwrite") == 2
    assert (output / "index.html").read_text(encoding="utf-8") == text
    assert call(monkeypatch, "report", pages / "small", "--output", output, "--overwrite") == 0
    assert capsys.readouterr().out.startswith(
        "small: score at the best goal 8 (7.7\u00a0to\u00a08.3) at goal 10\nwrote "
    )
    assert "<h1>Report: small</h1>" in (output / "index.html").read_text(encoding="utf-8")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    (output / "mine.txt").write_text("keep", encoding="utf-8")
    assert call(monkeypatch, "report", pages / "small", "--output", output, "--overwrite") == 2
    assert (output / "mine.txt").exists()


def test_without_matplotlib_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert call(monkeypatch, "report", "x", "--output", tmp_path / "out") == 2
    assert "pip install 'rap-lightning[report]'" in capsys.readouterr().err


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


def test_every_origin_has_a_title_on_the_page() -> None:
    assert tuple(ORIGIN_TITLES) == ORIGINS
