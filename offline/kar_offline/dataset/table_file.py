"""Owns reading columns of a Parquet or CSV file, with errors that name file, row and column.

Rows count from the first row of data: line 2 of a CSV file is row 1.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pyarrow import csv, parquet

from kar_sidecar.errors import InputError, NotFoundError

__all__ = ["TableColumn", "read_columns"]

T = TypeVar("T")


class TableColumn:
    """One column, dictionary-encoded: its distinct cells in order of first appearance, and a code per row."""

    def __init__(self, path: Path, name: str, column: pa.ChunkedArray) -> None:
        self.path, self.name = path, name
        if pa.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        if pa.types.is_timestamp(column.type):
            column = pc.cast(column, pa.timestamp("s", tz=column.type.tz), safe=False)
        if pa.types.is_nested(column.type):
            self.cells: list[Any] = column.to_pylist()
            self.codes: NDArray[np.integer] = np.arange(len(column))
        else:
            encoded = pc.dictionary_encode(column, null_encoding="encode").combine_chunks()
            if isinstance(encoded, pa.ChunkedArray):  # an empty table
                encoded = pa.DictionaryArray.from_arrays(pa.array([], pa.int32()), pa.array([], column.type))
            self.cells, self.codes = encoded.dictionary.to_pylist(), encoded.indices.to_numpy()

    def distinct(self, parse: Callable[[Any], T]) -> list[T]:
        """The parsed value of each distinct cell.

        Raises:
            InputError: `parse` raised a ValueError; the text names the first row that has the cell.
        """
        parsed = []
        for code, cell in enumerate(self.cells):
            try:
                parsed.append(parse(cell))
            except ValueError as error:
                shown = "" if cell is None else f"{cell!r} "
                raise InputError(f"{self.place(int(np.argmax(self.codes == code)))} {shown}{error}") from error
        return parsed

    def rows(self, parse: Callable[[Any], T]) -> list[T]:
        """The parsed value of every row; raises as `distinct` does."""
        parsed = self.distinct(parse)
        return [parsed[code] for code in self.codes]

    def array(self, parse: Callable[[Any], float], dtype: type[np.number]) -> NDArray:
        """The parsed value of every row [rows] as an array; raises as `distinct` does."""
        return np.array(self.distinct(parse), dtype)[self.codes]

    def place(self, row: int) -> str:
        """File, row number and column of a cell, for error messages; `row` counts from 0."""
        return f"{self.path.name} row {row + 1:,}: {self.name}"


def read_columns(path: Path, names: Sequence[str], delimiter: str, section: str) -> dict[str, TableColumn]:
    """Read columns of a file.

    Args:
        path: A file whose name ends in `.parquet`, or a CSV file with a header line.
        names: The columns to read.
        delimiter: Delimiter of a CSV file.
        section: Section of the mapping file that names the columns, for error messages.

    Raises:
        NotFoundError: there is no such file.
        InputError: it is not a table, or a column is missing or there twice.
    """
    if not path.is_file():
        raise NotFoundError(f"{path} does not exist: name a Parquet or CSV file")
    wanted = list(dict.fromkeys(names))
    parse_options = csv.ParseOptions(delimiter=delimiter, newlines_in_values=True)
    try:
        if path.suffix == ".parquet":
            present = parquet.read_schema(path).names
        else:
            with csv.open_csv(path, parse_options=parse_options) as reader:
                present = reader.schema.names
        if wrong := [name for name in wanted if present.count(name) != 1]:
            raise InputError(
                f"{path.name} needs exactly one column {wrong[0]!r} (its columns: {', '.join(present)}): "
                f"correct [{section}] of the mapping"
            )
        if path.suffix == ".parquet":
            table = parquet.read_table(path, columns=wanted)
        else:
            as_text = csv.ConvertOptions(column_types=dict.fromkeys(wanted, pa.string()), include_columns=wanted)
            # With one thread, messages about malformed rows name the right row.
            table = csv.read_csv(path, csv.ReadOptions(use_threads=False), parse_options, as_text)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path.name} cannot be read as a table ({error}): correct it") from error
    return {name: TableColumn(path, name, table[name]) for name in wanted}
