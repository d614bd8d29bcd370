"""The line that every file holds: a folder imports only floors below it, data and models never meet."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# what each folder may import of the package
FLOORS = {
    "kernels": {"kernels"},
    "zoo": {"zoo", "kernels"},
    "datamodules": {"datamodules"},
    "checkpoints": {"checkpoints", "zoo", "kernels"},
    "recipes": {"recipes", "checkpoints", "zoo", "kernels", "datamodules"},
}
# kernels are torch and triton alone
KERNEL_IMPORTS = {"torch", "triton", *sys.stdlib_module_names}
FILES = [path for folder in FLOORS for path in sorted((ROOT / folder).glob("*.py"))]


def imports(path: Path) -> Iterator[tuple[int, str, list[str], bool]]:
    """Every import: how many dots, the module, the names, whether it is at the top of the file."""
    tree = ast.parse(path.read_text())
    top = set(map(id, tree.body))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            yield node.level, node.module or "", [alias.name for alias in node.names], id(node) in top
        elif isinstance(node, ast.Import):
            for alias in node.names:
                yield 0, alias.name, [], id(node) in top


def folders_of(level: int, module: str, names: list[str], own: str) -> set[str]:
    """The folders of the package that an import reaches into."""
    if level == 1:
        return {own}
    if level == 2:
        return {module.split(".")[0]} if module else {name for name in names if name in FLOORS}
    return set()


def test_there_are_files() -> None:
    assert len(FILES) > 30


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_file_imports_only_what_is_below_it(path: Path) -> None:
    own = path.parent.name
    for level, module, names, _ in imports(path):
        assert "*" not in names
        assert level <= 2
        assert not (level == 0 and module.split(".")[0] == "mambazoo"), (
            "imports inside the package are relative"
        )
        assert folders_of(level, module, names, own) <= FLOORS[own]
        if own == "kernels" and level == 0:
            assert module.split(".")[0] in KERNEL_IMPORTS


def test_folders_are_flat_and_only_the_root_is_a_package() -> None:
    for folder in FLOORS:
        nested = [path for path in (ROOT / folder).rglob("*.py") if path.parent != ROOT / folder]
        assert nested == []
        assert not (ROOT / folder / "__init__.py").exists()


def test_no_file_outgrows_its_idea() -> None:
    lengths = {path.relative_to(ROOT).as_posix(): len(path.read_text().splitlines()) for path in FILES}
    assert {name: length for name, length in lengths.items() if length > 450} == {}


@pytest.mark.parametrize(
    "name", ["cli", "find", "generate", "score", "embed", "dna", "device", "bench", "info"]
)
def test_verbs_that_read_recipes_start_without_torch(name: str) -> None:
    for _, module, _, top in imports(ROOT / "recipes" / f"{name}.py"):
        assert not (top and module.split(".")[0] in ("torch", "lightning", "numpy"))


def test_every_module_says_what_it_is_for() -> None:
    for path in FILES:
        assert ast.get_docstring(ast.parse(path.read_text())), f"{path} has no docstring"
