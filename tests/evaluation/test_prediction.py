"""A model that has diverged is not measured."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from videogpt_jax import codec as codec_lib
from videogpt_jax import rollout
from videogpt_jax import weights as weights_lib
from videogpt_jax.data import world as world_lib
from videogpt_jax.errors import InputError
from videogpt_jax.evaluation import fvd
from videogpt_jax.evaluation import physics_iq
from videogpt_jax.evaluation import physics_mini
from videogpt_jax.evaluation import prediction
from videogpt_jax.evaluation import world
from videogpt_jax.metrics import fvd as fvd_lib
from videogpt_jax.metrics import i3d
from videogpt_jax.metrics.physics_iq.protocol import Protocol

WORLD = world_lib.Settings(size=32, frames=12, objects=(1, 1), radius=(3.0, 4.0))
SAMPLE = {"history": 4, "clip_frames": 4, "steps": 1, "guidance": 1.0, "shift": 1.0, "window": 0}


@pytest.fixture
def diverging(monkeypatch):
  """Weights whose second batch has, in its second clip, a NaN in one latent of one video."""
  calls = []

  def clips(model, params, history, *, num_frames, clip_frames, **rest):
    calls.append(len(history))
    for index in range(num_frames // clip_frames):
      clip = jnp.repeat(history[:, -1:], clip_frames, axis=1)
      yield clip.at[1, 2, 0, 0, 0].set(jnp.nan) if (len(calls), index) == (2, 1) else clip

  monkeypatch.setattr(rollout, "clips", clips)
  model = types.SimpleNamespace(
    patch_size=1, backbone=types.SimpleNamespace(dtype=np.float32))
  codec = codec_lib.Pixels(4)
  config = {"sample": SAMPLE, "data": {"source": "world", "frames": 12, "height": 32, "width": 32,
                                       "resize": "crop"},
            "world": dataclasses.asdict(WORLD), "codec": codec.spec()}
  return weights_lib.Weights(model, {"x": jnp.ones(2)}, codec, config, "runs/diverged")


pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered in cast")


def test_the_codec_alone_would_not_notice(diverging):
  frames = np.full((2, 4, 32, 32, 3), 200, np.uint8)
  first = prediction.continued(diverging, frames, 8, rng=jax.random.key(0))
  assert first.shape == (2, 8, 32, 32, 3) and (first == 200).all()
  second = diverging.continue_video(frames, 8, rng=jax.random.key(0))
  assert second.dtype == np.uint8 and second.shape == first.shape


def test_the_world_names_the_batch(diverging, tmp_path):
  options = world.Options(videos=5, batch_size=2, fit_videos=2)
  with pytest.raises(InputError, match=r"^batch of videos 2 to 3: runs/diverged predicts NaN or "
                     "infinite numbers for 1 of 2 videos, in clip 2: .* an earlier checkpoint"):
    world.run(diverging, tmp_path, options)
  assert [path.name for path in (tmp_path / "items").iterdir()] == ["00000.json"]


def test_fvd_names_the_batch(diverging, tmp_path, monkeypatch):
  monkeypatch.setattr(i3d, "load", lambda path, sha256: {})
  monkeypatch.setattr(fvd_lib, "_features", lambda params, videos, layer, resize: jnp.ones(
    (len(videos), i3d.FEATURES[layer])))  # in place of I3D
  options = fvd.Options(videos=4, frames=12, batch_size=2, processes=1)
  with pytest.raises(InputError, match=r"^batch seed_0/00001, videos from 2 on: runs/diverged "):
    fvd.run(diverging, tmp_path, options)
  assert len(list((tmp_path / "statistics" / "seed_0").iterdir())) == 1


def test_physics_iq_names_the_batch(diverging, tmp_path):
  protocol = Protocol(fps=8, conditioning_s=0.5, prediction_s=1.0, scenarios=1)
  physics_mini.write_dataset(WORLD, protocol, tmp_path / "data", seed=0)
  options = physics_iq.Options(data=str(tmp_path / "data"), protocol=protocol, clip_frames=4,
                               batch_size=2, workers=1)
  with pytest.raises(InputError, match=r"^prediction 001, videos from 0003_perspective-right_"
                     r"trimmed-scene-0\.mp4 on: runs/diverged predicts NaN"):
    physics_iq.run(diverging, tmp_path / "out", options)
  assert len(list((tmp_path / "out" / "diverged").iterdir())) == 2
