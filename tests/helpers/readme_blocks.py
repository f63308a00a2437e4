"""Run the Python blocks of a guide from top to bottom in one process, and compare what they print with the block after each.

python tests/helpers/readme_blocks.py README.md [FOLDER OTHER]

With FOLDER and OTHER, FOLDER is replaced by OTHER after the first block. A block whose package needs an environment of its own is
left out: tests/recipes/test_pylate.py runs it there.
"""

import contextlib
import doctest
import io
import re
import shutil
import sys

BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)

NEEDS_AN_ENVIRONMENT = ("from pylate import",)


def blocks(text):
    """(line, code, what it prints or None) of each Python block."""
    found = list(BLOCK.finditer(text))
    for block, after in zip(found, [*found[1:], None]):
        if block[1] == "python":
            is_shown = after is not None and after[1] == "text" and not text[block.end() : after.start()].strip()
            yield text[: block.start()].count("\n") + 2, block[2], after[2] if is_shown else None


def run(path, after_the_first=lambda: None):
    """Run all blocks but those for another environment, and `after_the_first` once; the number of outputs that were compared."""
    same, names, compared = doctest.OutputChecker().check_output, {"__name__": "__main__"}, 0
    with open(path) as file:
        text = file.read()
    for number, (line, code, shown) in enumerate(blocks(text)):
        if number == 1:
            after_the_first()
        if any(imported in code for imported in NEEDS_AN_ENVIRONMENT):
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile("\n" * (line - 1) + code, path, "exec"), names)
        if shown is not None:
            compared += 1
            if not same(shown, printed.getvalue(), doctest.ELLIPSIS):
                raise SystemExit(f"{path}, line {line} prints:\n{printed.getvalue()}\nand shows:\n{shown}")
    return compared


def replace(folder, other):
    shutil.rmtree(folder)
    shutil.copytree(other, folder)


if __name__ == "__main__":
    readme, *folders = sys.argv[1:]
    print(run(readme, lambda: replace(*folders) if folders else None))
