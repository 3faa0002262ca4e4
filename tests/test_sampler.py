"""The way from noise to data: grids, methods and their order, guidance."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import golden_videogpt as golden
from videogpt_jax import sampler as sampler_lib
from videogpt_jax.sampler import Sampler

_SHAPE = (1, 1, 4, 8, 2)


def _noise(seed=0):
  return jax.random.normal(jax.random.key(seed), _SHAPE)


def _plain(x1):
  """A model whose prediction is `x1(z, t)`, with or without a history."""
  return lambda z, t, guided: (x1(z, t), x1(z, t) if guided else None)


def _mixture(z, t):
  """E[x1 | z] where x1 is one of three Gaussians: curved paths, and known in closed form."""
  means, deviations = jnp.array([-1.5, 0.2, 1.0]), jnp.array([0.3, 0.5, 0.2])
  z, variance = z[..., None], (t * deviations) ** 2 + (1 - t) ** 2
  weights = jax.nn.softmax(-0.5 * (z - t * means) ** 2 / variance - 0.5 * jnp.log(variance))
  each = means + t * deviations**2 * (z - t * means) / variance
  return (weights * each).sum(-1)


def _errors(method, steps, shift):
  """Root mean square distance from the exact solution, by number of steps."""
  noise = _noise()
  with jax.enable_x64(True):
    exact = _runge_kutta(noise)
  return [float(jnp.sqrt(jnp.mean(jnp.square(
    sampler_lib.integrate(_plain(_mixture), _noise(), Sampler(n, shift=shift, method=method))
    - exact)))) for n in steps]


def _runge_kutta(z, steps=4000):
  """Fourth order, in float64, from t = 0 to just before 1, where x1 is the answer."""
  z = jnp.asarray(np.asarray(z), jnp.float64)
  velocity = lambda z, t: (_mixture(z, t) - z) / (1 - t)
  end = 1 - 1e-6

  def step(z, t):
    h = end / steps
    a = velocity(z, t)
    b = velocity(z + h / 2 * a, t + h / 2)
    c = velocity(z + h / 2 * b, t + h / 2)
    d = velocity(z + h * c, jnp.minimum(t + h, end))
    return z + h / 6 * (a + 2 * b + 2 * c + d), None

  z, _ = jax.lax.scan(step, z, jnp.arange(steps) * (end / steps))
  return np.asarray(_mixture(z, end))


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("heun", 2), ("multistep", 2)])
def test_order(method, order):
  """Twice the steps, a half or a quarter of the error: over two doublings, on curved paths."""
  few, many = _errors(method, (16, 64), 1.0)
  assert 0.8 * order < np.log2(few / many) / 2 < 1.3 * order


def test_second_order_beats_euler_at_the_same_number_of_predictions():
  (euler,), (heun,), (multistep,) = (
    _errors(method, (steps,), 1.0)
    for method, steps in (("euler", 20), ("heun", 10), ("multistep", 20)))
  assert multistep < 0.4 * euler
  assert heun < euler


@pytest.mark.parametrize("method", sampler_lib.METHODS)
@pytest.mark.parametrize(("steps", "shift"), [(1, 1.0), (7, 1.0), (5, 3.0), (20, 0.01)])
def test_with_one_data_point_every_method_ends_there(method, steps, shift):
  x1 = jnp.full(_SHAPE, 0.7)
  out = sampler_lib.integrate(_plain(lambda z, t: x1), _noise(),
                              Sampler(steps, shift=shift, method=method))
  np.testing.assert_allclose(out, x1, atol=2e-6)


def test_multistep_is_exact_where_the_prediction_is_linear_in_time():
  """dz/dt = (a + b t - z) / (1 - t), from its second step on; the first is Euler's."""
  a, b = 0.3, -0.8
  x1 = _plain(lambda z, t: jnp.full_like(z, a) + b * t)
  ours = sampler_lib.integrate(x1, _noise(), Sampler(50, method="multistep"))
  euler = sampler_lib.integrate(x1, _noise(), Sampler(50))
  np.testing.assert_allclose(ours, a + b, atol=1e-5)  # z(1) = x1(1), wherever one comes from
  assert np.abs(euler - (a + b)).max() > 0.01


