"""The columns of lists of videos: how they are read from files, checked and converted."""

from collections.abc import Callable, Iterator, Mapping, Sequence
import csv
import pathlib
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet

from videogpt_jax import errors
from videogpt_jax.errors import InputError

SCHEMA = pa.schema([
  ("path", pa.string()),
  ("start", pa.float64()),
  ("end", pa.float64()),
  ("label", pa.int64()),
  ("caption", pa.string()),
  ("split", pa.string()),
  ("frames", pa.int64()),
])
SPLITS = {"": "", "train": "train", "validation": "validation", "val": "validation",
          "valid": "validation", "test": "validation"}
LARGEST = 2**53  # every smaller whole number is exact as a float
_NUMBER = r"^-?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$"
_BATCH = 1 << 16  # rows that are Python objects at a time
_BLOCK = 1 << 24  # bytes of a CSV file that are parsed at a time; a row must fit

Column = Any  # a pa.ChunkedArray or pa.Array; pyarrow has no types
Where = Callable[[int], str]  # a row -> the file and the place in it, for messages


# Files.


def lines(path: pathlib.Path) -> Iterator[tuple[int, str]]:
  """The lines that say something and their numbers from 1, without blanks around them."""
  try:
    data = path.read_bytes()
  except OSError as error:
    raise errors.refused(f"cannot read {path}: {error.strerror or error}", error) from error
  try:
    text = data.decode("utf-8-sig")
  except UnicodeDecodeError as error:
    last = data.count(b"\n", 0, error.start) + 1
    raise InputError(f"{path}, line {last}: not UTF-8; save the list in that encoding") from error
  for number, raw in enumerate(text.split("\n"), start=1):
    line = raw.strip(" \r")
    if line.strip() and not line.startswith("#"):
      yield number, line


def read_csv(path: pathlib.Path, choose: Callable[[Sequence[str]], Sequence[str]]
             ) -> tuple[dict[str, Column], Where]:
  """The columns that `choose` picks of those in the header, as text."""
  try:
    # What is not UTF-8 further down is told below, by its row.
    with open(path, encoding="utf-8-sig", errors="replace", newline="") as file:
      header = next(csv.reader(file), [])
    wanted = choose(_unique(path, header))
    options = pa.csv.ConvertOptions(include_columns=wanted,
                                    column_types={name: pa.string() for name in wanted})
    table = pa.csv.read_csv(
      path,
      # By one thread it tells the row of an error.
      read_options=pa.csv.ReadOptions(use_threads=False, block_size=_BLOCK),
      parse_options=pa.csv.ParseOptions(newlines_in_values=True),
      convert_options=options,
    )
  except OSError as error:
    raise InputError(f"cannot read {path}: {error.strerror or error}") from error
  except (csv.Error, pa.ArrowException) as error:
    raise InputError(f"{path} is not a CSV file in UTF-8: {error}") from error
  columns = {name: table.column(name) for name in wanted}
  return columns, lambda i: f"{path}, row {i + 2}"


def read_parquet(path: pathlib.Path, choose: Callable[[Sequence[str]], Sequence[str]]
                 ) -> tuple[dict[str, Column], Where]:
  """The columns that `choose` picks of those in the file, of the types that they have there."""
  try:
    with pa.parquet.ParquetFile(path) as file:
      wanted = choose(_unique(path, file.schema_arrow.names))
      table = file.read(columns=list(wanted))
  except OSError as error:
    raise InputError(f"cannot read {path}: {error.strerror or error}") from error
  except pa.ArrowException as error:
    raise InputError(f"{path} is not a Parquet file that can be read: {error}") from error
  return {name: table.column(name) for name in wanted}, lambda i: f"{path}, row {i + 1}"


def _unique(path: pathlib.Path, header: Sequence[str]) -> Sequence[str]:
  if not header:
    raise InputError(f"{path} is empty; its first row must name the columns")
  twice = [name for i, name in enumerate(header) if name in header[:i]]
  if twice:
    raise InputError(f"{path}: two columns are called {twice[0]!r}; remove one")
  return header


# Columns.


