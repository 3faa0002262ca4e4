"""Which videos, and which parts of them, `encode` reads: folders, lists, manifests, recipes.

Every source becomes one columnar table, so that millions of entries cost little memory:

- a folder: every video file below it;
- a text list (.txt, .list, .tsv): a line is a path, or a path, a tab and its number of frames;
  blank lines and lines that start with # are skipped;
- a manifest (.csv, .parquet): a column `path`, and any of `start`, `end` (s), `label` (a number,
  or a name), `caption`, `split` (train, validation) and `frames`;
- the official list files of public datasets, by a recipe (see `RECIPES`).

Messages name rows of a CSV file as a spreadsheet does (the header is row 1), those of a Parquet
file from 1. A file that is listed but missing is no error here: it is one when it is decoded.
"""

import array
import ast
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
import csv
import dataclasses
import difflib
import hashlib
import json
import os
import pathlib
import re
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet

from videogpt_jax.data import video
from videogpt_jax.data.load import NO_LABEL
from videogpt_jax.data.load import Segment
from videogpt_jax.data.load import segment_name
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
_LISTS, _MANIFESTS = (".list", ".tsv", ".txt"), (".csv", ".parquet")
_SPLITS = {"": "", "train": "train", "validation": "validation", "val": "validation",
           "valid": "validation", "test": "validation"}
_KINETICS_SPLITS = {"train": "train", "validate": "validation", "val": "validation",
                    "validation": "validation", "test": "test"}
_NUMBER = r"^-?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$"
_LARGEST = 2**53  # every smaller whole number is exact as a float
_BATCH = 1 << 16  # rows that are Python objects at a time
_BLOCK = 1 << 24  # bytes of a CSV file that are parsed at a time; a row must fit
_PROBED = 1000  # rows by which the layout of a folder is found

_Column = Any  # a pa.ChunkedArray or pa.Array; pyarrow has no types
_Where = Callable[[int], str]  # a row -> the file and the place in it, for messages


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
    for rows in _batches(columns):
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
  if recipe and recipe not in _RECIPES:
    raise InputError(f"unknown recipe {recipe!r}{_nearest(recipe, RECIPES)}; known are "
                     f"{', '.join(RECIPES)}")
  if not os.path.exists(source):
    raise InputError(f"no file or folder {source}; name a folder with videos or a list of them")
  base = _expand(root) if root else None
  if base is not None and not base.is_dir():
    raise InputError(f"no folder {base}; the root is the folder that the paths in {source} are "
                     "relative to")
  if recipe and source.is_dir() and recipe not in _OF_FOLDERS:
    raise InputError(f"{source} is a folder; the recipe {recipe} reads a list file, so name that")
  if recipe:
    return _RECIPES[recipe](source, base)
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
  for number, line in _lines(path):
    name, *rest = (part.strip(" ") for part in line.split("\t"))
    if len(rest) > 1:
      raise InputError(f"{path}, line {number}: {len(rest)} tabs; a line is a path, or a path, a "
                       "tab and the number of frames")
    count = rest[0] if rest else ""
    if count and not (re.fullmatch("[0-9]+", count) and int(count) <= _LARGEST):
      raise InputError(f"{path}, line {number}: after the tab must be the number of frames, a "
                       f"whole number of at least 0, got {count!r}")
    lines.append(number)
    paths.append(name)
    frames.append(int(count) if count else None)
  columns = {"path": pa.array(paths, pa.string()), "frames": pa.array(frames, pa.int64())}
  return _listing(path, root or path.parent, columns, lambda i: f"{path}, line {lines[i]}")


def _read_manifest(path: pathlib.Path, root: pathlib.Path | None) -> Listing:
  reader = _read_csv if path.suffix.lower() == ".csv" else _read_parquet
  columns, where = reader(path, lambda found: _manifest_columns(path, found))
  labels: tuple[str, ...] = ()
  if "label" in columns:
    columns["label"], labels = _labels(columns["label"], where)
  if "split" in columns:
    columns["split"] = _splits(columns["split"], where, _SPLITS)
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


# Recipes.


