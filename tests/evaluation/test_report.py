"""Reports: what is printed and written says what was measured."""

import csv
import dataclasses
import itertools
import json
import math
import re
import xml.etree.ElementTree

from PIL import Image
import pytest

import example_report
from videogpt_jax.evaluation import curves
from videogpt_jax.evaluation import report as report_lib


def test_the_best_measured_values_are_marked():
  assert example_report.TABLE.best() == {(0, 1), (0, 2), (0, 3)}  # not the paper's
  across = report_lib.Table("", ["frame", "a", "b"], [["1", 1.0, 2.0], ["2", math.nan, 2.0]],
                            across=report_lib.HIGHER)
  assert across.best() == {(0, 2)}  # where there is one value, nothing is compared


def test_text_is_aligned_and_says_what_is_published():
  lines = report_lib.text(report_lib.Report("", {}, [example_report.TABLE])).splitlines()
  assert lines[0] == "Scores <of> models"
  header, rows = lines[1], lines[3:7]
  assert [row.split()[-1] for row in rows] == ["measured"] * 3 + ["3"]
  ends = [header.index(name) + len(name) for name in ("MSE", "PSNR", "drift")]
  for row in rows:
    for end in ends:
      assert row[end - 1] in "0123456789-" and row[end] in " *"
  assert rows[0].split() == ["ours", "&", "theirs", "0.0123*", "20.50*", "-0.2500*", "measured"]
  assert rows[2].split() == ["blank", "-", "-", "0.5000", "measured"]
  assert rows[3].startswith("paper †")
  assert lines[7:] == ["† published, not measured here", "At 8 frames/s."]


def test_files_hold_every_value(tmp_path):
  paths = report_lib.write(example_report.report(tmp_path), tmp_path)
  assert all(path.stat().st_size for path in paths)
  # What a restart of an evaluation removes.
  assert {path.name for path in tmp_path.iterdir()} == {*report_lib.OUTPUTS, "clips"}
  found = json.loads((tmp_path / "results.json").read_text(), parse_constant=pytest.fail)
  assert found["tables"][0]["rows"][0] == ["ours & theirs", 0.0123456, 20.5, -0.25, "measured"]
  assert found["tables"][0]["rows"][2][1:3] == [None, None]
  assert found["settings"] == {"shift": 0.5}
  assert found["videos"][1] == {"name": "ball 1 <b>", "values": {"MSE": 0.0}, "files": {
    "truth": "clips/truth #1.mp4", "model": "clips/model #1.mp4"}}
  lines = list(csv.DictReader((tmp_path / "results.csv").open()))
  assert {"table": "Scores <of> models", "row": "copy", "column": "PSNR", "value": "9.0"} in lines
  assert {"table": "videos", "row": "ball 0 <b>", "column": "MSE", "value": "1.0"} in lines
  assert len(lines) == 4 * 4 + 2
  for plot in found["plots"]:
    with Image.open(tmp_path / plot["file"]) as picture:
      picture.verify()
  assert {path.name for path in (tmp_path / "plots").iterdir()} == {"mse_by_frame.png",
                                                                    "by_scenario.png"}


def test_a_curve_has_a_gap_where_there_is_no_value():
  """In the picture of the page: two runs of one point each, not a line through the gap."""
  tree = xml.etree.ElementTree.fromstring(curves.svg(example_report.PLOTS[0]))
  paths = [x.get("d") for x in tree.iter("{http://www.w3.org/2000/svg}path")
           if "#d1342f" in (x.get("style") or "") and "stroke-width: 2.4" in x.get("style")]
  assert max(path.count("M") for path in paths) == 2
  texts = [x.text for x in tree.iter("{http://www.w3.org/2000/svg}text")]
  assert {"a", "b", "x"} <= set(texts)


_SVG = "{http://www.w3.org/2000/svg}"


def _bars(tree, colour):
  """Width and middle of every bar of a colour, as they are drawn."""
  found = []
  for path in tree.iter(f"{_SVG}path"):
    if colour in (path.get("style") or "") and path.get("clip-path"):
      numbers = [float(x) for x in re.findall(r"-?[\d.]+", path.get("d"))]
      found.append((max(numbers[::2]) - min(numbers[::2]),
                    (max(numbers[1::2]) + min(numbers[1::2])) / 2))
  return found


def test_ranked_bars_lie_below_each_other_the_highest_first():
  names = [f"scenario-{i}" for i in range(66)]
  values = [float(7 * i % 66) for i in range(66)]
  values[3] = math.nan
  tree = xml.etree.ElementTree.fromstring(curves.svg(report_lib.Plot(
    "Score", names, {"ours": values}, "score", ranked=True)))
  labels = [x for x in tree.iter(f"{_SVG}text") if (x.text or "").startswith("scenario-")]
  by_value = sorted(range(66), key=lambda i: math.inf if i == 3 else -values[i])
  assert [x.text for x in labels] == [names[i] for i in by_value]
  places = [float(x.get("y")) for x in labels]
  assert min(b - a for a, b in itertools.pairwise(places)) > 11  # pt, of letters of 8
  widths, middles = zip(*_bars(tree, "#d1342f"), strict=True)
  assert list(middles) == sorted(middles) and list(widths) == sorted(widths, reverse=True)
  unit = widths[0] / 65
  assert widths[1] == pytest.approx(64 * unit, rel=1e-3) and widths[-1] == 0
  texts = [x.text for x in tree.iter(f"{_SVG}text")]
  assert {"65", "64", "-"} <= set(texts)


def test_ranked_bars_of_several_keep_to_their_names():
  plot = report_lib.Plot("Score", ["low", "high"], {"ours": [1.0, 2.0], "theirs": [40.0, 30.0]},
                         ranked=True)
  tree = xml.etree.ElementTree.fromstring(curves.svg(plot))
  texts = [x.text for x in tree.iter(f"{_SVG}text") if x.text in ("low", "high")]
  assert texts == ["high", "low"]
  (ours_high, _), (ours_low, _), *_ = _bars(tree, "#d1342f")
  (theirs_high, _), (theirs_low, _), *_ = _bars(tree, "#3b74b8")
  assert ours_high / ours_low == pytest.approx(2, rel=1e-3)
  assert theirs_high / theirs_low == pytest.approx(30 / 40, rel=1e-3)


def test_the_page_reads_the_rate_of_videos_and_says_orange_where_something_is_given(tmp_path):
  report = example_report.report(tmp_path)
  rows = [dataclasses.replace(row, fps=0.0, given=0) for row in report.videos]
  broken = tmp_path / "clips" / "broken.mp4"
  broken.write_bytes(b"no video")
  rows.append(report_lib.VideoRow("broken", {"truth": broken}, {}))
  report_lib.write(dataclasses.replace(report, videos=rows), tmp_path)
  page = (tmp_path / report_lib.PAGE).read_text()
  assert re.findall(r'data-fps="([^"]*)"', page) == ["8", "8", "0"]
  assert "orange" not in page
  report_lib.write(report, tmp_path)
  assert "orange" in (tmp_path / report_lib.PAGE).read_text()


def test_a_table_of_unequal_rows_is_a_defect():
  with pytest.raises(ValueError, match="1 cells for 2 columns"):
    report_lib.Table("t", ["a", "b"], [["x"]])
