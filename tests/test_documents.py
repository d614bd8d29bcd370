"""What the documents say of the code is there, and what they show was drawn."""

import ast
import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch
from mambazoo.kernels.reference import selective_scan

ROOT = Path(__file__).resolve().parents[1]
# a line of docs/mamba.md that says where an equation is computed
PLACES = re.compile(r"^- `(\w+/\w+\.py)`: (.+)$", re.MULTILINE)


def names_of(path: Path) -> set[str]:
    """The functions, classes and methods of a file."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
            if isinstance(node, ast.ClassDef):
                names |= {f"{node.name}.{own.name}" for own in node.body if isinstance(own, ast.FunctionDef)}
    return names


def test_the_functions_beside_the_equations_exist() -> None:
    text = (ROOT / "docs" / "mamba.md").read_text()
    places = PLACES.findall(text)
    assert len(places) > 15
    for path, names in places:
        found = names_of(ROOT / path)
        # in brackets stands how it is used
        for name in re.findall(r"`([\w.]+)`", names.partition(" (")[0]):
            assert name in found, f"{path} has no {name}"


@pytest.mark.parametrize("path", sorted((ROOT / "docs").glob("*.md")), ids=lambda path: path.name)
def test_the_pictures_of_a_document_are_there_and_small(path: Path) -> None:
    for picture in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", path.read_text()):
        assert 1000 < (path.parent / picture).stat().st_size < 200_000


def test_every_picture_is_shown() -> None:
    shown = {
        picture
        for path in (ROOT / "docs").glob("*.md")
        for picture in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", path.read_text())
    }
    assert {path.name for path in (ROOT / "docs").glob("*.png")} <= shown


@pytest.fixture
def plots() -> ModuleType:
    spec = importlib.util.spec_from_file_location("plots", ROOT / "docs" / "plots.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_pictures_are_drawn_again_the_same(
    plots: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plots, "STEPS", 2)
    monkeypatch.setattr(plots, "BATCH", 4)
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        monkeypatch.setattr(plots, "FOLDER", tmp_path / folder)
        plots.main()
    drawn = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert drawn == ["delta-memory.png", "s4d-kernel.png", "selective-copying-gates.png"]
    for name in drawn:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
        assert name in (ROOT / "docs" / "mamba.md").read_text()


def test_a_state_with_a_chosen_step_is_a_gate() -> None:
    v, u, one = torch.randn(1, 20, 1), torch.randn(1, 20, 1), torch.ones(1, 1)
    y, _ = selective_scan(u, v, -one, one, one, delta_softplus=True, discretization="zoh")
    h, gate = torch.zeros(()), torch.sigmoid(v)
    for t in range(20):
        h = (1 - gate[0, t]) * h + gate[0, t] * u[0, t]
        torch.testing.assert_close(y[0, t], h)