def _panda70m(path: pathlib.Path, root: pathlib.Path | None) -> Listing:
  """Panda-70M: a row is a video, with lists of the times and the captions of its parts."""
  columns, where = _read_recipe(path, "panda70m", ("videoID", "timestamp", "caption"))
  _refuse(pc.equal(columns["videoID"], ""), where, lambda i: "videoID is empty")
  rows = array.array("q")
  chunks: dict[str, list[pa.Array]] = {"path": [], "start": [], "end": [], "caption": []}
  row = 0
  for batch in _batches(pa.table(columns)):
    parts: dict[str, list[Any]] = {name: [] for name in chunks}
    for name, times, captions in zip(*batch.values(), strict=True):
      try:
        found = _panda70m_parts(times, captions)
      except ValueError as error:
        raise InputError(f"{where(row)}: {error}") from error
      for start, end, caption in found:
        for key, value in zip(chunks, (f"{name}.mp4", start, end, caption), strict=True):
          parts[key].append(value)
        rows.append(row)
      row += 1
    for key, values in parts.items():
      chunks[key].append(pa.array(values, SCHEMA.field(key).type))
  made = {key: pa.chunked_array(values, SCHEMA.field(key).type) for key, values in chunks.items()}
  return _listing(path, root or path.parent, made, lambda i: where(rows[i]))


def _panda70m_parts(times: str, captions: str) -> list[tuple[float, float, str]]:
  """(start, end, caption) of the parts of a video, s; `ValueError` with the reason."""
  pairs, texts = _literal_list("timestamp", times), _literal_list("caption", captions)
  if len(pairs) != len(texts):
    raise ValueError(f"{len(pairs)} timestamps, but {len(texts)} captions")
  parts = []
  for pair, text in zip(pairs, texts, strict=True):
    if not isinstance(pair, list | tuple) or len(pair) != 2:
      raise ValueError(f"a timestamp must be a pair ['H:MM:SS.mmm', 'H:MM:SS.mmm'], got {pair!r}")
    if not isinstance(text, str):
      raise ValueError(f"a caption must be a text, got {text!r}")
    text.encode()  # half a character of UTF-16, as an escape may be, is none
    parts.append((_clock(pair[0]), _clock(pair[1]), text))
  return parts


def _literal_list(name: str, text: str) -> list[Any]:
  try:
    value = ast.literal_eval(text)
  except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
    value = None
  if not isinstance(value, list):
    raise ValueError(f"{name} must be a list as Python writes it, got {_shorten(text)}")
  return value


def _clock(text: Any) -> float:
  match = re.fullmatch(r"([0-9]+):([0-5][0-9]):([0-5][0-9])(\.[0-9]+)?", str(text))
  if not match:
    raise ValueError(f"a time must be 'H:MM:SS.mmm', got {text!r}")
  hours, minutes, seconds, fraction = match.groups(default="")
  # As one decimal number: a sum of floats would not be the float nearest to what is written.
  return float(f"{int(hours) * 3600 + int(minutes) * 60 + int(seconds)}{fraction}")


def _openvid1m(path: pathlib.Path, root: pathlib.Path | None) -> Listing:
  """OpenVid-1M: a row is a video file."""
  columns, where = _read_recipe(path, "openvid1m", ("video", "caption", "frame"))
  named = {"path": columns["video"], "caption": columns["caption"], "frames": columns["frame"]}
  return _listing(path, root or path.parent, named, where)


