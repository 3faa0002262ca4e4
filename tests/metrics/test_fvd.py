"""FVD of videos: what the network sees, and whole evaluations with and without a model."""

import dataclasses
import json
import pathlib
import shutil
import types

import jax
import numpy as np
import pytest
from scipy import ndimage

import processes
import stand_in_models
import tiny_run
from videogpt_jax import weights as weights_lib
from videogpt_jax.data import load
from videogpt_jax.data import video
from videogpt_jax.data import windows
from videogpt_jax.errors import InputError
from videogpt_jax.evaluation import fvd as evaluation
from videogpt_jax.evaluation import fvd_report
from videogpt_jax.evaluation import report as report_lib
from videogpt_jax.metrics import frames as frame_metrics
from videogpt_jax.metrics import frechet
from videogpt_jax.metrics import fvd
from videogpt_jax.metrics import i3d
from videogpt_jax.metrics import lpips

FRAMES = i3d.MIN_FRAMES  # the shortest window, for speed


@pytest.fixture(scope="module")
def extractor():
  return fvd.Extractor(batch=2)


def _videos(count, size=(24, 32), seed=0):
  """Smooth moving patterns."""
  rng = np.random.default_rng(seed)
  field = rng.standard_normal((count, FRAMES, *size, 3))
  field = ndimage.gaussian_filter(field, (0, 1, 4, 4, 0))
  return np.uint8(np.clip(field / field.std() * 50 + 128, 0, 255))


@pytest.mark.parametrize("size", [(64, 96), (300, 224)])
@pytest.mark.parametrize("resize", fvd.RESIZES)
def test_fvd_preprocessing_is_bilinear_without_smoothing(resize, size):
  frames = np.random.default_rng(0).integers(0, 256, (1, 1, *size, 3), np.uint8)
  shift = 0.5 if resize == "half_pixel" else 0.0
  at = [(np.arange(224) + shift) * side / 224 - shift for side in size]
  grid = np.meshgrid(*at, indexing="ij")
  expected = np.stack([ndimage.map_coordinates(frames[0, 0, ..., c].astype(float), grid, order=1,
                                               mode="nearest") for c in range(3)], axis=-1)
  found = jax.jit(fvd.preprocess, static_argnums=1)(frames, resize)
  np.testing.assert_allclose(found[0, 0], expected / 127.5 - 1, rtol=0, atol=2e-5)


def test_fvd_features_do_not_depend_on_their_batch(extractor):
  videos = _videos(3)
  together = extractor(videos)
  assert together.shape == (3, 400) and together.dtype == np.float32
  np.testing.assert_array_equal(together[:2], extractor(videos[:2]))
  np.testing.assert_allclose(extractor(videos[1:2]), together[1:2], rtol=0, atol=1e-4)


def test_fvd_grows_with_the_damage(extractor):
  real, rng = _videos(2), np.random.default_rng(1)
  noisy = lambda amount: np.uint8(np.clip(real + rng.normal(0, amount, real.shape), 0, 255))
  truth, little, much = map(extractor.statistics, (real, noisy(10), noisy(60)))
  assert 1 < frechet.distance(truth, little) < frechet.distance(truth, much) / 2


def test_fvd_refuses_videos_that_do_not_compare(extractor):
  real = _videos(2)
  with pytest.raises(InputError, match="9 frames, generated ones 12"):
    fvd.distance(extractor, real, np.repeat(real, 2, axis=1)[:, :12])
  with pytest.raises(InputError, match="24x32 px, generated ones of 16x32 px"):
    fvd.distance(extractor, real, real[:, :, :16])
  with pytest.raises(InputError, match="too short for I3D"):
    extractor(real[:, :8])
  with pytest.raises(InputError, match="uint8"):
    extractor(real.astype(np.float32))


