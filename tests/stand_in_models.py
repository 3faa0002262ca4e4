"""Models that cost nothing, for the tests of evaluations in several processes.

The processes import this module, see `processes.environment`.
"""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np

from videogpt_jax import codec
from videogpt_jax import rollout
from videogpt_jax import sharding
from videogpt_jax import weights
from videogpt_jax.metrics import fvd
from videogpt_jax.metrics import i3d


def drifting(config):
  """Weights on two devices that predict a random drift from the last frame to the first one.

  Args:
    config: its sections `data` and `sample`.
  """
  rollout.clips = _clips
  mesh = sharding.prediction_mesh(2, 2, 2, jax.local_devices())
  assert mesh.size == 2
  blocks = codec.Pixels(4)
  model = types.SimpleNamespace(patch_size=1, backbone=types.SimpleNamespace(dtype=np.float32))
  return weights.Weights(model, {"x": jnp.ones(2)}, blocks, {**config, "codec": blocks.spec()},
                         "drift", mesh)


def _clips(model, params, history, *, num_frames, rng, **rest):
  drift = jnp.cumsum(jax.random.uniform(rng, (num_frames,)))[:, None, None, None] / num_frames
  yield history[:, -1:] * (1 - drift) + history[:, :1] * drift


@functools.partial(jax.jit, static_argnums=(2, 3))
def features(params, videos, layer, resize):
  """In place of I3D's: a projection of what it would see."""
  x = fvd.preprocess(videos, resize)[:, :, ::16, ::16].reshape(len(videos), -1)
  return x @ jax.random.normal(jax.random.key(0), (x.shape[1], i3d.FEATURES[layer]))
