"""The modules of a package as files, and what each imports, read from the source without running it."""

import ast
from pathlib import Path


def sources(package: Path) -> dict[str, Path]:
    """Dotted module name -> file, for every module of a package directory."""
    modules = {}
    for path in package.rglob("*.py"):
        parts = path.relative_to(package.parent).with_suffix("").parts
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return modules


def imports(package: Path) -> dict[str, set[str]]:
    """Module -> the package's modules it imports, at the top or inside a function, but for types alone."""
    modules = sources(package)
    graph = {}
    for module, path in modules.items():
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                node.body = []
        graph[module] = found = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                found.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                here = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
                base = here[: len(here) + 1 - node.level] if node.level else []
                base = ".".join(base + ([node.module] if node.module else []))
                for alias in node.names:
                    name = f"{base}.{alias.name}"
                    found.add(name if name in modules else base)
        found &= set(modules)
        found.discard(module)
    return graph
