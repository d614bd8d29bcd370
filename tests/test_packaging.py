"""What an install puts where: a wheel of one folder, beside which other packages live."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return next(folder.glob("*.whl"))


def test_the_wheel_is_one_folder_and_holds_recipes(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    # nothing called kernels, which is another project's name, at the top
    assert {top for top in tops if not top.endswith(".dist-info")} == {"mambazoo"}
    for needed in (
        "py.typed",
        "__main__.py",
        "recipes/language/demo.yaml",
        "recipes/trainer/default.yaml",
        "kernels/scan.py",
    ):
        assert f"mambazoo/{needed}" in names
    assert {path.name for path in (ROOT / "checkpoints").iterdir() if path.suffix != ".pyc"} - {
        "__pycache__"
    } <= {name.split("/")[2] for name in names if name.startswith("mambazoo/checkpoints/")}
    assert not any("test" in name for name in names)


def test_the_wheel_runs(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = "import mambazoo, sys; sys.exit(0 if mambazoo.__file__.startswith(sys.argv[1]) else 1)"
    run = {"cwd": tmp_path, "check": True, "capture_output": True, "text": True}
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], **run)  # type: ignore[call-overload]
    listed = subprocess.run([sys.executable, "-m", "mambazoo", "ls"], **run)  # type: ignore[call-overload]
    assert "language/demo" in listed.stdout


def test_the_public_face_is_what_it_says() -> None:
    import mambazoo

    for name in mambazoo.__all__:
        assert getattr(mambazoo, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = mambazoo.nothing
    assert set(mambazoo.__all__) <= set(dir(mambazoo))


def test_importing_does_nothing() -> None:
    code = "import mambazoo, sys; sys.exit('torch' in sys.modules or 'omegaconf' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
