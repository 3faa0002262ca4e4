"""Recipes: the official list files of public datasets, as columns of a listing.

A recipe says what it finds as `Rows`; `listing.read` checks them and makes a `Listing` of them.
"""

import array
import ast
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
import dataclasses
import os
import pathlib
import re
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from videogpt_jax.data import columns as columns_lib
from videogpt_jax.data.columns import Column
from videogpt_jax.data.columns import SCHEMA
from videogpt_jax.data.columns import Where
from videogpt_jax.errors import InputError

_KINETICS_SPLITS = {"train": "train", "validate": "validation", "val": "validation",
                    "validation": "validation", "test": "test"}
_PROBED = 1000  # rows by which the layout of a folder is found


@dataclasses.dataclass(frozen=True)
class Rows:
  """What a recipe finds in its files; the values are yet to be checked.

  Attributes:
    root: what relative paths are relative to.
    columns: of `SCHEMA`, `path` among them, of any type that holds such values.
    where: a row -> the file and the place in it, for messages.
    labels: names of the classes, by label; empty if they are not known.
  """

  root: pathlib.Path
  columns: Mapping[str, Column]
  where: Where
  labels: tuple[str, ...] = ()


def read(recipe: str, path: pathlib.Path, root: pathlib.Path | None) -> Rows:
  """Reads a list by a recipe.

  Args:
    recipe: of `RECIPES`.
    path: the list file; for a recipe of `OF_FOLDERS`, also the folder of such files.
    root: the folder that the listed paths are relative to; None: the recipe finds it, most often
      that of the list.

  Raises:
    InputError: it cannot be read, or is not as the recipe expects.
  """
  return _RECIPES[recipe](path, root)


def _panda70m(path: pathlib.Path, root: pathlib.Path | None) -> Rows:
  """Panda-70M: a row is a video, with lists of the times and the captions of its parts."""
  columns, where = _read_recipe(path, "panda70m", ("videoID", "timestamp", "caption"))
  columns_lib.refuse(pc.equal(columns["videoID"], ""), where, lambda i: "videoID is empty")
  rows = array.array("q")
  chunks: dict[str, list[pa.Array]] = {"path": [], "start": [], "end": [], "caption": []}
  row = 0
  for batch in columns_lib.batches(pa.table(columns)):
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
  return Rows(root or path.parent, made, lambda i: where(rows[i]))


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


def _openvid1m(path: pathlib.Path, root: pathlib.Path | None) -> Rows:
  """OpenVid-1M: a row is a video file."""
  columns, where = _read_recipe(path, "openvid1m", ("video", "caption", "frame"))
  named = {"path": columns["video"], "caption": columns["caption"], "frames": columns["frame"]}
  return Rows(root or path.parent, named, where)


def _kinetics600(path: pathlib.Path, root: pathlib.Path | None) -> Rows:
  """Kinetics-600: rows are parts of online videos, the files those parts.

  Rows of the split "test" are left out, or are the validation split of a list that has no
  other; the classes are numbered in the order of their names in the whole list.
  """
  root = root or path.parent
  columns, where = _read_recipe(
    path, "kinetics600", ("label", "youtube_id", "time_start", "time_end", "split"))
  columns_lib.refuse(pc.equal(columns["youtube_id"], ""), where, lambda i: "youtube_id is empty")
  times = [_six_digits(columns[name], name, where) for name in ("time_start", "time_end")]
  file = pc.binary_join_element_wise(columns["youtube_id"], *times, "_")
  split = columns_lib.as_splits(columns["split"], where, _KINETICS_SPLITS)
  label, labels = columns_lib.named_labels(pc.utf8_trim_whitespace(columns["label"]))
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
  return Rows(root, {"path": table["path"], "label": table["label"], "split": split},
              lambda i: where(rows[i].as_py()), labels)


def _six_digits(column: Column, name: str, where: Where) -> Column:
  seconds = columns_lib.as_whole(column, name, where)
  columns_lib.refuse(pc.fill_null(pc.less(seconds, 0), True), where, lambda i: (
    f"{name} must be a whole number of seconds from 0, got {column[i].as_py()!r}"))
  return pc.utf8_lpad(seconds.cast(pa.string()), 6, "0")


def _kinetics_paths(path: pathlib.Path, root: pathlib.Path, names: Mapping[str, Column],
                    where: Where) -> Column:
  """The path of every row, in the layout of the first row whose file exists."""
  layouts = (("split", "name"), ("label", "name"), ("split", "label", "name"), ("name",))
  probed = pa.table(dict(names)).slice(0, _PROBED).to_pylist()
  for row in probed:
    for layout in layouts:
      parts = [row[key] for key in layout]
      if all(parts) and os.path.exists(root.joinpath(*parts)):
        if "label" in layout:
          columns_lib.refuse(pc.equal(names["label"], ""), where, lambda i: (
            "label is empty, but the files lie in folders named by it"))
        return pc.binary_join_element_wise(*(names[key] for key in layout), "/")
  if not probed:
    return names["name"]
  raise InputError(
    f"{path}: none of the files of the first {len(probed)} rows is in {root}; looked for "
    f"{probed[0]['name']} there and in its folders SPLIT, LABEL and SPLIT/LABEL; give the folder "
    "of the videos as the root")


def _ucf101(path: pathlib.Path, root: pathlib.Path | None) -> Rows:
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
  return Rows(root, columns, lambda i: rows[i].place, labels)


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
  for line, text in columns_lib.lines(path):
    place = f"{path}, line {line}"
    name, number = _ucf101_line(text)
    if not re.fullmatch("[^/]+/.*[^/]", name):
      raise InputError(f"{place}: {text!r} is not Class/video.avi, with or without the number of "
                       "the class, from 1, after it")
    yield _Ucf101Row(name, columns_lib.SPLITS[match[1]], number, place)


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
    for line, text in columns_lib.lines(index):
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


def _read_recipe(path: pathlib.Path, recipe: str, expected: Sequence[str]
                 ) -> tuple[dict[str, Column], Where]:
  """The expected columns of a CSV file, which may have others."""

  def choose(found: Sequence[str]) -> Sequence[str]:
    missing = [name for name in expected if name not in found]
    if missing:
      raise InputError(
        f"{path}: the recipe {recipe} expects the columns {', '.join(expected)}; "
        f"{', '.join(missing)} missing, found {', '.join(map(repr, found)) or 'none'}")
    return expected

  return columns_lib.read_csv(path, choose)


def _shorten(text: str) -> str:
  return repr(text if len(text) <= 60 else f"{text[:57]}...")


_RECIPES: dict[str, Callable[[pathlib.Path, pathlib.Path | None], Rows]] = {
  "kinetics600": _kinetics600,
  "openvid1m": _openvid1m,
  "panda70m": _panda70m,
  "ucf101": _ucf101,
}
RECIPES = tuple(_RECIPES)
OF_FOLDERS = ("ucf101",)  # of `RECIPES`, those that read a folder of lists too
