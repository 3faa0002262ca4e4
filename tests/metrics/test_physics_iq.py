"""Physics-IQ's masks, measures and score against numbers of the public evaluation code."""

import json
import os
import pathlib

import cv2
import numpy as np
import pytest

from videogpt_jax.errors import InputError
from videogpt_jax.metrics.physics_iq import comparison
from videogpt_jax.metrics.physics_iq import masks
from videogpt_jax.metrics.physics_iq import measures
from videogpt_jax.metrics.physics_iq import scores
from videogpt_jax.metrics.physics_iq import work
from videogpt_jax.metrics.physics_iq.files import Clip

_HERE = pathlib.Path(__file__).resolve()
GOLDEN = pathlib.Path(os.environ.get("VIDEOGPT_GOLDEN_PHYSICS_IQ",
                                     _HERE.parents[1] / "golden" / "physics_iq"))
EXPECTED = json.loads((GOLDEN / "expected.json").read_text())
CASES = json.loads((GOLDEN / "score_cases" / "expected.json").read_text())
VIEWS = ("left", "center", "right")


def _load(name):
  with np.load(GOLDEN / f"{name}.npz") as file:
    return dict(file)


def _reduced(video, mask, to):
  return measures.Reduced(np.stack([comparison.resize(x, to) for x in video]),
                          np.stack([comparison.resize_mask(x, to) for x in mask]))


def _assert_values(found, expected):
  assert found.keys() == expected.keys()
  for name, values in expected.items():
    np.testing.assert_allclose(found[name], values, rtol=0, atol=1e-6, err_msg=name)


def test_masks_measures_and_score_golden():
  videos, expected_masks = _load("videos"), _load("masks")
  rows = {}
  for scenario, views in EXPECTED["per_view"].items():
    for view in VIEWS:
      keys = [f"{scenario}__{view}__{part}" for part in ("take1", "take2", "gen")]
      found = [masks.motion_masks(videos[key]) for key in keys]
      for key, mask in zip(keys, found, strict=True):
        np.testing.assert_array_equal(mask, 255 * expected_masks[key], err_msg=key)
      to = comparison.size(*videos[keys[0]].shape[1:3])
      values = measures.compare(*(_reduced(videos[key], mask, to)
                                  for key, mask in zip(keys, found, strict=True)))
      _assert_values(values, views[f"perspective-{view}"])
      rows.setdefault(scenario, {})[view] = values
  found = scores.score(rows)
  assert found.score == pytest.approx(EXPECTED["score"], abs=0.01)
  assert found.physical_variance == pytest.approx(EXPECTED["physical_variance_all_metrics"])


def _plain_masks(frames):
  """The same recipe on whole frames, in numpy's integers where it can."""
  weights, background, found = np.array([1, 4, 6, 4, 1]), None, []
  for frame in frames.astype(np.int64):
    grey = (frame @ [9798, 19235, 3735] + 2**14) >> 15
    height, width = grey.shape
    padded = np.pad(grey, 2, mode="reflect")
    total = sum(weights[i] * weights[j] * padded[i:i + height, j:j + width]
                for i in range(5) for j in range(5))
    blurred = (total + 128) >> 8
    if background is None:
      background = blurred.astype(float)
      found.append(np.zeros(grey.shape, np.uint8))
      continue
    background = 0.7 * background + 0.3 * blurred
    mask = np.uint8(255 * (np.abs(blurred - np.rint(background.astype(np.float32))) > 10))
    for steps in ("min", "max", "max", "min"):
      padded = np.pad(mask, 2, constant_values=255 if steps == "min" else 0)
      windows = np.lib.stride_tricks.sliding_window_view(padded, (5, 5))
      mask = getattr(windows, steps)((-2, -1))
    found.append(mask)
  return np.stack(found)


