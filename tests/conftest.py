"""Small real components: three families of chat template, a byte-level tokenizer, tiny models, scored pairs.

Also how tests run command lines: ``called`` and ``run_command`` in this process, ``start_process`` in one of its own.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import random
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch; for subprocesses too: the models are tiny
os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import pytest
import torch

import kills
from cli_process import CliProcess
from rap_lightning.preferences.goals import OverallGoal

logging.raiseExceptions = False  # Lightning's handler outlives the streams that pytest captures
torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parent.parent
REAL_DATA = ROOT.parent / "shared" / "data"

CHATML = (  # a default system message where there is none, as Qwen2 and SmolLM2 have
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (  # begins with BOS, trims contents
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (  # begins with BOS, refuses a system role, calls the assistant "model"
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
FAMILIES: dict[str, dict[str, Any]] = {
    "chatml": {"template": CHATML, "eos": "<|im_end|>", "bos": None, "specials": ["<|im_start|>", "<|im_end|>"]},
    "llama3": {
        "template": LLAMA3,
        "eos": "<|eot_id|>",
        "bos": "<|begin_of_text|>",
        "specials": ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    },
    "gemma": {
        "template": GEMMA,
        "eos": "<end_of_turn>",
        "bos": "<bos>",
        "specials": ["<bos>", "<start_of_turn>", "<end_of_turn>"],
    },
}


def make_tokenizer(family: str, spec: dict[str, Any] | None = None) -> Any:
    """A byte-level BPE tokenizer with the control tokens and the chat template of a family, or of ``spec``."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    spec = spec or FAMILIES[family]
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<pad>", *spec["specials"]],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = [str(row) for row in scored_rows(50)] + [OverallGoal().text(i / 2) for i in range(2, 21)]
    inner.train_from_iterator(text, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        eos_token=spec["eos"],
        bos_token=spec["bos"],
        chat_template=spec["template"],
    )