def _kinetics600(path: pathlib.Path, root: pathlib.Path | None) -> Listing:
  """Kinetics-600: rows are parts of online videos, the files those parts.

  Rows of the split "test" are left out, or are the validation split of a list that has no
  other; the classes are numbered in the order of their names in the whole list.
  """
  root = root or path.parent
  columns, where = _read_recipe(
    path, "kinetics600", ("label", "youtube_id", "time_start", "time_end", "split"))
  _refuse(pc.equal(columns["youtube_id"], ""), where, lambda i: "youtube_id is empty")
  times = [_six_digits(columns[name], name, where) for name in ("time_start", "time_end")]
  file = pc.binary_join_element_wise(columns["youtube_id"], *times, "_")
  split = _splits(columns["split"], where, _KINETICS_SPLITS)
  label, labels = _named_labels(pc.utf8_trim_whitespace(columns["label"]))
  names = {"split": columns["split"], "label": columns["label"],
           "name": pc.binary_join_element_wise(file, ".mp4", "")}
  table = pa.table({"split": split, "label": label, "path": _kinetics_paths(
    path, root, names, where)})
  if pc.any(pc.equal(split, "validation")).as_py():
    rows = pc.indices_nonzero(pc.not_equal(split, "test"))
  else:
    rows = pc.indices_nonzero(pc.not_equal(split, ""))
  table = table.take(rows)
  split = pc.replace_substring_regex(table["split"], "^test$", "validation")
  return _listing(path, root, {"path": table["path"], "label": table["label"], "split": split},
                  lambda i: where(rows[i].as_py()), labels)


def _six_digits(column: _Column, name: str, where: _Where) -> _Column:
  seconds = _whole(column, name, where)
  _refuse(pc.fill_null(pc.less(seconds, 0), True), where, lambda i: (
    f"{name} must be a whole number of seconds from 0, got {column[i].as_py()!r}"))
  return pc.utf8_lpad(seconds.cast(pa.string()), 6, "0")


def _kinetics_paths(path: pathlib.Path, root: pathlib.Path, names: Mapping[str, _Column],
                    where: _Where) -> _Column:
  """The path of every row, in the layout of the first row whose file exists."""
  layouts = (("split", "name"), ("label", "name"), ("split", "label", "name"), ("name",))
  probed = pa.table(dict(names)).slice(0, _PROBED).to_pylist()
  for row in probed:
    for layout in layouts:
      parts = [row[key] for key in layout]
      if all(parts) and os.path.exists(root.joinpath(*parts)):
        if "label" in layout:
          _refuse(pc.equal(names["label"], ""), where, lambda i: (
            "label is empty, but the files lie in folders named by it"))
        return pc.binary_join_element_wise(*(names[key] for key in layout), "/")
  if not probed:
    return names["name"]
  raise InputError(
    f"{path}: none of the files of the first {len(probed)} rows is in {root}; looked for "
    f"{probed[0]['name']} there and in its folders SPLIT, LABEL and SPLIT/LABEL; give the folder "
    "of the videos as the root")


def _ucf101(path: pathlib.Path, root: pathlib.Path | None) -> Listing:
  """UCF101: trainlist0N.txt, testlist0N.txt, or the folder of them (then both of N = 1).

  The root is by default a folder UCF-101 beside that of the lists, if there is one.
  """
  folder = path if path.is_dir() else path.parent
  sources = [path / "trainlist01.txt", path / "testlist01.txt"] if path.is_dir() else [path]
  rows = [row for source in sources for row in _ucf101_rows(source)]
  numbers: dict[str, int] = {}  # of classes
  for row in rows:
    if row.number and numbers.setdefault(row.kind, row.number) != row.number:
      raise InputError(f"{row.place}: class number {row.number}, but {numbers[row.kind]} in a line "
                       f"of {row.kind} before")
  known, labels = _ucf101_classes(folder / "classInd.txt", numbers, {row.kind for row in rows})
  for row in rows:
    if row.kind not in known:
      raise InputError(f"{row.place}: the class {row.kind!r} has no number in classInd.txt (or, "
                       "without that file, in the train list)")
  if root is None:
    beside = folder.absolute().parent / "UCF-101"  # as the two archives unpack
    root = beside if beside.is_dir() else folder
  columns = {"path": pa.array([row.path for row in rows], pa.string()),
             "split": pa.array([row.split for row in rows], pa.string()),
             "label": pa.array([known[row.kind] for row in rows], pa.int64())}
  return _listing(path, root, columns, lambda i: rows[i].place, labels)


@dataclasses.dataclass(frozen=True)
class _Ucf101Row:
  path: str
  split: str
  number: int | None  # of the class, from 1; test lists have none
  place: str

  @property
  def kind(self) -> str:
    return self.path.split("/")[0]