@pytest.mark.parametrize("size", [(41, 37), (7, 90), (97, 6)])
def test_masks_do_not_depend_on_strips_and_corners(size):
  rng = np.random.default_rng(sum(size))
  coarse = rng.integers(0, 256, (6, max(size[0] // 6, 2), max(size[1] // 6, 2), 3), dtype=np.uint8)
  frames = np.stack([cv2.resize(x, size[::-1], interpolation=cv2.INTER_NEAREST) for x in coarse])
  found, expected = masks.motion_masks(frames), _plain_masks(frames)
  assert 0.1 < (expected > 0).mean() < 0.9
  assert (found != expected).mean() <= 1e-3  # float64 without fma rounds some ties otherwise
  np.testing.assert_array_equal(masks.motion_masks(frames[..., ::-1], bgr=True), found)


def test_resizing_golden():
  cases = _load("resize")
  for i in range(sum(name.startswith("in") for name in cases)):
    to = cases[f"out{i}"].shape[:2]
    np.testing.assert_array_equal(comparison.resize(cases[f"in{i}"], to), cases[f"out{i}"])
    np.testing.assert_array_equal(comparison.resize(cases[f"mask_in{i}"], to),
                                  cases[f"mask_out{i}"])
    np.testing.assert_array_equal(comparison.resize_mask(cases[f"mask_in{i}"], to),
                                  cases[f"mask_bin{i}"].astype(bool))
  with pytest.raises(InputError, match="too small"):
    comparison.size(3, 100)


def test_frame_rates_golden():
  cases = _load("fps_change")
  for name, expected in cases.items():
    if name.startswith("out"):
      _, rate, seconds = name.split("_")
      found = list(comparison.change_rate(cases[f"in_30fps_{seconds}"], 150, len(expected)))
      np.testing.assert_array_equal(found, expected, err_msg=f"{name} {rate}")
  with pytest.raises(InputError, match="20 frames, where 30"):
    list(comparison.change_rate(np.zeros((20, 2, 2, 3), np.uint8), 30, 8))


@pytest.mark.parametrize("name", CASES)
def test_score_golden(name):
  found = scores.score(scores.read(GOLDEN / "score_cases" / f"{name}.csv"))
  expected = CASES[name]["score"]
  assert found.score == pytest.approx(np.nan if expected is None else expected, abs=0.01,
                                      nan_ok=True)
  assert found.physical_variance == pytest.approx(CASES[name]["physical_variance_all_metrics"])


def test_mp4_files_golden():
  """From files, with the official masks and with lossless ones."""
  expected = json.loads((GOLDEN / "expected_mp4.json").read_text())
  lossless = expected["lossless_mask_variant"]
  (scenario, views), = expected["per_view"].items()
  made, rows, rows_lossless = _load("mp4_lossless_masks"), {}, {}
  for i, view in enumerate(VIEWS):
    clips, official = [], []
    for number, take in ((i + 1, 1), (i + 4, 2)):
      name = f"{number:04d}_{{}}_8FPS_perspective-{view}_take-{take}_{scenario}.mp4"
      clips.append(GOLDEN / "mp4" / "real" / name.format("testing-videos"))
      official.append(GOLDEN / "mp4" / "masks_real" / name.format("video-masks"))
    clips.append(GOLDEN / "mp4" / "generated" / f"{i + 1:04d}_perspective-{view}_{scenario}.mp4")
    official.append(GOLDEN / "mp4" / "masks_generated" / official[0].name)
    clips = [Clip(path, 8, 40, 40) for path in clips]
    parts = [work.reduce(clip, mask, (16, 20)) for clip, mask in zip(clips, official, strict=True)]
    rows[view] = measures.compare(*parts)
    _assert_values(rows[view], views[f"perspective-{view}"])
    rows_lossless[view] = work.score(work.View(*clips))
    _assert_values(rows_lossless[view], lossless["per_view"][scenario][f"perspective-{view}"])
    motion = masks.motion_masks(work.read(clips[0]), bgr=True)
    np.testing.assert_array_equal(motion, 255 * made[f"{scenario}__{view}__take1"])
  for found, wanted in ((rows, expected), (rows_lossless, lossless)):
    assert scores.score({scenario: found}).score == pytest.approx(wanted["score"], abs=0.01)


def test_table_is_the_official_one(tmp_path):
  official = GOLDEN / "metrics.csv"
  rows = scores.read(official)
  scores.write(tmp_path / "table.csv", rows)
  assert scores.read(tmp_path / "table.csv") == rows
  first = official.read_text().splitlines()[0]
  assert (tmp_path / "table.csv").read_text().splitlines()[0] == first
  assert len(scores.COLUMNS) == 37


def test_bad_tables_are_refused(tmp_path):
  text = (GOLDEN / "score_cases" / "single_scenario.csv").read_text()
  path = tmp_path / "table.csv"
  path.write_text(text.replace("v1_mse_perspective-left", "something"))
  with pytest.raises(InputError, match="lacks the column v1_mse_perspective-left"):
    scores.read(path)
  path.write_text(text.replace("[", "[oops, ", 1))
  with pytest.raises(InputError, match=r"v1_mse_perspective-left.*oops"):
    scores.read(path)
  path.write_text(text.replace("[", "[np.float64(0.5), ", 1))
  assert next(iter(scores.read(path).values()))["left"]["v1_mse"][0] == 0.5
  with pytest.raises(InputError, match="without scenarios"):
    scores.score({})
  with pytest.raises(InputError, match="scenario a lacks v1_mse of left"):
    scores.score({"a": {}})


def test_videos_of_other_length_or_size_are_refused():
  one = measures.Reduced(np.zeros((4, 8, 8, 3), np.uint8), np.zeros((4, 8, 8), bool))
  other = measures.Reduced(one.frames[:3], one.masks[:3])
  with pytest.raises(InputError, match="4 frames of 8x8 px and 3 frames"):
    measures.compare(one, one, other)
  with pytest.raises(InputError, match="do not belong"):
    measures.Reduced(one.frames, one.masks[:3])
  assert measures.compare(one, one, one)["spatial_iou_v1"] == 1.0  # nothing moves in either
