"""The verb `import`: another layout's model, here or on the Hugging Face Hub, as a model folder of this package."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from .export import DTYPES, OURS, write

NAME, SUMMARY = "import", "make a model folder of a model of transformers or state-spaces"


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint", help="a folder, a name that `mambazoo ls` lists, or owner/name of the Hub"
    )
    parser.add_argument("--output", type=Path, required=True, help="the folder to write")
    parser.add_argument(
        "--dtype", choices=DTYPES, default=None, help="of the weights; as they are by default"
    )


def run(arguments: Namespace) -> int:
    write(arguments.checkpoint, OURS, arguments.output, arguments.dtype)
    return 0
