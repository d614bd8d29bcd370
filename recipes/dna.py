"""What the verbs that use a model of DNA have in common: the model, the genome, and paths that are checked first."""

import os
from argparse import ArgumentParser
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..datamodules.genome import Genome
    from ..zoo.task import Task


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint", help="a model folder, a .ckpt file, a run, or runs/<recipe> for its newest run"
    )
    parser.add_argument(
        "--fasta", required=True, help="the genome: a FASTA or GenBank file, plain or packed, or sample:NAME"
    )
    parser.add_argument("--device", default=None, help="cuda where there is one, else cpu")


def load_model(checkpoint: str, device: str | None, *, scores: bool = False) -> "Task":
    """The model of DNA that a checkpoint holds, on its device; `scores` says that it is to tell bases.

    Raises:
        ValueError: when its tokens are not those of datamodules/alphabet.py, or see check_objective.
    """
    from ..checkpoints.io import load
    from ..datamodules.alphabet import SIZE
    from .device import to_device

    model, vocabulary = load(checkpoint)
    if (vocabulary or {}).get("kind") != "nucleotides" or model.hparams.get("vocab_size") != SIZE:
        raise ValueError(f"{checkpoint} is a {type(model).__name__} that does not read DNA")
    if scores:
        check_objective(checkpoint, model, vocabulary)
    return to_device(model, device)


def check_objective(checkpoint: str, model: Any, vocabulary: dict[str, Any] | None) -> None:
    """Raise ValueError for a causal model that has learnt to tell masked bases and is asked for the next one."""
    if (vocabulary or {}).get("objective") == "masked" and model.backbone.config.causal:
        raise ValueError(
            f"{checkpoint} has learnt to tell masked bases by those before them, and no next base: train it with "
            "data.objective=next or, to score substitutions, with model.backbone.bidirectional=tied"
        )


def open_genome(given: str) -> "Genome":
    """The genome of --fasta, read into the cache when it is first asked for."""
    from ..datamodules.genome import find_genomes

    [files] = find_genomes([given], "--fasta")
    files.build()
    return files.open()


def check_input(given: str, option: str) -> Path:
    """The path of a file to read.

    Raises:
        FileNotFoundError, ValueError: when it is not there, or may not be read.
    """
    path = Path(given).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"{option}: there is no file {given}")
    if not os.access(path, os.R_OK):
        raise ValueError(f"{option}: {given} may not be read")
    return path


def check_output(given: str, *endings: str) -> Path:
    """The path of --output.

    Raises:
        ValueError: when it does not end in what can be written, or its folder cannot be written to.
    """
    path = Path(given).expanduser()
    if endings and not path.name.endswith(endings):
        raise ValueError(f"--output: {given} must end in {' or '.join(endings)}")
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise ValueError(f"--output: {given} cannot be written; is its folder there?")
    return path