def refuse(bad: Column, where: Where, reason: Callable[[int], str]) -> None:
  """Raises `InputError` for the first row that is `bad`, if there is one; null: it is not."""
  row = pc.index(bad, True).as_py()
  if row >= 0:
    raise InputError(f"{where(row)}: {reason(row)}")


def as_text(column: Column, name: str, where: Where, wanted: str = "text") -> Column:
  """A column as text, null where empty."""
  if pa.types.is_dictionary(column.type):
    column = column.cast(column.type.value_type)
  if pa.types.is_null(column.type) or _is_text(column.type):
    column = column.cast(pa.string())
    return pc.if_else(pc.equal(column, ""), pa.scalar(None, pa.string()), column)
  raise InputError(f"{where(0)}: {name} must be {wanted}, got the type {column.type}")


def _is_text(kind: pa.DataType) -> bool:
  return pa.types.is_string(kind) or pa.types.is_large_string(kind) or (
    pa.types.is_string_view(kind))


def as_numbers(column: Column, name: str, where: Where) -> Column:
  """A column as float64, null where empty or not a number (as other libraries mark it)."""
  kind = column.type
  if pa.types.is_integer(kind) or pa.types.is_floating(kind):
    column = column.cast(pa.float64(), safe=False)
    return pc.if_else(pc.is_nan(column), pa.scalar(None, pa.float64()), column)
  text = pc.utf8_trim_whitespace(as_text(column, name, where, "a number"))
  text = pc.if_else(pc.equal(text, ""), pa.scalar(None, pa.string()), text)
  refuse(pc.invert(pc.match_substring_regex(text, _NUMBER)), where,
         lambda i: f"{name} must be a number, got {text[i].as_py()!r}")
  return text.cast(pa.float64())


def as_whole(column: Column, name: str, where: Where) -> Column:
  """A column as int64; tables write whole numbers as 3.0 where some are missing."""
  numbers = as_numbers(column, name, where)
  whole = pc.and_(pc.equal(pc.floor(numbers), numbers),
                  pc.less_equal(pc.abs(numbers), float(LARGEST)))
  refuse(pc.invert(whole), where,
         lambda i: f"{name} must be a whole number, got {column[i].as_py()!r}")
  return numbers.cast(pa.int64())


def as_labels(column: Column, where: Where) -> tuple[Column, tuple[str, ...]]:
  """Labels and the names of the classes: numbers stay, names are numbered in their order."""
  if pa.types.is_integer(column.type) or pa.types.is_floating(column.type):
    return as_whole(column, "label", where), ()
  text = pc.utf8_trim_whitespace(as_text(column, "label", where, "text or a number"))
  is_number = pc.or_(pc.match_substring_regex(text, r"^-?\d+(\.0*)?$"), pc.equal(text, ""))
  if pc.all(is_number).as_py():  # nulls are passed over
    return as_whole(text, "label", where), ()
  return named_labels(text)


def named_labels(text: Column) -> tuple[Column, tuple[str, ...]]:
  """Labels of names (null for none) in their order, and the names of the classes."""
  names = tuple(sorted(name for name in pc.unique(text).to_pylist() if name))
  label = pc.index_in(text, value_set=pa.array(names, pa.string()))  # null: no name
  return label.cast(pa.int64()), names


def as_splits(column: Column, where: Where, known: Mapping[str, str]) -> Column:
  """The splits, by the names that `known` gives them."""
  text = pc.fill_null(pc.utf8_trim_whitespace(as_text(column, "split", where)), "")
  place = pc.index_in(text, value_set=pa.array(known, pa.string()))
  refuse(pc.is_null(place), where, lambda i: (
    f"unknown split {text[i].as_py()!r}; known are {', '.join(name for name in known if name)}"))
  return pa.chunked_array([pa.array(known.values(), pa.string()).take(chunk)
                           for chunk in place.chunks], pa.string())


def batches(table: pa.Table) -> Iterator[dict[str, list[Any]]]:
  """Columns as Python objects, as many rows at a time whatever the table's chunks."""
  for start in range(0, table.num_rows, _BATCH):
    yield table.slice(start, _BATCH).to_pydict()
