"""How alike two frames are: MSE, PSNR and SSIM, one number per frame.

All three take uint8 RGB frames with any leading axes and compute in float64. MSE is on
pixels / 255, so 0.01 means an error of a tenth of the full range; PSNR has its peak at
full range. SSIM is the Gaussian variant of Wang et al. 2004 (11x11 window, sigma 1.5,
biased covariance, per channel, border cropped) as computed by scikit-image.
"""

from collections.abc import Callable
from typing import NamedTuple

from jaxtyping import Float, UInt8
import numpy as np

from videogpt_jax.errors import InputError

EQUAL_PSNR = 100.0  # dB that equal frames count in means, which their infinite PSNR would swallow
SSIM_WINDOW = 11  # px, the least side of frames that have one


class Label(NamedTuple):
  """What a measure of frames is called: briefly, and with its units and what is better."""

  name: str
  title: str


LABELS = {
  "mse": Label("MSE", "MSE of pixels / 255 (lower is better)"),
  "psnr": Label("PSNR", "PSNR in dB (higher is better)"),
  "ssim": Label("SSIM", "SSIM (higher is better)"),
  "lpips": Label("LPIPS", "LPIPS (lower is better)"),  # see `metrics.lpips`
}


def mse(
  predicted: UInt8[np.ndarray, "*lead H W 3"], truth: UInt8[np.ndarray, "*lead H W 3"]
) -> Float[np.ndarray, "*lead"]:
  """Mean square error of pixels / 255 over height, width and colours.

  Raises:
    InputError: the shapes differ or the frames are not uint8 RGB.
  """
  _check(predicted, truth)
  return _by_frame(_mse_of_frame, predicted, truth)


def psnr(
  predicted: UInt8[np.ndarray, "*lead H W 3"], truth: UInt8[np.ndarray, "*lead H W 3"]
) -> Float[np.ndarray, "*lead"]:
  """Peak signal-to-noise ratio in dB; infinite where two frames are equal.

  Raises:
    InputError: the shapes differ or the frames are not uint8 RGB.
  """
  return psnr_from_mse(mse(predicted, truth))


def psnr_of_video(
  predicted: UInt8[np.ndarray, "*lead T H W 3"], truth: UInt8[np.ndarray, "*lead T H W 3"]
) -> Float[np.ndarray, "*lead"]:
  """PSNR in dB of whole videos: of the mean MSE of their frames, not the mean of their PSNRs.

  Raises:
    InputError: the shapes differ or the frames are not uint8 RGB.
  """
  return psnr_from_mse(mse(predicted, truth).mean(axis=-1))


def psnr_from_mse(error: Float[np.ndarray, "*lead"]) -> Float[np.ndarray, "*lead"]:
  """PSNR in dB of mean square errors on the 0..1 scale; infinite at zero."""
  with np.errstate(divide="ignore"):
    return -10.0 * np.log10(error)


def ssim(
  predicted: UInt8[np.ndarray, "*lead H W 3"], truth: UInt8[np.ndarray, "*lead H W 3"]
) -> Float[np.ndarray, "*lead"]:
  """Structural similarity, 1 for equal frames.

  Raises:
    InputError: the shapes differ, the frames are not uint8 RGB or a side is under 11 px.
  """
  _check(predicted, truth)
  height, width = truth.shape[-3:-1]
  if min(height, width) < SSIM_WINDOW:
    raise InputError(
      f"SSIM needs frames of at least {SSIM_WINDOW} px a side, got {height}x{width}"
    )
  return _by_frame(_ssim_of_frame, predicted, truth)


def _by_frame(
  metric: Callable[[np.ndarray, np.ndarray], float], predicted: np.ndarray, truth: np.ndarray
) -> np.ndarray:
  # One frame at a time: as float64, a whole evaluation would take eight times its bytes.
  frame = truth.shape[-3:]
  pairs = zip(predicted.reshape(-1, *frame), truth.reshape(-1, *frame), strict=True)
  return np.array([metric(p, t) for p, t in pairs], np.float64).reshape(truth.shape[:-3])


def _mse_of_frame(predicted: np.ndarray, truth: np.ndarray) -> float:
  return float(np.mean(np.square(predicted.astype(np.float64) - truth))) / 255.0**2


def _ssim_of_frame(predicted: np.ndarray, truth: np.ndarray) -> float:
  from skimage import metrics as skimage_metrics  # an extra: training does without it

  return skimage_metrics.structural_similarity(
    truth.astype(np.float64),
    predicted.astype(np.float64),
    data_range=255.0,
    channel_axis=-1,
    gaussian_weights=True,
    sigma=1.5,
    use_sample_covariance=False,
  )


def _check(predicted: np.ndarray, truth: np.ndarray) -> None:
  if predicted.shape != truth.shape:
    raise InputError(
      f"predicted frames of shape {predicted.shape} cannot be compared with true ones of"
      f" shape {truth.shape}"
    )
  if predicted.dtype != np.uint8 or truth.dtype != np.uint8:
    raise InputError(f"frames must be uint8, got {predicted.dtype} and {truth.dtype}")
  if truth.ndim < 3 or truth.shape[-1] != 3:
    raise InputError(f"frames must end in axes height, width, 3; got shape {truth.shape}")
