"""A whole Physics-IQ run: what is written, what is taken up again, and that nothing is stale."""

import dataclasses
import json
import pathlib
import re
import shutil
import subprocess
import sys

import av
import cv2
import numpy as np
import pytest

import physics_small
import processes
from videogpt_jax.data import video
from videogpt_jax.errors import InputError
from videogpt_jax.evaluation import physics_iq
from videogpt_jax.evaluation import physics_iq_report
from videogpt_jax.evaluation import physics_mini
from videogpt_jax.evaluation import report as report_lib
from videogpt_jax.metrics.physics_iq import protocol as protocol_lib
from videogpt_jax.metrics.physics_iq import scores
from videogpt_jax.metrics.physics_iq.protocol import Protocol


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  folder = tmp_path_factory.mktemp("data") / "physics-IQ-benchmark"
  physics_small.write(folder)
  return folder


class Copies:
  """Copies the last frame, and counts."""

  def __init__(self, fail_at=None):
    self.calls, self.shapes, self._fail_at = 0, set(), fail_at

  def predict(self, frames, count, rng):
    if self.calls == self._fail_at:
      raise RuntimeError("the machine went down")
    self.calls += 1
    self.shapes.add(frames.shape)
    return physics_mini.copy_last(frames, count, rng)

  def predictor(self, name="copies"):
    return physics_iq.Predictor(name, {"checkpoint": name}, self.predict, lambda h, w: (48, 64))


def _options(data, **changes):
  return physics_iq.Options(data=str(data), protocol=physics_small.PROTOCOL, workers=1, **changes)


def test_writes_what_the_official_script_takes(data, tmp_path):
  copies = Copies()
  found = physics_iq.measure(copies.predictor(), tmp_path, _options(data))
  assert copies.shapes == {(4, 4, 48, 64, 3)}  # six videos: one batch and a half
  videos = sorted((tmp_path / "copies").iterdir())
  views = protocol_lib.VIEWS
  assert [path.name for path in videos] == [
    f"{3 * scene + i + 1:04d}_perspective-{view}_trimmed-scene-{scene}.mp4"
    for scene in range(2) for i, view in enumerate(views)]
  for path in videos:
    seconds, fps, height, width = video.read_header(path)
    assert abs(seconds - 1.0) < 1e-3 and fps == 8 and (height, width) == (48, 64)
    capture = cv2.VideoCapture(str(path))
    assert capture.get(cv2.CAP_PROP_FPS) == 8
    assert sum(1 for _ in iter(lambda capture=capture: capture.read()[0], False)) == 8
  assert scores.read(tmp_path / "results" / "copies.csv") == found.rows
  assert all(value == 0 for rows in found.rows.values() for view in rows.values()
             for name, value in view.items() if name == "spatial_iou_v1")  # copies do not move
  assert found.score.variance["spatial"] > 0.5


def test_five_seconds_at_every_rate(tmp_path):
  for fps in protocol_lib.RATES:
    path = tmp_path / f"{fps}.mp4"
    frames = Protocol(fps=fps).prediction_frames
    video.write_mp4(path, np.zeros((frames, 16, 16, 3), np.uint8), fps)
    assert abs(video.read_header(path)[0] - 5) < 1e-3


