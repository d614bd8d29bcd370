"""What `embed` writes as vectors come: arrays for numpy, or a Parquet table with a line for each row."""

import zipfile
from collections.abc import Callable, Iterator
from typing import IO, TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor


class Row(NamedTuple):
    """A sequence that was read: what it is called and where it is."""

    name: str
    chrom: str
    start: int
    end: int
    strand: str


Writer = Callable[
    [IO[bytes], list[Row], tuple[int, int], Iterator["Tensor"], Callable[[int], None], bool], None
]


def write_npz(
    file: IO[bytes],
    rows: list[Row],
    shape: tuple[int, int],
    vectors: Iterator["Tensor"],
    advance: Callable[[int], None],
    per_base: bool,
) -> None:
    """Write the arrays as numpy.savez does; the vectors go to the file as they come."""
    import numpy as np
    from numpy.lib import format as npy

    columns = _columns(rows)
    if per_base:
        columns["offsets"] = np.concatenate([[0], np.cumsum(columns["end"] - columns["start"])])
    with zipfile.ZipFile(file, "w") as archive:
        for key, values in columns.items():
            with archive.open(f"{key}.npy", "w") as member:
                npy.write_array(member, values)  # type: ignore[no-untyped-call]
        with archive.open("embeddings.npy", "w", force_zip64=True) as member:
            header = {"descr": "<f4", "fortran_order": False, "shape": shape}
            npy.write_array_header_1_0(member, header)  # type: ignore[no-untyped-call]
            for part in vectors:
                member.write(part.cpu().numpy().astype("<f4").tobytes())
                advance(len(part))


def write_parquet(
    file: IO[bytes],
    rows: list[Row],
    shape: tuple[int, int],
    vectors: Iterator["Tensor"],
    advance: Callable[[int], None],
    per_base: bool,
) -> None:
    """Write a table with a line a row; `embedding` is its vector or, per base, the list of its vectors.

    A group of lines goes to the file as soon as its vectors are there.
    """
    import numpy as np
    import pyarrow as pa
    from pyarrow import parquet

    vector = pa.list_(pa.float32(), shape[1])
    fields = [("name", pa.string()), ("chrom", pa.string()), ("start", pa.int64()), ("end", pa.int64())]
    fields += [("strand", pa.string()), ("embedding", pa.large_list(vector) if per_base else vector)]
    schema = pa.schema(fields)
    lengths = [row.end - row.start if per_base else 1 for row in rows]
    waiting: list[NDArray[np.float32]] = []
    done = ready = 0
    with parquet.ParquetWriter(file, schema) as table:
        for part in vectors:
            waiting.append(part.cpu().numpy().astype(np.float32))
            ready += len(part)
            group = done
            while group < len(rows) and lengths[group] <= ready:
                ready -= lengths[group]
                group += 1
            if group > done:
                have = np.concatenate(waiting)
                used = len(have) - ready
                cells: Any = pa.FixedSizeListArray.from_arrays(pa.array(have[:used].ravel()), shape[1])
                if per_base:
                    offsets = np.concatenate([[0], np.cumsum(lengths[done:group])])
                    cells = pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), cells)
                columns = [pa.array(values) for values in _columns(rows[done:group]).values()]
                table.write_table(pa.Table.from_arrays([*columns, cells], schema=schema))
                waiting, done = [have[used:]], group
            advance(len(part))


def _columns(rows: list[Row]) -> "dict[str, NDArray[Any]]":
    import numpy as np

    return {key: np.array(values) for key, values in zip(Row._fields, zip(*rows, strict=True), strict=True)}


FORMATS: dict[str, Writer] = {".npz": write_npz, ".parquet": write_parquet}
