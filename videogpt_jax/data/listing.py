"""Which videos, and which parts of them, `encode` reads: folders, lists, manifests, recipes.

Every source becomes one columnar table, so that millions of entries cost little memory:

- a folder: every video file below it;
- a text list (.txt, .list, .tsv): a line is a path, or a path, a tab and its number of frames;
  blank lines and lines that start with # are skipped;
- a manifest (.csv, .parquet): a column `path`, and any of `start`, `end` (s), `label` (a number,
  or a name), `caption`, `split` (train, validation) and `frames`;
- the official list files of public datasets, by a recipe (see `data/recipes.py`).

Messages name rows of a CSV file as a spreadsheet does (the header is row 1), those of a Parquet
file from 1. A file that is listed but missing is no error here: it is one when it is decoded.
"""

import array
from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import difflib
import hashlib
import json
import os
import pathlib
import re

import pyarrow as pa
import pyarrow.compute as pc

from videogpt_jax.data import columns as columns_lib
from videogpt_jax.data import recipes
from videogpt_jax.data import video
from videogpt_jax.data.columns import Column
from videogpt_jax.data.columns import SCHEMA
from videogpt_jax.data.columns import Where
from videogpt_jax.data.load import NO_LABEL
from videogpt_jax.data.load import Segment
from videogpt_jax.data.load import segment_name
from videogpt_jax.data.recipes import RECIPES
from videogpt_jax.errors import InputError

_LISTS, _MANIFESTS = (".list", ".tsv", ".txt"), (".csv", ".parquet")


@dataclasses.dataclass(frozen=True)
class Listing:
  """Segments of videos, in the order of their source.

  Attributes:
    root: what relative paths are relative to.
    table: of `SCHEMA`; `start`, `end` and `frames` are null where they are not known.
    labels: names of the classes, by label; empty if they are not known.
    digest: 16 hex digits, a hash of what decides which videos are read: the table and the labels
      (of a folder the sizes of the files too), wherever they lie.
  """

  root: pathlib.Path
  table: pa.Table
  labels: tuple[str, ...]
  digest: str

  def __len__(self) -> int:
    return self.table.num_rows

  def __getitem__(self, index: int) -> Segment:
    return Segment(*(self.table.column(field.name)[index].as_py()
                     for field in dataclasses.fields(Segment)))

  def __iter__(self) -> Iterator[Segment]:
    columns = self.table.select([field.name for field in dataclasses.fields(Segment)])
    for rows in columns_lib.batches(columns):
      yield from map(Segment, *rows.values())

  @property
  def names(self) -> pa.ChunkedArray:
    """The `Segment.name` of every row."""
    return _names(self.table)

  @property
  def num_frames(self) -> int:
    """The frames of all entries of which the number is known."""
    return pc.sum(self.table.column("frames")).as_py() or 0

  def path(self, index: int) -> pathlib.Path:
    """The file of a row."""
    return self.root / self.table.column("path")[index].as_py()


def of_folder(folder: str | os.PathLike[str]) -> Listing:
  """Every video file below a folder, named relative to it.

  Raises:
    InputError: no such folder, no videos there, or a name that is not UTF-8.
  """
  root = _expand(folder)
  names, sizes = [], hashlib.sha256()
  for path in video.find_videos(root):
    name = path.relative_to(root).as_posix()
    try:
      sizes.update(f"{name}\n{path.stat().st_size}\n".encode())
    except UnicodeEncodeError as error:
      raise InputError(f"{os.fsencode(path)!r}: the name is not UTF-8; rename the file") from error
    except OSError as error:
      raise InputError(f"{path}: {error.strerror or error}") from error
    names.append(name)
  return _listing(root, root, {"path": pa.array(names, pa.string())}, lambda i: f"{root}",
                  sizes=sizes.hexdigest())


