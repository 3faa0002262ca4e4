"""What a benchmark found, and the files it is written to.

    results.json     all of it
    results.csv      table,row,column,value of every table: one value a line
    plots/NAME.png   the curves
    report.html      all of it on one page, with the videos side by side (`evaluation.page`)
"""

from collections.abc import Mapping, Sequence
import csv
import dataclasses
import io
import math
import os
import pathlib
import re
from typing import Any

from videogpt_jax import files
from videogpt_jax.evaluation import ledger

Cell = str | float | None
RESULTS, VALUES, PAGE, PLOTS = "results.json", "results.csv", "report.html", "plots"
OUTPUTS = (RESULTS, VALUES, PAGE, PLOTS, "posters")  # whatever the benchmark; see `ledger.Ledger`
LOWER, HIGHER, ZERO = "lower", "higher", "zero"  # what is better: the latter, nearer to 0

_MOST_DECIMALS = 6


@dataclasses.dataclass(frozen=True)
class Table:
  """A table; the first column names the rows.

  Attributes:
    title: what the values are, with units.
    columns: names.
    rows: cells by column; None or NaN: there is no value.
    note: below the table: sources, protocol.
    published: indices of rows whose values are of a paper, not measured here; they are marked.
    better: by column, `LOWER`, `HIGHER` or `ZERO`: its best measured value is marked.
    across: one of these: instead, the best value of every row is.
    digits: shown of the largest value of a column.
  """

  title: str
  columns: Sequence[str]
  rows: Sequence[Sequence[Cell]]
  note: str = ""
  published: Sequence[int] = ()
  better: Mapping[str, str] = dataclasses.field(default_factory=dict)
  across: str = ""
  digits: int = 4

  def __post_init__(self) -> None:
    for row in self.rows:
      if len(row) != len(self.columns):
        raise ValueError(f"table {self.title!r}: {len(row)} cells for {len(self.columns)} columns")

  def shown(self) -> list[list[str]]:
    """The cells as text; numbers of a column have equally many decimals."""
    columns = [[row[i] for row in self.rows] for i in range(len(self.columns))]
    decimals = [_decimals(column, self.digits) for column in columns]
    if self.across:  # rows are compared: a column of zeros looks like the others
      decimals = [decimals[0], *(x or max(decimals[1:]) for x in decimals[1:])]
    shown = [[_cell(cell, places) for cell in column]
             for column, places in zip(columns, decimals, strict=True)]
    return [list(row) for row in zip(*shown, strict=True)]

  def best(self) -> set[tuple[int, int]]:
    """The marked cells: row, column."""
    marked: set[tuple[int, int]] = set()
    measured = [i for i in range(len(self.rows)) if i not in self.published]
    for name, way in self.better.items():
      column = list(self.columns).index(name)
      marked |= _best([(i, column) for i in measured], self.rows, way)
    if self.across:
      for i in measured:
        marked |= _best([(i, j) for j in range(1, len(self.columns))], self.rows, self.across)
    return marked


@dataclasses.dataclass(frozen=True)
class Plot:
  """Curves over one axis of numbers, or bars over one of names.

  Attributes:
    title: of the plot; its file has this name.
    x: numbers, or names.
    curves: values by name of the curve, NaN or None where there is none.
    xlabel, ylabel: with units.
    ranked: for names, of which there may be many: the bars lie, one name below the other, and
      are drawn from the highest value of the first curve to the lowest. `x` keeps its order.
  """

  title: str
  x: Sequence[Any]
  curves: Mapping[str, Sequence[float | None]]
  xlabel: str = ""
  ylabel: str = ""
  ranked: bool = False


@dataclasses.dataclass(frozen=True)
class VideoRow:
  """Videos of one item that are shown side by side.

  Attributes:
    name: of the item.
    files: H.264 mp4 by column, such as truth, model; best below the folder of the results.
    values: by which rows can be sorted.
    fps: of the videos; 0: unknown.
    given: how many of their frames were given, the others are predicted; 0: unknown.
  """

  name: str
  files: Mapping[str, pathlib.Path]
  values: Mapping[str, float]
  fps: float = 0.0
  given: int = 0


@dataclasses.dataclass(frozen=True)
class Report:
  """What a benchmark found.

  Attributes:
    title: of the page.
    settings: how it was measured.
    tables, plots, videos: in the order they are shown.
    summary: the few numbers that count.
  """

  title: str
  settings: dict[str, Any]
  tables: Sequence[Table] = ()
  plots: Sequence[Plot] = ()
  videos: Sequence[VideoRow] = ()
  summary: dict[str, Any] = dataclasses.field(default_factory=dict)