def test_goes_on_and_is_never_stale(data, tmp_path):
  own, out = shutil.copytree(data, tmp_path / "data"), tmp_path / "out"
  with pytest.raises(RuntimeError):
    physics_iq.measure(Copies(fail_at=1).predictor(), out, _options(own))
  (out / "copies" / ".half.mp4.tmp").touch()
  second = Copies()
  first = physics_iq.measure(second.predictor(), out, _options(own))
  assert second.calls == 1  # the first of the two batches was there
  assert not list((out / "copies").glob(".*"))
  written = {path: path.stat().st_mtime_ns for path in (out / "items").iterdir()}
  third = Copies()
  assert physics_iq.measure(third.predictor(), out, _options(own)).rows == first.rows
  assert third.calls == 0
  assert written == {path: path.stat().st_mtime_ns for path in (out / "items").iterdir()}
  # Another real video under the same name: that view is scored again.
  real = own / "split-videos/testing/8FPS"
  names = sorted(path.name for path in real.iterdir())
  shutil.copyfile(real / names[5], real / names[0])
  changed = physics_iq.measure(third.predictor(), out, _options(own)).rows
  assert third.calls == 0
  assert [(scene, view) for scene in first.rows for view in first.rows[scene]
          if first.rows[scene][view] != changed[scene][view]] == [("trimmed-scene-0", "left")]
  # A generated video that is no longer what was written is predicted again.
  (out / "copies" / "0005_perspective-center_trimmed-scene-1.mp4").write_bytes(b"broken")
  physics_iq.measure(third.predictor(), out, _options(own))
  assert third.calls == 1
  with pytest.raises(InputError, match="another evaluation: checkpoint copies"):
    physics_iq.measure(Copies().predictor("others"), out, _options(own))


def test_videos_of_somebody_else_and_shipped_masks(data, tmp_path):
  own = shutil.copytree(data, tmp_path / "data")
  folder = tmp_path / "others"
  folder.mkdir()
  takes = sorted((own / "split-videos/testing/8FPS").iterdir())[:6]
  for number, path in enumerate(takes, start=1):
    shutil.copyfile(path, folder / f"{number:04d}_anything.mp4")
  options = _options(own, generated=str(folder))
  one = physics_iq.measure(None, tmp_path / "one", options)
  assert one.model == "others" and one.score.score == 100 and one.shipped == 0
  two = physics_iq.measure(None, tmp_path / "two", dataclasses.replace(options, workers=2))
  assert two.rows == one.rows
  shown = tmp_path / "one" / "shown" / "0001_anything_prediction.mp4"
  pictures, own_video = shown.read_bytes(), (folder / "0001_anything.mp4").read_bytes()
  shutil.copyfile(folder / "0004_anything.mp4", folder / "0001_anything.mp4")
  again = physics_iq.measure(None, tmp_path / "one", options)  # the same folder, another video
  assert again.rows["trimmed-scene-0"]["left"] != one.rows["trimmed-scene-0"]["left"]
  assert shown.read_bytes() != pictures
  (folder / "0001_anything.mp4").write_bytes(own_video)
  assert physics_iq.measure(None, tmp_path / "one", options).rows == one.rows
  assert shown.read_bytes() == pictures
  mask = own / "video-masks/real/8FPS/0002_video-masks_8FPS_perspective-center_take-1_"
  mask = pathlib.Path(f"{mask}trimmed-scene-0.mp4")
  mask.parent.mkdir(parents=True)
  video.write_mp4(mask, np.zeros((8, 128, 128, 3), np.uint8), 8)
  shipped = physics_iq.measure(None, tmp_path / "one", options)
  assert shipped.shipped == 1
  assert shipped.rows["trimmed-scene-0"]["center"]["spatial_iou_v1"] == 0
  made = physics_iq.measure(None, tmp_path / "one", dataclasses.replace(
    options, masks=physics_iq.LOSSLESS))
  assert made.rows == one.rows


def _contents(folder):
  return {path.relative_to(folder): (path.stat().st_mtime_ns, path.read_bytes())
          for path in folder.rglob("*") if path.is_file()}


def test_a_restart_with_fewer_scenarios(data, tmp_path):
  own, out = shutil.copytree(data, tmp_path / "data"), tmp_path / "out"
  physics_iq.measure(Copies().predictor(), out, _options(own))
  (out / "mine.txt").write_text("own")
  for path in own.rglob("*scene-1*"):
    path.unlink()
  (own / "descriptions.csv").unlink()
  fewer = _options(own, restart=True)
  one = dataclasses.replace(physics_small.PROTOCOL, scenarios=1)
  fewer = dataclasses.replace(fewer, protocol=one)
  assert len(physics_iq.measure(Copies().predictor(), out, fewer).rows) == 1
  assert not list(out.rglob("*scene-1*"))
  assert (out / "mine.txt").exists()
  given = dataclasses.replace(fewer, generated=str(out / "copies"))
  with pytest.raises(InputError, match=r"--restart would remove .*copies, which is to be read"):
    physics_iq.measure(None, out, given)
  assert len(list((out / "copies").iterdir())) == 3


