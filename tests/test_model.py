"""The model: causality by gradients, independence of order, positions, shapes."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from videogpt_jax import backbone
from videogpt_jax import layout
from videogpt_jax import model

_STACK = backbone.Config(hidden_size=16, intermediate_size=24, num_layers=2, num_heads=2,
                         num_kv_heads=1)
CONFIG = model.Config(backbone=_STACK, channels=3, patch_size=2, pos_embed_max_size=8)


@pytest.fixture(scope="module")
def params():
  """Random weights everywhere, so that nothing is cut off by a zero initialisation."""
  shapes = model.abstract_params(CONFIG)
  leaves, tree = jax.tree.flatten(shapes)
  keys = jax.random.split(jax.random.key(0), len(leaves))
  return tree.unflatten([0.5 * jax.random.normal(k, x.shape)
                         for k, x in zip(keys, leaves, strict=True)])


def _apply(params, clean, noisy, t, blocks, **kwargs):
  return model.VideoGPT(CONFIG).apply({"params": params}, clean, noisy, t, blocks, **kwargs)


def _video(frames, seed=1, batch=1):
  return jax.random.normal(jax.random.key(seed), (batch, frames, 4, 4, 3))


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_causality_by_gradients(params, implementation):
  config = dataclasses.replace(CONFIG, backbone=dataclasses.replace(
      _STACK, attention=implementation))
  clip = jnp.array([[0, 0, 1, 2, 2]])
  t = jnp.array([[.2, .2, .5, .7, .7]])

  @jax.jit
  def influence(clean, noisy):
    def outputs(clean, noisy):
      x1 = model.VideoGPT(config).apply({"params": params}, clean, noisy, t,
                                        layout.training(clip)).x1
      return jnp.square(x1).sum((0, 2, 3, 4))
    return [jnp.abs(g).sum((1, 3, 4, 5)) for g in jax.jacobian(outputs, (0, 1))(clean, noisy)]

  by_clean, by_noisy = influence(_video(4), _video(5, seed=2))
  clips = np.asarray(clip[0])
  np.testing.assert_array_equal(np.asarray(by_clean) > 0, clips[:, None] > clips[None, :4])
  np.testing.assert_array_equal(np.asarray(by_noisy) > 0, clips[:, None] == clips[None])


def test_the_order_of_blocks_does_not_matter(params):
  clip = jnp.array([[0, 1, 1, 2]])
  blocks = layout.training(clip)
  clean, noisy, t = _video(3), _video(4, seed=2), jnp.array([[.1, .4, .4, .8]])
  expected = _apply(params, clean, noisy, t, blocks).x1
  order_clean, order_noisy = np.array([2, 0, 1]), np.array([3, 1, 0, 2])
  moved = jax.tree.map(lambda x: x[:, np.concatenate([order_clean, 3 + order_noisy])], blocks)
  found = _apply(params, clean[:, order_clean], noisy[:, order_noisy], t[:, order_noisy], moved).x1
  np.testing.assert_allclose(found, expected[:, order_noisy], atol=2e-5)


def test_clean_copies_of_a_last_clip_that_is_known_can_be_left_out(params):
  clip = jnp.array([[0, 1, 1, 2, 2, 2]])
  clean, noisy = _video(5), _video(6, seed=2)
  t = jnp.array([[.1, .4, .4, .8, .8, .8]])
  expected = _apply(params, clean, noisy, t, layout.training(clip)).x1
  for known in (2, 3):
    blocks = layout.training(clip, last_clip=known)
    assert blocks.stream.shape == (1, 12 - known)
    found = _apply(params, clean[:, :6 - known], noisy, t, blocks).x1
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_shifting_all_positions_changes_nothing(params):
  """Rotary positions are relative, so a prefix of length n that nobody uses is a shift."""
  blocks = layout.prediction(2, 2)
  shifted = dataclasses.replace(blocks, frame=blocks.frame + 5, clip_start=blocks.clip_start + 5)
  inputs = params, _video(2), _video(2, seed=2), jnp.full((1, 2), .3)
  np.testing.assert_allclose(_apply(*inputs, shifted).x1, _apply(*inputs, blocks).x1, atol=2e-5)


def test_prefix_conditions_every_frame_and_its_padding_none(params):
  blocks = layout.training(jnp.array([[0, 1]]))
  inputs = params, _video(1), _video(2, seed=2), jnp.array([[.2, .6]])

  def outputs(embeddings):
    prefix = model.Prefix(embeddings, jnp.array([2]))
    return jnp.square(_apply(*inputs, blocks, prefix=prefix).x1).sum((0, 2, 3, 4))

  embeddings = jax.random.normal(jax.random.key(5), (1, 3, 16))
  influence = jnp.abs(jax.jacobian(outputs)(embeddings)).sum((1, 3))
  np.testing.assert_array_equal(influence > 0, [[True, True, False]] * 2)
  empty = model.Prefix(embeddings, jnp.array([0]))
  np.testing.assert_allclose(_apply(*inputs, blocks, prefix=empty).x1,
                             _apply(*inputs, blocks).x1, atol=2e-5)


def test_captured_layers_are_the_stacks_own_outputs(params):
  blocks = layout.prediction(1, 1)
  inputs = params, _video(1), _video(1, seed=2), jnp.full((1, 1), .3)
  out = _apply(*inputs, blocks, capture=(0, 1))
  assert set(out.hidden) == {0, 1}
  shorter = dataclasses.replace(CONFIG, backbone=dataclasses.replace(_STACK, num_layers=1))
  first = jax.tree.map(lambda x: x[:1], params["backbone"]["layers"])
  cut = {**params, "backbone": {**params["backbone"], "layers": first}}
  alone = model.VideoGPT(shorter).apply({"params": cut}, *inputs[1:], blocks, capture=(0,))
  np.testing.assert_allclose(out.hidden[0], alone.hidden[0], atol=1e-5)


@pytest.mark.parametrize("policy", ["dots", "attention", "full"])
def test_remat_changes_no_gradient(params, policy):
  blocks = layout.training(jnp.array([[0, 1]]))

  def gradient(remat):
    config = dataclasses.replace(CONFIG, backbone=dataclasses.replace(_STACK, remat=remat))
    def loss(p):
      out = model.VideoGPT(config).apply({"params": p}, _video(1), _video(2, seed=2),
                                         jnp.array([[.2, .6]]), blocks)
      return jnp.square(out.x1).mean()
    return jax.jit(jax.grad(loss))(params)

  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
               gradient(policy), gradient("none"))


@pytest.mark.parametrize(("gradients", "least", "most"), [("float32", 0, 1e-6),
                                                          ("compute", 1e-4, 1e-2)])
def test_gradients_of_matrices_in_bfloat16_and_in_float32(gradients, least, most):
  """Against float64; the product and the gradient of its input are the same in both."""
  keys = jax.random.split(jax.random.key(0), 3)
  x = jax.random.normal(keys[0], (3, 50, 4, 2), jnp.bfloat16)
  w = jax.random.normal(keys[1], (4, 2, 6, 5))
  g = jax.random.normal(keys[2], (3, 50, 6, 5), jnp.bfloat16)
  product, back = jax.vjp(lambda x, w: backbone.GRADIENTS[gradients](x, w, 2), x, w)
  of_x, of_w = back(g)
  usual, usual_back = jax.vjp(lambda x, w: backbone.contract(x, w, 2), x, w)
  np.testing.assert_array_equal(product, usual)
  np.testing.assert_array_equal(of_x, usual_back(g)[0])
  assert of_x.dtype == jnp.bfloat16 and of_w.dtype == jnp.float32
  expected = np.einsum("blhe,blij->heij", np.float64(x), np.float64(g))
  error = np.abs(of_w - expected).max() / np.abs(expected).max()
  assert least <= error <= most


def test_every_parameter_has_axis_names():
  frame = jnp.zeros((1, 1, 2, 2, 3))
  boxed = jax.eval_shape(lambda: model.VideoGPT(CONFIG).init(
      jax.random.key(0), frame, frame, jnp.zeros((1, 1)), layout.prediction(1, 1)))
  leaves = jax.tree.leaves(boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))
  assert leaves
  for leaf in leaves:
    assert isinstance(leaf, nn.LogicallyPartitioned)
    assert len(leaf.names) == leaf.value.ndim


def test_patches_that_do_not_fit_are_refused():
  with pytest.raises(ValueError, match="5x4 cells do not divide into 2x2 patches"):
    model.patches_per_frame(CONFIG, 5, 4)
  with pytest.raises(ValueError, match="exceed the position table"):
    model.position_table(16, 8, 9, 2)
