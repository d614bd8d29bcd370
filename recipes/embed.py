"""The verb `embed`: a model's vectors of the records of a genome, or of intervals of it, in one file.

    embeddings                        (rows, d) float32; without pooling (bases, d), row after row
    offsets                           (rows + 1,): where the bases of each row are, without pooling
    name, chrom, start, end, strand   (rows,): what each row is of, as in BED

A Parquet file has the columns name to strand and, as `embedding`, each row's vector or list of vectors. A sequence on
the strand - is read from that side, and so are its bases.
"""

import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from .dna import add_arguments as add_common_arguments
from .dna import check_input, check_output, load_model, open_genome
from .vectors import FORMATS, Row, Vectors

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from ..datamodules.genome import Genome
    from ..zoo.vectors import VectorReader

NAME, SUMMARY = "embed", "write a model's vectors of sequences of DNA"


def add_arguments(parser: ArgumentParser) -> None:
    add_common_arguments(parser)
    parser.add_argument(
        "--bed", help="intervals of the genome, one for each row, on the strand in column 6; else its records"
    )
    parser.add_argument("--output", required=True, help="arrays for numpy (.npz), or a table (.parquet)")
    parser.add_argument(
        "--pool",
        choices=("mean", "last", "none"),
        default="mean",
        help="of a sequence's vectors their mean, the last, or every one",
    )
    parser.add_argument(
        "--window", type=int, default=1 << 16, help="bases to read at a time; a causal model reads on and on"
    )


def run(arguments: Namespace) -> int:
    if arguments.window < 1:
        raise ValueError(f"--window must be 1 or more, not {arguments.window}")
    path = check_output(arguments.output, *FORMATS)
    if path.suffix == ".parquet" and find_spec("pyarrow") is None:
        raise ValueError("--output: Parquet needs pyarrow: pip install 'mambazoo[parquet]', or write .npz")
    bed = None if arguments.bed is None else check_input(arguments.bed, "--bed")

    import torch

    from ..datamodules.alphabet import EOS
    from ..zoo.saving import write_whole
    from ..zoo.tokens import TokenModel
    from ..zoo.vectors import VectorReader
    from .bar import progress
    from .device import autocast

    model: Any = load_model(arguments.checkpoint, arguments.device)
    if getattr(model, "patches", None) is not None:
        raise ValueError(f"{arguments.checkpoint} reads patches of bases and has no vector for each")
    genome = open_genome(arguments.fasta)
    rows = _rows(genome, bed)
    config, bases = model.backbone.config, sum(row.end - row.start for row in rows)
    if not config.causal:
        _refuse_long(rows, arguments.window)
    # what predicts the next base has been told where sequences begin
    start = EOS if config.causal and isinstance(model, TokenModel) else None
    reader = VectorReader(model.embedding, model.backbone, arguments.pool, start)
    per_base = arguments.pool == "none"
    count = bases if per_base else len(rows)
    started = time.monotonic()

    def write(file: IO[bytes]) -> None:
        with progress("embedding", count) as advance, autocast(model.device):

            def parts() -> Iterator["NDArray[np.float32]"]:
                for part in _vectors(reader, genome, rows, arguments.window):
                    yield part.float().cpu().numpy()
                    advance(len(part))

            FORMATS[path.suffix](file, Vectors(rows, parts(), count, config.d_model, per_base))

    try:
        write_whole(path, write)
    except OSError as error:
        if not isinstance(error.__cause__, torch.OutOfMemoryError):
            raise
        raise ValueError(
            f"{arguments.window} bases at a time do not fit the memory of the GPU: give a smaller --window"
        ) from None
    seconds = time.monotonic() - started
    print(f"{len(rows)} sequences embedded: {path}")
    print(f"{bases} bases in {seconds:.1f} s, {bases / max(seconds, 1e-9):,.0f} a second", file=sys.stderr)
    return 0


def _rows(genome: "Genome", bed: Path | None) -> list[Row]:
    from ..datamodules.intervals import is_reverse, locate, read_bed

    if bed is None:
        return [Row(name, name, 0, genome.length(name), "+") for name in genome.names]
    lines = read_bed(bed)
    locate(bed, lines, [genome])
    rows = []
    for line in lines:
        record, start, end = line.interval
        name = "".join(line.fields[:1]) or f"{record}:{start}-{end}"
        rows.append(Row(name, record, start, end, "-" if is_reverse(bed, line) else "+"))
    return rows


def _refuse_long(rows: list[Row], window: int) -> None:
    for row in rows:
        if row.end - row.start > window:
            raise ValueError(
                f"--window: a model that sees both sides reads a sequence at once, and {row.name} has "
                f"{row.end - row.start} bases: give shorter ones in --bed, or a --window as long"
            )


def _vectors(reader: "VectorReader", genome: "Genome", rows: list[Row], window: int) -> "Iterator[Tensor]":
    """The vectors of all rows in their order; those that fit a window together are read in one pass."""
    batch: list[Tensor] = []
    room = window
    for row in rows:
        length = row.end - row.start
        if batch and length > room:
            yield reader.whole(batch)
            batch, room = [], window
        if length > window:
            cuts = range(0, length, window)
            yield from reader.onward(_tokens(genome, row, at, min(at + window, length)) for at in cuts)
        else:
            batch.append(_tokens(genome, row, 0, length))
            room -= length
    if batch:
        yield reader.whole(batch)


def _tokens(genome: "Genome", row: Row, start: int, end: int) -> "Tensor":
    """Tokens `start` to `end` of a row, in the direction it is read in."""
    import torch

    from ..datamodules.alphabet import reverse_complement, tokens_of

    if row.strand == "-":
        start, end = row.end - row.start - end, row.end - row.start - start
    sequence = genome.read(row.chrom, row.start + start, row.start + end)
    return torch.from_numpy(tokens_of(reverse_complement(sequence) if row.strand == "-" else sequence)).long()
