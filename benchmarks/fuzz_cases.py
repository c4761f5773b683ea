"""Mutated model folders, chat templates and data folders, through the package's own functions in one process.

A case follows from its kind and number alone. It is judged by an oracle: the unmutated input gives token ids and
log-probabilities. Right are: the same ones again; one message of at most three lines; rows that are counted; and a
change that only describes another model or other data (another value of the same kind), which nobody could call wrong.
Wrong are: any other exception, a hang, and other numbers without a word.
"""

from __future__ import annotations

import bz2
import copy
import csv
import gzip
import io
import json
import random
import re
import shutil
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file, save_file

from rap_lightning.batches.dataset import Example, PairEncoder, example_of, note_encoding
from rap_lightning.batches.encode import Encoder
from rap_lightning.batches.layouts import LAYOUTS, lay_out
from rap_lightning.batches.sampler import BatchPlan
from rap_lightning.errors import DataError, UserError
from rap_lightning.models.model_checks import check_head, check_sharing
from rap_lightning.models.policy_config import PolicyConfig
from rap_lightning.models.pretrained import refuse_quantised
from rap_lightning.preferences import rendering
from rap_lightning.preferences.data_report import DataReport
from rap_lightning.preferences.goals import OverallGoal
from rap_lightning.preferences.pairs import Pair
from rap_lightning.preferences.read_pairs import read_pairs
from rap_lightning.preferences.relabelling import Relabelling
from rap_lightning.preferences.rules import Rules
from rap_lightning.preferences.sources import Source, splits_of

HANG_S = 60
KINDS = ("model", "template", "data")


class Hang(BaseException):
    """A case took longer than HANG_S."""


@dataclass
class Numbers:
    """What training on an input begins with: ids and text of each training pair, and log-probabilities, in nats."""

    examples: list[Example]
    texts: list[tuple[str, ...]]
    logps: list[float]


@dataclass(frozen=True)
class Found:
    """What became of a case."""

    verdict: str
    mutation: str
    detail: str = ""

    @property
    def wrong(self) -> bool:
        return self.verdict.startswith("wrong")


@contextmanager
def limited(seconds: float = HANG_S) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def read(data: Path) -> tuple[list[Pair], DataReport]:
    """The pairs of a source, as training reads them."""
    source = Source(str(data))
    splits_of(source)
    report = DataReport(str(data), "train")
    rules = Rules(OverallGoal(), Relabelling("both"), tool_turns=True)
    return list(read_pairs(source, "train", rules, report, progress=False)), report


def encoded(config: PolicyConfig, pairs: list[Pair], report: DataReport) -> tuple[list[Example], list[Any]]:
    """The training pairs as token ids, and as text."""
    encoder = Encoder(config.load_tokenizer(), OverallGoal(), 256)
    encode = PairEncoder(encoder, Relabelling("both"))
    rows, examples, texts = encode(pairs), list[Example](), list[Any]()
    kept = note_encoding(rows, report)
    if not any(kept):
        raise DataError("no pair is left to train on")
    for pair, row, good in zip(pairs, rows, kept, strict=True):
        if not good:
            continue
        for place, shown in enumerate(encode.readable(pair)):
            examples.append(example_of(row, place))
            texts.append((examples[-1].goal, *shown))
    return examples, texts


def train(model: Path, pairs: list[Pair], report: DataReport, *, weights: bool = True) -> Numbers:
    """Load a model as fit does, and compute what its first step begins with."""
    config = PolicyConfig(str(model))
    examples, texts = encoded(config, pairs, report)
    logps: list[float] = []
    if weights:
        refuse_quantised(config.load_config(), config.path)
        policy = config.build(torch.float32)
        check_head(policy)
        check_sharing(policy)
        few = examples[:8]
        plan = BatchPlan(tuple(range(len(few))), (1.0,) * len(few), len(few), (tuple(range(len(few))),))
        with torch.no_grad():
            logps = policy.logps(lay_out(LAYOUTS["padded"], few, plan, pad_id=0)).tolist()
    return Numbers(examples, texts, logps)


