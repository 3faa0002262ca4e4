"""Where something moves in a video of a camera that stands still.

The background is a running mean of blurred grey frames. A pixel is set where a frame differs
from the background by more than 10 of 255 grey levels, after the frame itself has entered it
with a weight of 0.3; then specks are removed and gaps closed, by 5x5 px. The first frame has
no motion. (Physics-IQ's public evaluation code, whose masks these are, bit by bit.)
"""

from collections.abc import Iterable

import cv2
from jaxtyping import UInt8
import numpy as np

_WEIGHT = 0.3  # of a new frame in the background
_THRESHOLD = 10  # grey levels, of 255
_SIDE = 5  # px, of the blur and of what counts as a speck or gap
_HALO = _SIDE // 2
_ROWS = 32  # blurred at a time: small enough for a core's own cache, which halves the time
_ZEROS = 4  # px around what is set, within which closing and opening need to know that it ends


class Motion:
  """The masks of one video, frame after frame.

  Args:
    bgr: frames come with blue first, as OpenCV reads them.
  """

  def __init__(self, bgr: bool = False) -> None:
    self._grey = cv2.COLOR_BGR2GRAY if bgr else cv2.COLOR_RGB2GRAY
    self._background: np.ndarray | None = None  # float64: in float32 some pixels differ

  def __call__(self, frame: UInt8[np.ndarray, "H W 3"]) -> UInt8[np.ndarray, "H W"]:
    """The mask of the next frame, 0 or 255."""
    if self._background is None:
      self._background = np.empty(frame.shape[:2])
      for rows, blurred in self._blurred(frame):
        self._background[rows] = blurred
      return np.zeros(frame.shape[:2], np.uint8)
    mask = np.empty(frame.shape[:2], np.uint8)
    for rows, blurred in self._blurred(frame):
      cv2.accumulateWeighted(blurred, self._background[rows], _WEIGHT)
      behind = cv2.convertScaleAbs(self._background[rows])
      cv2.threshold(cv2.absdiff(blurred, behind), _THRESHOLD, 255, cv2.THRESH_BINARY,
                    dst=mask[rows])
    return _cleaned(mask)

  def _blurred(self, frame: np.ndarray) -> Iterable[tuple[slice, np.ndarray]]:
    """The grey, blurred frame in strips."""
    height = len(frame)
    for top in range(0, height, _ROWS):
      end = min(top + _ROWS, height)
      low, high = max(top - _HALO, 0), min(end + _HALO, height)
      grey = cv2.cvtColor(frame[low:high], self._grey)
      yield slice(top, end), cv2.GaussianBlur(grey, (_SIDE, _SIDE), 0)[top - low:end - low]


def motion_masks(frames: Iterable[UInt8[np.ndarray, "H W 3"]], *, bgr: bool = False
                 ) -> UInt8[np.ndarray, "T H W"]:
  """The masks of a whole video, 0 or 255."""
  return np.stack(list(map(Motion(bgr), frames)))


def _cleaned(mask: np.ndarray) -> np.ndarray:
  """Opened, then closed; only where something is set, which is mostly little of a frame."""
  left, top, width, height = cv2.boundingRect(mask)
  if not width:
    return mask
  part = mask[max(top - _ZEROS, 0):top + height + _ZEROS,
              max(left - _ZEROS, 0):left + width + _ZEROS]
  square = np.ones((_SIDE, _SIDE), np.uint8)
  opened = cv2.morphologyEx(part, cv2.MORPH_OPEN, square)
  part[:] = cv2.morphologyEx(opened, cv2.MORPH_CLOSE, square)
  return mask
