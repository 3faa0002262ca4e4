"""The plots of a report: curves over numbers, bars over names."""

import io
import math
import pathlib
import textwrap
from typing import Any

import numpy as np

from videogpt_jax.evaluation import report as report_lib
from videogpt_jax.telemetry import plots

_SIZE = (6.4, 4.0)  # inches
_TITLE = 80  # characters of a line
_LEGEND_COLUMNS = 4
_BAR, _NAME, _AROUND = 0.09, 0.19, 0.9  # inches: a lying bar, a name at least; axis, legend
_BAR_FONT, _BAR_DIGITS = 8, 4  # points; of the largest value
_FIRST = "#d1342f"  # the model
_OTHERS = ("#3b74b8", "#2e8b57", "#b8860b", "#8e63a8", "#5f9ea0", "#7f7f7f", "#bc8f5f")


def write_png(plot: report_lib.Plot, path: pathlib.Path) -> None:
  """Draws a plot to a file (atomically).

  Raises:
    InputError: matplotlib is not installed, or the file cannot be written.
  """
  figure = _draw(plot)
  figure.suptitle("\n".join(textwrap.wrap(plot.title, _TITLE)), x=0.01, ha="left", fontsize=11)
  plots.save(figure, path)


def svg(plot: report_lib.Plot) -> str:
  """A plot as an `<svg>` element, for a page, which gives it its title.

  Raises:
    InputError: matplotlib is not installed.
  """
  import matplotlib

  buffer = io.StringIO()
  with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": plot.title}):
    _draw(plot).savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
  text = buffer.getvalue().replace("#000000", "currentColor")  # readable in the dark, too
  return text[text.index("<svg"):]


def _draw(plot: report_lib.Plot) -> Any:
  return _ranked(plot) if plot.ranked else _upright(plot)


def _ranked(plot: report_lib.Plot) -> Any:
  """Lying bars below each other: a name needs a line, however many there are."""
  curves = {name: [math.nan if x is None else x for x in curve]
            for name, curve in plot.curves.items()}
  by = next(iter(curves.values()))
  order = sorted(range(len(plot.x)),  # what has no value comes last
                 key=lambda i: (math.isnan(by[i]), 0.0 if math.isnan(by[i]) else -by[i]))
  high = max(_NAME, _BAR * (len(curves) + 1))
  figure = plots.figure((_SIZE[0], _AROUND + high * len(order)))
  axes = figure.add_subplot()
  width = 0.8 / max(len(curves), 1)
  for k, (name, curve) in enumerate(curves.items()):
    places = [y + (k - (len(curves) - 1) / 2) * width for y in range(len(order))]
    values = [curve[i] for i in order]
    bars = axes.barh(places, np.nan_to_num(values), width, label=name, color=_colour(k))
    if len(curves) == 1:
      texts = report_lib.Table("", [name], [[x] for x in values], digits=_BAR_DIGITS).shown()
      axes.bar_label(bars, [text for text, in texts], padding=2, fontsize=_BAR_FONT - 1)
  axes.set_yticks(range(len(order)), [str(plot.x[i]) for i in order], fontsize=_BAR_FONT)
  axes.set_ylim(len(order) - 0.4, -0.6)  # the first on top
  axes.set(xlabel=plot.xlabel, ylabel=plot.ylabel)
  axes.grid(axis="x", alpha=0.25, linewidth=0.6)
  axes.set_axisbelow(True)
  axes.tick_params(axis="y", length=0)
  axes.spines[["top", "right"]].set_visible(False)
  _add_legend(figure, axes, plot)
  return figure


def _upright(plot: report_lib.Plot) -> Any:
  figure = plots.figure(_SIZE)
  from matplotlib import ticker  # it is there: `figure` said so

  axes = figure.add_subplot()
  named = any(isinstance(x, str) for x in plot.x)
  width = 0.8 / max(len(plot.curves), 1)
  for i, (name, curve) in enumerate(plot.curves.items()):
    values = [math.nan if value is None else value for value in curve]
    colour = _colour(i)
    if named:
      places = [x + (i - (len(plot.curves) - 1) / 2) * width for x in range(len(values))]
      axes.bar(places, values, width, label=name, color=colour)
    else:
      axes.plot(plot.x, values, color=colour, linewidth=1.5 if i else 2.4, marker="o",
                markersize=3 if i else 5, label=name, zorder=2 if i else 3)
  if named:
    axes.set_xticks(range(len(plot.x)), [str(x) for x in plot.x], rotation=30, ha="right")
  axes.set(xlabel=plot.xlabel, ylabel=plot.ylabel)
  axes.grid(alpha=0.25, linewidth=0.6)
  axes.spines[["top", "right"]].set_visible(False)
  if not named and all(isinstance(x, int) for x in plot.x):
    axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
  _add_legend(figure, axes, plot)
  return figure


def _colour(i: int) -> str:
  return _OTHERS[(i - 1) % len(_OTHERS)] if i else _FIRST


def _add_legend(figure: Any, axes: Any, plot: report_lib.Plot) -> None:
  if len(plot.curves) > 1:
    lines, names = axes.get_legend_handles_labels()
    figure.legend(lines, names, loc="outside lower center", ncols=_LEGEND_COLUMNS, frameon=False,
                  fontsize=9)