def judged(mutation: str, call: Callable[[], tuple[str, str]]) -> Found:
    """Call, and turn exceptions into a verdict."""
    try:
        with (
            limited(), warnings.catch_warnings(record=True) as told,
            redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()),
        ):  # fmt: skip
            warnings.simplefilter("always")
            verdict, detail = call()
        ours = [str(one.message) for one in told if "rap_lightning" in one.filename]
        if ours and verdict in ("wrong: silent", "another"):
            return Found("counted", mutation, ours[0])
        return Found(verdict, mutation, detail)
    except UserError as error:
        own = [line for line in str(error).splitlines() if not line.startswith("  ")]  # without the counted report
        if not str(error).strip() or len(own) > 3 or any(len(line) > 1200 for line in own):
            return Found("wrong: a message of no or many lines", mutation, str(error))
        return Found("message", mutation, str(error))
    except Hang:
        return Found("wrong: a hang", mutation)
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        ours = [frame for frame in frames if "rap_lightning" in frame.filename]
        where = ", ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in [*ours[-1:], frames[-1]])
        return Found("wrong: a traceback", mutation, f"{type(error).__name__}: {str(error)[:300]} ({where})")


# -- model folders -----------------------------------------------------------------------------------------------------

WRONG_VALUES: list[Any] = [None, "", "x", -1, 0, 1.5, [], {}, True, [1], "1e-5", 1e300, {"a": 1}]
NAMES = ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json")
DESCRIBES = {
    "rms_norm_eps", "rope_theta", "rope_parameters", "hidden_act", "attention_bias", "mlp_bias", "head_dim",
    "attention_dropout", "initializer_range", "num_attention_heads", "num_key_value_heads", "max_position_embeddings",
}  # fmt: skip
"""Keys of a config for which another valid value is another model, as far as anybody can tell."""
SHAPES_KEPT = re.compile("tensors: (exchanged|transposed)")
"""Other weights under the same names and with the same shapes are another model, too."""


