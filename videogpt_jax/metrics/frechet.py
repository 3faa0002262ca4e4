"""The Frechet distance between two sets of features, from statistics that are gathered in a stream.

Two sets are compared as the normal distributions of their means and covariances (Dowson and
Landau 1982; Heusel et al., arXiv 1706.08500):

    |m_x - m_y|^2 + tr(C_x) + tr(C_y) - 2 tr((C_x C_y)^(1/2))

Of a set are kept its count n, its mean and a factor F with F^T F = sum (x - m)(x - m)^T: the
centred rows themselves, or, once there are more than enough, the triangle of their QR
decomposition. So memory does not grow with the set; a merge is the pairwise update of Chan,
Golub and LeVeque (1979) in square root form; and since no covariance is ever formed, small
deviations keep their digits. The last trace is the sum of the singular values of
F_x F_y^T / sqrt(d_x d_y), with d the divisors of the covariances: exact where covariances
have no full rank, where a matrix square root loses half the digits.

All in float64. D is the number of features.
"""

from collections.abc import Mapping
import dataclasses
import io
import json
import math
import os
from typing import Any

from jaxtyping import Float
import numpy as np

from videogpt_jax import files
from videogpt_jax.errors import InputError

# Divides by n - 1, as the reference implementation of FVD (Unterthiner et al., arXiv 1812.01717,
# by TensorFlow-GAN) does; code that comes from that of StyleGAN2 divides by n.
UNBIASED, BIASED = "unbiased", "biased"
COVARIANCES = {UNBIASED: 1, BIASED: 0}


@dataclasses.dataclass(frozen=True)
class Statistics:
  """Mean and spread of a set of feature rows; immutable.

  Attributes:
    kind: JSON-able, how features are made: only sets of one kind can be merged or compared.
    count: rows, n.
    mean: of the rows.
    factor: see the module; at most 2 D rows.
    source: JSON-able, what the features are of; free.
  """

  kind: Mapping[str, Any]
  count: int
  mean: Float[np.ndarray, " D"]
  factor: Float[np.ndarray, "r D"]
  source: Any = None

  @property
  def size(self) -> int:
    """Features of a row, D."""
    return len(self.mean)

  def add(self, features: Float[np.ndarray, "n D"]) -> "Statistics":
    """With more rows.

    Raises:
      InputError: another number of features, NaN or infinite ones.
    """
    return self.merge(of(features, self.kind))

  def merge(self, other: "Statistics") -> "Statistics":
    """Of both sets together; `source` is the one of `self`.

    Raises:
      InputError: features of another kind or number.
    """
    _check_alike(self, other, "merged")
    if not self.count or not other.count:
      return dataclasses.replace(other, source=self.source) if not self.count else self
    count = self.count + other.count
    step = other.mean - self.mean
    between = step * math.sqrt(self.count / count * other.count)
    factor = _compact(np.concatenate([self.factor, other.factor, between[None]]))
    return Statistics(self.kind, count, self.mean + step * (other.count / count), factor,
                      self.source)

  def covariance(self, covariance: str = UNBIASED) -> Float[np.ndarray, "D D"]:
    """The matrix, for whoever needs it; `distance` does not."""
    return self.factor.T @ self.factor / _divisor(self, covariance)

  def save(self, path: str | os.PathLike[str]) -> None:
    """Writes an .npz file, whole or not at all. Raises `InputError` if it cannot."""
    buffer = io.BytesIO()
    about = json.dumps({"kind": dict(self.kind), "source": self.source})
    np.savez(buffer, count=self.count, mean=self.mean, factor=self.factor, about=about)
    files.replace(path, buffer.getvalue())


def empty(size: int, kind: Mapping[str, Any] | None = None, source: Any = None) -> Statistics:
  """Of no rows of `size` features."""
  return Statistics(kind or {}, 0, np.zeros(size), np.zeros((0, size)), source)


