"""Writers of feature files: `.npy` with a list of image paths beside it, or `.parquet`.

Rows are appended batch by batch to temporary files, which get their final names when the last row has been written. To add a
file format, add a context manager like `npy_writer` to `WRITERS`.
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from hjepa.config.errors import import_optional
from hjepa.tracking.atomic import atomic_files

AppendRows = Callable[[list[str], np.ndarray], None]  # appends the paths of N images and their features float32 [N, F]

ROW_GROUP_SIZE = 4096  # rows per row group of a parquet file


@contextlib.contextmanager
def npy_writer(out: Path, dim: int) -> Iterator[AppendRows]:
    """Write the features float32 [N, dim] to `out`, and the path of every row to `paths_file(out)`."""
    with (
        atomic_files(out, paths_file(out)) as (temporary, temporary_paths),
        temporary.open("wb") as array_file,
        temporary_paths.open("w", encoding="utf-8", errors="surrogateescape") as list_file,
    ):
        count = 0

        def write_header() -> None:
            array_file.seek(0)
            np.lib.format.write_array_header_1_0(array_file, {"descr": "<f4", "fortran_order": False, "shape": (count, dim)})

        def append(paths: list[str], features: np.ndarray) -> None:
            nonlocal count
            count += len(paths)
            list_file.writelines(f"{path}\n" for path in paths)
            array_file.write(features.astype("<f4").tobytes())

        write_header()
        yield append
        write_header()  # NumPy pads the header, so that one with a larger number of rows has the same length


def paths_file(out: Path) -> Path:
    """Return the file with the paths of the images, beside an .npy file."""
    return out.with_suffix(".files.txt")


@contextlib.contextmanager
def parquet_writer(out: Path, dim: int) -> Iterator[AppendRows]:
    """Write the columns path (string) and feature (list of `dim` float32) to `out`."""
    pa, pq = (import_optional(f"pyarrow{module}", f"task.out={out.name}", "write .npy") for module in ("", ".parquet"))
    schema = pa.schema([("path", pa.string()), ("feature", pa.list_(pa.float32(), dim))])
    with atomic_files(out) as (temporary,), pq.ParquetWriter(temporary, schema) as writer:
        pending: list[Any] = []

        def flush() -> None:
            writer.write_table(pa.Table.from_batches(pending, schema))
            pending.clear()

        def append(paths: list[str], features: np.ndarray) -> None:
            printable = [path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace") for path in paths]
            flat = pa.array(features.ravel(), pa.float32())
            pending.append(pa.record_batch([pa.array(printable), pa.FixedSizeListArray.from_arrays(flat, dim)], schema=schema))
            if sum(map(len, pending)) >= ROW_GROUP_SIZE:
                flush()

        yield append
        flush()


WRITERS = {".npy": npy_writer, ".parquet": parquet_writer}