def keys_of(value: Any, path: tuple[Any, ...] = (), most: int = 40) -> list[tuple[Any, ...]]:
    """The paths inside nested values; of long lists and dicts only some."""
    inner = list(value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ())
    step = max(1, len(inner) // most)
    return [p for key, one in inner[::step] for p in [(*path, key), *keys_of(one, (*path, key), most)]]


def mutate_json(path: Path, rng: random.Random) -> tuple[str, tuple[Any, ...]]:
    """Change one key of a JSON file; what was done, and where."""
    whole = json.loads(path.read_text(encoding="utf-8"))
    levels: dict[int, list[Any]] = {}
    for one in keys_of(whole):
        levels.setdefault(len(one), []).append(one)
    place = rng.choice(levels[rng.choice(sorted(levels))])
    inside = whole
    for key in place[:-1]:
        inside = inside[key]
    key, kind = place[-1], rng.choice(("value", "value", "gone", "renamed", "extra", "number"))
    if kind == "renamed" and isinstance(inside, dict):
        inside[f"{key}{rng.choice('s_x')}" if rng.random() < 0.7 else str(key).upper()] = inside.pop(key)
    elif kind == "extra" and isinstance(inside, dict):
        inside[rng.choice(("extra", "eos_token", "auto_map", "torch_dtype", "layers", "_x"))] = rng.choice(WRONG_VALUES)
    elif kind == "number" and isinstance(inside[key], int | float) and not isinstance(inside[key], bool):
        inside[key] = inside[key] * rng.choice((2, 0.5, 3)) if isinstance(inside[key], float) else inside[key] + 1
    elif kind == "gone":
        del inside[key]
    else:
        kind = "value"
        inside[key] = new = rng.choice(WRONG_VALUES)
        kind += f" {new!r}"
    path.write_text(json.dumps(whole), encoding="utf-8")
    return f"{path.name}: {'.'.join(map(str, place))} {kind}", place


def mutate_file(folder: Path, rng: random.Random) -> str:
    """Damage a whole file."""
    path = rng.choice(sorted(p for p in folder.iterdir() if p.is_file()))
    content, kind = path.read_bytes(), rng.choice(("missing", "empty", "cut", "a folder", "another kind", "renamed"))
    path.unlink()
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "cut":
        path.write_bytes(content[: rng.randrange(1, len(content))])
    elif kind == "a folder":
        path.mkdir()
    elif kind == "another kind":
        text = rng.choice((b"[]", b"null", b"1", b'"x"', b"\xff\xfe\x00", b"{}", b"<html></html>", b'{"a": ' * 3000))
        path.write_bytes(text)
        kind += f" {text[:12]!r}"
    elif kind == "renamed":
        path.with_name(rng.choice((f" {path.name}", path.name.upper(), f"{path.name}.bak"))).write_bytes(content)
    return f"{path.name}: {kind}"


def mutate_tensors(folder: Path, rng: random.Random) -> str:
    """Change one or more tensors of a file."""
    path = rng.choice(sorted(folder.glob("*.safetensors")))
    state = load_file(path)
    name = rng.choice(sorted(state))
    kind = rng.choice(
        ("gone", "renamed", "prefixed", "nan", "inf", "cut", "longer", "transposed", "flat", "extra", "integers",
         "empty", "scalar", "half", "bias", "exchanged", "complex", "bool")
    )  # fmt: skip
    value = state[name]
    if kind == "gone":
        del state[name]
    elif kind == "renamed":
        new = rng.choice((name.replace("weight", "weights"), name.replace(".0.", ".9."), f"{name}_orig", name.upper()))
        state[new if new != name else f"{name}.1"] = state.pop(name)
    elif kind == "prefixed":
        prefix = rng.choice(("_orig_mod.", "module.", "base_model.model.", "policy.", "model."))
        state = {f"{prefix}{key}": one for key, one in state.items()}
    elif kind == "extra":
        state[rng.choice(("v_head.weight", "lm_head.bias", f"{name}.lora_A", "model.layers.7.x", "x"))] = torch.ones(3)
    elif kind == "bias":
        state[name.replace("weight", "bias")] = torch.ones(value.shape[0])
    elif kind == "exchanged":
        if not (others := [n for n in sorted(state) if n != name and state[n].shape == value.shape]):
            kind = "gone"
            del state[name]
        else:
            state[name], state[others[0]] = state[others[0]], value
    else:
        bad = value.clone()
        if kind in ("nan", "inf"):
            bad.view(-1)[rng.randrange(bad.numel())] = float(kind)
        state[name] = {
            "cut": lambda: value[:-1], "longer": lambda: torch.cat([value, value[:1]]), "flat": value.flatten,
            "transposed": lambda: value.T if value.dim() == 2 else value[None], "integers": lambda: value.int(),
            "empty": lambda: value[:0], "scalar": lambda: value.reshape(-1)[0], "half": lambda: value.half(),
            "complex": lambda: value.to(torch.complex64), "bool": lambda: value > 0,
        }.get(kind, lambda: bad)()  # fmt: skip
    path.unlink()
    save_file({n: v.clone().contiguous() for n, v in state.items()}, path, {"format": "pt"})
    return f"tensors: {kind}" + ("" if kind == "prefixed" else f" {name}")


def model_case(number: int, work: Path, base: Base) -> Found:
    rng = random.Random(f"model {number}")
    name = rng.choice(sorted(base.models))
    folder = work / rng.choice(("model", "model", "a model", "modèl-№1", "model[1]", "-m", "m.json", "x" * 120))
    shutil.copytree(base.models[name], folder)
    place: tuple[Any, ...] = ()
    what = rng.choice(("json", "json", "json", "file", "tensors", "tensors", "nothing" if number % 7 == 0 else "json"))
    if what == "json":
        mutation, place = mutate_json(folder / rng.choice([n for n in NAMES if (folder / n).exists()]), rng)
    else:
        mutation = {"file": mutate_file, "tensors": mutate_tensors}.get(what, lambda *_: f"named {folder.name[:9]}")(
            folder, rng
        )

    def call() -> tuple[str, str]:
        report = DataReport("rows", "train")
        found, expected = train(folder, base.pairs, report), base.numbers[name]
        same_ids = [(e.prompt_ids, e.chosen_ids, e.rejected_ids) for e in found.examples] == [
            (e.prompt_ids, e.chosen_ids, e.rejected_ids) for e in expected.examples
        ]
        difference = max(abs(a - b) for a, b in zip(found.logps, expected.logps, strict=True)) if same_ids else 0.0
        if same_ids and difference < 1e-4:
            return "right", ""
        if report.dropped or report.repaired:
            return "counted", str(list(report.lines()))
        half = mutation.startswith("tensors: half") and difference < 0.1
        numeric = place and place[0] in DESCRIBES and mutation.startswith("config.json")
        valid = numeric and re.search(r"number$|gone$|value [\d.e+-]+$", mutation)
        if half or (same_ids and valid) or SHAPES_KEPT.search(mutation):
            return "another", f"{difference:.2g} nats"
        if not same_ids and mutation.startswith("tokenizer") and found.texts == expected.texts:
            return "another", "other tokens of the same text"
        if not same_ids and not base.lost(found):
            return "another", "text is whole"
        return "wrong: silent", f"{difference:.3g} nats" if same_ids else f"other ids: {found.texts[0]}"

    return judged(f"{name} {mutation}", call)


# -- chat templates ----------------------------------------------------------------------------------------------------

PIECES = (
    "{{ raise_exception('no') }}", "{{ 1/0 }}", "{{ undefined.x }}", "{% for i in range(99999) %}x{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "{{ 'x' * 10000000 }}",
    "{{ eos_token }}", "{{ bos_token }}", "<|im_end|>", "<|im_start|>system\n", "{% if false %}", "{% endif %}",
    "{{ messages }}", "{{ m['content'] }}", "{{ messages[0]['content'] }}", "{{ messages[-1]['content'] }}", "{%", "}}",
    "{{ m.content | upper }}", "{{ m.content[:5] }}", "{{ namespace() }}", "{{ cycler() }}", "{{ strftime_now('%Y') }}",
    "{{ tools | tojson }}", "{% set messages = messages[1:] %}", "{% set messages = messages[::-1] %}",
    "{% set messages = messages[-1:] %}", "{% set messages = [] %}", "{% set ns = messages.clear() %}",
    "{% break %}", "{% include 'x' %}", "{% extends 'x' %}", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ ''.__class__.__mro__ }}", "\ud7ff\u0000", "{% generation %}", "{% endgeneration %}",
)  # fmt: skip
SWAPS = (
    ("m['content']", "m['text']"), ("m['content']", "m['content'][0]"), ("m['content']", "m.content[1:]"),
    ("m['content']", "m['content'] * 2"), ("m['content']", "m['content'] | upper"), ("m['content']", "m['role']"),
    ("m['content']", "(m['content'] | length)"), ("m['content']", "m['content'].split()[0]"),
    ("m['content']", "m['content'] | replace('e', '')"), ("m['content']", "m['content'] | truncate(9)"),
    ("m['role']", "'user'"), ("m['role']", "'assistant'"), ("m['role']", "'x'"), ("m['role']", "''"),
    ("in messages", "in messages[:1]"), ("in messages", "in messages[1:]"), ("in messages", "in messages[::-1]"),
    ("in messages", "in messages | reverse"), ("in messages", "in messages[-1:]"), ("in messages", "in []"),
    ("in messages", "in messages + messages"), ("in messages", "in messages if m.role != 'assistant'"),
    ("in messages", "in messages if m.role != 'user'"), ("in messages", "in messages if m.role != 'system'"),
    ("in messages", "in messages | sort(attribute='content')"), ("in messages", "in message"),
    ("add_generation_prompt", "not add_generation_prompt"), ("add_generation_prompt", "true"),
    ("add_generation_prompt", "false"), ("add_generation_prompt", "x"), ("<|im_end|>", ""), ("<|im_start|>", ""),
    ("\n", ""), ("assistant", "user"), ("user", "assistant"), ("{% endif %}", ""), ("{% endfor %}", ""),
    ("messages", "message"), ("<|eot_id|>", "<|begin_of_text|>"), ("| trim", "| e"), ("| trim", "| tojson"),
)  # fmt: skip


