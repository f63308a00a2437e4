"""Mutation testing: small changes of the package's code, and whether the tests of the changed module notice.

    python -m benchmarks.mutants [FILE ...] [--share 1.0] [--most 40] [--seed 0] [--lines 12 13]

A mutant is killed where a test fails or where the tests take far longer than without a change; else it survives. torch and
transformers are imported once. Each mutant is a fork of that process, in which the changed module stands in for the file's.
Tests that killed before come first, then the cheapest. A mutant that no test can tell from the original is named in
`benchmarks/equivalent_mutants.py` with the reason, and isn't run.
"""

import argparse
import gc
import importlib.abc
import importlib.util
import os
import pickle
import random
import select
import signal
import sys
import time
import types
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from benchmarks.equivalent_mutants import EQUIVALENT
from benchmarks.measure import table
from benchmarks.mutations import Mutant, mutants_of

ROOT = Path(__file__).parent.parent
PACKAGE = "bidirect_patch"
OF_THE_HEAD = ("strategies", "loss", "bad_input", "on_and_off", "outputs", "chunks")
HEAD_TESTS = tuple(f"tests/mntp/test_head_{name}.py" for name in OF_THE_HEAD)
OF_THE_COLLATOR = ("tokens", "features", "draws", "collator", "collator_settings")
COLLATOR_TESTS = tuple(f"tests/mntp/test_{name}.py" for name in OF_THE_COLLATOR)
MASK_TESTS = (
    "tests/attention/test_arguments.py",
    "tests/attention/test_users_masks.py",
    "tests/attention/test_masks.py",
    "tests/attention/test_packed_sdpa.py",
    "tests/attention/test_backends.py::test_every_backend_is_the_plain_decoder",
)
TESTS: dict[str, tuple[str, ...]] = {  # which tests are to kill the mutants of a file
    "swap/classes.py": ("tests/swap",),
    "swap/plan.py": ("tests/swap",),
    "swap/apply.py": ("tests/swap",),
    "swap/in_use.py": ("tests/swap",),
    "swap/instance_forward.py": ("tests/swap",),
    "swap/view.py": ("tests/swap",),
    "attention/padding_and_packing.py": MASK_TESTS,
    "attention/ready_mask.py": MASK_TESTS,
    "attention/dense.py": MASK_TESTS,
    "mntp/collator.py": COLLATOR_TESTS,
    "mntp/tokens.py": COLLATOR_TESTS,
    "mntp/features.py": COLLATOR_TESTS,
    "mntp/head.py": HEAD_TESTS,
    "mntp/loss.py": HEAD_TESTS,
    "mntp/strategies.py": HEAD_TESTS,
}
OWN = (PACKAGE, "tests", "benchmarks", "conftest", "__main__")  # what each fork imports for itself


