"""What README and docs show is run: each command, each config, each piece of Python.

A block that isn't run says why in a comment on the line above it: ``<!-- not run: REASON -->``. Of the blocks of a
page the commands run in the order of the page, in one folder, with a tiny model in the place of those on the Hub. Other
pages may use the run that README makes.
"""

import ast
import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from conftest import ROOT, call, make_model, make_tokenizer, scored_rows, write_jsonl

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), ROOT / "examples" / "README.md"]
TINY = [
    "--model.policy.lora.r 2", "--trainer.accelerator cpu", "--trainer.max_steps 1", "--data.max_length 160",
    "--data.batch_size 2", "--trainer.enable_progress_bar false", "--trainer.limit_val_batches 1",
]  # fmt: skip
"""What makes a fit of the docs small. A LoRA is asked for where the command itself asks for one."""


class Block(NamedTuple):
    """A fenced block: its page, the line it stands on, its language, its text and why it isn't run."""

    page: Path
    line: int
    language: str
    text: str
    why: str


def blocks(page: Path) -> list[Block]:
    found, lines = [], page.read_text(encoding="utf-8").splitlines() if page.exists() else []
    place = 0
    while place < len(lines):
        if opened := re.fullmatch(r"( *)```(\w*)(.*)", lines[place]):
            end = next(k for k in range(place + 1, len(lines)) if lines[k].strip() == "```")
            above = next((line for line in reversed(lines[:place]) if line.strip()), "")
            why = re.fullmatch(r" *<!-- not run: (.+) -->", above)
            text = "\n".join(lines[place + 1 : end])
            found.append(Block(page, place + 1, opened[2], text, why[1] if why else ""))
            place = end
        place += 1
    return found


ALL = [block for page in PAGES for block in blocks(page)]


def name(block: Block) -> str:
    return f"{block.page.relative_to(ROOT)}:{block.line}"


@pytest.mark.parametrize("block", ALL, ids=name)
def test_every_block_can_be_run_or_says_why_not(block: Block) -> None:
    assert block.why or block.language in ("sh", "python", "yaml", "json"), "mark it, or name its language"


@pytest.mark.parametrize("block", [b for b in ALL if b.language == "yaml" and not b.why], ids=name)
def test_configs_of_the_docs_keep_to_the_schema(block: Block, schema: dict[str, Any]) -> None:
    import jsonschema

    jsonschema.validate(yaml.safe_load(block.text), schema)


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    from rap_lightning.commands.schema import config_schema

    return config_schema()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the docs take for granted: scored pairs, prompts, a model, a reward model."""
    folder = tmp_path_factory.mktemp("docs")
    make_model(folder / "tiny")
    _reward_model(folder / "RM")
    (folder / "my-pairs").mkdir()
    write_jsonl(folder / "my-pairs" / "train.jsonl", scored_rows(12))
    write_jsonl(folder / "my-pairs" / "test.jsonl", scored_rows(4, seed=1))
    write_jsonl(folder / "my-prompts.jsonl", [{"prompt": f"Say {n}."} for n in range(2)])
    return folder


def _reward_model(folder: Path) -> None:
    from transformers import LlamaConfig, LlamaForSequenceClassification

    tokenizer = make_tokenizer("chatml")
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    config = LlamaConfig(vocab_size=len(tokenizer), num_labels=1, num_attention_heads=4, **sizes)
    config.pad_token_id = tokenizer.pad_token_id
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def commands(text: str) -> list[list[str]]:
    """The commands of a shell block, continued lines joined and comments left out."""
    joined = re.sub(r"\\\n", " ", text)
    return [parts for line in joined.splitlines() if (parts := shlex.split(line, comments=True))]


STAND_INS = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": "tiny",
    "MODEL": "tiny",
    "dpo=runs/version_1": "dpo=runs/version_0/evaluation",  # a second run: the first one's evaluation alone
}


def small(args: list[str]) -> list[str]:
    """The same command on a tiny model, and for one step."""
    args = [STAND_INS.get(arg, arg) for arg in args]
    if args[0] == "fit" and "--config" not in args and not any(arg.endswith(".help") for arg in args):
        short = [part for option in TINY[1:] for part in option.split()]
        given = set(args)
        args += [part for key, value in zip(short[::2], short[1::2], strict=True) if key not in given
                 for part in (key, value)]  # fmt: skip
    if any(arg.endswith("/quickstart.yaml") for arg in args):
        args += [
            "--data.train_pairs",
            "40",
            "--data.test_pairs",
            "8",
            "--data.base_steps",
            "5",
            "--trainer.max_steps",
            "1",
        ]
        args += ["--trainer.callbacks", "null"]
    if args[0] in ("generate", "predict", "evaluate"):
        args += ["--max_new_tokens", "8"] if args[0] != "predict" else ["--model.generation.max_new_tokens", "8"]
    return args


READS = {ROOT / page: ROOT / "README.md" for page in ("docs/conditioning.md", "docs/export.md", "docs/report.md")}
"""Pages that use the run which another page makes."""


@pytest.mark.parametrize("page", [page for page in PAGES if page.exists()], ids=lambda p: str(p.relative_to(ROOT)))
def test_commands_and_python_of_a_page_run_in_its_order(
    page: Path, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    _clear(place)
    if page in READS:
        _run_page(READS[page], place, monkeypatch, capsys)
        _clear(place, "runs")
    _run_page(page, place, monkeypatch, capsys)


def _clear(place: Path, *kept: str) -> None:
    for left in set(place.iterdir()) - {place / name for name in ("my-pairs", "my-prompts.jsonl", "tiny", "RM", *kept)}:
        left.unlink() if left.is_file() or left.is_symlink() else shutil.rmtree(left)
    (place / "configs").symlink_to(ROOT / "configs")


def _run_page(
    page: Path, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    for block in blocks(page):
        if block.why:
            continue
        if block.language == "python":
            _run_python(block, place, monkeypatch)
        for command in commands(block.text) if block.language == "sh" else []:
            assert command[0] == "rap-lightning", f"{name(block)}: {command[0]} isn't run; mark the block"
            _run(small(command[1:]), block, monkeypatch, capsys)


def _run(
    args: list[str], block: Block, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    if code := call(monkeypatch, *args):
        pytest.fail(f"{name(block)}: {' '.join(args)} ended with {code}: {capsys.readouterr().err[-1500:]}")


def _run_python(block: Block, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ast.parse(block.text)
    file = re.match(r"# (\w+\.py)\b", block.text)
    if file:  # a file that later commands name
        (place / file[1]).write_text(block.text, encoding="utf-8")
        monkeypatch.syspath_prepend(str(place))
        return
    space: dict[str, Any] = {"__name__": "docs"}
    exec(compile(block.text, name(block), "exec"), space)


def test_the_runner_reads_blocks_as_a_reader_does(tmp_path: Path) -> None:
    page = tmp_path / "p.md"
    page.write_text("a\n\n<!-- not run: it costs money -->\n\n```sh\nx --y \\\n  z  # why\n```\n```json\n{}\n```\n")
    first, second = blocks(page)
    assert (first.why, first.language, second.why) == ("it costs money", "sh", "")
    assert commands(first.text) == [["x", "--y", "z"]]
    assert json.loads(second.text) == {}
