"""What is shipped, and that it speaks of no machine."""

import ast
import inspect
import os
import re
import shutil
import subprocess
import sys
import zipfile
from email import message_from_string

import pytest

import bidirect_patch

from .helpers.paths import ROOT
from .helpers.source_tree import sources

PACKAGE = ROOT / "bidirect_patch"


MACHINE = re.compile(r"(?<![\w.~$}>])/(?:work|root|opt|home|tmp|mnt)/[\w.]|python[h]osted|(?:pypi|npmjs)\.org")


def test_no_file_names_a_machine():
    texts = [ROOT / name for name in ("README.md", "setup.cfg", "setup.py", ".ci/run", ".ruff.toml", ".gitignore")]
    for folder in ("bidirect_patch", "tests", "benchmarks"):
        texts += [path for path in (ROOT / folder).rglob("*") if path.suffix in {".py", ".md", ".sh", ".txt", ".toml"}]
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in texts
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if MACHINE.search(line)
    ]
    assert not found, "\n".join(found)


def test_a_machine_would_be_seen():
    slash = "/"
    for path in ("work/main/x.py", "root/.cache", "tmp/run7", "home/me/data"):
        assert MACHINE.search(f"open('{slash}{path}')")
    assert MACHINE.search("files.python" + "hosted.org")
    assert not MACHINE.search(slash.join(("see https:", "", "github.com", "some", "work", "tree and $HOME", "work", "x")))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel built from a copy of the checkout, so that no build folder is left in it."""
    copy, out = tmp_path_factory.mktemp("checkout"), tmp_path_factory.mktemp("wheel")
    shutil.copytree(PACKAGE, copy / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "tests", copy / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    build = f"from setuptools import build_meta; build_meta.build_wheel({str(out)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=copy, check=True, capture_output=True, text=True)
    (path,) = out.iterdir()
    with zipfile.ZipFile(path) as archive:
        yield archive


def info(wheel: zipfile.ZipFile, name: str) -> str:
    return wheel.read(f"bidirect_patch-{bidirect_patch.__version__}.dist-info/{name}").decode()


def test_wheel_holds_the_whole_package_and_nothing_else(wheel):
    shipped = {name for name in wheel.namelist() if ".dist-info/" not in name}
    there = {path.relative_to(ROOT).as_posix() for path in PACKAGE.rglob("*") if path.is_file()}
    assert shipped == {name for name in there if "__pycache__" not in name}
    assert {"bidirect_patch/py.typed", "bidirect_patch/cli/README.md"} <= shipped
    assert "Apache License" in info(wheel, "licenses/LICENSE")


def test_wheel_metadata(wheel):
    metadata = message_from_string(info(wheel, "METADATA"))
    assert metadata["Version"] == bidirect_patch.__version__
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["License"] == "Apache-2.0"
    assert {"train", "flash", "simcse", "test", "dev"} <= set(metadata.get_all("Provides-Extra"))
    core = {re.split(r"\W", line)[0] for line in metadata.get_all("Requires-Dist") if "extra ==" not in line}
    assert core == {"torch", "transformers", "wrapt"}


def test_version_stands_in_one_place():
    literal = re.compile(rf"['\"\s=]{re.escape(bidirect_patch.__version__)}['\"\s]")
    files = [ROOT / "setup.cfg", ROOT / "setup.py", *PACKAGE.rglob("*.py")]
    assert [path.name for path in files if literal.search(path.read_text())] == ["__init__.py"]


def test_wheel_runs_without_the_checkout(wheel, tmp_path):
    """The console script and the plugin, from the unpacked wheel alone, in an empty folder."""
    site = tmp_path / "site"
    wheel.extractall(site)
    empty = tmp_path / "empty"
    empty.mkdir()
    code = """
        from importlib.metadata import distribution
        points = {point.group: point for point in distribution("bidirect-patch").entry_points}
        plugin = points["pytest11"].load()
        assert plugin.bidirectional_model and plugin.__file__.startswith(SITE), plugin.__file__
        points["console_scripts"].load()(["--help"])
    """
    code = f"SITE = {str(site)!r}\n" + "\n".join(line.strip() for line in code.splitlines())
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=empty,
        env=os.environ | {"PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    for command in ("demo", "check", "mntp"):
        assert command in run.stdout


def test_every_import_is_declared(wheel):
    """A third-party module that the package imports belongs to a requirement, of the core or of an extra."""
    lines = message_from_string(info(wheel, "METADATA")).get_all("Requires-Dist")
    declared = {re.match(r"[\w-]+", line)[0].replace("-", "_") for line in lines}
    # What transformers requires itself:
    declared |= {"numpy", "huggingface_hub", "packaging", "safetensors", "tokenizers", "tqdm"}
    for module, path in sources(PACKAGE).items():
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            foreign = {name.split(".")[0] for name in names} - sys.stdlib_module_names - {"bidirect_patch"}
            assert foreign <= declared, f"{module}: {foreign - declared}"


@pytest.mark.parametrize("name", [name for name in bidirect_patch.__all__ if not name.startswith("_")])
def test_the_public_face_is_typed_and_explained(name):
    thing = getattr(bidirect_patch, name)
    assert thing.__doc__
    function = thing.__init__ if inspect.isclass(thing) else thing
    if inspect.isfunction(function):
        parameters = list(inspect.signature(function).parameters.values())[inspect.isclass(thing) :]
        assert not [parameter.name for parameter in parameters if parameter.annotation is parameter.empty]
        assert inspect.isclass(thing) or "return" in function.__annotations__


def test_readme_commands_are_the_ones_that_ci_runs():
    """Each of the two is one line of the README, of torch's exact version; .ci/run takes them from there."""
    readme = (ROOT / "README.md").read_text().splitlines()
    script = (ROOT / ".ci" / "run").read_text()
    for end in ("-m bidirect_patch demo", "-m pytest -n 2 --dist worksteal"):
        (line,) = [line for line in readme if line.startswith("python3 -m venv") and line.endswith(end)]
        assert "torch==2.13.0" in line
        assert f'readme "{end}"' in script
