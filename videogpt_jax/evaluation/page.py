"""A report as one static page: tables, plots, and videos side by side that play in step.

The page needs no server and nothing from elsewhere: style, script and plots are in it, and the
videos beside it are named by relative paths. `page.css` and `page.js` say how it looks and acts.
"""

from collections.abc import Iterator, Sequence
import contextlib
import html
import importlib.resources
import io
import json
import os
import pathlib
import urllib.parse

from PIL import Image

import videogpt_jax
from videogpt_jax import files
from videogpt_jax.data import video
from videogpt_jax.evaluation import curves
from videogpt_jax.evaluation import ledger
from videogpt_jax.evaluation import report as report_lib

POSTERS = "posters"
_POSTER_WIDTH = 480  # px, at most
_SIZE, _SMALL, _MANY = 160, 128, 5  # px, of a video at first; of one of so many in a row


def write(report: report_lib.Report, path: pathlib.Path) -> None:
  """Writes the page, and a picture of each video that is shown until it plays.

  Raises:
    InputError: they cannot be written, or matplotlib is not installed.
  """
  style, script = (importlib.resources.files(__package__).joinpath(name).read_text("utf-8")
                   for name in ("page.css", "page.js"))
  title = html.escape(report.title)
  body = "\n".join(_body(report, path.parent))
  files.replace(path, f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
{body}
<script>
{script}</script>
</body>
</html>
""".encode())


def _body(report: report_lib.Report, out: pathlib.Path) -> Iterator[str]:
  sections = {"results": bool(report.tables), "plots": bool(report.plots),
              "tables": len(report.tables) > 1, "videos": bool(report.videos), "settings": True}
  links = "".join(f'<a href="#{name}">{name.capitalize()}</a>'
                  for name, there in sections.items() if there)
  yield (f'<header><h1>{html.escape(report.title)}</h1><nav>{links}</nav>'
         '<button id="theme" title="Light or dark">◐</button></header><main>')
  if report.tables:
    yield f'<section id="results">{_table(report.tables[0])}</section>'
  if report.plots:
    figures = "".join(f"<figure><h3>{html.escape(plot.title)}</h3>{curves.svg(plot)}</figure>"
                      for plot in report.plots)
    yield f'<section id="plots"><h2>Plots</h2><div class="grid">{figures}</div></section>'
  if len(report.tables) > 1:
    tables = "".join(map(_table, report.tables[1:]))
    yield (f'<section id="tables"><h2>Tables</h2><details><summary>{len(report.tables) - 1} more'
           f'</summary><div class="grid">{tables}</div></details></section>')
  if report.videos:
    yield from _videos(report.videos, out)
  settings = html.escape(json.dumps(ledger.plain(report.settings), indent=2))
  yield ('<section id="settings"><h2>Settings</h2><details><summary>How this was measured</summary>'
         f"<pre>{settings}</pre></details></section></main>"
         f"<footer>videogpt_jax {videogpt_jax.__version__}</footer>")


def _table(table: report_lib.Table) -> str:
  best, shown = table.best(), table.shown()
  numeric = [not any(isinstance(row[j], str) for row in table.rows)
             for j in range(len(table.columns))]
  head = "".join(_header(name, numeric[j]) for j, name in enumerate(table.columns))
  body = []
  for i, row in enumerate(shown):
    cells = "".join(_cell(table.rows[i][j], text, (i, j) in best, numeric[j])
                    for j, text in enumerate(row))
    body.append(f'<tr class="published">{cells}</tr>' if i in table.published
                else f"<tr>{cells}</tr>")
  notes = ["† published, not measured here"] if table.published else []
  notes += [table.note] if table.note else []
  note = f'<p class="note">{"<br>".join(map(html.escape, notes))}</p>' if notes else ""
  return (f'<div class="block"><h3>{html.escape(table.title)}</h3><div class="scroll">'
          f'<table class="sortable"><thead><tr>{head}</tr></thead>'
          f'<tbody>{"".join(body)}</tbody></table></div>{note}</div>')


def _header(name: str, numeric: bool) -> str:
  kind = ' class="number"' if numeric else ""
  return f'<th scope="col"{kind}><button>{html.escape(name)}</button></th>'


def _cell(value: report_lib.Cell, text: str, best: bool, numeric: bool) -> str:
  kinds = " ".join(kind for kind, there in (("number", numeric), ("best", best)) if there)
  kept = f' data-value="{float(value)!r}"' if report_lib.is_number(value) else ""  # type: ignore
  return f'<td{f" class={kinds!r}" if kinds else ""}{kept}>{html.escape(text)}</td>'


def _videos(rows: Sequence[report_lib.VideoRow], out: pathlib.Path) -> Iterator[str]:
  columns = list(dict.fromkeys(name for row in rows for name in row.files))
  values = list(dict.fromkeys(name for row in rows for name in row.values))
  toggles = "".join(
    f'<label><input type="checkbox" data-column="{i}" checked> {html.escape(name)}</label>'
    for i, name in enumerate(columns))
  size = _SMALL if len(columns) >= _MANY else _SIZE
  border = " An orange border: predicted." if any(row.given for row in rows) else ""
  yield f"""<section id="videos"><h2>Videos</h2>
<div class="controls">
<button id="play" title="Play or pause all (space)">Pause</button>
<label>speed <select id="speed"><option>0.1</option><option>0.25</option><option>0.5</option>
<option selected>1</option><option>2</option></select></label>
<label>size <input id="size" type="range" min="64" max="640" step="16" value="{size}"></label>
<span class="columns">{toggles}</span>
<input id="filter" type="search" placeholder="filter: words, {html.escape(_example(values))}"
 title="Words of the name; conditions on values, such as {html.escape(_example(values))}">
<output id="count">{len(rows)} of {len(rows)}</output>
</div>
<p class="note help">Click a heading to sort, a video to hold its row. Space: play or pause all;
← and →: one frame; /: filter.{border}</p>
<div class="scroll"><table class="sortable videos" style="--size: {size}px"><thead><tr>"""
  yield _header("video", False)
  yield "".join(f'<th scope="col" class="film c{i}">{html.escape(name)}</th>'
                for i, name in enumerate(columns))
  yield "".join(_header(name, True) for name in values)
  yield "</tr></thead><tbody>"
  numbers = report_lib.Table("", ["video", *values], [
    [row.name, *(row.values.get(name) for name in values)] for row in rows])
  for row, shown in zip(rows, numbers.shown(), strict=True):
    films = "".join(f'<td class="film c{i}">{_film(row, name, out)}</td>'
                    for i, name in enumerate(columns))
    cells = "".join(_cell(row.values.get(name), text, False, True)
                    for name, text in zip(values, shown[1:], strict=True))
    yield (f'<tr data-fps="{_fps(row):g}" data-given="{row.given}"><td class="name">'
           f'<span>{html.escape(row.name)}</span><input type="range" class="scrub" min="0" max="1"'
           f' step="any" value="0" aria-label="time"><output class="frame"></output></td>'
           f"{films}{cells}</tr>")
  yield "</tbody></table></div></section>"


def _fps(row: report_lib.VideoRow) -> float:
  """Frames a second of a row's videos, out of the first that says them; 0: unknown."""
  for path in row.files.values() if not row.fps else ():
    with contextlib.suppress(OSError, video.VideoError):
      if fps := video.read_header(path)[1]:
        return fps
  return row.fps


def _example(values: Sequence[str]) -> str:
  """What a filter may be; a condition has no spaces, which part it from others."""
  return f"{''.join(values[0].split())}>0.01" if values else "such as ball"


def _film(row: report_lib.VideoRow, name: str, out: pathlib.Path) -> str:
  path = row.files.get(name)
  if path is None:
    return ""
  link = lambda to: html.escape(urllib.parse.quote(pathlib.PurePath(os.path.relpath(to, out))
                                                   .as_posix()))
  poster = _poster(path, out, row.given)
  shown = f' poster="{link(poster)}"' if poster else ""
  label = html.escape(f"{row.name}: {name}")
  return (f'<video muted playsinline preload="none" data-src="{link(path)}"{shown}'
          f' aria-label="{label}"></video>')


def _poster(path: pathlib.Path, out: pathlib.Path, given: int) -> pathlib.Path | None:
  """A picture of a video: the last frame that was given, or the first."""
  relative = os.path.relpath(path, out)
  poster = out / POSTERS / f"{report_lib.slug(relative)}.jpg"
  try:
    if poster.exists() and poster.stat().st_mtime >= path.stat().st_mtime:
      return poster
    frame = video.read(path, max_frames=max(given, 1)).frames[-1]
  except (OSError, video.VideoError):
    return None  # the page shows that it cannot play it
  picture = Image.fromarray(frame)
  picture.thumbnail((_POSTER_WIDTH, _POSTER_WIDTH))
  buffer = io.BytesIO()
  picture.save(buffer, "JPEG", quality=85)
  files.make_folder(poster.parent)
  files.replace(poster, buffer.getvalue())
  return poster
