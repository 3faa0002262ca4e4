"""Weights: what tells them apart."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tiny_run
from videogpt_jax import config as config_lib
from videogpt_jax import model as model_lib
from videogpt_jax import weights as weights_lib


@pytest.fixture(scope="module")
def params():
  """Of a model of two layers."""
  model = config_lib.model(tiny_run.config("nowhere"))
  shapes = jax.eval_shape(lambda: model_lib.init_params(model, 0))
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), shapes)


def test_a_fingerprint_sees_every_parameter_in_every_layer(params):
  known = weights_lib.fingerprint(params)
  assert weights_lib.fingerprint(jax.tree.map(jnp.copy, params)) == known
  leaves, tree = jax.tree.flatten(params)
  paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
  seen = {known}
  for i, path in enumerate(paths):
    for layer in range(2 if "layers" in path else 1):
      where = layer if "layers" in path else ...
      changed = leaves[i].at[where].multiply(1.5)
      seen.add(weights_lib.fingerprint(
        jax.tree.unflatten(tree, [*leaves[:i], changed, *leaves[i + 1:]])))
  assert sum("layers" in path for path in paths) > 5
  assert len(seen) == 1 + len(paths) + sum("layers" in path for path in paths)


def test_a_fingerprint_reads_little(params, monkeypatch):
  """Of a layer one row: nearly all of a matrix, and of a kernel, stays where it is."""
  read = []
  monkeypatch.setattr(weights_lib, "digest", lambda array: read.append(array.size))
  weights_lib.fingerprint(params)
  assert read == [sum((x.shape[0] if "layers" in jax.tree_util.keystr(path) else 1) * x.shape[-1]
                      for path, x in jax.tree_util.tree_leaves_with_path(params))]
