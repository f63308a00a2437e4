"""Run what is measured on a GPU, and write the tables row by row.

    python -m benchmarks.gpu [--parts kernels,speed,patch,growth,ladder] [--minutes 8.5] [--output FILE] [--carried PARTS]
    python -m benchmarks.gpu --dry-run          (tiny sizes on a CPU: does it all run)
    python -m benchmarks.gpu --prepare PARTS --data FOLDER --model FOLDER [--gguf_file NAME]      (for the ladder)

Each part has a share of the minutes; what it doesn't use goes to the later ones. A part that runs alone has them all.
"""

import argparse
import importlib.metadata
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.gpu import carried, growth, kernels, ladder, native_flag, speed
from benchmarks.gpu.progress import Deadline, Run, stop_after, writer

PARTS: dict[str, tuple[str, Callable[[Run], None], float]] = {  # title, the part, its share of the time
    "kernels": ("Correctness on real kernels", kernels.part, 130),
    "speed": ("Speed and memory of an MNTP step", speed.part, 150),
    "patch": ("The patch beside the native flag", native_flag.part, 20),
    "growth": ("Growth to 32k tokens", growth.part, 40),
    "ladder": ("The ladder at the paper's size", ladder.part, 170),
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
    if options.prepare:
        for path in carried.prepare(Path(options.data), options.model, options.gguf_file, Path(options.prepare)):
            print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")
        return 0
    if not options.dry_run and not torch.cuda.is_available():
        print("There is no CUDA GPU here: --dry-run runs everything at tiny sizes on a CPU.", file=sys.stderr)
        return 2
    write = writer(options.output)
    write(f"Machine: {machine(options.dry_run)}.")
    minutes = DRY_MINUTES if options.dry_run else options.minutes
    watchdog = stop_after(60 * minutes + GRACE, write)
    try:
        with tempfile.TemporaryDirectory() as made_up:
            if options.dry_run and options.carried is None and "ladder" in options.parts:
                options.carried = dry_parts(Path(made_up))
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
    parser.add_argument("--carried", metavar="PARTS", help="ladder: the folder that --prepare wrote")
    parser.add_argument("--steps", type=int, default=1000, help="ladder: of each training (default: %(default)s)")
    parser.add_argument("--mntp_rate", type=float, default=5e-5, help="ladder: learning rate (default: %(default)s)")
    parser.add_argument("--simcse_rate", type=float, default=3e-5, help="ladder: learning rate (default: %(default)s)")
    parser.add_argument("--prepare", metavar="PARTS", help="write to this folder what the ladder needs, and stop")
    parser.add_argument("--data", help="--prepare: a folder with sts/*.csv and wikipedia.txt")
    parser.add_argument("--model", help="--prepare: a folder or hub name of a causal language model")
    parser.add_argument("--gguf_file", help="--prepare: the file in it, if the weights are a GGUF")
    options = parser.parse_args(arguments)
    options.parts = [name for name in options.parts.split(",") if name]
    unknown = [name for name in options.parts if name not in PARTS]
    if unknown or not options.parts:
        parser.error(f"--parts takes {', '.join(PARTS)}; got {', '.join(unknown) or 'none'}")
    if options.prepare and not (options.data and options.model):
        parser.error("--prepare needs --data and --model")
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


def dry_parts(folder: Path) -> str:
    """The parts of the demo's tiny model and a few made-up texts, through the same code as real ones."""
    import bidirect_patch

    (folder / "data" / "sts").mkdir(parents=True)
    lines = [
        f"Paragraph {i} says that {i} and {i + 1} are numbers. Nothing else is said here of {i}." for i in range(20)
    ]
    (folder / "data" / "wikipedia.txt").write_text("\n".join(lines), encoding="utf-8")
    rows = [f"The number {i} is here.,{'A' if i % 2 else 'No'} number {i} is seen.,{7 * i % 5}" for i in range(6)]
    for name in ("stsb-test", "sts2012"):
        table = "\n".join(["sentence1,sentence2,score", *rows])
        (folder / "data" / "sts" / f"{name}.csv").write_text(table, encoding="utf-8")
    demo = Path(bidirect_patch.__file__).parent / "demo_model"
    carried.prepare(folder / "data", demo, None, folder / "parts", most_bytes=500_000)
    return str(folder / "parts")


if __name__ == "__main__":
    sys.exit(main())