def _ucf101_rows(path: pathlib.Path) -> Iterator[_Ucf101Row]:
  match = re.match("(train|test)list", path.name)
  if not match:
    raise InputError(f"{path}: the recipe ucf101 reads trainlist0N.txt, testlist0N.txt or the "
                     "folder of them, and knows the split by the file's name")
  for line, text in _lines(path):
    place = f"{path}, line {line}"
    name, number = _ucf101_line(text)
    if not re.fullmatch("[^/]+/.*[^/]", name):
      raise InputError(f"{place}: {text!r} is not Class/video.avi, with or without the number of "
                       "the class, from 1, after it")
    yield _Ucf101Row(name, _SPLITS[match[1]], number, place)


def _ucf101_line(text: str) -> tuple[str, int | None]:
  """(path, number of the class) of a line; test lists have no numbers."""
  match = re.fullmatch(r"(.*\S)\s+([1-9][0-9]{0,8})", text)
  return (match[1], int(match[2])) if match else (text.strip(), None)


def _ucf101_classes(index: pathlib.Path, numbers: Mapping[str, int], classes: Set[str]
                    ) -> tuple[dict[str, int], tuple[str, ...]]:
  """Labels by class, and classes by label: of the index, else the train list, else in order.

  Args:
    index: classInd.txt, which may be missing.
    numbers: of classes in the train list, from 1.
    classes: of the rows.
  """
  known = dict(numbers)
  if index.exists():
    known = {}
    for line, text in _lines(index):
      match = re.fullmatch(r"([1-9][0-9]{0,8})\s+(\S+)", text.strip())
      if not match:
        raise InputError(f"{index}, line {line}: {text!r} is not the number of a class and its "
                         "name")
      known[match[2]] = int(match[1])
    for name, number in numbers.items():
      if name in known and known[name] != number:
        raise InputError(f"{index}: {name} is class {known[name]}, but {number} in the train list")
  elif not numbers:
    known = {name: number for number, name in enumerate(sorted(classes), start=1)}
  if len(set(known.values())) != len(known):
    raise InputError(f"{index if index.exists() else index.parent}: two classes have one number")
  by_number = sorted(known, key=known.__getitem__)
  complete = bool(known) and known[by_number[-1]] == len(known)
  return {name: number - 1 for name, number in known.items()}, tuple(by_number if complete else ())


_RECIPES: dict[str, Callable[[pathlib.Path, pathlib.Path | None], Listing]] = {
  "kinetics600": _kinetics600,
  "openvid1m": _openvid1m,
  "panda70m": _panda70m,
  "ucf101": _ucf101,
}
RECIPES = tuple(_RECIPES)
_OF_FOLDERS = ("ucf101",)


# Files.


def _expand(path: str | os.PathLike[str]) -> pathlib.Path:
  try:
    return pathlib.Path(path).expanduser()
  except RuntimeError as error:
    raise InputError(f"{path}: {error}") from error


def _lines(path: pathlib.Path) -> Iterator[tuple[int, str]]:
  """The lines that say something and their numbers from 1, without blanks around them."""
  try:
    data = path.read_bytes()
  except OSError as error:
    raise InputError(f"cannot read {path}: {error.strerror or error}") from error
  try:
    text = data.decode("utf-8-sig")
  except UnicodeDecodeError as error:
    last = data.count(b"\n", 0, error.start) + 1
    raise InputError(f"{path}, line {last}: not UTF-8; save the list in that encoding") from error
  for number, raw in enumerate(text.split("\n"), start=1):
    line = raw.strip(" \r")
    if line.strip() and not line.startswith("#"):
      yield number, line


def _read_csv(path: pathlib.Path, choose: Callable[[Sequence[str]], Sequence[str]]
              ) -> tuple[dict[str, _Column], _Where]:
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


