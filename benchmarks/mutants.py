"""Mutation testing: what the fast tests of a module notice when its code is changed by one operator at a time.

    pip install mutmut cosmic-ray coverage
    python benchmarks/mutants.py relabel losses --output mutants.jsonl     # no name: all five parts
    python benchmarks/mutants.py --output mutants.jsonl --again            # survivors, after a new test
    python benchmarks/mutants.py --output mutants.jsonl --table

The mutants are mutmut's, made by its own visitor, and those of the operators of cosmic-ray that mutmut lacks. The
runner is ours, because mutmut's trampolines change the signatures that jsonargparse reads, and because importing torch
for each mutant takes longer than its tests: a process that holds the libraries, but nothing of this package, is forked
for each mutant and imports a mutated copy. Of the part's own tests those are run that execute the mutated line,
quickest first, until one fails or 5 seconds of CPU are spent; where a line is run by the import, all are. Mutants
that the output has as killed are left out, so that a stopped run goes on, and survivors meet new tests. Text that only
people or type checkers read is not mutated: docstrings, annotations, what errors say.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import gc
import hashlib
import importlib
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "rap_lightning"

PARTS = {  # name: (files, their tests)
    "relabel": (
        ["preferences/relabelling.py"],
        [
            "relabel",
            "weights::test_weights_without_effect_are_refused_in_words",
            "weights::test_originals_and_ties_count_one",
        ],
    ),
    "goals": (["preferences/goals.py", "preferences/goal_spec.py", "preferences/scales.py"], ["goals", "scales"]),
    "losses": (["losses/*.py"], ["losses", "losses_formulas"]),
    "layouts": (
        ["batches/layouts.py"],
        [
            "laid_out",
            "layouts::test_a_forest_holds_every_sequence_and_sees_exactly_its_path",
            "layouts::test_a_branch_that_would_share_next_to_nothing_starts_at_the_one_before",
        ],
    ),
    "logps": (["models/logps.py"], ["logps"]),
}
BUDGET = 5.0  # CPU seconds of tests for one mutant


class Mutant(NamedTuple):
    """One changed file: its text, where it was changed, and how."""

    code: str
    line: int
    change: str


def mutants(path: Path) -> list[Mutant]:
    """Every mutant of a file that differs from it in what runs, by line."""
    source = path.read_text(encoding="utf-8")
    untouched, found = _only_read(source), []
    meanings = {ast.dump(ast.parse(source))}  # what two operators both make, and what differs in blanks alone, once
    for code in (*_of_mutmut(source), *_of_cosmic_ray(source)):
        if (meaning := ast.dump(ast.parse(code))) in meanings:
            continue
        meanings.add(meaning)
        first = next((i for i, (a, b) in enumerate(zip(source, code, strict=False)) if a != b), len(code))
        if not any(start <= first < stop for start, stop in untouched):
            found.append(Mutant(code, source.count("\n", 0, first) + 1, _change(source, code)))
    return sorted(found, key=lambda mutant: mutant.line)


def _of_mutmut(source: str) -> Iterator[str]:
    import libcst as cst
    from mutmut.mutation import file_mutation as mutmut
    from mutmut.mutation.pragma_handling import get_ignored_lines

    class Visitor(mutmut.MutationVisitor):
        """Also looks into decorated functions, which mutmut leaves out for its trampolines' sake alone."""

        def _skip_node_and_children(self, node: cst.CSTNode) -> bool:
            return not isinstance(node, cst.FunctionDef) and super()._skip_node_and_children(node)

    wrapper = cst.metadata.MetadataWrapper(cst.parse_module(source))
    visitor = Visitor(mutmut.mutation_operators, get_ignored_lines("", source, wrapper))
    module = wrapper.visit(visitor)
    for mutation in visitor.mutations:
        yield mutmut.deep_replace(module, mutation.original_node, mutation.mutated_node).code  # type: ignore[union-attr]


def _of_cosmic_ray(source: str) -> Iterator[str]:
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.operators import boolean_replacer, number_replacer, remove_decorator, zero_iteration_for_loop

    kinds = (
        boolean_replacer.AddNot, number_replacer.NumberReplacer, remove_decorator.RemoveDecorator,
        zero_iteration_for_loop.ZeroIterationForLoop,
    )  # fmt: skip
    for kind in kinds:
        occurrence = 0
        while (code := mutate_code(source, kind(), occurrence)) is not None:
            occurrence += 1
            with suppress(SyntaxError):  # a number within a name of a type, say
                ast.parse(code)
                yield code


