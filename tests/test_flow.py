"""Noising, the loss, and what a sample becomes."""

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

import golden_videogpt as golden
from videogpt_jax import flow
from videogpt_jax import model
from videogpt_jax import objective


def _draw(rows=400, frames=4):
  keys = jax.random.split(jax.random.key(0), rows)
  clip = jnp.broadcast_to(jnp.array([0, 0, 1, 2]), (rows, frames))
  target = jax.random.normal(jax.random.key(1), (rows, frames, 2, 2, 3))
  return jax.jit(flow.draw)(keys, clip, target)


def test_times_are_uniform_one_per_clip_and_history_nearly_clean():
  draw = _draw()
  t = np.asarray(draw.t)
  np.testing.assert_array_equal(t[:, 0], t[:, 1])
  assert (t[:, 1] != t[:, 2]).all()
  for column in (0, 2, 3):
    assert stats.kstest(t[:, column], "uniform").pvalue > 1e-4
  gamma = (np.asarray(draw.clean_t).ravel() - 0.9) / 0.1
  assert stats.kstest(gamma, "uniform").pvalue > 1e-4
  assert abs(np.corrcoef(t[:, 0], t[:, 2])[0, 1]) < 0.2


def test_noise_is_standard_normal_and_independent_of_the_history_noise():
  draw = _draw()
  t, clean_t = (x[..., None, None, None] for x in (draw.t, draw.clean_t))
  x0 = np.asarray((draw.noisy - t * draw.target) / (1 - t))[t.squeeze() < 0.9]
  eps = np.asarray((draw.clean - clean_t * draw.target[:, :-1]) / (1 - clean_t))
  assert stats.kstest(x0.ravel()[:4000], "norm").pvalue > 1e-4
  assert abs(eps.std() - 1) < 0.05


def test_a_samples_noise_depends_on_its_own_key_alone():
  keys = jax.random.split(jax.random.key(0), 3)
  clip, target = jnp.zeros((3, 2), jnp.int32), jnp.ones((3, 2, 2, 2, 3))
  whole = flow.draw(keys, clip, target)
  alone = flow.draw(keys[1:2], clip[:1], target[:1])
  np.testing.assert_array_equal(whole.noisy[1], alone.noisy[0])


def test_loss_is_a_mean_over_real_frames_and_parts_add_up():
  draw = _draw(rows=4)
  x1 = draw.target + jnp.arange(16.0).reshape(4, 4, 1, 1, 1)
  valid = jnp.arange(4) < jnp.array([4, 2, 1, 3])[:, None]
  squares = np.arange(16.0).reshape(4, 4) ** 2
  whole, aux = flow.loss(x1, draw, valid)
  np.testing.assert_allclose(whole, squares[np.asarray(valid)].mean(), rtol=1e-4)
  assert (np.asarray(aux["frame_loss"])[~np.asarray(valid)] == 0).all()
  parts = [flow.loss(x1[i:i + 2], jax.tree.map(lambda x, i=i: x[i:i + 2], draw), valid[i:i + 2],
                     jnp.float32(10))[0] for i in (0, 2)]
  np.testing.assert_allclose(sum(parts), whole, rtol=1e-4)


def test_golden_time_features():
  parts = golden.arrays("parts")
  golden.assert_close(model.time_features(jnp.asarray(parts["time/t"])), parts["time/embedding"])


def test_fixed_clips_leave_out_what_nobody_sees():
  latents = jax.random.normal(jax.random.key(0), (2, 5, 2, 2, 3))
  for lengths, clean in (((2, 1, 2), 3), ((4, 1), 4), ((5,), 0)):
    draw, blocks = objective.fixed(lengths)(
      objective.row_keys(0, jnp.int32(3), 2), latents, latents)
    assert draw.clean.shape[1] == clean
    assert blocks.frame[1].tolist() == [*range(clean), *range(5)]
    assert blocks.valid.all()
    np.testing.assert_array_equal(draw.target, latents)
    np.testing.assert_allclose(draw.clean, latents[:, :clean], atol=0.6)


def test_continuation_gives_history_and_denoises_the_rest():
  latents = jax.random.normal(jax.random.key(0), (2, 5, 2, 2, 3))
  keys = objective.row_keys(0, jnp.int32(3), 2)
  draw, blocks = objective.continuation(2)(keys, latents, latents)
  np.testing.assert_array_equal(draw.target, latents[:, 2:])
  assert blocks.frame[0].tolist() == [0, 1, 2, 3, 4]
  np.testing.assert_array_equal(draw.t, draw.t[:, :1].repeat(3, axis=1))
  np.testing.assert_allclose(draw.clean, latents[:, :2], atol=0.6)


def test_rows_have_the_same_keys_whatever_the_batch_they_stand_in():
  keys = jax.random.key_data(objective.row_keys(1, jnp.int32(7), 8))
  np.testing.assert_array_equal(keys[:4], jax.random.key_data(
      objective.row_keys(1, jnp.int32(7), 4)))
  assert len({tuple(k) for k in np.asarray(keys).tolist()}) == 8
