"""Which module of the package imports which: the folders stand in layers, and nothing goes around them."""

import ast
import re
from graphlib import CycleError, TopologicalSorter

import pytest

import bidirect_patch

from .helpers.paths import ROOT
from .helpers.source_tree import imports, sources

pytestmark = pytest.mark.slow  # the same on every release of transformers

FACE = "bidirect_patch"
PACKAGE = ROOT / FACE

# What each folder, or module beside the folders, may import. "face" is `bidirect_patch/__init__.py`.
BELOW = {"errors", "swap", "model", "attention", "verify", "checkpoints"}
ALLOWED = {
    "errors": set(),
    "swap": {"errors"},
    "model": {"errors", "swap"},
    "attention": {"errors", "swap", "model"},
    "verify": {"errors", "swap", "model", "attention"},
    "checkpoints": {"errors", "swap", "model", "attention", "verify"},
    "checks": BELOW,
    "transition": BELOW | {"checks"},
    "block": BELOW | {"checks", "transition"},
    "patch": BELOW | {"checks", "transition", "block"},
    "auto": BELOW | {"patch"},
    "mntp": BELOW - {"checkpoints"} | {"patch"},
    "head": {"mntp"},
    "encoder": {"errors"},
    "llm2vec": BELOW | {"patch"},
    "architectures": {"errors"},
    "cli": BELOW | {"face", "patch", "auto", "mntp", "head", "encoder", "architectures"},
    "face": set(),
    "pytest_plugin": {"face"},
    "__main__": {"cli"},
}

# Where a module of the package is imported by its name in a string, which no import statement shows.
BY_NAME = {
    ("bidirect_patch", "_install_hooks"),  # once PEFT is there
    ("bidirect_patch", "_install_reopening"),  # once sentence-transformers is there
    ("bidirect_patch", "__getattr__"),  # names that load on first use
    ("bidirect_patch.cli", "_dispatch"),  # the command that was asked for
    ("bidirect_patch.encoder.reopening", "_class_of"),  # a class that a modules.json names
}

# Callables that a lower folder is handed or keeps. By them, code of an upper folder could run below.
LOWER = ("swap", "model", "attention", "verify", "checkpoints")
CALLABLES = {
    "attention.recompute._Checkpoint.__call__.function",  # a layer's own forward, as transformers checkpoints it
    "attention.recompute._Checkpoint.__init__.checkpoint",  # transformers' checkpointing function
    "attention.recompute._Layer.__init__.function",  # as the first
    "model.facts.Function",  # any function about a class: `per_class` keeps what it returns
    "model.shrink.Limit",
    "model.shrink.Ratio",
    "swap.classes._bottom.return",  # the model's own forward
    "swap.classes.set_forward.forward",  # the mixin's forward, of attention or of verify
    "verify.probe._LayerHooks.reader_of.return",  # a forward hook of torch
}


def folder(module: str) -> str:
    """The folder of a module, or the module itself where it stands beside the folders."""
    return "face" if module == FACE else module.split(".")[1]


def order(graph: dict[str, set[str]]) -> list[str]:
    return list(TopologicalSorter(graph).static_order())


def too_high(graph: dict[str, set[str]], allowed: dict[str, set[str]]) -> list[str]:
    """Imports from one folder into another that the table does not allow."""
    return [
        f"{module} imports {name}"
        for module, imported in graph.items()
        for name in imported
        if folder(name) not in allowed[folder(module)] | {folder(module)}
    ]


def test_each_folder_imports_what_it_may():
    graph = imports(PACKAGE)
    assert {folder(module) for module in graph} == set(ALLOWED), "each folder has its line in the table"
    assert not too_high(graph, ALLOWED)


def test_the_table_has_no_cycle():
    assert order(ALLOWED)


def test_imports_point_one_way():
    """No cycle between modules: inside a folder, across folders, or by the names that the face loads on first use."""
    graph = imports(PACKAGE)
    lazily = {f"{FACE}.{module}" for module in bidirect_patch._HOME.values()}
    assert lazily <= set(graph)
    graph[FACE] |= lazily
    order(graph)
    assert not graph[f"{FACE}.errors"]
    for module, imported in graph.items():
        if not module.startswith((f"{FACE}.cli", f"{FACE}.__main__")):
            assert not [name for name in imported if name.startswith(f"{FACE}.cli")], f"{module} imports the commands"


@pytest.mark.parametrize(
    "line", ["from .b import x", "from . import b", "import pkg.b", "def f():\n from pkg import b"]
)
def test_a_cycle_would_be_seen(tmp_path, line):
    package = tmp_path / "pkg"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "a.py").write_text(f"from typing import TYPE_CHECKING\n{line}\n")
    (package / "b.py").write_text("from .a import y\n")
    with pytest.raises(CycleError):
        order(imports(package))
    (package / "b.py").write_text("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .a import y\n")
    assert order(imports(package)).index("pkg.b") < order(imports(package)).index("pkg.a")