def _only_read(source: str) -> list[tuple[int, int]]:
    """Stretches of the source, as offsets, that say something to people and do nothing."""
    tree = ast.parse(source)
    nodes: list[ast.AST] = []
    prose: list[ast.AST] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            nodes.append(node)
        elif isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            nodes += node.exc.args
        elif isinstance(node, ast.Assert) and node.msg is not None:
            nodes.append(node.msg)
        elif isinstance(node, ast.arg | ast.AnnAssign) and node.annotation is not None:
            nodes.append(node.annotation)
            if ast.unparse(node.annotation) == "TypeAlias":
                nodes.append(node.value)  # type: ignore[union-attr]
        elif isinstance(node, ast.FunctionDef) and node.returns is not None:
            nodes.append(node.returns)
        elif isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name) and node.value.id == "Literal":
            nodes.append(node)
        elif isinstance(node, ast.ClassDef):  # a reason, as a class attribute
            values = [a.value for a in node.body if isinstance(a, ast.Assign | ast.AnnAssign)]
            prose += [v for v in values if isinstance(v, ast.Constant) and " " in str(v.value)]
    starts = [0]
    for line in source.encode().splitlines(keepends=True):
        starts.append(starts[-1] + len(line))

    def at(line: int, column: int) -> int:  # ast counts bytes
        return len(source.encode()[: starts[line - 1] + column].decode())

    def span(node: Any, inside: int = 0) -> tuple[int, int]:
        return at(node.lineno, node.col_offset) + inside, at(node.end_lineno, node.end_col_offset)

    return [*map(span, nodes), *(span(text, inside=1) for text in prose)]  # that there is a reason is no prose


def _change(source: str, code: str) -> str:
    lines = difflib.unified_diff(source.splitlines(), code.splitlines(), n=0, lineterm="")
    return "\n".join(line for line in lines if not line.startswith(("---", "+++", "@@")))


def forked(work: Callable[[], int], seconds: float, log: Path) -> int:
    """What ``work`` returned in a process of its own; -1 for one that was killed or ran out of time."""
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        code = 99
        with suppress(BaseException):
            out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(out, 1)
            os.dup2(out, 2)
            # a mutant that allocates without end dies alone
            held = int(re.findall(r"VmSize:\s+(\d+)", Path("/proc/self/status").read_text())[0]) * 1024
            resource.setrlimit(resource.RLIMIT_AS, (held + 6 * 2**30,) * 2)
            code = work()
        os._exit(code)
    until = time.monotonic() + seconds
    try:
        while time.monotonic() < until:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                child = 0
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.02)
        return -1
    finally:  # out of time, or Ctrl-C
        if child:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)


def outcome(copy: Path, tests: list[str], plugins: tuple[Any, ...] = ()) -> int:
    """Run tests on the package as it stands in a copy; pytest's exit code."""
    import pytest

    os.environ["PYTHONPATH"] = str(copy)
    sys.path[:] = [str(copy), *(p for p in sys.path if not p.startswith(str(ROOT / "src")))]
    importlib.invalidate_caches()
    quick = ["--assert=plain", "-p", "no:cacheprovider", "-p", "no:unraisableexception", "-m", "not slow"]
    own = f"--basetemp={copy.parent / 'tmp'}"
    return int(pytest.main(["-x", "-q", "--no-header", own, *quick, *tests], plugins=list(plugins)))


class Watch:
    """Which test runs which lines of some files, and how long it takes."""

    def __init__(self, files: list[Path], output: Path) -> None:
        import coverage

        self.files, self.output, self.seconds = files, output, dict[str, float]()
        self.coverage = coverage.Coverage(data_file=None, include=[str(f) for f in files], config_file=False)
        self.coverage.start()

    @staticmethod
    def _clock() -> float:
        return sum(os.times()[:4])  # of children too

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """A test begins, with its fixtures."""
        self.coverage.switch_context(nodeid)
        self.began = self._clock()

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        """It ends."""
        self.seconds[nodeid] = self._clock() - self.began
        self.coverage.switch_context("")

    def pytest_sessionfinish(self) -> None:
        """Write it all down, with the libraries that were imported."""
        self.coverage.stop()
        lines = {str(f): self.coverage.get_data().contexts_by_lineno(str(f)) for f in self.files}
        self.output.write_text(json.dumps({"lines": lines, "seconds": self.seconds, "modules": sorted(sys.modules)}))


def watched(copy: Path, files: list[Path], tests: list[str], folder: Path) -> dict[str, Any]:
    """The tests of a part on unchanged code, which must pass; the libraries they need are imported here."""
    seen, log = folder / "watched.json", folder / "watched.log"
    if forked(lambda: outcome(copy, tests, (Watch(files, seen),)), 3600, log) != 0:
        raise SystemExit(f"the tests fail without any mutant:\n{log.read_text()[-4000:]}")
    found: dict[str, Any] = json.loads(seen.read_text())
    ours = re.compile(r"rap_lightning|benchmarks|conftest|test_|my_|__|_pytest\.assertion")
    for name in found["modules"]:
        if not ours.match(name):
            with suppress(Exception):
                importlib.import_module(name)
    gc.freeze()  # what all children share is not theirs to look through
    return found


