"""How alike two frames are: MSE, PSNR and SSIM, one number per frame.

All three take uint8 RGB frames with any leading axes and compute in float64. MSE is on
pixels / 255, so 0.01 means an error of a tenth of the full range; PSNR has its peak at
full range. SSIM is the Gaussian variant of Wang et al. 2004 (11x11 window, sigma 1.5,
biased covariance, per channel, border cropped) as computed by scikit-image.
"""

from jaxtyping import Float, UInt8
import numpy as np
from skimage import metrics as skimage_metrics

from videogpt_jax.errors import InputError

EQUAL_PSNR = 100.0  # dB that equal frames count in `mean_psnr`; 8-bit RGB comes near it
_SSIM_WINDOW = 11


def mse(
  predicted: UInt8[np.ndarray, "*lead H W 3"], truth: UInt8[np.ndarray, "*lead H W 3"]
) -> Float[np.ndarray, "*lead"]:
  """Mean square error of pixels / 255 over height, width and colours.

  Raises:
    InputError: the shapes differ or the frames are not uint8 RGB.
  """
  _check(predicted, truth)
  # one frame at a time: the float copies of a whole evaluation would be 16 times its bytes
  lead = truth.shape[:-3]
  pairs = zip(predicted.reshape(-1, *truth.shape[-3:]), truth.reshape(-1, *truth.shape[-3:]))
  errors = [np.mean(np.square(p.astype(np.float64) - t)) for p, t in pairs]
  return np.asarray(errors, np.float64).reshape(lead) / 255.0**2


def psnr(
  predicted: UInt8[np.ndarray, "*lead H W 3"], truth: UInt8[np.ndarray, "*lead H W 3"]
) -> Float[np.ndarray, "*lead"]:
  """Peak signal-to-noise ratio in dB; infinite where two frames are equal.

  Raises:
    InputError: the shapes differ or the frames are not uint8 RGB.
  """
  return psnr_from_mse(mse(predicted, truth))


def psnr_from_mse(error: Float[np.ndarray, "*lead"]) -> Float[np.ndarray, "*lead"]:
  """PSNR in dB of mean square errors on the 0..1 scale; infinite at zero."""
  with np.errstate(divide="ignore"):
    return -10.0 * np.log10(error)


def mean_psnr(decibels: Float[np.ndarray, "*lead"], axis: int = 0) -> Float[np.ndarray, "*rest"]:
  """Mean of PSNRs along `axis`; an infinite one counts as `EQUAL_PSNR` dB."""
  return np.minimum(decibels, EQUAL_PSNR).mean(axis)


def ssim(
  predicted: UInt8[np.ndarray, "*lead H W 3"], truth: UInt8[np.ndarray, "*lead H W 3"]
) -> Float[np.ndarray, "*lead"]:
  """Structural similarity, 1 for equal frames.

  Raises:
    InputError: the shapes differ, the frames are not uint8 RGB or a side is under 11 px.
  """
  _check(predicted, truth)
  height, width = truth.shape[-3:-1]
  if min(height, width) < _SSIM_WINDOW:
    raise InputError(
      f"SSIM needs frames of at least {_SSIM_WINDOW} px a side, got {height}x{width}"
    )
  lead = truth.shape[:-3]
  pairs = zip(predicted.reshape(-1, *truth.shape[-3:]), truth.reshape(-1, *truth.shape[-3:]))
  return np.asarray([_ssim_of_frame(p, t) for p, t in pairs], np.float64).reshape(lead)


def _ssim_of_frame(predicted: np.ndarray, truth: np.ndarray) -> float:
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