def scored_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Scored pairs in the layout of ultrafeedback_binarized, with a few existing system messages and histories."""
    rng = random.Random(seed)
    words = [
        "red", "green", "blue", "apple", "pear", "plum", "one", "two", "three", "four", "sings", "walks", "runs",
        "far", "near", "and", "or", "the", "a",
    ]  # fmt: skip

    def say(low: int, high: int) -> str:
        return " ".join(rng.choices(words, k=rng.randint(low, high)))

    rows = []
    for number in range(count):
        history = [{"role": "user", "content": f"{number}: {say(2, 8)}"}]
        if number % 5 == 1:
            history.insert(0, {"role": "system", "content": "Answer in " + say(1, 3)})
        if number % 7 == 2:
            history += [{"role": "assistant", "content": say(1, 6)}, {"role": "user", "content": say(1, 6)}]
        high, low = sorted(rng.sample([i / 2 for i in range(2, 21)], 2), reverse=True)
        rows.append(
            {
                "prompt": history[-1]["content"],
                "chosen": [*history, {"role": "assistant", "content": say(1, 12) + " yes"}],
                "rejected": [*history, {"role": "assistant", "content": say(1, 12) + " no"}],
                "score_chosen": high,
                "score_rejected": low,
            }
        )
    return rows


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def flip_bit(shard: Path) -> None:
    """Change a bit in the middle of the largest tensor of a shard of a checkpoint folder."""
    from rap_lightning.models.checkpoint.sharded_folder import read_index

    entries = read_index(shard.parent).storage_data.values()
    largest = max((one for one in entries if one.relative_path == shard.name), key=lambda one: one.length)
    content = bytearray(shard.read_bytes())
    content[largest.offset + largest.length // 2] ^= 1
    shard.write_bytes(content)


def pairs_of(rows: list[dict[str, Any]], **rules: Any) -> tuple[list[Any], Any]:
    """The scored pairs of rows in memory, and the report; ``rules`` are those of Rules."""
    from rap_lightning.preferences.format_detection import find_format
    from rap_lightning.preferences.readers import Chunk
    from rap_lightning.preferences.rows_to_pairs import rows_to_pairs
    from rap_lightning.preferences.rules import Rules
    from rap_lightning.preferences.sources import Source

    made = Rules(**rules)
    chunk = Chunk("rows", 1, rows)
    part = rows_to_pairs(chunk, made, find_format(chunk, made, Source("rows")))
    part.report.pairs = len(part.pairs)
    return part.pairs, part.report


def pair_of(row: dict[str, Any]) -> Any:
    """The one scored pair of a row."""
    (pair,), _ = pairs_of([row])
    return pair


def encode(tokenizer: Any, rows: list[dict[str, Any]], **options: Any) -> tuple[Any, Any, Any]:
    """Rows in memory to encoded pairs: (EncodedPairs, report, encoder)."""
    import tempfile

    from rap_lightning.batches.dataset import encode_pairs
    from rap_lightning.batches.encode import Encoder
    from rap_lightning.preferences.pair_cache import stored_pairs
    from rap_lightning.preferences.relabelling import Relabelling
    from rap_lightning.preferences.rules import Rules
    from rap_lightning.preferences.sources import Source

    goal = options.pop("goal", OverallGoal())
    lengths = options.pop("max_length", 512), options.pop("max_prompt_length", None)
    num_proc = options.pop("num_proc", None)
    relabelling = options.pop("relabelling", Relabelling("both" if goal else "none"))
    rules = Rules(goal, relabelling, tool_turns=True, **options)
    encoder = Encoder(tokenizer, goal, *lengths)
    with tempfile.TemporaryDirectory() as folder:
        source = Source(str(write_jsonl(Path(folder) / "rows.jsonl", rows)))
        table, report = stored_pairs(source, "train", rules, num_proc=num_proc)
        strict = rules.bad_rows == "error"
        pairs = encode_pairs(table, encoder, relabelling, report, num_proc=num_proc, strict=strict)
        return pairs, report, encoder


def make_model(folder: Path, family: str = "chatml", tokenizer: Any = None, **options: Any) -> Path:
    """A tiny Llama with random weights, saved beside its tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = tokenizer or make_tokenizer(family)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    options = {**sizes, "initializer_range": 0.2, **options}
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=512, **options)
    model = LlamaForCausalLM(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def called(*args: object) -> int:
    """The exit code of a command line, in this process."""
    from rap_lightning.cli import main as cli

    try:
        cli.main(list(map(str, args)))
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def call(monkeypatch: pytest.MonkeyPatch, *args: object) -> int:
    """As :func:`called`, of a command line that ``sys.argv`` holds."""
    monkeypatch.setattr(sys, "argv", ["rap-lightning", *map(str, args)])
    return called(*args)


def run_command(*args: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command line in this process, and return its exit code with what it wrote."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.chdir(cwd or "."), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = called(*args)
    return subprocess.CompletedProcess(list(map(str, args)), code, out.getvalue(), err.getvalue())


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """Return a folder that ``make`` fills once for all workers of pytest-xdist. Tests must not write to it."""
    from filelock import FileLock

    root = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # of this session, and of all its workers
    folder = root / name
    with FileLock(root / f"{name}.lock"):
        if not folder.exists():
            partial = root / f"{name}.partial"
            partial.mkdir()
            make(partial)
            partial.rename(folder)
    return folder


@pytest.fixture(params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny ChatML model."""
    return make_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def knowing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has a goal."""
    folder = make_model(tmp_path_factory.mktemp("knowing") / "model")
    (folder / "goal.json").write_text(json.dumps(OverallGoal().record()))
    return folder


@pytest.fixture(scope="session")
def pairs_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train.jsonl with 23 pairs and test.jsonl with 9."""
    folder = tmp_path_factory.mktemp("pairs")
    write_jsonl(folder / "train.jsonl", scored_rows(23))
    write_jsonl(folder / "test.jsonl", scored_rows(9, seed=1))
    return folder


@pytest.fixture
def commands_in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a command that starts ``rap-lightning`` as a subprocess, as rounds does for fit, call it in this process."""
    start, run, popen = [sys.executable, "-m", "rap_lightning.cli.main"], subprocess.run, subprocess.Popen

    class Ended:
        """As a Popen: the command has run when it is waited for."""

        def __init__(self, command: list[str]) -> None:
            self.returncode = called(*command[3:])

        def wait(self) -> int:
            return self.returncode

    monkeypatch.setattr(subprocess, "run", lambda c, **o: run_command(*c[3:]) if c[:3] == start else run(c, **o))
    monkeypatch.setattr(subprocess, "Popen", lambda c, **o: Ended(c) if c[:3] == start else popen(c, **o))


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded world with few pairs and a base model that has hardly been trained."""
    return made_once(tmp_path_factory, "small-world", kills.make) / "world"


@pytest.fixture(autouse=True)
def _isolated() -> Iterator[None]:
    """Restore what a command line changes in its process: environment, working folder, import path, users' modules."""
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    environment, path, cwd = dict(os.environ), list(sys.path), Path.cwd()
    yield
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:] = path
    os.chdir(cwd)
    for name in [name for name in sys.modules if name.startswith("my_")]:  # my_losses.py, my_rows.py: each test's own
        del sys.modules[name]


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Give each worker a datasets cache of its own, and its subprocesses too, so that no run sees another's rows."""
    import datasets

    cache = tmp_path_factory.mktemp("datasets-cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
        patch.setenv("HF_DATASETS_CACHE", str(cache))
        yield


@pytest.fixture(scope="session")
def process_server(_own_cache: None) -> Any:
    """The server that processes are forked from: it has imported everything, which takes seconds."""
    return kills.server()


@pytest.fixture
def start_process(process_server: Any, tmp_path: Path) -> Iterator[Callable[..., CliProcess]]:
    """Start a command line as a process of its own: ``start_process(arguments, NAME="environment")``."""
    started: list[CliProcess] = []

    def start(arguments: list[str], **environment: str) -> CliProcess:
        started.append(CliProcess(process_server, arguments, tmp_path / f"{len(started)}.log", **environment))
        return started[-1]

    yield start
    for one in started:
        one.process.kill()


def build(model: Path, data: Path, *, lora: bool = False, **options: Any) -> tuple[Any, Any]:
    """A module and a data module; ``options`` go to whichever takes them."""
    from lightning.pytorch import seed_everything

    from rap_lightning.datamodule import PreferenceDataModule
    from rap_lightning.models.policy_config import Lora, PolicyConfig
    from rap_lightning.module import PreferenceModule

    seed_everything(0, verbose=False)
    policy = options.pop("policy", None) or PolicyConfig(str(model), lora=Lora(r=4) if lora else None)
    module_names = {"loss", "reference", "optimizer", "schedule", "generation", "warm_up"}
    module_options = {k: v for k, v in options.items() if k in module_names}
    data_options = {k: v for k, v in options.items() if k not in module_names}
    module = PreferenceModule(policy, **module_options)
    return module, PreferenceDataModule(str(data), **({"max_length": 160, "batch_size": 4} | data_options))


def make_trainer(folder: Path, **options: Any) -> Any:
    """A quiet CPU trainer."""
    from lightning.pytorch import Trainer
    from lightning.pytorch.loggers import CSVLogger

    defaults = {
        "accelerator": "cpu",
        "max_epochs": 1,
        "logger": CSVLogger(folder, name=""),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "log_every_n_steps": 1,
        "num_sanity_val_steps": 0,
    }
    return Trainer(**(defaults | options))


def sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.1)


@pytest.fixture
def true_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models compute norms, softmaxes and routers in float32 for every dtype; here float64 stays float64."""
    to, as_float, softmax = torch.Tensor.to, torch.Tensor.float, torch.nn.functional.softmax

    def kept(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        asked = [*args, *kwargs.values()]
        if self.dtype == torch.float64 and torch.float32 in [x for x in asked if isinstance(x, torch.dtype)]:
            return self
        return to(self, *args, **kwargs)

    def soft(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if x.dtype == torch.float64:
            kwargs.pop("dtype", None)
        return softmax(x, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", kept)
    monkeypatch.setattr(torch.Tensor, "float", lambda x: x if x.dtype == torch.float64 else as_float(x))
    monkeypatch.setattr(torch.nn.functional, "softmax", soft)


@pytest.fixture
def real_pairs() -> Path:
    folder = REAL_DATA / "ultrafeedback_pairs_scored"
    if not folder.is_dir():
        pytest.skip(f"the real sample data are not at {folder}")
    return folder