@pytest.mark.parametrize(("method", "evaluations"), [("euler", 5), ("heun", 9), ("multistep", 5)])
def test_evaluations(method, evaluations):
  """As many predictions as said, at the times of the grid; Heun's last step is Euler's."""
  seen = []

  def predict(z, t, guided):
    jax.debug.callback(lambda t: seen.append(float(t)), t, ordered=True)
    return z, None

  sampler = Sampler(5, shift=2.0, method=method)
  jax.block_until_ready(sampler_lib.integrate(predict, _noise(), sampler))
  jax.effects_barrier()
  grid = sampler_lib.time_grid(5, 2.0)
  expected = grid[:-1] if method != "heun" else [
    t for pair in itertools.pairwise(grid) for t in pair][:-1]
  np.testing.assert_allclose(seen, expected, rtol=1e-6)
  assert len(seen) == sampler.evaluations == evaluations
  assert sampler.guided_evaluations == 0


def test_heun_equals_its_textbook_form():
  z, grid = _noise(), sampler_lib.time_grid(6, 2.0)
  velocity = lambda z, t: (_mixture(z, t) - z) / (1 - t)
  for t, t_next in itertools.pairwise(grid):
    first = velocity(z, t)
    euler = z + (t_next - t) * first
    z = euler if t_next == 1 else z + (t_next - t) * (first + velocity(euler, t_next)) / 2
  ours = sampler_lib.integrate(_plain(_mixture), _noise(), Sampler(6, shift=2.0, method="heun"))
  np.testing.assert_allclose(ours, z, atol=1e-5)


# Guidance ---------------------------------------------------------------------------------


def _two(asked=None):
  """A model with a history says .5, without one -.1."""
  def predict(z, t, guided):
    if asked is not None:
      jax.debug.callback(lambda t: asked.append((round(float(t), 4), guided)), t, ordered=True)
    return jnp.full_like(z, 0.5), jnp.full_like(z, -0.1) if guided else None
  return predict


def test_guidance_on_predictions_is_guidance_on_velocities():
  z = _noise()
  for t, t_next in itertools.pairwise(sampler_lib.time_grid(4)):
    with_history, without = ((x - z) / (1 - t) for x in (0.5, -0.1))
    z = z + (t_next - t) * (without + 2.5 * (with_history - without))
  ours = sampler_lib.integrate(_two(), _noise(), Sampler(4, guidance=2.5))
  np.testing.assert_allclose(ours, z, atol=1e-5)


def test_guidance_decays_with_time():
  """The last step takes the prediction at its begin, t = 0.75, whole."""
  ours = sampler_lib.integrate(_two(), _noise(), Sampler(4, guidance=3.0, guidance_decay=2.0))
  np.testing.assert_allclose(ours, -0.1 + 0.6 * (1 + 2.0 * 0.25**2), atol=1e-6)


def test_outside_its_range_guidance_is_not_paid_for():
  asked = []
  sampler = Sampler(5, guidance=2.0, guidance_range=(0.15, 0.65))
  jax.block_until_ready(sampler_lib.integrate(_two(asked), _noise(), sampler))
  jax.effects_barrier()
  assert asked == [(0.0, False), (0.2, True), (0.4, True), (0.6, True), (0.8, False)]
  assert sampler.guided_evaluations == 3


def test_golden_noise_schedules():
  parts = golden.arrays("parts")
  names = sorted({k.split("/")[0] for k in parts if k.startswith("sigma")})
  assert names
  for name in names:
    grid = sampler_lib.time_grid(int(parts[f"{name}/steps"]), float(parts[f"{name}/shift"]))
    golden.assert_close(grid, parts[f"{name}/sigma"])


def test_no_steps_no_grid():
  with pytest.raises(ValueError, match="at least 1 step"):
    sampler_lib.time_grid(0)