class Changed(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports one module from a changed syntax tree."""

    def __init__(self, name: str, path: Path, code: types.CodeType) -> None:
        self.name, self.path, self.code = name, path, code

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        if fullname != self.name:
            return None
        return importlib.util.spec_from_file_location(fullname, self.path, loader=self)

    def exec_module(self, module: types.ModuleType) -> None:
        exec(self.code, module.__dict__)


@dataclass
class Run:
    """What one run of the tests came to."""

    killed: bool = True
    killer: str = ""  # the first test that failed
    seconds: dict[str, float] = field(default_factory=dict)  # of each test that ran
    modules: list[str] = field(default_factory=list)  # that were imported by then


class Watcher:
    """A pytest plugin: the order of the tests, and what they came to."""

    def __init__(self, order: dict[str, tuple[float, float]]) -> None:
        self.order, self.run = order, Run(killed=False)

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items.sort(key=lambda item: self.order.get(item.nodeid, (0, 0)))

    def pytest_runtest_logreport(self, report: Any) -> None:
        seconds = self.run.seconds
        seconds[report.nodeid] = seconds.get(report.nodeid, 0) + report.duration
        if report.failed and not self.run.killer:
            self.run.killer = report.nodeid

    def pytest_sessionfinish(self) -> None:
        self.run.modules = list(sys.modules)


def in_a_fork(changed: Changed | None, tests: Iterable[str], order: dict[str, tuple[float, float]], limit: float) -> Run:
    """Run tests in a fork of this process, with one module changed, until one fails or `limit` seconds are over."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.setsid()
        os.close(reading)
        _be_the_child(changed, tests, order, writing)
    os.close(writing)
    told = b""
    ends = time.monotonic() + limit
    while select.select([reading], [], [], max(0, ends - time.monotonic()))[0]:
        if not (part := os.read(reading, 1 << 16)):
            break
        told += part
    with suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # also what the tests started
    os.waitpid(child, 0)
    os.close(reading)
    try:
        return pickle.loads(told)
    except (EOFError, pickle.UnpicklingError):  # it hung, or it died
        return Run(killer="too slow" if time.monotonic() >= ends else "the process died")


def _be_the_child(changed: Changed | None, tests: Iterable[str], order: Any, writing: int) -> None:
    status: Any = 1
    watcher = Watcher(order)
    try:
        silence = os.open(os.environ.get("MUTANTS_LOG", os.devnull), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(silence, 1)
        os.dup2(silence, 2)
        if changed is not None:
            sys.meta_path.insert(0, changed)
        options = ["-x", "-q", "-m", "not slow", "-p", "no:cacheprovider", "-p", "no:xdist", "--capture=fd"]
        status = pytest.main([*options, "--rootdir", os.getcwd(), *tests], plugins=[watcher])
    finally:
        watcher.run.killed = status != pytest.ExitCode.OK
        os.write(writing, pickle.dumps(watcher.run))
        os._exit(0)


@dataclass
class Result:
    """What became of one file's mutants."""

    name: str
    run: int = 0
    killed: int = 0
    equivalent: int = 0
    survivors: list[Mutant] = field(default_factory=list)

    @property
    def row(self) -> dict[str, object]:
        share = f"{self.killed / self.run:.0%}" if self.run else ""
        return {"file": self.name, "run": self.run, "killed": self.killed, "share": share, "equivalent": self.equivalent}


def chosen(mutants: list[Mutant], options: argparse.Namespace, name: str) -> list[Mutant]:
    """The sample that is asked for: the same with the same seed, and a larger one holds a smaller one."""
    if options.lines:
        return [mutant for mutant in mutants if mutant.line in options.lines]
    count = min(round(len(mutants) * options.share), options.most or len(mutants))
    order = list(range(len(mutants)))
    random.Random(f"{options.seed} {name}").shuffle(order)
    return [mutants[index] for index in sorted(order[:count])]


@cache
def without_change(tests: tuple[str, ...]) -> tuple[Run, float]:
    """The run of tests on the code as it is, and how many seconds they may take on a mutant."""
    start = time.monotonic()
    first = in_a_fork(None, tests, {}, 3600)
    if first.killed:
        sys.exit(f"{' '.join(tests)} fails without any change: {first.killer}")
    preload(first.modules)
    return first, 30 + 3 * (time.monotonic() - start)


def tested(path: Path, module: str, name: str, tests: tuple[str, ...], options: argparse.Namespace) -> Result:
    """Run `tests` on mutants of the file of `module` and print what survives."""
    first, limit = without_change(tests)
    killers: Counter[str] = Counter()
    result = Result(name)
    for mutant in chosen(mutants_of(path.read_text()), options, name):
        if (name, mutant.text, mutant.change) in EQUIVALENT:
            result.equivalent += 1
            continue
        result.run += 1
        changed = Changed(module, path, compile(mutant.tree(), str(path), "exec"))
        order = {test: (-killers[test], cost) for test, cost in first.seconds.items()}
        run = in_a_fork(changed, tests, order, limit)
        if run.killed:
            result.killed += 1
            killers[run.killer] += 1
        else:
            result.survivors.append(mutant)
        if options.verbose or not run.killed:
            what = run.killer if run.killed else "SURVIVES"
            print(f"{name}:{mutant.line}: {mutant.text}\n    {mutant.change}    [{what}]", flush=True)
    print(f"{name}: {result.killed} of {result.run} killed, {result.equivalent} equivalent", flush=True)
    return result


def preload(names: Iterable[str]) -> None:
    """Import what each fork would import else, but not the package: a fork imports the changed module."""
    for name in names:
        if name.split(".")[0] not in OWN:
            with suppress(Exception):
                import_module(name)
    loaded = [name for name in sys.modules if name.split(".")[0] == PACKAGE]
    if loaded:
        sys.exit(f"{loaded[0]} is imported already, so no mutant would take its place")
    gc.freeze()  # what all forks share is not looked through for garbage


def main(arguments: list[str] | None = None) -> None:
    """Make mutants, run tests, print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", metavar="FILE", help=f"below {PACKAGE}/; default: {', '.join(TESTS)}")
    parser.add_argument("--share", type=float, default=1.0, help="of a file's mutants")
    parser.add_argument("--most", type=int, help="at most so many of a file")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--lines", type=int, nargs="+", default=[], help="the mutants of these lines alone")
    parser.add_argument("--verbose", action="store_true", help="also say which test killed each mutant")
    options = parser.parse_args(arguments)
    for name in options.files:
        if name not in TESTS:
            parser.error(f"no tests are named for {name}: give some of {', '.join(TESTS)}")
    start = time.monotonic()
    os.chdir(ROOT)
    preload(["torch", "transformers"])
    results = []
    for name in options.files or TESTS:
        module = f"{PACKAGE}.{name.removesuffix('.py').replace('/', '.')}"
        results.append(tested(ROOT / PACKAGE / name, module, name, TESTS[name], options))
    run, killed, equivalent = (sum(getattr(r, what) for r in results) for what in ("run", "killed", "equivalent"))
    print("\n" + table([result.row for result in results]))
    print(
        f"\n{killed} of {run} mutants killed ({killed / max(run, 1):.1%}), {equivalent} more are equivalent, in "
        f"{(time.monotonic() - start) / 60:.0f} min"
    )


if __name__ == "__main__":
    main()
