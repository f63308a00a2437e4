"""Run all benchmarks and write RESULTS.md and the figures beside it.

    python -m benchmarks [--quick] [--also PYTHON]... [--output benchmarks/RESULTS.md]

`--also` takes the interpreter of another environment, whose peers this one lacks: one with transformers 4.39.3 for the
tutorial's hand-written subclasses, one with llm2vec 0.2.3 and transformers 4.44.2 (`tox -e t4393,t4442` makes both).
"""

import argparse
import os
import platform
import re
import subprocess
import sys
import time

from benchmarks.measure import ROOT
from benchmarks.report import FIGURES

VERSIONS = (
    "import transformers, torch, importlib.util as u; "
    "print(transformers.__version__, torch.__version__, bool(u.find_spec('llm2vec')))"
)
INTRODUCTION = """# What was measured

Made by `python -m benchmarks`. Each section is one script, run in a process of its own beside its peers; times are CPU
seconds on one thread, in turns: one round runs each way once, and a ratio is taken within a round. `a / b / c` is the
minimum, median and maximum over rounds; `b [a, c]` is the median and the quartiles.
"""
KEPT = ("## The ladder", "## Tests", "## On a GPU", "## Mutants")  # sections that other commands make
SECTIONS = (  # title, script and its arguments
    ("The MNTP head against the stock step", ("head", "--quick", "--rounds", "3")),
    ("The MNTP head on two threads", ("head", "--quick", "--rounds", "3", "--threads", "2")),
    ("Growth with vocabulary, length, layers and scored share", ("growth",)),
    ("Padding-free batches", ("padding_free",)),
    ("The patch against the peers", ("patch_cost",)),
    ("What verification costs", ("verification",)),
    ("Sink tokens against none", ("sinks", "--rounds", "3")),
    ("Encoding with sentence-transformers", ("encode", "--rounds", "2")),
    ("The collator", ("collator",)),
    ("Lower precision", ("precision",)),
    ("Eager attention beside SDPA on a CPU", ("cpu_attention",)),
    ("A step of each command beside its floor", ("steps", "--rounds", "2")),
)


def machine() -> str:
    """Processor, cores and system, in words."""
    name = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            name = next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), name)
    return f"{name}, {os.cpu_count()} cores, {platform.system()}, Python {platform.python_version()}"


def versions(python: str) -> tuple[str, str, bool]:
    """transformers' and torch's versions there, and whether llm2vec is installed."""
    done = subprocess.run([python, "-c", VERSIONS], capture_output=True, text=True, check=True)
    transformers, torch, llm2vec = done.stdout.split()[-3:]
    return transformers, torch, llm2vec == "True"


def run(title: str, arguments: tuple[str, ...], python: str, where: str) -> str:
    """One section in Markdown: the script's own output under its command, or its error."""
    command = ("-m", f"benchmarks.{arguments[0]}", *arguments[1:])
    print(f"{time.strftime('%H:%M:%S')} {title}", file=sys.stderr, flush=True)
    environment = {**os.environ, "PYTHONPATH": ROOT, "OMP_NUM_THREADS": "1"}
    start = time.perf_counter()
    done = subprocess.run([python, *command], cwd=ROOT, env=environment, capture_output=True, text=True)
    body = done.stdout.strip()
    if done.returncode:
        body += f"\n\nThis failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}"
    if arguments[0] == "head":
        body += _head_goal(body, 0.38 if "--threads" in arguments else 0.35)
    seconds = time.perf_counter() - start
    return f"## {title}\n\n`python {' '.join(command)}` on {where}, {seconds:.0f} s\n\n{body.strip()}\n"


def _head_goal(body: str, most: float) -> str:
    """The goal for the share of the time beside the row that it is about."""
    row = re.search(r"^\|[^|]*\| trained +\| ours .*$", body, re.MULTILINE)
    if row is None:
        return ""
    _, _, _, _, share, floor, _, memory = (re.search(r"[\d.]+", c) for c in row[0].strip("| ").split("|"))
    met = float(share[0]) <= most and float(memory[0]) <= 0.35
    why = f"The arithmetic alone is {floor[0]} of its time; both vocabulary matrices' gradients are dense."
    verdict = "met" if met else f"missed. {why}"
    return (
        f"\n\nGoal: at most {most} of the stock step's time and 0.35 of its peak growth, all weights trained: "
        f"{share[0]} and {memory[0]}: {verdict}"
    )


def kept_sections(text: str) -> str:
    """The sections of RESULTS.md that this script doesn't measure and keeps as they are."""
    titles = "|".join(map(re.escape, KEPT))
    found = re.findall(rf"^(?:{titles})$.*?(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    return "".join(f"\n{section.rstrip()}\n" for section in found)


def main(arguments: list[str] | None = None) -> None:
    """Run all, write the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it all run; the file isn't written")
    parser.add_argument("--also", action="append", default=[], metavar="PYTHON", help="another environment's python")
    parser.add_argument("--output", default=os.path.join(os.path.dirname(FIGURES), "RESULTS.md"))
    options = parser.parse_args(arguments)
    sections = [s for s in SECTIONS if not (options.quick and s[1][0] == "head")]  # its quick run takes minutes
    jobs = [(*section, sys.executable) for section in sections]
    places = {python: versions(python) for python in (sys.executable, *options.also)}
    for python in options.also:
        jobs.append((f"The patch against the peers, transformers {places[python][0]}", ("patch_cost",), python))
    with_llm2vec = [python for python, place in places.items() if place[2]]
    if with_llm2vec:
        jobs.append(("Beside llm2vec 0.2.3", ("llm2vec_peer",), with_llm2vec[0]))
        jobs.append(("Embeddings beside llm2vec 0.2.3", ("llm2vec_embeddings",), with_llm2vec[0]))
    kept = ""
    if os.path.exists(options.output):
        with open(options.output) as file:
            kept = kept_sections(file.read())
    parts = [INTRODUCTION, f"Machine: {machine()}.\n"]
    took: dict[str, float] = {}

    def write() -> None:
        """Write what is there: it is called after each section, since all of them take most of an hour."""
        if not options.quick:
            with open(options.output, "w") as file:
                file.write("\n".join(parts) + kept)

    for title, command, python in jobs:
        quick = ("--quick",) if options.quick else ()
        where = f"transformers {places[python][0]}, torch {places[python][1]}"
        start = time.perf_counter()
        parts.append(run(title, (*command, *quick), python, where))
        took[title] = time.perf_counter() - start
        write()
    if not with_llm2vec:
        parts.append(
            "## Beside llm2vec 0.2.3\n\nNot run here: `python -m benchmarks --also PYTHON` with the interpreter of an "
            "environment that has llm2vec 0.2.3 and transformers 4.44.2 (`tox -e t4442` makes one).\n"
        )
    parts.append(f"All of it took {sum(took.values()) / 60:.0f} minutes.\n")
    write()
    if options.quick:
        print("\n".join(parts))


if __name__ == "__main__":
    main()