def run(part: str, output: Path, share: int | None, seed: int, again: bool) -> None:
    """Every mutant of a part, or ``share`` of each file's drawn at random; one line of JSON each.

    ``again`` takes the survivors of the output alone.
    """
    patterns, names = PARTS[part]
    files = [f for p in patterns for f in sorted(PACKAGE.glob(p)) if f.name != "__init__.py"]
    tests = [str(ROOT / "tests" / f"test_{re.sub(r'(?=::)|$', '.py', name, count=1)}") for name in names]
    known = records(output)
    with TemporaryDirectory() as scratch:
        copy = Path(scratch) / "src"
        shutil.copytree(ROOT / "src", copy)
        places = [copy / f.relative_to(ROOT / "src") for f in files]
        print(f"{part}: its tests on the code as it is ...", file=sys.stderr)
        seen = watched(copy, places, tests, Path(scratch))
        sys.dont_write_bytecode = True  # from here on: what a mutant compiles is no one else's
        for place in places:
            shutil.rmtree(place.parent / "__pycache__", ignore_errors=True)
            found, source = mutants(place), place.read_text(encoding="utf-8")
            for mutant in tqdm(random.Random(seed).sample(found, len(found))[:share], place.name):
                mark = hashlib.sha256(f"{place.name}{mutant.code}".encode()).hexdigest()[:12]
                if known.get(mark, {"killed": again})["killed"]:
                    continue
                place.write_text(mutant.code, encoding="utf-8")
                record = {"id": mark, "part": part, "file": str(place.relative_to(copy / PACKAGE.name))}
                record |= judged(copy, mutant, seen, tests, seen["lines"][str(place)].get(str(mutant.line), []))
                with output.open("a", encoding="utf-8") as lines:
                    lines.write(json.dumps(record | {"of": len(found)}) + "\n")
                if not record["killed"]:
                    tqdm.write(f"survived: {record['file']}:{mutant.line}\n{mutant.change}")
            place.write_text(source, encoding="utf-8")


def judged(copy: Path, mutant: Mutant, seen: dict[str, Any], tests: list[str], on_line: list[str]) -> dict[str, Any]:
    """What the tests make of the mutant that stands in the copy."""
    picked, cost = chosen(seen, on_line)
    began, log = time.monotonic(), copy.parent / "mutant.log"
    code = forked(lambda: outcome(copy, picked), 60 + 20 * cost, log)
    if code in (4, 5):  # tests of these names are no longer found
        code = forked(lambda: outcome(copy, tests), 600, log)
    return {
        "line": mutant.line, "change": mutant.change, "killed": code != 0, "code": code, "tests": len(picked),
        "seconds": round(time.monotonic() - began, 1),
    }  # fmt: skip


def chosen(seen: dict[str, Any], on_line: list[str]) -> tuple[list[str], float]:
    """Tests for a mutant of a line, quickest first, with the CPU seconds they take together.

    No more of them than take BUDGET, so that what only slow tests would notice counts as a survivor.
    """
    seconds: dict[str, float] = seen["seconds"]
    picked, cost = list[str](), 0.0
    by_import = not on_line or "" in on_line  # what a line does when it is imported, any test may notice
    for name in sorted(seconds if by_import else set(on_line), key=seconds.__getitem__):
        if picked and cost + seconds[name] > BUDGET:
            break
        picked.append(name)
        cost += seconds[name]
    return picked, cost


def records(output: Path) -> dict[str, dict[str, Any]]:
    """What an output says of each mutant: its last line."""
    lines = output.read_text(encoding="utf-8").splitlines() if output.exists() else []
    return {record["id"]: record for record in map(json.loads, lines)}


def table(output: Path) -> str:
    """The figures of an output, by file; where the code has changed since, begin a new output."""
    rows = list(records(output).values())
    made, killed = Counter(r["file"] for r in rows), Counter(r["file"] for r in rows if r["killed"])
    of = {r["file"]: r["of"] for r in rows}
    text = ["| file | mutants | run | killed | survived |", "|---|---|---|---|---|"]
    text += [f"| `{f}` | {of[f]} | {n} | {killed[f]} | {n - killed[f]} |" for f, n in sorted(made.items())]
    return "\n".join(text)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; none is all")
    parser.add_argument("--output", type=Path, required=True, help="json lines: a line per mutant")
    parser.add_argument("--share", type=int, help="as many mutants of each file, drawn at random")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--again", action="store_true", help="only those that have survived")
    parser.add_argument("--table", action="store_true", help="print the figures of an output and stop")
    options = parser.parse_args()
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"expected parts among {', '.join(PARTS)}, found {', '.join(sorted(unknown))}")
    if options.table:
        print(table(options.output))
        return
    os.chdir(ROOT)
    for part in options.parts or PARTS:
        run(part, options.output, options.share, options.seed, options.again)


if __name__ == "__main__":
    main()