def of(features: Float[np.ndarray, "n D"], kind: Mapping[str, Any] | None = None,
       source: Any = None) -> Statistics:
  """The statistics of some rows.

  Raises:
    InputError: not a matrix, or features are NaN or infinite.
  """
  rows = np.asarray(features, np.float64)
  if rows.ndim != 2:
    raise InputError(f"features must be rows of numbers, got the shape {rows.shape}")
  bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
  if len(bad):
    raise InputError(
      f"{len(bad)} of {len(rows)} feature rows hold NaN or infinite numbers, the first is row "
      f"{bad[0]}; frames are bytes, so look at the weights that make the features")
  if not len(rows):
    return empty(rows.shape[1], kind, source)
  mean = rows.mean(axis=0)
  return Statistics(kind or {}, len(rows), mean, _compact(rows - mean), source)


def load(path: str | os.PathLike[str]) -> Statistics:
  """Reads what `Statistics.save` wrote.

  Raises:
    InputError: no such file, or a damaged or another one.
  """
  try:
    with np.load(path, allow_pickle=False) as file:
      about = json.loads(str(file["about"]))
      found = Statistics(about["kind"], int(file["count"]), file["mean"], file["factor"],
                         about["source"])
    if found.factor.shape[1:] != found.mean.shape or not np.isfinite(found.factor).all():
      raise ValueError(f"shapes {found.factor.shape}, {found.mean.shape}, or NaN")
  except Exception as error:  # numpy and zipfile raise many kinds
    raise InputError(f"{path} holds no whole statistics of features ({error}); remove it, and the "
                     "evaluation makes it again") from error
  return found


def distance(x: Statistics, y: Statistics, covariance: str = UNBIASED) -> float:
  """The Frechet distance; around -1e-13 of two equal sets, by rounding.

  Args:
    x, y: two sets.
    covariance: "unbiased" divides by n - 1, "biased" by n; see `UNBIASED`.

  Raises:
    InputError: features of different kinds or numbers, or too few rows.
  """
  _check_alike(x, y, "compared")
  scale_x, scale_y = _divisor(x, covariance), _divisor(y, covariance)
  spread = np.sum(x.factor**2) / scale_x + np.sum(y.factor**2) / scale_y
  common = np.linalg.svd(x.factor @ y.factor.T, compute_uv=False).sum()
  return float(np.sum((x.mean - y.mean)**2) + spread - 2 * common / math.sqrt(scale_x * scale_y))


def caution(x: Statistics, y: Statistics) -> str:
  """Why a distance is to be taken with care; empty if there is no reason."""
  fewest = min(x.count, y.count)
  if fewest > x.size:
    return ""
  return (f"only {fewest} samples of {x.size} features: the covariance has no full rank, and the "
          "distance is mostly its error; it compares only with those of equally many samples")


def _compact(factor: Float[np.ndarray, "r D"]) -> Float[np.ndarray, "s D"]:
  """The same F^T F of at most 2 D rows."""
  if len(factor) <= 2 * factor.shape[1]:
    return factor
  triangle: Any = np.linalg.qr(factor, mode="r")
  return triangle


def _divisor(x: Statistics, covariance: str) -> int:
  if covariance not in COVARIANCES:
    raise InputError(f"unknown covariance {covariance!r}; known: {', '.join(COVARIANCES)}")
  divisor = x.count - COVARIANCES[covariance]
  if divisor < 1:
    raise InputError(f"a covariance ({covariance}) of {x.count} samples is not defined; take at "
                     f"least {1 + COVARIANCES[covariance]}")
  return divisor


def _check_alike(x: Statistics, y: Statistics, what: str) -> None:
  if x.size != y.size:
    raise InputError(f"rows of {x.size} and of {y.size} features cannot be {what}")
  different = [f"{name} {x.kind.get(name)} and {y.kind.get(name)}"
               for name in sorted({*x.kind, *y.kind}) if x.kind.get(name) != y.kind.get(name)]
  if different:
    raise InputError(f"features of different kinds cannot be {what}: {', '.join(different)}; "
                     "make both in the same way")
