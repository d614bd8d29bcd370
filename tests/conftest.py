"""What every test starts from: a seed, a cache of its own, memory that is never silently zero."""

import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

ROOT = Path(__file__).resolve().parents[1]
# recorded values and real corpora; tests that need them skip where they are not
DATA = Path(os.environ.get("MAMBAZOO_TEST_DATA") or ROOT.parent / "shared" / "data")

# a shell has what it runs in the background ignore interrupts, and so would all that is started here
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Corpora are cached for one session of tests, away from the user's."""
    monkeypatch.setenv("MAMBAZOO_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.delenv("MAMBAZOO_BACKEND", raising=False)
    monkeypatch.delenv("MAMBAZOO_RUN", raising=False)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Memory that is not initialised is NaN, so that what a kernel forgets to write is seen."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def data() -> Path:
    """The folder of recorded values and real corpora."""
    if not DATA.is_dir():
        pytest.skip(f"needs the reference data in {DATA.name}, or MAMBAZOO_TEST_DATA")
    return DATA


@pytest.fixture
def genome(tmp_path: Path) -> Path:
    """A FASTA file of three records of a thousand random bases."""
    draw, path = random.Random(0), tmp_path / "genome.fa"
    records = ("".join(draw.choices("ACGT", k=1000)) for _ in range(3))
    path.write_text("".join(f">chr{i} of a genome\n{bases}\n" for i, bases in enumerate(records)))
    return path


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    """A table of a hundred labelled sequences: those of class b have a motif."""
    draw, path = random.Random(1), tmp_path / "labelled.tsv"
    rows = ["sequence\tlabel"]
    for i in range(100):
        bases = "".join(draw.choices("ACGT", k=24))
        rows.append(f"{bases[:12]}{'AAGCAAGCA' if i % 2 else ''}{bases[12:]}\t{'ab'[i % 2]}")
    path.write_text("\n".join(rows))
    return path


@pytest.fixture
def sounds(tmp_path: Path) -> Path:
    """A folder of six tones for each of two classes, named as in Speech Commands: a speaker each."""
    for label, pitch in (("low", 200), ("high", 1500)):
        (tmp_path / "sounds" / label).mkdir(parents=True)
        for take in range(6):
            wave = np.sin(2 * np.pi * (pitch + 10 * take) * np.arange(2000) / 8000)
            path = tmp_path / "sounds" / label / f"{take:08x}_nohash_0.flac"
            soundfile.write(path, 0.3 * wave, 8000)
    return tmp_path / "sounds"


@pytest.fixture
def reviews(tmp_path: Path) -> Path:
    """A folder like aclImdb: forty reviews to train on and ten to test on, half of them good, and one of no class."""
    folder = tmp_path / "reviews"
    for i in range(50):
        label = ("neg", "pos")[i % 2]
        path = folder / ("train" if i < 40 else "test") / label / f"{i}_{i % 10}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            f"Film number {i} is {('dull', 'fine')[i % 2]}{'!' * i} \u2013 say {'we' * (i % 7)}.\n"
        )
    (folder / "train" / "unsup").mkdir()
    (folder / "train" / "unsup" / "0_0.txt").write_text("Who knows.")
    return folder


@pytest.fixture
def cifar(tmp_path: Path) -> Path:
    """A folder like cifar-10-batches-bin: two files of twenty random pictures to train on, and one to test on."""
    draw, folder = np.random.default_rng(0), tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    for name in ("data_batch_1", "data_batch_2", "test_batch"):
        rows = draw.integers(0, 256, (20, 3073), dtype=np.uint8)
        rows[:, 0] = np.arange(20) % 10
        (folder / f"{name}.bin").write_bytes(rows.tobytes())
    return folder


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """A folder of thirty small documents."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(30):
        lines = [f"def f{i}_{j}(x):\n    return x + {i * j}\n" for j in range(40)]
        (folder / f"module_{i:02}.py").write_text("\n".join(lines))
    return folder