def _read_parquet(path: pathlib.Path, choose: Callable[[Sequence[str]], Sequence[str]]
                  ) -> tuple[dict[str, _Column], _Where]:
  try:
    with pa.parquet.ParquetFile(path) as file:
      wanted = choose(_unique(path, file.schema_arrow.names))
      table = file.read(columns=list(wanted))
  except OSError as error:
    raise InputError(f"cannot read {path}: {error.strerror or error}") from error
  except pa.ArrowException as error:
    raise InputError(f"{path} is not a Parquet file that can be read: {error}") from error
  return {name: table.column(name) for name in wanted}, lambda i: f"{path}, row {i + 1}"


def _read_recipe(path: pathlib.Path, recipe: str, expected: Sequence[str]
                 ) -> tuple[dict[str, _Column], _Where]:
  """The expected columns of a CSV file, which may have others."""

  def choose(found: Sequence[str]) -> Sequence[str]:
    missing = [name for name in expected if name not in found]
    if missing:
      raise InputError(
        f"{path}: the recipe {recipe} expects the columns {', '.join(expected)}; "
        f"{', '.join(missing)} missing, found {', '.join(map(repr, found)) or 'none'}")
    return expected

  return _read_csv(path, choose)


def _unique(path: pathlib.Path, header: Sequence[str]) -> Sequence[str]:
  if not header:
    raise InputError(f"{path} is empty; its first row must name the columns")
  twice = [name for i, name in enumerate(header) if name in header[:i]]
  if twice:
    raise InputError(f"{path}: two columns are called {twice[0]!r}; remove one")
  return header


# Columns.


def _refuse(bad: _Column, where: _Where, reason: Callable[[int], str]) -> None:
  """Raises `InputError` for the first row that is `bad`, if there is one; null: it is not."""
  row = pc.index(bad, True).as_py()
  if row >= 0:
    raise InputError(f"{where(row)}: {reason(row)}")


def _text(column: _Column, name: str, where: _Where, wanted: str = "text") -> _Column:
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


def _numbers(column: _Column, name: str, where: _Where) -> _Column:
  """A column as float64, null where empty or not a number (as other libraries mark it)."""
  kind = column.type
  if pa.types.is_integer(kind) or pa.types.is_floating(kind):
    column = column.cast(pa.float64(), safe=False)
    return pc.if_else(pc.is_nan(column), pa.scalar(None, pa.float64()), column)
  text = pc.utf8_trim_whitespace(_text(column, name, where, "a number"))
  text = pc.if_else(pc.equal(text, ""), pa.scalar(None, pa.string()), text)
  _refuse(pc.invert(pc.match_substring_regex(text, _NUMBER)), where,
          lambda i: f"{name} must be a number, got {text[i].as_py()!r}")
  return text.cast(pa.float64())


def _whole(column: _Column, name: str, where: _Where) -> _Column:
  """A column as int64; tables write whole numbers as 3.0 where some are missing."""
  numbers = _numbers(column, name, where)
  whole = pc.and_(pc.equal(pc.floor(numbers), numbers),
                  pc.less_equal(pc.abs(numbers), float(_LARGEST)))
  _refuse(pc.invert(whole), where,
          lambda i: f"{name} must be a whole number, got {column[i].as_py()!r}")
  return numbers.cast(pa.int64())


def _labels(column: _Column, where: _Where) -> tuple[_Column, tuple[str, ...]]:
  """Labels and the names of the classes: numbers stay, names are numbered in their order."""
  if pa.types.is_integer(column.type) or pa.types.is_floating(column.type):
    return _whole(column, "label", where), ()
  text = pc.utf8_trim_whitespace(_text(column, "label", where, "text or a number"))
  is_number = pc.or_(pc.match_substring_regex(text, r"^-?\d+(\.0*)?$"), pc.equal(text, ""))
  if pc.all(is_number).as_py():  # nulls are passed over
    return _whole(text, "label", where), ()
  return _named_labels(text)


def _named_labels(text: _Column) -> tuple[_Column, tuple[str, ...]]:
  names = tuple(sorted(name for name in pc.unique(text).to_pylist() if name))
  label = pc.index_in(text, value_set=pa.array(names, pa.string()))  # null: no name
  return label.cast(pa.int64()), names


