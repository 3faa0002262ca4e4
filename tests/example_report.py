"""A report with all that a report may hold."""

import math

import numpy as np

from videogpt_jax.data import video
from videogpt_jax.evaluation import report as report_lib

TABLE = report_lib.Table(
  "Scores <of> models", ["model", "MSE", "PSNR", "drift", "source"],
  [["ours & theirs", 0.0123456, 20.5, -0.25, "measured"], ["copy", 0.5, 9.0, 0.75, "measured"],
   ["blank", None, math.nan, 0.5, "measured"], ["paper", 0.001, 99.0, 0.0, "Table 3"]],
  note="At 8 frames/s.", published=(3,),
  better={"MSE": report_lib.LOWER, "PSNR": report_lib.HIGHER, "drift": report_lib.ZERO})
PLOTS = [
  report_lib.Plot("MSE: by/frame", [1, 2, 3], {"a": [1.0, None, 3.0], "b": [1, 2, math.nan]}, "x"),
  report_lib.Plot("By scenario", ["solid", "fluid"], {"a": [1.0, 2.0], "b": [3.0, math.nan]})]


def report(out):
  """Its videos, whose red grows by 60 a frame, are written into a folder below `out`."""
  frames = np.zeros((4, 16, 16, 3), np.uint8)
  frames[:, :, :, 0] = np.arange(4)[:, None, None] * 60
  rows = []
  for i in range(2):
    files = {name: out / "clips" / f"{name} #{i}.mp4" for name in ("truth", "model")}
    files["truth"].parent.mkdir(parents=True, exist_ok=True)
    for path in files.values():
      video.write_mp4(path, frames, 8.0)
    rows.append(report_lib.VideoRow(f"ball {i} <b>", files, {"MSE": 1.0 - i}, 8.0, 2))
  return report_lib.Report("A & B", {"shift": np.float32(0.5)}, [TABLE], PLOTS, rows,
                           {"MSE": math.inf})
