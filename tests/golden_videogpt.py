"""The published implementation's numbers: where they lie and how to read them."""

from collections.abc import Iterator
import functools
import json
import os
import pathlib

import numpy as np
from safetensors import numpy as safetensors

from videogpt_jax import model
from videogpt_jax import published

TOLERANCE = 1e-4
FOLDER = pathlib.Path(os.environ.get("VIDEOGPT_GOLDEN",
                                     pathlib.Path(__file__).parent / "golden" / "videogpt"))


@functools.cache
def arrays(name: str) -> dict[str, np.ndarray]:
  """All arrays of `name`.npz."""
  with np.load(FOLDER / f"{name}.npz") as file:
    return dict(file)


def index(name: str):
  """The cases listed in `name`.json."""
  return json.loads((FOLDER / f"{name}.json").read_text())


def case(name: str, key: str) -> dict[str, np.ndarray]:
  """The arrays of one case, their names without the case."""
  prefix = key + "/"
  return {k.removeprefix(prefix): x for k, x in arrays(name).items() if k.startswith(prefix)}


@functools.cache
def load_model(name: str) -> tuple[model.Config, dict]:
  """A tiny published model: settings and parameters."""
  settings = json.loads((FOLDER / f"model_{name}_config.json").read_text())
  config = published.model_config(settings)
  tensors = safetensors.load_file(FOLDER / f"model_{name}.safetensors")
  return config, published.from_published(tensors, config)


def channels_last(x: np.ndarray) -> np.ndarray:
  """Latents (frames, channels, h, w) as ours, [frames, h, w, C]."""
  return np.moveaxis(x, -3, -1)


def assert_close(actual, expected, tolerance: float = TOLERANCE) -> None:
  """Largest difference over largest magnitude, as the golden README asks."""
  actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
  assert actual.shape == expected.shape, (actual.shape, expected.shape)
  assert np.isfinite(actual).all()
  error = np.abs(actual - expected).max() / max(np.abs(expected).max(), 1e-30)
  assert error <= tolerance, f"relative error {error:.2e} exceeds {tolerance:.0e}"


def samples(case_arrays: dict[str, np.ndarray], frame_blocks) -> Iterator[tuple]:
  """Splits a training case's flat frames by sample: (clip lengths, noisy, clean slices)."""
  noisy_at = clean_at = 0
  for lengths in frame_blocks:
    frames, seen = sum(lengths), sum(lengths[:-1])
    yield lengths, slice(noisy_at, noisy_at + frames), slice(clean_at, clean_at + seen)
    noisy_at, clean_at = noisy_at + frames, clean_at + seen