@pytest.mark.parametrize(
    "line", ["from ..upper import x", "from .. import upper", "def f():\n from pkg.upper.x import y"]
)
def test_an_import_of_an_upper_folder_would_be_seen(tmp_path, line):
    for name in ("lower", "upper"):
        (tmp_path / "pkg" / name).mkdir(parents=True)
        (tmp_path / "pkg" / name / "__init__.py").write_text("")
    (tmp_path / "pkg" / "__init__.py").write_text("")
    (tmp_path / "pkg" / "upper" / "x.py").write_text("")
    (tmp_path / "pkg" / "lower" / "a.py").write_text(f"{line}\n")
    graph = imports(tmp_path / "pkg")
    del graph["pkg"]
    (found,) = too_high(graph, {"lower": set(), "upper": set()})
    assert found.startswith("pkg.lower.a imports pkg.upper")


def by_name(source: str) -> list[str]:
    """The functions ("" at the top) in which a module of the package is named by a string, or by what only a run shows."""
    found = []

    def walk(node: ast.AST, function: str) -> None:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            function = node.name
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if re.fullmatch(rf"{FACE}(\.\w+)+", node.value):
                found.append(function)
        if isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            names = node.args[1:2] if called == "register_post_import_hook" else node.args[:1]
            if called in ("import_module", "__import__", "find_spec", "register_post_import_hook"):
                for name in names:
                    foreign = isinstance(name, ast.Constant) and not re.match(rf"\.|{FACE}(\.|$)", str(name.value))
                    if not foreign:
                        found.append(function)
        for child in ast.iter_child_nodes(node):
            walk(child, function)

    walk(ast.parse(source), "")
    return found


def test_modules_are_named_in_strings_only_where_they_must():
    found = {(module, function) for module, path in sources(PACKAGE).items() for function in by_name(path.read_text())}
    assert found == BY_NAME


@pytest.mark.parametrize(
    "line",
    [
        'import_module("bidirect_patch.patch")',
        'importlib.import_module(f"{__name__}.patch")',
        'import_module(".patch", __package__)',
        "import_module(name)",
        'register_post_import_hook(f, "bidirect_patch.patch")',
        'NAMES = ["bidirect_patch.patch"]',
        '__import__("bidirect_patch")',
    ],
)
def test_a_module_in_a_string_would_be_seen(line):
    assert "f" in by_name(f"def f():\n    {line}\n")
    assert by_name(line)


@pytest.mark.parametrize(
    "line", ['import_module("peft")', 'register_post_import_hook(f, "peft.peft_model")', '"see bidirect_patch.auto"']
)
def test_other_strings_are_let_be(line):
    assert not by_name(line)


def callables(source: str) -> list[str]:
    """The names under which a callable is taken, returned or kept: what an annotation or an alias says is Callable."""
    found = []

    def is_one(annotation: ast.AST | None) -> bool:
        return annotation is not None and "Callable" in re.findall(r"\w+", ast.unparse(annotation))

    def walk(node: ast.AST, path: tuple[str, ...]) -> None:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            path = (*path, node.name)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            if is_one(node.returns):
                found.append(".".join((*path, "return")))
        if isinstance(node, ast.arg) and is_one(node.annotation):
            found.append(".".join((*path, node.arg)))
        if isinstance(node, ast.AnnAssign) and (is_one(node.annotation) or is_one(node.value)):
            found.append(".".join((*path, ast.unparse(node.target))))
        if isinstance(node, ast.Assign) and is_one(node.value):
            found.append(".".join((*path, ast.unparse(node.targets[0]))))
        for child in ast.iter_child_nodes(node):
            walk(child, path)

    walk(ast.parse(source), ())
    return found


@pytest.mark.parametrize("package", sorted(path.parent for path in PACKAGE.glob("*/__init__.py")), ids=lambda path: path.name)
def test_the_first_words_of_a_folder_name_files_that_are_there(package):
    text = ast.get_docstring(ast.parse((package / "__init__.py").read_text())) or ""
    named = set(re.findall(r"`([a-z_]+)`", text)) - {"load_llm2vec"}
    assert named <= {path.stem for path in package.iterdir()}


def test_lower_folders_are_handed_no_callables_but_these():
    found = {
        f"{module.removeprefix(f'{FACE}.')}.{name}"
        for module, path in sources(PACKAGE).items()
        if folder(module) in LOWER
        for name in callables(path.read_text())
    }
    assert found == CALLABLES


@pytest.mark.parametrize(
    "source, name",
    [
        ("def verify(decoder, enable: Callable[[Any], Any]): ...", "verify.enable"),
        ("def f(*, enable: 'Callable | None' = None): ...", "f.enable"),
        ("class Block:\n    enable: Callable[..., None]", "Block.enable"),
        ("class Block:\n    def __init__(self):\n        self.enable: Callable = None", "Block.__init__.self.enable"),
        ("Verb = Callable[[Any], Any]", "Verb"),
        ("def f() -> Callable[[], None]: ...", "f.return"),
    ],
)
def test_a_callable_would_be_seen(source, name):
    assert callables(source) == [name]
