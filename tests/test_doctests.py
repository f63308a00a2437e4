"""The examples in the package's docstrings."""

import doctest
import importlib

import pytest

from .helpers.paths import ROOT

pytestmark = pytest.mark.slow  # the same on every release of transformers

PACKAGE = ROOT / "bidirect_patch"
# The commands have no examples; importing `__main__` runs one.
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in PACKAGE.rglob("*.py")
    if "cli" not in path.relative_to(PACKAGE).parts and path.name != "__main__.py"
)


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        if (error.name or "").startswith("bidirect_patch"):
            raise
        pytest.skip(f"{error.name} isn't installed")
    found = doctest.testmod(module)
    assert found.failed == 0
    with open(module.__file__, encoding="utf-8") as file:
        assert (found.attempted > 0) == (">>> " in file.read()), "an example that no run of doctest sees"


def test_the_public_functions_have_examples():
    """A check on the list above: these modules are in it, and each has examples."""
    shown = {"mntp.collator", "mntp.head", "mntp.metrics", "patch", "verify.report"}
    shown |= {"llm2vec.load", "llm2vec.reading", "model.shrink", "model.tiny", "model.wrappers"}
    assert {f"bidirect_patch.{name}" for name in shown} <= set(MODULES)
    for name in shown:
        assert ">>> " in (PACKAGE / f"{name.replace('.', '/')}.py").read_text(encoding="utf-8"), name