def write(report: Report, out: pathlib.Path) -> list[pathlib.Path]:
  """Writes a report's files (see the module) and returns their paths.

  Raises:
    InputError: they cannot be written, or matplotlib is not installed.
  """
  from videogpt_jax.evaluation import curves
  from videogpt_jax.evaluation import page

  plots = {plot.title: out / PLOTS / f"{slug(plot.title)}.png" for plot in report.plots}
  files.make_folder(out / PLOTS)
  for plot in report.plots:
    curves.write_png(plot, plots[plot.title])
  files.write_json(out / RESULTS, _strict(ledger.plain(_as_dict(report, out, plots))))
  files.replace(out / VALUES, _csv(report).encode())
  page.write(report, out / PAGE)
  return [out / RESULTS, out / VALUES, *plots.values(), out / PAGE]


def text(report: Report) -> str:
  """The tables as aligned text: `*` marks the best, `†` what is of a paper."""
  return "\n\n".join(_text(table) for table in report.tables)


def slug(title: str) -> str:
  """A title as the name of a file."""
  return re.sub(r"[^a-z0-9]+", "_", title.lower()).strip("_") or "untitled"


def is_number(cell: Any) -> bool:
  """Whether a cell holds a value."""
  return isinstance(cell, (int, float)) and not isinstance(cell, bool) and math.isfinite(cell)


def _best(cells: list[tuple[int, int]], rows: Sequence[Sequence[Cell]], way: str
          ) -> set[tuple[int, int]]:
  values: dict[tuple[int, int], float] = {}
  for i, j in cells:
    value = rows[i][j]
    if isinstance(value, (int, float)) and is_number(value):
      values[i, j] = {LOWER: value, HIGHER: -value, ZERO: abs(value)}[way]
  if len(values) < 2:
    return set()
  best = min(values.values())
  return {cell for cell, value in values.items() if value == best}


def _decimals(cells: Sequence[Cell], digits: int) -> int:
  numbers = [abs(x) for x in cells if isinstance(x, (int, float)) and is_number(x)]
  if all(float(x).is_integer() for x in numbers):
    return 0
  return min(max(digits - 1 - math.floor(math.log10(max(numbers))), 0), _MOST_DECIMALS)


def _cell(cell: Cell, decimals: int) -> str:
  if isinstance(cell, str):
    return cell
  return f"{cell:.{decimals}f}" if is_number(cell) else "-"


def _text(table: Table) -> str:
  best, rows = table.best(), table.shown()
  for i, row in enumerate(rows):
    for j in range(1, len(row)):
      row[j] += "*" if (i, j) in best else " "
    if i in table.published:
      row[0] += " †"
  widths = [max(len(row[j]) for row in [list(table.columns), *rows])
            for j in range(len(table.columns))]

  def line(cells: Sequence[str]) -> str:
    shown = [cell.ljust(width) if j == 0 or not _numeric(table, j) else cell.rjust(width)
             for j, (cell, width) in enumerate(zip(cells, widths, strict=True))]
    return "  ".join(shown).rstrip()

  header = line([name if j == 0 or not _numeric(table, j) else f"{name} "
                 for j, name in enumerate(table.columns)])
  lines = [table.title, header, "-" * len(header), *map(line, rows)]
  if table.published:
    lines.append("† published, not measured here")
  return "\n".join(lines + ([table.note] if table.note else []))


def _numeric(table: Table, column: int) -> bool:
  return not any(isinstance(row[column], str) for row in table.rows)


def _as_dict(report: Report, out: pathlib.Path, plots: Mapping[str, pathlib.Path]
             ) -> dict[str, Any]:
  videos = [{"name": row.name, "files": {name: os.path.relpath(path, out)
                                         for name, path in row.files.items()},
             "values": row.values} for row in report.videos]
  return {
    "title": report.title, "summary": report.summary, "settings": report.settings,
    "tables": [dataclasses.asdict(table) for table in report.tables],
    "plots": [{**dataclasses.asdict(plot), "file": os.path.relpath(plots[plot.title], out)}
              for plot in report.plots],
    "videos": videos}


def _strict(value: Any) -> Any:
  """Without NaN and infinities, which are no JSON."""
  if isinstance(value, dict):
    return {name: _strict(x) for name, x in value.items()}
  if isinstance(value, list):
    return [_strict(x) for x in value]
  return None if isinstance(value, float) and not math.isfinite(value) else value


def _csv(report: Report) -> str:
  buffer = io.StringIO()
  writer = csv.writer(buffer, lineterminator="\n")
  writer.writerow(("table", "row", "column", "value"))
  for table in report.tables:
    for row in table.rows:
      for name, cell in zip(table.columns[1:], row[1:], strict=True):
        writer.writerow((table.title, row[0], name, "" if cell is None else cell))
  for item in report.videos:
    for name, value in item.values.items():
      writer.writerow(("videos", item.name, name, value))
  return buffer.getvalue()