def _splits(column: _Column, where: _Where, known: Mapping[str, str]) -> _Column:
  """The splits, by the names that `known` gives them."""
  text = pc.fill_null(pc.utf8_trim_whitespace(_text(column, "split", where)), "")
  place = pc.index_in(text, value_set=pa.array(known, pa.string()))
  _refuse(pc.is_null(place), where, lambda i: (
    f"unknown split {text[i].as_py()!r}; known are {', '.join(name for name in known if name)}"))
  return pa.chunked_array([pa.array(known.values(), pa.string()).take(chunk)
                           for chunk in place.chunks], pa.string())


# The table.


def _listing(file: pathlib.Path, root: pathlib.Path, columns: Mapping[str, _Column],
             where: _Where, labels: tuple[str, ...] = (), *, sizes: str = "") -> Listing:
  """Checks the values of all columns, and adds those that are missing.

  Args:
    file: the source.
    root: see `Listing`.
    columns: of `SCHEMA`, of any type that holds such values.
    where: see `_Where`.
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
      made[field.name] = pc.fill_null(_text(column, field.name, where), "")
    elif pa.types.is_floating(field.type):
      made[field.name] = _numbers(column, field.name, where)
    else:
      made[field.name] = _whole(column, field.name, where)
  made["label"] = pc.fill_null(made["label"], NO_LABEL)
  table = pa.table(made, schema=SCHEMA)
  _check(table, where)
  return Listing(root, table, labels, _digest(table, labels, sizes))


def _check(table: pa.Table, where: _Where) -> None:
  """Raises `InputError` for the first row with a bad value, or with the name of another."""
  path, start, end = (table.column(name) for name in ("path", "start", "end"))
  _refuse(pc.equal(pc.utf8_trim_whitespace(path), ""), where, lambda i: "path is empty")
  _refuse(pc.match_substring(path, "\0"), where,
          lambda i: f"path {path[i].as_py()!r} holds a NUL character; save the list as UTF-8")
  _check_seconds("start", start, where)
  _check_seconds("end", end, where)
  _refuse(pc.less_equal(end, pc.fill_null(start, 0.0)), where, lambda i: (
    f"end ({end[i].as_py():g} s) must be after start ({start[i].as_py() or 0:g} s)"))
  _check_least("frames", table.column("frames"), 0, where)
  _check_least("label", table.column("label"), NO_LABEL, where)
  names = _names(table)
  if pc.count_distinct(names).as_py() < len(names):
    _refuse_twice(names, where)


def _check_seconds(name: str, column: _Column, where: _Where) -> None:
  good = pc.and_(pc.greater_equal(column, 0), pc.is_finite(column))
  _refuse(pc.invert(good), where,
          lambda i: f"{name} must be seconds from 0, got {column[i].as_py():g}")


def _check_least(name: str, column: _Column, least: int, where: _Where) -> None:
  _refuse(pc.less(column, least), where,
          lambda i: f"{name} must be at least {least}, got {column[i].as_py()}")


def _refuse_twice(names: pa.ChunkedArray, where: _Where) -> None:
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
            for rows in _batches(table.select(["path", "start", "end"]))]
  return pa.chunked_array(chunks, pa.string())


def _digest(table: pa.Table, labels: tuple[str, ...], sizes: str) -> str:
  """Of the values, not of the bytes in memory: those depend on the source and the library."""
  digest = hashlib.sha256(json.dumps([sizes, labels]).encode())
  for rows in _batches(table):
    digest.update(json.dumps(rows).encode() + b"\n")
  return digest.hexdigest()[:16]


def _batches(table: pa.Table) -> Iterator[dict[str, list[Any]]]:
  """Columns as Python objects, as many rows at a time whatever the table's chunks."""
  for start in range(0, table.num_rows, _BATCH):
    yield table.slice(start, _BATCH).to_pydict()


# Messages.


def _nearest(name: str, known: Sequence[str]) -> str:
  near = difflib.get_close_matches(name, known, n=1)
  return f" (did you mean {near[0]!r}?)" if near else ""


def _shorten(text: str) -> str:
  return repr(text if len(text) <= 60 else f"{text[:57]}...")
