"""Frame metrics against golden values and hand calculation."""

import json
import os
import pathlib

import numpy as np
import pytest

from videogpt_jax.errors import InputError
from videogpt_jax.metrics import frames

_HERE = pathlib.Path(__file__).resolve()
GOLDEN = pathlib.Path(
  os.environ.get("VIDEOGPT_GOLDEN_METRICS", _HERE.parents[1] / "golden" / "metrics")
)
EXPECTED = json.loads((GOLDEN / "psnr_ssim_expected.json").read_text())["videos"]


def _golden(name):
  with np.load(GOLDEN / "psnr_ssim_videos.npz") as videos:
    return videos[f"{name}__x"], videos[f"{name}__y"]


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_psnr_golden(name):
  x, y = _golden(name)
  expected = EXPECTED[name]
  np.testing.assert_allclose(
    frames.mse(y, x) * 255.0**2, expected["mse_per_frame"], rtol=1e-12, atol=1e-12
  )
  psnr = [np.inf if v is None else v for v in expected["psnr_per_frame"]]
  np.testing.assert_allclose(frames.psnr(y, x), psnr, rtol=0, atol=1e-4)
  whole = expected["psnr_whole_video"]
  np.testing.assert_allclose(
    frames.psnr_of_video(y, x), np.inf if whole is None else whole, rtol=0, atol=1e-4
  )


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_ssim_golden(name):
  x, y = _golden(name)
  expected = EXPECTED[name]["ssim_gaussian_per_frame"]
  np.testing.assert_allclose(frames.ssim(y, x), expected, rtol=0, atol=1e-6)


def test_leading_axes_are_kept_and_independent():
  rng = np.random.default_rng(0)
  x, y = rng.integers(0, 256, (2, 2, 3, 16, 12, 3), dtype=np.uint8)
  for metric in (frames.mse, frames.psnr, frames.ssim):
    together = metric(x, y)
    assert together.shape == (2, 3)
    np.testing.assert_array_equal(together[1, 2], metric(x[1, 2], y[1, 2]))


def test_mse_by_hand():
  truth = np.zeros((1, 2, 2, 3), np.uint8)
  predicted = truth.copy()
  predicted[0, 0, 0, 0] = 255  # one of twelve values is off by the full range
  assert frames.mse(predicted, truth)[0] == pytest.approx(1 / 12)
  assert frames.psnr(predicted, truth)[0] == pytest.approx(10 * np.log10(12))


def test_bad_frames_are_refused():
  good = np.zeros((2, 16, 16, 3), np.uint8)
  with pytest.raises(InputError, match="cannot be compared"):
    frames.mse(good[:1], good)
  with pytest.raises(InputError, match="uint8"):
    frames.mse(good.astype(np.float32), good)
  with pytest.raises(InputError, match="height, width, 3"):
    frames.psnr(good[..., :2], good[..., :2])
  with pytest.raises(InputError, match="11 px"):
    frames.ssim(good[:, :8], good[:, :8])