_WORKER = """
import pathlib, sys
from absl import flags
import stand_in_models
from videogpt_jax import distributed
from videogpt_jax.evaluation import physics_iq
from videogpt_jax.metrics.physics_iq.protocol import Protocol
distributed.define_flags()
flags.FLAGS(["worker"] + sys.argv[3:])
distributed.obey_flags()
own = stand_in_models.drifting({
  "sample": {"clip_frames": 8, "history": 4, "window": 0, "steps": 1},
  "data": {"source": "world", "frames": 12, "height": 32, "width": 32}})
physics_iq.run(own, pathlib.Path(sys.argv[2]), physics_iq.Options(
  data=sys.argv[1], protocol=Protocol(8, 0.5, 1.0, 2), batch_size=2, workers=1, clip_frames=8))
"""


def test_two_processes_of_two_devices_find_what_one_does(data, tmp_path):
  """Of three batches one process predicts two, the other one; each from its own videos."""
  started = {count: processes.start(["-c", _WORKER, data, tmp_path / str(count)], count, 2)
             for count in (1, 2)}
  said = {count: processes.finish(workers) for count, workers in started.items()}
  assert "4/4 videos predicted" in said[2][0] and "6/6 videos predicted" in said[1][0]
  one, two = (scores.read(tmp_path / str(count) / "results" / "drift.csv") for count in (1, 2))
  assert one == two
  assert len({str(view["v1_mse"]) for views in one.values() for view in views.values()}) == 6


def test_command(data, tmp_path):
  folder = physics_small.second_takes(data, tmp_path / "perfect")

  def run(*arguments):
    return subprocess.run(
      [sys.executable, "-m", "videogpt_jax.evaluate", "--benchmark=physics_iq", *arguments,
       f"--out={tmp_path / 'out'}"], capture_output=True, text=True, check=False)

  refused = run(f"--data={data}", f"--generated={folder}", "--scenarios=2", "--check")
  assert refused.returncode == 2 and "lasts 1.000 s, not 5 s" in refused.stderr
  done = run(f"--data={data}", f"--generated={folder}", "--scenarios=2", "--prediction_s=1",
             "--workers=1")
  assert done.returncode == 0, done.stderr
  assert re.search(r"^perfect .* 100 .*measured", done.stdout, re.MULTILINE)
  assert (tmp_path / "out" / "report.html").exists()
  assert scores.score(scores.read(tmp_path / "out" / "results" / "perfect.csv")).score == 100
  before = _contents(tmp_path / "out")
  checked = run(f"--data={data}", f"--generated={folder}", "--scenarios=2", "--prediction_s=1",
                "--check")
  assert checked.returncode == 0, checked.stderr
  assert "as the official script wants them" in checked.stdout
  assert "wrote" not in checked.stdout
  assert _contents(tmp_path / "out") == before


def test_report(data, tmp_path):
  folder = physics_small.second_takes(data, tmp_path / "perfect")
  report = physics_iq.run(None, tmp_path / "out", _options(data, generated=str(folder)))
  assert report.tables[0].rows[0] == ("perfect", "0.5 s, 8 frames/s", 100.0, "measured")
  assert "not the 66" in report.tables[0].note and "lossless" in report.tables[0].note
  assert [table.title for table in report.tables[1:]] == [
    "What the score is made of", "By category", "By scenario"]
  assert len(report.videos) == 6
  for row in report.videos:
    assert list(row.files) == ["truth", "prediction", "motion"]
    assert all(len(video.read(path).frames) == 8 for path in row.files.values())
  json.dumps(report.summary)