def read(path: str | os.PathLike[str], *, recipe: str = "", root: str | os.PathLike[str] = ""
         ) -> Listing:
  """Lists the videos of a folder, of a list file, or of a dataset.

  Args:
    path: a folder or a file; `~` is the home folder.
    recipe: of `RECIPES`, if it is the official list of that dataset, whatever its suffix.
    root: the folder that the listed paths are relative to; default: that of the list.

  Raises:
    InputError: it is missing, cannot be read, is empty, names a video twice, or has a bad value.
  """
  source = _expand(path)
  if recipe and recipe not in RECIPES:
    raise InputError(f"unknown recipe {recipe!r}{_nearest(recipe, RECIPES)}; known are "
                     f"{', '.join(RECIPES)}")
  if not os.path.exists(source):
    raise InputError(f"no file or folder {source}; name a folder with videos or a list of them")
  base = _expand(root) if root else None
  if base is not None and not base.is_dir():
    raise InputError(f"no folder {base}; the root is the folder that the paths in {source} are "
                     "relative to")
  if recipe and source.is_dir() and recipe not in recipes.OF_FOLDERS:
    raise InputError(f"{source} is a folder; the recipe {recipe} reads a list file, so name that")
  if recipe:
    found = recipes.read(recipe, source, base)
    return _listing(source, found.root, found.columns, found.where, found.labels)
  if source.is_dir():
    if base is not None:
      raise InputError(f"{source} is a folder, which takes no root; name a list file, or only "
                       "the folder")
    return of_folder(source)
  if source.suffix.lower() in _LISTS:
    return _read_list(source, base)
  if source.suffix.lower() in _MANIFESTS:
    return _read_manifest(source, base)
  raise InputError(f"{source} is no list of videos by its suffix; known are "
                   f"{', '.join(_LISTS + _MANIFESTS)}, a folder, and the recipes "
                   f"{', '.join(RECIPES)}")


# Lists and manifests.


def _read_list(path: pathlib.Path, root: pathlib.Path | None) -> Listing:
  lines, paths, frames = array.array("q"), [], []
  for number, line in columns_lib.lines(path):
    name, *rest = (part.strip(" ") for part in line.split("\t"))
    if len(rest) > 1:
      raise InputError(f"{path}, line {number}: {len(rest)} tabs; a line is a path, or a path, a "
                       "tab and the number of frames")
    count = rest[0] if rest else ""
    if count and not (re.fullmatch("[0-9]+", count) and int(count) <= columns_lib.LARGEST):
      raise InputError(f"{path}, line {number}: after the tab must be the number of frames, a "
                       f"whole number of at least 0, got {count!r}")
    lines.append(number)
    paths.append(name)
    frames.append(int(count) if count else None)
  columns = {"path": pa.array(paths, pa.string()), "frames": pa.array(frames, pa.int64())}
  return _listing(path, root or path.parent, columns, lambda i: f"{path}, line {lines[i]}")


def _read_manifest(path: pathlib.Path, root: pathlib.Path | None) -> Listing:
  reader = columns_lib.read_csv if path.suffix.lower() == ".csv" else columns_lib.read_parquet
  columns, where = reader(path, lambda found: _manifest_columns(path, found))
  labels: tuple[str, ...] = ()
  if "label" in columns:
    columns["label"], labels = columns_lib.as_labels(columns["label"], where)
  if "split" in columns:
    columns["split"] = columns_lib.as_splits(columns["split"], where, columns_lib.SPLITS)
  return _listing(path, root or path.parent, columns, where, labels)


def _manifest_columns(path: pathlib.Path, found: Sequence[str]) -> Sequence[str]:
  known = SCHEMA.names
  listed = ", ".join(known)
  unknown = [name for name in found if name not in known]
  if "path" not in found:
    near = difflib.get_close_matches("path", unknown, n=1)
    hint = f"; rename {near[0]!r}?" if near else ""
    raise InputError(f"{path}: no column 'path', which names the videos, among "
                     f"{', '.join(map(repr, found))}{hint} (known columns: {listed})")
  if unknown:
    raise InputError(f"{path}: unknown column {unknown[0]!r}{_nearest(unknown[0], known)}; rename "
                     f"or remove it (known columns: {listed})")
  return found


# The table.


