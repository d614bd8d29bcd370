"""The verb `export`: a model in the layout that other software reads, and up to the Hugging Face Hub."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

NAME, SUMMARY = "export", "write a model in the layout of transformers, of state-spaces, or our own"
# ours is the one that is not in checkpoints/hub.py
OURS = "safetensors"
FORMATS = ("transformers", "state-spaces", OURS)
DTYPES = ("float32", "bfloat16", "float16")


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint", help="a run, a model folder, a .ckpt file, a name, or owner/name of the Hub"
    )
    parser.add_argument("--format", choices=FORMATS, default=OURS)
    parser.add_argument("--output", type=Path, required=True, help="the folder to write")
    parser.add_argument(
        "--dtype", choices=DTYPES, default=None, help="of the weights; as they are by default"
    )
    parser.add_argument("--push", metavar="OWNER/NAME", help="upload the folder to the Hugging Face Hub")


def run(arguments: Namespace) -> int:
    write(arguments.checkpoint, arguments.format, arguments.output, arguments.dtype)
    if arguments.push:
        from ..checkpoints.remote import push_to_hub

        print(push_to_hub(arguments.output, arguments.push))
    return 0


def write(checkpoint: str, layout: str, folder: Path, dtype: str | None = None) -> None:
    """Write a model to a folder in a layout, and say what is there.

    Raises:
        ValueError: when the folder is something else than a model, or the layout cannot say what the model is.
    """
    import torch

    from ..checkpoints.files import check_replaced
    from ..checkpoints.io import export, read, save
    from ..checkpoints.remote import CARD, TOKENIZER
    from ..datamodules.vocab import Bytes, vocabulary_from_dict
    from ..zoo.optim import is_state_space

    folder = folder.expanduser()
    try:
        check_replaced(folder)
    except ValueError as error:
        raise ValueError(f"--output: {error}") from None
    stored = read(checkpoint)
    if dtype is not None:
        wanted = getattr(torch, dtype)
        # what has several names stays one
        cast = {(value.data_ptr(), value.shape): value.to(wanted) for value in stored.weights.values()}
        stored = stored._replace(
            weights={
                name: value if is_state_space(name) else cast[value.data_ptr(), value.shape]
                for name, value in stored.weights.items()
            }
        )
    texts = {}
    if stored.place.is_dir() and (stored.place / CARD).is_file():
        texts[CARD] = (stored.place / CARD).read_text(encoding="utf-8")
    if layout == OURS:
        save(stored, folder, texts)
    else:
        words = None if stored.vocabulary is None else vocabulary_from_dict(stored.vocabulary)
        if isinstance(words, Bytes):
            # others know a vocabulary by its tokenizer.json alone
            texts[TOKENIZER] = words.as_subwords().to_dict()["json"]
        export(stored, layout, folder, texts, None if words is None else words.eos)
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"{folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}, {size / 1e6:,.1f} MB")