def template_case(number: int, work: Path, base: Base) -> Found:
    rng = random.Random(f"template {number}")
    family = rng.choice(sorted(base.templates))
    text = base.templates[family]
    done = []
    for _ in range(rng.choice((1, 1, 1, 2))):
        kind = rng.choice(("piece", "swap", "swap", "cut", "doubled"))
        if kind == "piece":
            places = [i for i in range(len(text)) if text.startswith(("{%", "{{"), i)] or [0]
            piece, place = rng.choice(PIECES), rng.choice(places)
            text, kind = text[:place] + piece + text[place:], f"{piece} put in"
        elif kind == "swap":
            if not (able := [swap for swap in SWAPS if swap[0] in text]):
                continue
            old, new = rng.choice(able)
            text, kind = text.replace(old, new, rng.choice((1, -1))), f"{old!r} to {new!r}"
        else:
            a = rng.randrange(len(text))
            b = min(len(text), a + rng.choice((1, 3, 20, 80)))
            text = text[:a] + text[a:b] * (2 if kind == "doubled" else 0) + text[b:]
        done.append(kind)
    folder = work / "tokenizer"
    shutil.copytree(base.tokenizers[family], folder)
    (folder / "chat_template.jinja").write_text(text, encoding="utf-8")

    def call() -> tuple[str, str]:
        report = DataReport("rows", "train")
        found, expected = train(folder, base.pairs, report, weights=False), base.numbers[family]
        if found.examples == expected.examples:
            return "right", ""
        if fault := base.lost(found):
            return "wrong: silent", fault
        if report.dropped or report.repaired:
            return "counted", str(list(report.lines()))
        return "another", "text is whole"

    return judged(f"{family}: {'; '.join(done)}", call)