def _listing(file: pathlib.Path, root: pathlib.Path, columns: Mapping[str, Column],
             where: Where, labels: tuple[str, ...] = (), *, sizes: str = "") -> Listing:
  """Checks the values of all columns, and adds those that are missing.

  Args:
    file: the source.
    root: see `Listing`.
    columns: of `SCHEMA`, of any type that holds such values.
    where: see `Where`.
    labels: see `Listing`.
    sizes: a hash of what else decides what is read.
  """
  count = len(columns["path"])
  if not count:
    raise InputError(f"{file} lists no videos")
  made = {}
  for field in SCHEMA:
    column = columns.get(field.name, pa.nulls(count, field.type))
    if pa.types.is_string(field.type):
      made[field.name] = pc.fill_null(columns_lib.as_text(column, field.name, where), "")
    elif pa.types.is_floating(field.type):
      made[field.name] = columns_lib.as_numbers(column, field.name, where)
    else:
      made[field.name] = columns_lib.as_whole(column, field.name, where)
  made["label"] = pc.fill_null(made["label"], NO_LABEL)
  table = pa.table(made, schema=SCHEMA)
  _check(table, where)
  return Listing(root, table, labels, _digest(table, labels, sizes))


def _check(table: pa.Table, where: Where) -> None:
  """Raises `InputError` for the first row with a bad value, or with the name of another."""
  path, start, end = (table.column(name) for name in ("path", "start", "end"))
  columns_lib.refuse(pc.equal(pc.utf8_trim_whitespace(path), ""), where, lambda i: "path is empty")
  columns_lib.refuse(pc.match_substring(path, "\0"), where, lambda i: (
    f"path {path[i].as_py()!r} holds a NUL character; save the list as UTF-8"))
  _check_seconds("start", start, where)
  _check_seconds("end", end, where)
  columns_lib.refuse(pc.less_equal(end, pc.fill_null(start, 0.0)), where, lambda i: (
    f"end ({end[i].as_py():g} s) must be after start ({start[i].as_py() or 0:g} s)"))
  _check_least("frames", table.column("frames"), 0, where)
  _check_least("label", table.column("label"), NO_LABEL, where)
  names = _names(table)
  if pc.count_distinct(names).as_py() < len(names):
    _refuse_twice(names, where)


def _check_seconds(name: str, column: Column, where: Where) -> None:
  good = pc.and_(pc.greater_equal(column, 0), pc.is_finite(column))
  columns_lib.refuse(pc.invert(good), where, lambda i: (
    f"{name} must be seconds from 0, got {column[i].as_py():g}"))


def _check_least(name: str, column: Column, least: int, where: Where) -> None:
  columns_lib.refuse(pc.less(column, least), where, lambda i: (
    f"{name} must be at least {least}, got {column[i].as_py()}"))


def _refuse_twice(names: pa.ChunkedArray, where: Where) -> None:
  seen: dict[str, int] = {}
  for row, name in enumerate(names.to_pylist()):
    first = seen.setdefault(name, row)
    if first != row:
      raise InputError(f"{where(row)}: {name} is listed twice, first at {where(first)}; remove one")


def _names(table: pa.Table) -> pa.ChunkedArray:
  path, start, end = (table.column(name) for name in ("path", "start", "end"))
  is_part = pc.or_(pc.fill_null(pc.greater(start, 0), False), pc.is_valid(end))
  if not pc.any(is_part).as_py():
    return path
  chunks = [pa.array(map(segment_name, *rows.values()), pa.string())
            for rows in columns_lib.batches(table.select(["path", "start", "end"]))]
  return pa.chunked_array(chunks, pa.string())


def _digest(table: pa.Table, labels: tuple[str, ...], sizes: str) -> str:
  """Of the values, not of the bytes in memory: those depend on the source and the library."""
  digest = hashlib.sha256(json.dumps([sizes, labels]).encode())
  for rows in columns_lib.batches(table):
    digest.update(json.dumps(rows).encode() + b"\n")
  return digest.hexdigest()[:16]


# Messages and paths.


def _expand(path: str | os.PathLike[str]) -> pathlib.Path:
  try:
    return pathlib.Path(path).expanduser()
  except RuntimeError as error:
    raise InputError(f"{path}: {error}") from error


def _nearest(name: str, known: Sequence[str]) -> str:
  near = difflib.get_close_matches(name, known, n=1)
  return f" (did you mean {near[0]!r}?)" if near else ""
