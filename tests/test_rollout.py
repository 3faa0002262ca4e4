"""Rollouts: the window, the length, and what the frames depend on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import golden_videogpt as golden
from videogpt_jax import rollout


def _generate(history, **kwargs):
  config, params = golden.load_model("a")
  arguments = {"num_frames": 3, "clip_frames": 2, "sampler": rollout.Sampler(2),
               "rng": jax.random.key(0), **kwargs}
  return rollout.generate(config, params, history, **arguments)


@pytest.fixture(name="history")
def _history():
  return jax.random.normal(jax.random.key(1), (2, 3, 4, 4, 4))


def test_any_length_and_a_shorter_last_clip(history):
  assert _generate(history, num_frames=5, clip_frames=2).shape == (2, 5, 4, 4, 4)
  assert _generate(history, num_frames=1, clip_frames=4).shape == (2, 1, 4, 4, 4)


def test_frames_that_left_the_window_have_no_influence(history):
  other = history.at[:, 0].add(1.0)
  same = lambda window: np.array_equal(_generate(history, num_frames=2, window=window),
                                       _generate(other, num_frames=2, window=window))
  assert same(4) and not same(5)


def test_a_clip_continues_from_the_generated_ones(history):
  whole = _generate(history, num_frames=4)
  first = _generate(history, num_frames=2)
  np.testing.assert_allclose(whole[:, :2], first, atol=1e-6)
  second = rollout.denoise_clip(
      *golden.load_model("a"), jnp.concatenate([history, first], axis=1),
      jax.random.normal(jax.random.fold_in(jax.random.key(0), 1), first.shape), rollout.Sampler(2))
  np.testing.assert_allclose(whole[:, 2:], second, atol=1e-6)


def test_history_noise_is_drawn_from_the_second_clip_on(history):
  """As published: all frames of the history, anew for every clip but the first."""
  clean, noised = (_generate(history, num_frames=4, sampler=rollout.Sampler(2, history_noise=n))
                   for n in (0.0, 0.5))
  np.testing.assert_array_equal(clean[:, :2], noised[:, :2])
  assert np.abs(clean[:, 2:] - noised[:, 2:]).max() > 0.05
  seen = []
  denoise = rollout.denoise_clip

  def watched(config, params, past, *rest):
    seen.append(past)
    return denoise(config, params, past, *rest)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(rollout, "denoise_clip", watched)
    video = _generate(history, num_frames=6, sampler=rollout.Sampler(2, history_noise=0.5))
  whole = jnp.concatenate([history, video], axis=1)
  eps = [(past - 0.5 * whole[:, :past.shape[1]]) / 0.5 for past in seen[1:]]
  for noise in eps:
    assert abs(float(noise.mean())) < 0.2 and abs(float(noise.std()) - 1) < 0.1
  assert np.abs(eps[1][:, :3] - eps[0][:, :3]).max() > 0.5


def test_another_seed_gives_another_future(history):
  assert not np.allclose(_generate(history), _generate(history, rng=jax.random.key(1)))


def test_a_clip_larger_than_the_window_is_refused():
  with pytest.raises(ValueError, match="clip of 5 frames does not fit a window of 4"):
    rollout.kept_history(3, 5, 4)
