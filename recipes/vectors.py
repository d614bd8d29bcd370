"""What `embed` writes as vectors come: arrays for numpy, or a Parquet table with a line for each row."""

import zipfile
from collections.abc import Callable, Iterator
from typing import IO, TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class Row(NamedTuple):
    """A sequence that was read: what it is called and where it is."""

    name: str
    chrom: str
    start: int
    end: int
    strand: str


class Vectors(NamedTuple):
    """The vectors of rows, to be written as they come: parts (k, width), one after the other.

    A row has one vector or, per_base, one for each of its bases; `total` is how many there are in all.
    """

    rows: list[Row]
    parts: Iterator["NDArray[np.float32]"]
    total: int
    width: int
    per_base: bool


def write_npz(file: IO[bytes], vectors: Vectors) -> None:
    """Write the arrays as numpy.savez does; the vectors go to the file as they come."""
    import numpy as np
    from numpy.lib import format as npy

    columns = _columns(vectors.rows)
    if vectors.per_base:
        columns["offsets"] = np.concatenate([[0], np.cumsum(columns["end"] - columns["start"])])
    with zipfile.ZipFile(file, "w") as archive:
        for key, values in columns.items():
            with archive.open(f"{key}.npy", "w") as member:
                npy.write_array(member, values)  # type: ignore[no-untyped-call]
        with archive.open("embeddings.npy", "w", force_zip64=True) as member:
            shape = (vectors.total, vectors.width)
            header = {"descr": "<f4", "fortran_order": False, "shape": shape}
            npy.write_array_header_1_0(member, header)  # type: ignore[no-untyped-call]
            for part in vectors.parts:
                member.write(part.astype("<f4").tobytes())


def write_parquet(file: IO[bytes], vectors: Vectors) -> None:
    """Write a table with a line a row; `embedding` is its vector or, per base, the list of its vectors.

    A group of lines goes to the file as soon as its vectors are there.
    """
    import numpy as np
    import pyarrow as pa
    from pyarrow import parquet

    rows, width, per_base = vectors.rows, vectors.width, vectors.per_base
    vector = pa.list_(pa.float32(), width)
    fields = [("name", pa.string()), ("chrom", pa.string()), ("start", pa.int64()), ("end", pa.int64())]
    fields += [("strand", pa.string()), ("embedding", pa.large_list(vector) if per_base else vector)]
    schema = pa.schema(fields)
    lengths = [row.end - row.start if per_base else 1 for row in rows]
    waiting: list[NDArray[np.float32]] = []
    done = ready = 0
    with parquet.ParquetWriter(file, schema) as table:
        for part in vectors.parts:
            waiting.append(part)
            ready += len(part)
            group = done
            while group < len(rows) and lengths[group] <= ready:
                ready -= lengths[group]
                group += 1
            if group == done:
                continue
            have = np.concatenate(waiting)
            used = len(have) - ready
            cells: Any = pa.FixedSizeListArray.from_arrays(pa.array(have[:used].ravel()), width)
            if per_base:
                offsets = np.concatenate([[0], np.cumsum(lengths[done:group])])
                cells = pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), cells)
            columns = [pa.array(values) for values in _columns(rows[done:group]).values()]
            table.write_table(pa.Table.from_arrays([*columns, cells], schema=schema))
            waiting, done = [have[used:]], group


def _columns(rows: list[Row]) -> "dict[str, NDArray[Any]]":
    import numpy as np

    return {key: np.array(values) for key, values in zip(Row._fields, zip(*rows, strict=True), strict=True)}


FORMATS: dict[str, Callable[[IO[bytes], Vectors], None]] = {".npz": write_npz, ".parquet": write_parquet}
