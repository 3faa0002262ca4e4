"""Frechet distances from streams against golden values, and what is refused."""

import json
import os
import pathlib

import numpy as np
import pytest

from videogpt_jax.errors import InputError
from videogpt_jax.metrics import frechet

GOLDEN = pathlib.Path(os.environ.get(
  "VIDEOGPT_GOLDEN_METRICS", pathlib.Path(__file__).resolve().parents[1] / "golden" / "metrics"))
EXPECTED = json.loads((GOLDEN / "frechet_expected.json").read_text())["cases"]
KEYS = {frechet.UNBIASED: "unbiased_cov", frechet.BIASED: "biased_cov"}
DEFICIENT = ("rank_deficient_both", "rank_deficient_one", "constant_column")


def _rows(case):
  with np.load(GOLDEN / "frechet_features.npz") as file:
    return file[f"{case}__x"], file[f"{case}__y"]


def _streamed(rows, sizes=(1, 7, 30)):
  """In portions of changing size."""
  found, at = frechet.empty(rows.shape[1]), 0
  while at < len(rows):
    size = sizes[at % len(sizes)]
    found = found.add(rows[at:at + size])
    at += size
  return found


@pytest.mark.parametrize("covariance", list(KEYS))
@pytest.mark.parametrize("case", sorted(EXPECTED))
def test_frechet_golden(case, covariance):
  x, y = _rows(case)
  expected = EXPECTED[case][KEYS[covariance]]["fd_exact_svd"]
  relative = 1e-6 if case in DEFICIENT else 1e-8
  parts = np.array_split(y, 3)
  merged = frechet.of(parts[0]).merge(frechet.of(parts[1]).merge(frechet.of(parts[2])))
  for other in (frechet.of(y), _streamed(y), merged):
    actual = frechet.distance(_streamed(x), other, covariance)
    assert actual == pytest.approx(expected, rel=relative, abs=1e-8)


def test_frechet_statistics_stay_small_and_exact_far_from_zero():
  # A mean a million times the deviation: sums of squares would keep none of its digits.
  rng = np.random.default_rng(0)
  rows = rng.standard_normal((5_000, 6)) * 1e-3 + 1e3
  found = _streamed(rows, sizes=(50, 3))
  assert found.count == 5_000 and len(found.factor) <= 12
  np.testing.assert_allclose(found.covariance(), np.cov(rows, rowvar=False), rtol=0, atol=1e-13)
  np.testing.assert_allclose(found.covariance(frechet.BIASED),
                             np.cov(rows, rowvar=False, bias=True), rtol=0, atol=1e-13)
  np.testing.assert_allclose(found.mean, rows.mean(0), rtol=1e-14)


def test_frechet_distance_of_normal_distributions_by_hand():
  # Independent features: (m - n)^2 + (s - t)^2 each; scaled to have just these deviations.
  rng = np.random.default_rng(1)
  rows = np.linalg.qr(rng.standard_normal((200, 3)) - 0)[0]
  rows = np.linalg.qr(rows - rows.mean(0))[0]
  rows = (rows - rows.mean(0)) * np.sqrt(199)
  x, y = rows * (1, 2, 0) + (0, 1, 5), rows * (3, 2, 4) + (1, 1, 3)
  assert frechet.distance(frechet.of(x), frechet.of(y)) == pytest.approx(1 + 4 + 4 + 16)


def test_frechet_statistics_are_saved_with_what_they_are_of(tmp_path):
  kind = {"layer": "logits", "frames": 16}
  rows = np.random.default_rng(2).standard_normal((9, 4))
  saved = frechet.of(rows, kind, source={"folder": "real"})
  saved.save(tmp_path / "real.npz")
  found = frechet.load(tmp_path / "real.npz")
  assert (found.kind, found.source, found.count) == (kind, {"folder": "real"}, 9)
  assert frechet.distance(found, saved) == pytest.approx(0, abs=1e-12)
  with pytest.raises(InputError, match="frames 16 and 24"):
    frechet.distance(found, frechet.of(rows, {**kind, "frames": 24}))
  (tmp_path / "real.npz").write_bytes((tmp_path / "real.npz").read_bytes()[:-30])
  with pytest.raises(InputError, match="no whole statistics"):
    frechet.load(tmp_path / "real.npz")


def test_frechet_refuses_what_has_no_distance():
  rows = np.ones((3, 4))
  rows[1, 2] = np.nan
  with pytest.raises(InputError, match=r"1 of 3 feature rows.*row 1"):
    frechet.of(rows)
  with pytest.raises(InputError, match="4 and of 5 features"):
    frechet.distance(frechet.of(np.eye(4)), frechet.of(np.eye(5)))
  with pytest.raises(InputError, match="of 1 samples"):
    frechet.distance(frechet.of(np.eye(4)), frechet.of(np.eye(4)[:1]))
  with pytest.raises(InputError, match="unknown covariance"):
    frechet.distance(frechet.of(np.eye(4)), frechet.of(np.eye(4)), "none")


def test_frechet_warns_of_fewer_samples_than_features():
  few, many = frechet.of(np.eye(4)), frechet.of(np.random.default_rng(3).normal(size=(9, 4)))
  assert "only 4 samples of 4 features" in frechet.caution(many, few)
  assert frechet.caution(many, many) == ""
