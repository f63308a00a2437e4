"""Scan every decoder class of the installed transformers for faults, and write the table in benchmarks/SCAN.md.

    python -m benchmarks.scan [--only TYPE,TYPE] [--backends eager,sdpa] [--rows FILE ...]

Each class is built small and random and called with each argument that its signature names, with and without padding. What
comes out must equal an unpatched twin under explicit masks, or be an error of this package. Rows of the installed release
are replaced in the table. The exit code is 1 if an outcome has no explanation.
"""

import argparse
import json
import sys
import warnings

import torch
import transformers

from . import table
from .scan_release import read_rows, scan_release


def main() -> int:
    """Scan, write the table, and say what has no explanation."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scan", description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", metavar="TYPE,TYPE", help="these model types alone; the table is not written")
    parser.add_argument("--backends", default="eager,sdpa", help="of the patched model (eager,sdpa)")
    parser.add_argument("--rows", nargs="+", metavar="FILE", help="scan nothing; the table of what earlier runs have printed")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    only = {each for each in options.only.split(",") if each}
    rows = read_rows(options.rows or ())
    for row in () if options.rows else scan_release(only, tuple(options.backends.split(","))):
        print(json.dumps(row._asdict()), flush=True)
        rows.append(row)
    section, unexplained = table.section(rows)
    if only:
        print(section)
    else:
        table.write(section)
    for line in unexplained:
        print("no explanation:", line)
    return bool(unexplained)


if __name__ == "__main__":
    sys.exit(main())
