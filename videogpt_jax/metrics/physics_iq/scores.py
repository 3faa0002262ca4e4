"""The table of a whole data set, as the official code writes it, and the score."""

from collections.abc import Mapping, Sequence
import csv
import dataclasses
import io
import math
import os
import pathlib
import re

import numpy as np

from videogpt_jax import files
from videogpt_jax.errors import InputError
from videogpt_jax.metrics.physics_iq.protocol import VIEWS

LISTS = ("v1_mse", "v2_mse", "variance_spatiotemporal_iou", "variance_mse",
         "spatiotemporal_iou_v1", "spatiotemporal_iou_v2")  # a value a frame
MEASURES = ("v1_mse", "v2_mse", "variance_spatial", "variance_weighted_spatial",
            "variance_spatiotemporal_iou", "variance_mse", "spatiotemporal_iou_v1",
            "spatiotemporal_iou_v2", "spatial_iou_v1", "spatial_iou_v2",
            "weighted_spatial_iou_v1", "weighted_spatial_iou_v2")
COLUMNS = ("scenario", *(f"{name}_perspective-{view}" for view in VIEWS for name in MEASURES))
_WRAPPED = re.compile(r"np\.float(?:32|64)\(([^()]*)\)")  # how numpy 2 prints its numbers

# By scenario, then view, then measure.
Rows = Mapping[str, Mapping[str, Mapping[str, float | Sequence[float]]]]


@dataclasses.dataclass(frozen=True)
class Score:
  """The score and what it is made of.

  Attributes:
    score: 0..100, two decimals; NaN where neither takes nor prediction move.
    spatiotemporal, spatial, weighted_spatial, mse: means of the prediction.
    variance: of the two takes, the same four by name.
  """

  score: float
  spatiotemporal: float
  spatial: float
  weighted_spatial: float
  mse: float
  variance: Mapping[str, float]

  @property
  def physical_variance(self) -> float:
    """How alike the takes are: the three overlaps less the error, at best 3."""
    v = _rounded(self.variance)  # numpy's round, whose ties are not Python's
    total = v["spatiotemporal"] + v["spatial"] + v["weighted_spatial"] - v["mse"]
    return float(np.round(total, 4))


def score(rows: Rows) -> Score:
  """The Physics-IQ score of a table.

  Means over the data set are divided by those of the takes, not video by video; the mean of the
  three shares, less what the error exceeds that of the takes by, is cut to 0..100 once.

  Raises:
    InputError: no scenarios, or one without all views and measures.
  """
  if not rows:
    raise InputError("a Physics-IQ table without scenarios has no score")
  for scenario, views in rows.items():
    missing = [f"{name} of {view}" for view in VIEWS for name in MEASURES
               if name not in views.get(view, {})]
    if missing:
      raise InputError(f"scenario {scenario} lacks {', '.join(missing[:3])}"
                       + (f" and {len(missing) - 3} more" if len(missing) > 3 else ""))
  means = {name: _by_scenario(rows, column) for name, column in (
    ("spatiotemporal", "spatiotemporal_iou_v1"), ("mse", "v1_mse"))}
  means |= {name: _by_view(rows, column) for name, column in (
    ("spatial", "spatial_iou_v1"), ("weighted_spatial", "weighted_spatial_iou_v1"))}
  variance = {name: _by_view(rows, column) for name, column in (
    ("spatiotemporal", "variance_spatiotemporal_iou"), ("spatial", "variance_spatial"),
    ("weighted_spatial", "variance_weighted_spatial"), ("mse", "variance_mse"))}
  rounded = _rounded(variance)
  with np.errstate(divide="ignore", invalid="ignore"):
    shares = [np.float64(means[name]) / rounded[name]
              for name in ("spatiotemporal", "spatial", "weighted_spatial")]
  raw = 100 * (float(np.mean(shares)) - (means["mse"] - rounded["mse"]))
  total = raw if math.isnan(raw) else round(min(max(raw, 0.0), 100.0), 2)
  return Score(total, variance=variance, **means)


def _rounded(variance: Mapping[str, float]) -> dict[str, float]:
  return {name: round(x, 5 if name == "spatial" else 4) for name, x in variance.items()}


def _by_scenario(rows: Rows, column: str) -> float:
  """Mean over scenarios, of each the mean over the frames of all views."""
  return float(np.mean([np.mean(np.concatenate([_frames(views[view][column]) for view in VIEWS]))
                        for views in rows.values()]))


def _by_view(rows: Rows, column: str) -> float:
  """Mean over views, of each the mean over all scenarios (and frames)."""
  return float(np.mean([np.mean(np.concatenate([_frames(views[view][column])
                                                for views in rows.values()])) for view in VIEWS]))


def _frames(values: float | Sequence[float]) -> np.ndarray:
  """Values by frame, to four decimals as the score takes them; or a single one as it is."""
  if isinstance(values, Sequence):
    return np.array([round(x, 4) for x in values])
  return np.array([values])


def write(path: str | os.PathLike[str], rows: Rows) -> None:
  """Writes the official table, a row a scenario; atomically.

  Raises:
    InputError: it cannot be written.
  """
  buffer = io.StringIO()
  writer = csv.writer(buffer, lineterminator="\n")
  writer.writerow(COLUMNS)
  for scenario, views in rows.items():
    cells = [_cell(views[view][name]) for view in VIEWS for name in MEASURES]
    writer.writerow([f"{scenario}.mp4", *cells])
  files.replace(path, buffer.getvalue().encode())


def read(path: str | os.PathLike[str]) -> Rows:
  """Reads a table of the official code, or of `write`.

  Raises:
    InputError: the file cannot be read, has other columns, or what should be numbers is none.
  """
  path = pathlib.Path(path)
  try:
    with path.open(newline="", encoding="utf-8") as file:
      reader = csv.DictReader(file)
      lines = list(reader)
      missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
  except (OSError, UnicodeDecodeError, csv.Error) as error:
    raise InputError(f"{path}: not a table that can be read: {error}") from error
  if missing:
    raise InputError(f"{path} is no Physics-IQ table: it lacks the column {missing[0]}"
                     + (f" and {len(missing) - 1} more" if missing[1:] else ""))
  return {line["scenario"].removesuffix(".mp4"): {
    view: {name: _value(path, line, name, f"{name}_perspective-{view}") for name in MEASURES}
    for view in VIEWS} for line in lines}


def _cell(values: float | Sequence[float]) -> str:
  if isinstance(values, Sequence):
    return "[" + ", ".join(repr(float(x)) for x in values) + "]"
  return repr(float(values))


def _value(path: pathlib.Path, line: Mapping[str, str], name: str, column: str
           ) -> float | list[float]:
  text = _WRAPPED.sub(r"\1", line[column] or "").strip()
  try:
    if name not in LISTS:
      return float(text)
    if not (text.startswith("[") and text.endswith("]")):
      raise ValueError("no list in brackets")
    numbers = [float(x) for x in text[1:-1].split(",") if x.strip()]
    if not numbers:
      raise ValueError("an empty list")
    return numbers
  except ValueError as error:
    raise InputError(f"{path}: {line['scenario']}, {column}: {error}") from error