# -- data folders ------------------------------------------------------------------------------------------------------

CELLS: list[Any] = [
    None, "", " ", "\u200b", "<|im_end|>", "\x00", [], {}, [None], [[]], True, 0, -1, 5, 11, 1e300, float("nan"),
    float("inf"), "7", "7,5", "high", {"role": "user"}, [{"role": "user", "content": "hi"}], [1, 2], "None", "null",
    [{"role": "assistant", "content": None}], [{"content": "x"}], {"content": {"text": {"a": [None]}}}, "[1, 2]",
    [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo", "weight": 0}], [[[[[[None]]]]]],
    [{"role": "USER", "content": "hi"}, {"role": "Assistant", "content": "hello"}], "\ud7ff", "2024-01-01", b"".hex(),
]  # fmt: skip
FILES = (
    "train.jsonl", "train.jsonl", "train.json", "train.parquet", "train.arrow", "train.jsonl.gz", "Train.JSONL",
    "tr ain.jsonl",
    "train-00000-of-00001.parquet", "trän#1.jsonl", "[train].jsonl", "data.jsonl", "train.ndjson", "train.txt", "train",
    "train.csv", "train.jsonl.bz2", "test.jsonl", "validation.jsonl", "train.jsonl~", ".train.jsonl", "json", "*.jsonl",
)  # fmt: skip
NAMES_OF_COLUMNS = (
    "score_chosen", "chosen", "prompt", "messages", "system", "tools", "Chosen", "reward", "margin", "label", "id",
    "weight", "rejected_score", "history", "completions", "split", "source",
)  # fmt: skip


def layouts(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The same pairs in several row formats."""
    scores = [{key: row[key] for key in ("score_chosen", "score_rejected")} for row in rows]
    last = [(row["chosen"][-1]["content"], row["rejected"][-1]["content"]) for row in rows]
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    return {
        "conversations": rows,
        "prompt as messages": [
            {"prompt": row["chosen"][:-1], "chosen": row["chosen"][-1:], "rejected": row["rejected"][-1:], **s}
            for row, s in zip(rows, scores, strict=True)
        ],
        "plain": [
            {"prompt": row["prompt"], "chosen": a, "rejected": b, **s}
            for row, (a, b), s in zip(rows, last, scores, strict=True)
        ],
        "completions": [
            {"prompt": row["prompt"], "completions": [
                {"response": a, "overall_score": s["score_chosen"]},
                {"response": b, "overall_score": s["score_rejected"]}]}
            for row, (a, b), s in zip(rows, last, scores, strict=True)
        ],
        "sharegpt": [
            {"conversations": [{"from": names[t["role"]], "value": t["content"]} for t in row["chosen"][:-1]],
             "chosen": {"from": "gpt", "value": a}, "rejected": {"from": "gpt", "value": b}, **s}
            for row, (a, b), s in zip(rows, last, scores, strict=True)
        ],
    }  # fmt: skip


def mutate_rows(rows: list[dict[str, Any]], rng: random.Random) -> str:
    """Change one place of one row or of all; what was done."""
    place, kind, every = (
        rng.choice(keys_of(rows[0])),
        rng.choice(("cell", "cell", "gone", "renamed", "extra")),
        rng.random() < 0.4,
    )
    value, column, at = copy.deepcopy(rng.choice(CELLS)), rng.choice(NAMES_OF_COLUMNS), rng.randrange(len(rows))
    for number, row in enumerate(rows):
        if not every and number != at:
            continue
        inside: Any = row
        try:
            for key in place[:-1]:
                inside = inside[key]
            if kind == "cell":
                inside[place[-1]]
                inside[place[-1]] = value
            elif kind == "gone":
                del inside[place[-1]]
            elif kind == "renamed":
                inside[f"{place[-1]}s" if column < "m" else column] = inside.pop(place[-1])
            else:
                row[column] = value
        except (KeyError, IndexError, TypeError, AttributeError):
            continue
    where = ".".join(map(str, place)) if kind != "extra" else column
    return f"{where} {kind}{f' {value!r}'[:40] if kind in ('cell', 'extra') else ''}{' in all' if every else ''}"


def write_file(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows in the kind that the file's name says; as JSON lines where Arrow can't hold them."""
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    try:
        if path.suffix in (".parquet", ".arrow"):
            names = list(dict.fromkeys(key for row in rows for key in row))  # of the first row alone, it would be
            table = pa.Table.from_pylist([{name: row.get(name) for name in names} for row in rows])
            if path.suffix == ".parquet":
                pq.write_table(table, path)
            else:
                with pa.ipc.new_stream(str(path), table.schema) as writer:
                    writer.write_table(table)
            return
    except (pa.ArrowException, UnicodeError, OverflowError):
        path.unlink(missing_ok=True)
        path = path.with_suffix(".jsonl")
    if path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, sorted({str(key) for row in rows for key in row}))
            writer.writeheader()
            writer.writerows(
                {str(k): v if isinstance(v, str | int | float) else json.dumps(v) for k, v in r.items()} for r in rows
            )
        return
    content = {".json": json.dumps(rows).encode(), ".gz": gzip.compress(text), ".bz2": bz2.compress(text)}
    path.write_bytes(content.get(path.suffix, text))


def strings(value: Any) -> list[str]:
    """Every text in nested values, JSON in texts included."""
    if isinstance(value, str):
        if value[:1] in "[{":
            with suppress(ValueError, RecursionError):
                return [value, *strings(json.loads(value))]
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [text for one in inner for text in strings(one)]


def numbers(value: Any) -> set[float]:
    """Every number in nested values, those in texts included."""
    if isinstance(value, str):
        with suppress(ValueError, RecursionError):
            return {float(value)}
        with suppress(ValueError, RecursionError):
            return numbers(json.loads(value)) if value[:1] in ("[", "{") else set()
        return set()
    if isinstance(value, int | float):
        return {float(value)}
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return {n for one in inner for n in numbers(one)}


def data_case(number: int, work: Path, base: Base) -> Found:
    rng = random.Random(f"data {number}")
    layout = rng.choice(sorted(base.layouts))
    rows, mutations = copy.deepcopy(base.layouts[layout]), []
    for _ in range(rng.choice((0, 1, 1, 1, 2))):
        mutations.append(mutate_rows(rows, rng))
    folder = work / rng.choice(("data", "data", "parquet", "data [v1]", "dätä", "train", "-d", "da*ta"))
    folder.mkdir()
    path = folder / (rng.choice(FILES) if rng.random() < 0.5 else "train.jsonl")
    write_file(path, rows)
    mutations.append(path.name)
    written = next(folder.iterdir())
    if rng.random() < 0.15:
        content = written.read_bytes()
        a = rng.randrange(len(content))
        kind = rng.choice(("cut", "a hole", "noise", "utf-16", "bom", "doubled"))
        new = {
            "cut": content[:a], "a hole": content[:a] + content[a + rng.choice((1, 9, 200)) :],
            "noise": content[:a] + rng.randbytes(9) + content[a:], "bom": b"\xef\xbb\xbf" + content,
            "utf-16": content.decode("utf-8", "replace").encode("utf-16"), "doubled": content * 2,
        }  # fmt: skip
        written.write_bytes(new[kind])
        mutations.append(kind)
        rows = None  # type: ignore[assignment]
    beside = rng.choice(
        (None, None, None, None, "empty.jsonl", "other.parquet", "notes.md", "sub/train.jsonl", "dataset_infos.json")
    )
    if beside:
        other = folder / beside
        other.parent.mkdir(exist_ok=True)
        if beside.endswith(("parquet", "n.jsonl")):
            write_file(other, base.layouts["plain"][:3])
            rows = None  # type: ignore[assignment]
        else:
            other.write_text("" if beside == "empty.jsonl" else "{}")
        mutations.append(f"beside {beside}")
    source = folder if rng.random() < 0.7 else written

    def call() -> tuple[str, str]:
        pairs, report = read(source)
        encoded(PolicyConfig(str(base.tokenizers["chatml"])), pairs, report)
        said = list(report.lines())[1:]
        if rows is None:
            return ("counted" if said else "right"), str(said)
        if report.read != len(rows):
            return "wrong: silent", f"{report.read} rows read of {len(rows)}"
        lost = report.read - report.kept
        if lost and not report.dropped:
            return "wrong: silent", f"{lost} rows are gone"
        known = {text.strip() for row in rows for text in strings(row)}
        scores = {n for row in rows for n in numbers(row)}
        for pair in pairs:
            texts = [t["content"] for t in pair.history] + list(pair.responses)
            parts = [[t] if t.strip() in known else t.split("\n\n") for t in texts]  # texts that were joined
            strange = [one for several in parts for one in several if one.strip() not in known]
            if strange and not report.repaired and not report.noted:
                return "wrong: silent", f"text that no row has: {strange[0][:80]!r}"
            if not set(pair.rewards) <= scores and not said:
                return "wrong: silent", f"rewards {pair.rewards} that no row has"
            if pair.rewards[0] < pair.rewards[1]:
                return "wrong: silent", "chosen has the lower reward"
        if said:
            return "counted", str(said)
        own = sorted((p.responses, p.rewards) for p in pairs)
        if own == base.plain_pairs[layout]:
            return "right", ""
        read_texts = {
            t
            for pair in pairs
            for t in [*(m["content"].strip() for m in pair.history), *map(str.strip, pair.responses)]
        }
        whole = "\n\n".join(read_texts)
        for row in rows:
            if missing := [
                t
                for t in strings({k: v for k, v in row.items() if k != "prompt"})
                if t.strip() and t.strip() not in whole and t not in KEYWORDS
            ]:
                return "wrong: silent", f"text of a row that no pair has: {missing[0][:80]!r}"
        return "another", "other rows"

    return judged(f"{layout}: {'; '.join(mutations)}", call)


KEYWORDS = ("user", "assistant", "system", "human", "gpt", "USER", "Assistant")
CASES = {"model": model_case, "template": template_case, "data": data_case}


@dataclass
class Base:
    """The unmutated inputs, and what training on them begins with."""

    models: dict[str, Path]
    tokenizers: dict[str, Path]
    templates: dict[str, str]
    layouts: dict[str, list[dict[str, Any]]]
    pairs: list[Pair]
    plain_pairs: dict[str, Any]
    numbers: dict[str, Numbers]

    @classmethod
    def of_small_models(cls, work: Path, rows: int = 5) -> Base:
        """Make two tiny models (one sharded, with tied embeddings) and the tokenizers of four families."""
        from transformers import AutoModelForCausalLM

        sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
        conftest, thinking = import_module("conftest"), import_module("thinking_models")
        models = {
            name: conftest.make_model(work / name, tie_word_embeddings=name == "shards") for name in ("llama", "shards")
        }
        whole = AutoModelForCausalLM.from_pretrained(models["shards"])
        (models["shards"] / "model.safetensors").unlink()
        whole.save_pretrained(models["shards"], max_shard_size="60KB")
        made = {family: conftest.make_tokenizer(family) for family in ("chatml", "llama3", "gemma")}
        made["hybrid"] = thinking.thinking_tokenizer("hybrid")
        for family, tokenizer in made.items():
            tokenizer.save_pretrained(work / family)
        return cls.make(work / "base", models, {family: work / family for family in made}, conftest.scored_rows(rows))

    @classmethod
    def make(cls, work: Path, models: dict[str, Path], tokenizers: dict[str, Path], rows: list[dict[str, Any]]) -> Base:
        """Read and train on everything once.

        Args:
            work: an empty folder.
            models: folders of models with their tokenizers, by name.
            tokenizers: folders of tokenizers with a chat template, by family; "chatml" is one.
            rows: scored pairs of conversations.
        """
        made, plain = layouts(rows), {}
        for name, several in made.items():
            folder = work / name
            folder.mkdir(parents=True)
            write_file(folder / "train.jsonl", several)
            pairs, _ = read(folder)
            plain[name] = sorted((p.responses, p.rewards) for p in pairs)
        pairs, _ = read(work / "conversations")
        found = {
            name: train(folder, pairs, DataReport("rows", "train"), weights=name in models)
            for name, folder in (models | tokenizers).items()
        }
        templates = {
            family: (folder / "chat_template.jinja").read_text(encoding="utf-8")
            for family, folder in tokenizers.items()
        }
        return cls(models, tokenizers, templates, made, pairs, plain, found)

    def lost(self, found: Numbers) -> str:
        """What of the pairs is not in the text of the ids, by pair and in order; "" where everything is."""
        by_response = {pair.responses: pair for pair in self.pairs}
        for example, (_, prompt, chosen, rejected) in zip(found.examples, found.texts, strict=True):
            squeezed = [_squeezed(text) for text in (prompt, chosen, rejected)]
            pair = next(
                (p for (a, b), p in by_response.items()
                 if {_squeezed(a), _squeezed(b)} == {_within(one, a, b) for one in squeezed[1:]}),
                None,
            )  # fmt: skip
            if pair is None:
                return f"no pair has these responses: {chosen!r}, {rejected!r}"
            if example.goal and _squeezed(example.goal) not in squeezed[0]:
                return f"the goal is not in {prompt!r}"
            rest = squeezed[0]
            for turn in [t for t in pair.history if t["role"] != "system"]:
                _, there, rest = rest.partition(_squeezed(turn["content"]))
                if not there:
                    return f"{turn['content']!r} is not in {prompt!r}, or not in its place"
            if any(t["content"] not in prompt for t in pair.history if t["role"] == "system"):
                return f"the system text is not in {prompt!r}"
            if any(_squeezed(r) in rest for r in pair.responses):
                return f"a response is in the prompt {prompt!r}"
            if "⟦" not in chosen or "⟦" not in rejected:
                return f"no end of turn in {chosen!r}"
            if [t["role"] for t in pair.history if t["role"] != "system"] != ["user"]:
                users = [t["content"] for t in pair.history if t["role"] != "system"]
                after = prompt.partition(users[0])[2]
                one, _, after = after.partition(users[1])
                two = after.partition(users[2])[0]
                if one == two:
                    return f"roles can't be told in {prompt!r}"
        return ""


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _within(text: str, *responses: str) -> str:
    return next((r for r in (_squeezed(one) for one in responses) if r in text), "")


def run(kind: str, number: int, work: Path, base: Base) -> Found:
    """Run one case in a folder of its own, and remove the folder if all is well."""
    rendering.SHORT_S = 5
    folder = work / f"{kind}-{number}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    found = CASES[kind](number, folder, base)
    if not found.wrong:
        shutil.rmtree(folder)
    return found
