"""Where features go: `.npy` with a list of files beside it, or `.parquet`. Rows are written as they come, and the files get their
names when all of them are there.
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from hjepa.config.errors import import_optional
from hjepa.tracking.atomic import atomic_files

Add = Callable[[list[str], np.ndarray], None]  # paths of N images and their features float32 [N, F]

GROUP = 4096  # rows of a row group of a parquet file


@contextlib.contextmanager
def npy(out: Path, dim: int) -> Iterator[Add]:
    """`out` float32 [N, dim], and `listing(out)` with the path of every row."""
    with (
        atomic_files(out, listing(out)) as (array, names),
        array.open("wb") as rows,
        names.open("w", encoding="utf-8", errors="surrogateescape") as paths,
    ):
        count = 0

        def header() -> None:
            rows.seek(0)
            np.lib.format.write_array_header_1_0(rows, {"descr": "<f4", "fortran_order": False, "shape": (count, dim)})

        def add(new: list[str], features: np.ndarray) -> None:
            nonlocal count
            count += len(new)
            paths.writelines(f"{path}\n" for path in new)
            rows.write(features.astype("<f4").tobytes())

        header()
        yield add
        header()  # numpy leaves room for the number of rows to grow


def listing(out: Path) -> Path:
    """The list of files beside an .npy file."""
    return out.with_suffix(".files.txt")


@contextlib.contextmanager
def parquet(out: Path, dim: int) -> Iterator[Add]:
    """`out` with the columns path (string) and feature (list of `dim` float32)."""
    pa, pq = (import_optional(f"pyarrow{part}", f"task.out={out.name}", "write .npy") for part in ("", ".parquet"))
    schema = pa.schema([("path", pa.string()), ("feature", pa.list_(pa.float32(), dim))])
    with atomic_files(out) as (name,), pq.ParquetWriter(name, schema) as writer:
        waiting: list[Any] = []

        def flush() -> None:
            writer.write_table(pa.Table.from_batches(waiting, schema))
            waiting.clear()

        def add(new: list[str], features: np.ndarray) -> None:
            printable = [path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace") for path in new]
            flat = pa.array(features.ravel(), pa.float32())
            waiting.append(pa.record_batch([pa.array(printable), pa.FixedSizeListArray.from_arrays(flat, dim)], schema=schema))
            if sum(map(len, waiting)) >= GROUP:
                flush()

        yield add
        flush()


STORES = {".npy": npy, ".parquet": parquet}