def test_fvd_windows_are_drawn_by_name_and_cover_the_video(tmp_path):
  frames = np.repeat(np.arange(40, dtype=np.uint8)[:, None, None, None] * 6, 16, axis=1)
  frames = np.broadcast_to(frames, (40, 16, 16, 3))
  for name in map(str, range(12)):
    video.write_mp4(tmp_path / f"{name}.mp4", frames, 8, lossless=True)
  read = windows.Files(tmp_path, frames=5, interval=3, drawn=True)
  found = [read(load.Segment(f"{i}.mp4"), lambda: None) for i in range(12)]
  starts = [int(x.frames[0, 0, 0, 0]) // 6 for x in found]
  assert len(set(starts)) > 5 and min(starts) >= 0 and max(starts) <= 40 - 13
  for start, x in zip(starts, found, strict=True):
    np.testing.assert_array_equal(x.frames, frames[start:start + 13:3])
    assert x.fps == pytest.approx(8 / 3)
  again = read(load.Segment("3.mp4"), lambda: None)
  np.testing.assert_array_equal(again.frames, found[3].frames)
  with pytest.raises(InputError, match=r"too short: 40 frames.*has 41"):
    windows.Files(tmp_path, frames=41)(load.Segment("0.mp4"), lambda: None)


# Whole evaluations, of cheap features -----------------------------------------------------


@pytest.fixture
def cheap(monkeypatch):
  """In place of I3D: a projection of what it would see. The extractor that evaluations make."""
  monkeypatch.setattr(i3d, "load", lambda path, sha256: {})
  monkeypatch.setattr(fvd, "_features", stand_in_models.features)
  return fvd.Extractor()


def _write(folder, videos):
  folder.mkdir()
  for i, frames in enumerate(videos):
    video.write_mp4(folder / f"{i}.mp4", frames, 8, lossless=True)
  return str(folder)


def _options(**changes):
  return evaluation.Options(**{"frames": FRAMES, "processes": 1, "batch_size": 2, **changes})


def test_fvd_of_two_folders_goes_on_where_it_was_cut_short(tmp_path, cheap, monkeypatch):
  real, made = _videos(3), _videos(4, seed=5)
  options = _options(videos_dir=_write(tmp_path / "real", real),
                     generated=_write(tmp_path / "made", made))
  report = evaluation.run(None, tmp_path / "out", options)
  expected = fvd.distance(cheap, real, made)
  assert report.summary["fvd"] == pytest.approx(expected, rel=1e-4)
  assert "only 3 samples of 400 features" in report.summary["caution"]
  report_lib.write(report, tmp_path / "out")
  assert json.loads((tmp_path / "out" / "results.json").read_text())["summary"]["videos"] == 3
  assert frechet.load(tmp_path / "out" / "statistics" / "generated.npz").count == 4
  # All is there: nothing is decoded or computed again, bit by bit the same distance.
  (tmp_path / "out" / "items" / "generated%2F00001.json").unlink()
  computed = []
  original = fvd.Extractor.__call__
  monkeypatch.setattr(fvd.Extractor, "__call__",
                      lambda self, x: computed.append(len(x)) or original(self, x))
  again = evaluation.run(None, tmp_path / "out", options)
  assert computed == [2] and again.summary == report.summary
  with pytest.raises(InputError, match=r"another evaluation.*--restart"):
    evaluation.run(None, tmp_path / "out", _options(
      videos_dir=options.videos_dir, generated=options.videos_dir))


def test_fvd_refuses_folders_that_do_not_compare(tmp_path, cheap):
  real = _write(tmp_path / "real", _videos(2))
  small = _write(tmp_path / "small", _videos(2, size=(16, 32)))
  short = _write(tmp_path / "short", _videos(2)[:, :5])
  with pytest.raises(InputError, match=r"mixed resolutions: .*24x32 px, another of 16x32 px"):
    evaluation.run(None, tmp_path / "a", _options(videos_dir=real, generated=small))
  with pytest.raises(InputError, match=r"2 generated videos cannot be used.*too short: 5 frames"):
    evaluation.run(None, tmp_path / "b", _options(videos_dir=real, generated=short))
  with pytest.raises(InputError, match=r"has 2 videos, the protocol ucf101_2048 takes 2048"):
    evaluation.run(None, tmp_path / "c", evaluation.Options(
      protocol="ucf101_2048", videos_dir=real, generated=real))
  with pytest.raises(InputError, match="give --videos_dir"):
    evaluation.run(None, tmp_path / "d", _options(generated=real))


def test_fvd_of_a_model_by_seed(tmp_path, cheap):
  weights = weights_lib.load()
  with pytest.raises(InputError, match=r"made from nothing.*--history=N"):
    evaluation.run(weights, tmp_path, evaluation.Options(protocol="ucf101_2048"))
  options = _options(videos=2, seeds=(0, 3))
  report = evaluation.run(weights, tmp_path / "out", options)
  by_set = report.summary["fvd_by_set"]
  assert list(by_set) == ["seed_0", "seed_3"] and by_set["seed_0"] != by_set["seed_3"]
  assert report.summary["fvd"] == pytest.approx(np.mean(list(by_set.values())))
  assert report.summary["fvd_deviation"] == pytest.approx(np.std(list(by_set.values()), ddof=1))
  # Frames: of each seed, by how far ahead they are, as a comparison of all at once has it.
  assert set(report.summary["frames"]) == {"seed 0", "seed 3"}
  assert [plot.ylabel for plot in report.plots] == ["MSE", "PSNR", "SSIM"]
  assert set(report.videos[0].values) == {"MSE", "PSNR", "SSIM"}
  # The predictions begin with what was given, so they are nearer to the truth than noise is.
  row = report.videos[0]
  truth, made = (video.read(row.files[name]).frames for name in ("real", "seed_0"))
  history = weights.config["sample"]["history"]
  assert np.abs(truth[:history].astype(int) - made[:history]).mean() < 2
  assert np.abs(truth[history:].astype(int) - made[history:]).max() > 30


@pytest.mark.parametrize(("changes", "name"), [
  ({}, "kinetics600_5k"),
  ({"videos": 5000, "frames": 16, "history": 5}, "kinetics600_5k"),
  ({"videos": 64, "frames": 32}, "kinetics600_5k, changed: videos=64, frames=32"),
  ({"layer": "pooled"}, "kinetics600_5k, changed: layer=pooled"),
  ({"resize": "half_pixel"}, "kinetics600_5k, changed: resize=half_pixel"),
  ({"covariance": "biased"}, "kinetics600_5k, changed: covariance=biased"),
  ({"i3d_sha256": i3d.SHA256.upper()}, "kinetics600_5k"),
  ({"i3d_sha256": "ab"}, "kinetics600_5k, changed: i3d_sha256=ab"),
  ({"history": 3, "layer": "pooled"}, "kinetics600_5k, changed: history=3, layer=pooled"),
  ({"videos_dir": ""}, "kinetics600_5k, changed: data=simulated world"),
])
def test_fvd_published_distances_stand_beside_those_of_their_protocol_alone(changes, name):
  options = evaluation.Options(**{"protocol": "kinetics600_5k", "videos_dir": "real", **changes})
  protocol = evaluation.resolve(options, None)
  assert name.startswith(protocol.name)
  found, published = fvd_report.published(protocol, evaluation.changed(options))
  assert found == name
  assert [x.model for x in published] == (
    ["MAGVIT-L", "Video-GPT"] if name == "kinetics600_5k" else [])


def test_fvd_table_says_what_is_unknown_of_the_papers_protocol(tmp_path, cheap, monkeypatch):
  real = _write(tmp_path / "real", _videos(2, size=(64, 64)))
  whole = evaluation.run(Copying(64, 64), tmp_path / "a", _options(
    protocol="kinetics600_5k", videos=2, videos_dir=real))
  text = report_lib.text(whole)
  assert "FVD, protocol kinetics600_5k, changed: videos=2, frames=9" in text
  assert "unknown of the paper's protocol (arXiv 2505.12489): given frames" in text
  assert "†" not in text
  small = dataclasses.replace(fvd.PROTOCOLS["kinetics600_5k"], videos=2, frames=FRAMES)
  monkeypatch.setitem(fvd.PROTOCOLS, "kinetics600_5k", small)
  as_it_is = evaluation.run(Copying(64, 64), tmp_path / "b", evaluation.Options(
    protocol="kinetics600_5k", videos_dir=real, processes=1))
  assert "MAGVIT-L †" in report_lib.text(as_it_is)
  assert "changed" not in report_lib.text(as_it_is)


class Copying:
  """Repeats the last frame it is given; wants frames of one size."""

  path = "copying"
  codec = types.SimpleNamespace(downsample=1)
  model = types.SimpleNamespace(patch_size=1,
                                backbone=types.SimpleNamespace(dtype=np.dtype(np.float32)))

  def __init__(self, height, width):
    self.params = {"weight": jax.numpy.ones(3)}
    self.config = {"data": {"height": height, "width": width, "source": "videos"},
                   "sample": {"history": 4}}

  def stream(self, frames, num_frames, *, clip_frames=None, rng):
    assert frames.shape[2:4] == (self.config["data"]["height"], self.config["data"]["width"])
    made = np.repeat(frames[:, -1:], num_frames, axis=1)
    yield types.SimpleNamespace(frames=made, latents=made)


def test_fvd_compares_predicted_frames_one_by_one(tmp_path, cheap, monkeypatch):
  real = _videos(3, size=(48, 48))
  options = _options(history=4, videos_dir=_write(tmp_path / "real", real), seeds=(0, 1))
  model, seen = Copying(48, 48), []
  report = evaluation.run(model, tmp_path / "out", options)
  copied, truth = np.repeat(real[:, 3:4], FRAMES - 4, axis=1), real[:, 4:]
  expected = {"MSE": frame_metrics.mse(copied, truth), "PSNR": frame_metrics.psnr(copied, truth),
              "SSIM": frame_metrics.ssim(copied, truth)}
  for plot in report.plots:
    assert plot.x == [1, 2, 3, 4, 5] and list(plot.curves) == ["seed 0", "seed 1"]
    np.testing.assert_allclose(plot.curves["seed 1"], expected[plot.ylabel].mean(axis=0))
  assert report.plots[0].curves["seed 0"][0] < report.plots[0].curves["seed 0"][-1]
  for i, row in enumerate(report.videos):
    np.testing.assert_allclose(list(row.values.values()),
                               [values[i].mean() for values in expected.values()])
  report_lib.write(report, tmp_path / "out")
  assert '"MSE of pixels / 255 (lower is better), by predicted frame",5,seed 0,' in (
    tmp_path / "out" / "results.csv").read_text()
  assert len(list((tmp_path / "out" / "plots").glob("*.png"))) == 3
  # Cut short, one batch is predicted again; the rest is on disk.
  (tmp_path / "out" / "items" / "seed_1%2F00001.json").unlink()
  monkeypatch.setattr(model, "stream", lambda frames, n, **rest: seen.append(1) or (
    Copying.stream(model, frames, n, **rest)))
  again = evaluation.run(model, tmp_path / "out", options)
  assert len(seen) == 1 and again.tables == report.tables


def test_fvd_compares_predicted_frames_by_lpips(tmp_path, cheap, monkeypatch):
  distance = lambda x, y: np.abs(x.astype(float) - y).mean(axis=(-3, -2, -1))
  monkeypatch.setattr(lpips, "Lpips", lambda network, channels: distance)
  paths = tuple(str(tmp_path / name) for name in ("network.pth", "channels.pth"))
  for path in paths:
    pathlib.Path(path).write_bytes(b"weights")
  real = _videos(2, size=(48, 48))
  options = _options(history=4, videos_dir=_write(tmp_path / "real", real), lpips=paths)
  report = evaluation.run(Copying(48, 48), tmp_path / "out", options)
  assert report.tables[1].columns == ["set", "MSE", "PSNR", "SSIM", "LPIPS"]
  np.testing.assert_allclose(report.plots[-1].curves["seed 0"],
                             distance(real[:, 3:4], real[:, 4:]).mean(axis=0))
  pathlib.Path(paths[1]).write_bytes(b"others")
  with pytest.raises(InputError, match="another evaluation: compared"):
    evaluation.run(Copying(48, 48), tmp_path / "out", options)
  with pytest.raises(InputError, match="LPIPS needs frames of at least 32 px a side, got 16x48"):
    evaluation.run(Copying(16, 48), tmp_path / "new", options)
  assert not (tmp_path / "new").exists()  # before anything is computed


def test_fvd_compares_every_model_with_the_same_sharp_truth(tmp_path, cheap):
  """The videos are finer than the model: that blurs its predictions, and nothing else."""
  real = _write(tmp_path / "real", _videos(3, size=(128, 128)))
  options = _options(protocol="ucf101_2048", videos=3, history=4, videos_dir=real)
  kept, distances = [], []
  for side in (16, 128):
    report = evaluation.run(Copying(side, side), tmp_path / str(side), options)
    kept.append(frechet.load(tmp_path / str(side) / "statistics" / "real.npz"))
    distances.append(report.summary["fvd"])
    files = report.videos[0].files
    truth, made = (video.read(files[name]).frames.astype(int) for name in ("real", "seed_0"))
    assert np.abs(truth - made)[:4].mean() < 2.5  # the files are compressed
    assert (np.abs(made[4] - made[3]).mean() > 5) == (side == 16)
  np.testing.assert_array_equal(kept[0].mean, kept[1].mean)
  np.testing.assert_allclose(kept[0].mean, cheap(_videos(3, size=(128, 128))).mean(axis=0),
                             rtol=0, atol=1e-3)
  assert distances[0] != distances[1]


@pytest.mark.parametrize(("source", "size"), [
  ((96, 128), (48, 96)),  # the model's crop would lose what the protocol sees at top and bottom
  ((96, 128), (64, 64)),
  ((96, 160), (64, 80)),
])
def test_fvd_predictions_show_the_same_part_of_a_video_as_the_truth(source, size, tmp_path, cheap):
  y, x = np.mgrid[:source[0], :source[1]]
  still = np.stack([y * 2, x, (x + y) // 2], axis=-1).astype(np.uint8)
  real = _write(tmp_path / "real", np.repeat(still[None, None], FRAMES, axis=1).repeat(2, axis=0))
  report = evaluation.run(Copying(*size), tmp_path / "out", _options(
    protocol="kinetics600_5k", videos=2, videos_dir=real))
  made = video.read(report.videos[0].files["seed_0"]).frames.astype(int)
  assert np.abs(made[-1] - made[0]).max() < 12  # px of a ramp; another part is off by 30 or more


def test_fvd_sees_that_listed_videos_are_others_now(tmp_path, cheap):
  real, made = _videos(3), _videos(3, seed=5)
  _write(tmp_path / "made", made)
  (tmp_path / "made.txt").write_text("".join(f"made/{i}.mp4\n" for i in range(3)))
  options = _options(videos_dir=_write(tmp_path / "real", real),
                     generated=str(tmp_path / "made.txt"))
  first = evaluation.run(None, tmp_path / "out", options).summary["fvd"]
  shutil.rmtree(tmp_path / "made")
  _write(tmp_path / "made", real)
  second = evaluation.run(None, tmp_path / "out", options).summary["fvd"]
  assert first > 1 and second == pytest.approx(0, abs=1e-6)
  (tmp_path / "made" / "2.mp4").unlink()
  with pytest.raises(InputError, match=r"cannot be used, such as made/2\.mp4: missing"):
    evaluation.run(None, tmp_path / "out", options)


_WORKER = """
import json, pathlib, sys
from absl import flags
import jax
import stand_in_models
from videogpt_jax import distributed
from videogpt_jax.evaluation import fvd as evaluation
from videogpt_jax.metrics import fvd, i3d
distributed.define_flags()
flags.FLAGS(["worker"] + sys.argv[3:])
distributed.obey_flags()
fvd._features, i3d.load = stand_in_models.features, lambda path, sha256: {}
own = stand_in_models.drifting({
  "sample": {"clip_frames": 5, "history": 4, "window": 0, "steps": 1},
  "data": {"source": "videos", "frames": 9, "height": 24, "width": 32}})
report = evaluation.run(own, pathlib.Path(sys.argv[2]), evaluation.Options(
  videos_dir=sys.argv[1], frames=9, batch_size=2, processes=1, seeds=(0, 1)))
told = {"summary": report.summary, "tables": [table.rows for table in report.tables]}
pathlib.Path(f"{sys.argv[2]}_{jax.process_index()}.json").write_text(json.dumps(told))
"""


def test_fvd_by_two_processes_of_two_devices_is_that_of_one(tmp_path):
  """Of five batches one process predicts three, the other two; each from its own videos."""
  real = _write(tmp_path / "real", _videos(9))
  started = {count: processes.start(["-c", _WORKER, real, tmp_path / str(count)], count, 2)
             for count in (1, 2)}
  said = {count: processes.finish(workers) for count, workers in started.items()}
  assert "5/5 seed_0 videos" in said[2][0] and "9/9 seed_0 videos" in said[1][0]
  found = [json.loads((tmp_path / f"{name}.json").read_text()) for name in ("1_0", "2_0", "2_1")]
  assert found[0] == found[1] == found[2]
  by_set = found[0]["summary"]["fvd_by_set"]
  assert by_set["seed_0"] != by_set["seed_1"]


def test_fvd_command_says_what_is_missing(tmp_path):
  result = tiny_run.run("evaluate", "--benchmark=fvd", f"--i3d={tmp_path / 'none'}", "--videos=2",
                        f"--out={tmp_path}")
  assert result.returncode == 2, result.stderr
  assert "no weights of I3D" in result.stderr and "Traceback" not in result.stderr
