"""Run what is measured on a GPU, and write the tables row by row.

    python -m benchmarks.gpu [--parts kernels,speed,patch,growth] [--minutes 8.5] [--output FILE]
    python -m benchmarks.gpu --dry-run          (tiny sizes on a CPU: does it all run)

Each part has a share of the minutes; what it doesn't use goes to the later ones. A part that runs alone has them all.
"""

import argparse
import importlib.metadata
import platform
import sys
import time
from collections.abc import Callable

import torch

from benchmarks.gpu import growth, kernels, native_flag, speed
from benchmarks.gpu.progress import Deadline, Run, stop_after, writer

PARTS: dict[str, tuple[str, Callable[[Run], None], float]] = {  # title, the part, its share of the time
    "kernels": ("Correctness on real kernels", kernels.part, 130),
    "speed": ("Speed and memory of an MNTP step", speed.part, 150),
    "patch": ("The patch beside the native flag", native_flag.part, 20),
    "growth": ("Growth to 32k tokens", growth.part, 40),
}
PACKAGES = ("transformers", "peft", "liger-kernel", "flash-attn", "flash-attn-3", "flash-attn-4")
GRACE = 25  # seconds after the minutes at which the process is ended in the middle of a part
DRY_MINUTES = 5.0  # in a dry run nothing is left out for want of time


def main(arguments: list[str] | None = None) -> int:
    """Run the parts asked for.

    Returns:
        0, or 1 where something failed or came out wrong, or 2 where there is no GPU.
    """
    options = parse(arguments)
    if not options.dry_run and not torch.cuda.is_available():
        print("There is no CUDA GPU here: --dry-run runs everything at tiny sizes on a CPU.", file=sys.stderr)
        return 2
    write = writer(options.output)
    write(f"Machine: {machine(options.dry_run)}.")
    minutes = DRY_MINUTES if options.dry_run else options.minutes
    watchdog = stop_after(60 * minutes + GRACE, write)
    try:
        problems = run_parts(options, Deadline(60 * minutes), write)
    finally:
        watchdog.cancel()
    write(f"\n{len(problems)} problems." if problems else "\nNo problem.")
    for line in problems:
        write(f"- {line}")
    return 1 if problems else 0


def run_parts(options: argparse.Namespace, whole: Deadline, write: Callable[[str], None]) -> list[str]:
    """Run one part after the other, each with its share of the time that is left; what went wrong."""
    device = torch.device("cpu" if options.dry_run else "cuda")
    problems: list[str] = []
    for i, name in enumerate(options.parts):
        title, part, share = PARTS[name]
        seconds = max(0.0, whole.left()) * share / sum(PARTS[later][2] for later in options.parts[i:])
        write(f"\n### {title}")
        run = Run(device, options.dry_run, Deadline(seconds), write, options)
        start = time.perf_counter()
        try:
            part(run)
        except Exception as error:  # the other parts still have their time
            write(f"\nThis failed: {run.failed(name, error)}")
        write(f"\n`--parts {name}`: {time.perf_counter() - start:.0f} s of {seconds:.0f} s")
        problems += run.problems
    return problems


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options, checked."""
    lines = __doc__.splitlines()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=lines[0])
    parser.add_argument("--parts", default=",".join(PARTS), help="some of them, with commas (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=8.5, help="for all parts together (default: %(default)s)")
    parser.add_argument("--output", help="a file that the tables are written to, too")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on a CPU")
    options = parser.parse_args(arguments)
    options.parts = [name for name in options.parts.split(",") if name]
    unknown = [name for name in options.parts if name not in PARTS]
    if unknown or not options.parts:
        parser.error(f"--parts takes {', '.join(PARTS)}; got {', '.join(unknown) or 'none'}")
    return options


def machine(dry: bool) -> str:
    """The card and the versions, in words."""
    card = "none, a dry run on a CPU; its numbers mean nothing" if dry else torch.cuda.get_device_name()
    found = [f"Python {platform.python_version()}", f"torch {torch.__version__}"]
    for package in PACKAGES:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"no {package}")
    return f"card: {card}; {', '.join(found)}"


if __name__ == "__main__":
    sys.exit(main())
