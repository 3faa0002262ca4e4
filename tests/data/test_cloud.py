"""A data set on gs://, read from an emulator: the same as the folder that it was copied from."""

import itertools
import os
from pathlib import Path
import pickle
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

import gcs_emulator
from videogpt_jax.data import pipeline
from videogpt_jax.data import store

_TESTS = Path(__file__).parents[1]


def _read(path):
  """All that can be read of a split, by the ways that training takes."""
  source = store.open_split(path, "train")
  fields = ("info", "lengths", "sizes", "num_bytes", "fingerprint")
  content = {name: getattr(source, name) for name in fields}
  content["splits"] = store.splits(path)
  content["records"] = [source[i] for i in range(len(source))]
  for workers in (0, 2):
    batches = pipeline.batches(
      source, frames=3, interval=(1, 2), batch_size=4, seed=0, workers=workers)
    content[f"batches, {workers} workers"] = list(itertools.islice(batches, 6))
    batches.close()
  return content



@pytest.fixture(scope="module")
def root(tmp_path_factory):
  """Has the bucket `videos` with the data set `of/balls`, shards of some MB."""
  root = tmp_path_factory.mktemp("cloud")
  spec = store.Spec(16, "bfloat16", {"id": "vae"}, moments=True, masks=True)
  writer = store.create(root / "videos" / "of" / "balls", spec, {"train": 2, "test": 1}, {})
  rng = np.random.default_rng(0)
  for split, index in writer.pending():
    with writer.shard(split, index) as shard:
      for k in range(9):
        t, h, w = 4 + k, (32, 24)[k % 2], 32
        shard.add(
          rng.standard_normal((t, h, w, 16)).astype(ml_dtypes.bfloat16),
          masks=rng.integers(0, 2, (t, 2, h, w), np.uint8),
          fps=12.5,
          source=f"{split}/{index}/{k}",
          label=k,
          caption="ein größerer Ball",
        )
  writer.finish()
  return root


@pytest.fixture(scope="module")
def bucket(root):
  with gcs_emulator.serve(root) as server:
    yield server


def _python(arguments, server):
  paths = os.pathsep.join(filter(None, (str(_TESTS), os.environ.get("PYTHONPATH"))))
  return subprocess.run(
    [sys.executable, *map(str, arguments)], capture_output=True, text=True, check=False,
    timeout=300, env={**os.environ, **server.environment, "PYTHONPATH": paths})


def _error(code, server):
  """What a process that runs the code, and fails, says at last."""
  result = _python(["-c", f"from videogpt_jax.data import store\n{code}"], server)
  assert result.returncode == 1, result.stderr
  return result.stderr.rpartition("videogpt_jax.errors.")[2].strip()


def test_a_data_set_in_the_cloud_is_the_one_that_was_copied_there(root, bucket, tmp_path):
  result = _python([__file__, "gs://videos/of/balls", tmp_path / "read"], bucket)
  assert result.returncode == 0, result.stderr
  there = pickle.loads((tmp_path / "read").read_bytes())
  here = _read(root / "videos" / "of" / "balls")
  np.testing.assert_equal(there, here)
  assert len(here["records"]) == 18
  # From the bucket, and in parts.
  shards = [span for path, span in bucket.requests if ".array_record-" in path]
  assert len(shards) > 18 and all(shards)


def test_without_gcsfs_the_extra_is_named(bucket):
  code = "import sys; sys.modules['gcsfs'] = None; store.open_split('gs://videos/set', 'train')"
  assert _error(code, bucket) == (
    "InputError: gs://videos/set lies in the cloud: pip install 'videogpt_jax[gcs]'")


@pytest.mark.parametrize("path", ["gs://videos/of/cubes", "gs://pictures/of/balls"])
def test_an_empty_folder_or_no_bucket_is_no_data_set(bucket, path):
  error = _error(f"store.open_split({path!r}, 'train')", bucket)
  assert error.startswith(f"InputError: no latent data set at {path}; ")


@pytest.mark.parametrize(("forbidden", "expected"), [
  ("metadata.json", "cannot read gs://videos/of/balls: Forbidden"),
  ("array_record-", "record 3 of gs://videos/of/balls, split 'train', cannot be read (Permanent"),
])
def test_what_may_not_be_read_is_said(bucket, monkeypatch, forbidden, expected):
  monkeypatch.setattr(bucket, "forbidden", forbidden)
  error = _error("store.open_split('gs://videos/of/balls', 'train')[3]", bucket)
  assert error.startswith(f"InputError: {expected}") and "encode" not in error, error


if __name__ == "__main__":  # the process that reads from the bucket
  Path(sys.argv[2]).write_bytes(pickle.dumps(_read(sys.argv[1])))