def test_scores_by_category_and_scenario_are_drawn(data, tmp_path):
  own = shutil.copytree(data, tmp_path / "data")
  lines = (own / "descriptions.csv").read_text().splitlines()
  (own / "descriptions.csv").write_text("\n".join(lines[:1] + [re.sub(
    r"(scene-(\d)\.mp4),.*,(\d{4}_perspective)", r"\1,words,kind \2,\3", x) for x in lines[1:]]))
  folder = physics_small.second_takes(data, tmp_path / "made")
  for path in sorted(folder.iterdir())[3:]:  # the second scenario's do not move
    video.write_mp4(path, np.repeat(video.read(path).frames[:1], 8, axis=0), 8)
  report = physics_iq.run(None, tmp_path / "out", _options(own, generated=str(folder)))
  plots = {plot.title: plot for plot in report.plots}
  category, scenario = plots["Score by category"], plots["Score by scenario"]
  assert list(category.x) == ["kind 0", "kind 1"] and list(scenario.x) == ["scene-0", "scene-1"]
  for plot in (category, scenario):
    (good, bad), = plot.curves.values()
    assert plot.ranked and good > 90 and bad < 40
  table = next(table for table in report.tables if table.title == "By scenario")
  assert [row[1] for row in table.rows] == scenario.curves["prediction"]
  (own / "descriptions.csv").unlink()
  report = physics_iq.run(None, tmp_path / "out", _options(own, generated=str(folder)))
  assert {"Score by category", "Score by scenario"} - {plot.title for plot in report.plots} == {
    "Score by category"}


def test_where_takes_never_move_alike_there_is_no_score(data, tmp_path):
  folder = physics_small.second_takes(data, tmp_path / "made")
  found = physics_iq.measure(None, tmp_path / "out", _options(data, generated=str(folder)))
  rows = {name: {view: dict(values) for view, values in views.items()}
          for name, views in found.rows.items()}
  for values in rows["trimmed-scene-1"].values():
    values["variance_spatial"] = 0.0
  assert scores.score({"trimmed-scene-1": rows["trimmed-scene-1"]}).score == 100
  report = physics_iq_report.report("made", found.dataset, found.videos, rows, scores.score(rows),
                                    tmp_path / "out" / "shown", {}, 0)
  table = next(table for table in report.tables if table.title == "By scenario")
  plot = next(plot for plot in report.plots if plot.title == "Score by scenario")
  for first, second in ([row[1] for row in table.rows], plot.curves["prediction"]):
    assert first > 90 and np.isnan(second)


def test_the_page_has_its_own_videos_that_browsers_play(data, tmp_path):
  """Of videos elsewhere, as OpenCV writes them; as they are they would not play."""
  folder, out = tmp_path / "theirs", tmp_path / "out"
  physics_small.as_opencv_writes(physics_small.second_takes(data, tmp_path / "perfect"), folder)
  report = physics_iq.run(None, out, _options(data, generated=str(folder)))
  for number, row in enumerate(report.videos, start=1):
    for path in row.files.values():
      assert path.is_relative_to(out / "shown")
      with av.open(path) as file:
        codec = file.streams.video[0].codec_context
        assert (codec.name, codec.pix_fmt) == ("h264", "yuv420p")
    theirs = video.read(folder / f"{number:04d}_perspective.mp4").frames
    shown = video.read(row.files["prediction"]).frames
    assert theirs.shape == (8, 128, 128, 3) and shown.shape == (8, 32, 32, 3)
    smaller = theirs.reshape(8, 32, 4, 32, 4, 3).mean((2, 4))
    assert np.abs(smaller - shown).mean() < 4 < np.abs(smaller[..., ::-1] - shown).mean()
  for path in report_lib.write(report, out):
    if path.suffix in (".html", ".json"):
      assert not re.search(r'"[^"]*\.\./[^"]*mp4"', path.read_text())  # moves with the page
