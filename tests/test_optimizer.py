"""The optimizers against published formulas and optax's own, and where their state lies."""

import dataclasses
import math

from flax import traverse_util
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec
import numpy as np
import optax
import pytest

import tiny_run
from videogpt_jax import backbone
from videogpt_jax import config as config_lib
from videogpt_jax import model
from videogpt_jax import optimizer as optimizer_lib
from videogpt_jax import presets
from videogpt_jax import sharding
from videogpt_jax import step as step_lib


@pytest.mark.parametrize(("warmup", "cooldown", "expected"), [
  (4, 0, [0.5, 1.0, 1.5, 2.0, 2.0, 2.0, 2.0, 2.0]),
  (1, 0, [2.0] * 8),
  (0, 0, [2.0] * 8),
  (2, 4, [1.0, 2.0, 2.0, 2.0, 2.0, 1.5, 1.0, 0.5]),
])
def test_learning_rate(warmup, cooldown, expected):
  schedule = optimizer_lib.learning_rate(optimizer_lib.Config(2.0, warmup, 8, cooldown))
  np.testing.assert_allclose([schedule(n) for n in range(8)], expected)


def test_adamw_with_decay_on_all_parameters_and_global_norm_clipping():
  """Against the published formulas in float64, on gradients below and above the norm."""
  config = optimizer_lib.Config(learning_rate=0.1, warmup_steps=2, total_steps=10)
  optimizer = optimizer_lib.make(config)
  rng = np.random.default_rng(0)
  params = {"scale": rng.normal(size=3), "kernel": rng.normal(size=(2, 3))}
  ours = jax.tree.map(jnp.float32, params)
  state = optimizer.init(ours)
  m = jax.tree.map(np.zeros_like, params)
  v = jax.tree.map(np.zeros_like, params)
  for n, size in enumerate((0.01, 10.0, 0.3, 1e-3), start=1):
    grads = jax.tree.map(lambda x, s=size: s * rng.normal(size=x.shape), params)
    norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
    assert (norm > 1) == (size == 10.0)
    rate = 0.1 * min(1, n / 2)
    for name, p in params.items():
      g = grads[name] / max(norm, 1.0)
      m[name] = 0.9 * m[name] + 0.1 * g
      v[name] = 0.95 * v[name] + 0.05 * g**2
      step = m[name] / (1 - 0.9**n) / (np.sqrt(v[name] / (1 - 0.95**n)) + 1e-8)
      params[name] = p - rate * (step + 0.1 * p)
    updates, state = optimizer.update(jax.tree.map(jnp.float32, grads), state, ours)
    ours = optax.apply_updates(ours, updates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-5), ours, params)


@pytest.fixture(scope="module")
def muon(tiny_data):
  """A recipe with Muon, its parameters, gradients, and the first update of these."""
  c = tiny_run.config(tiny_data)
  c.optimizer.name, c.optimizer.eps = "muon", 1e-3
  recipe = config_lib.recipe(c)
  params = nn.meta.unbox(model.init_params(recipe.model, 0))
  rng = np.random.default_rng(0)
  grads = jax.tree.map(lambda x: jnp.float32(0.01 * rng.normal(size=x.shape)), params)
  optimizer = optimizer_lib.make(recipe.optimizer)
  update, _ = optimizer.update(grads, optimizer.init(params), params)
  return recipe, params, grads, update


def test_muon_orthogonalises_every_matrix_of_the_stack(muon):
  """Against the singular value decomposition in float64: U V^T, scaled as AdamW's steps are."""
  recipe, params, grads, update = muon
  rate, decay = recipe.optimizer.learning_rate / 2, recipe.optimizer.weight_decay  # warm-up of 2
  b = recipe.model.backbone
  D, F, H, G, E = (b.hidden_size, b.intermediate_size, b.num_heads, b.num_kv_heads, b.head_size)
  matrices = {  # of layer 1
    ("attention", "q"): lambda x: [x[1].reshape(D, H * E)],
    ("attention", "kv"): lambda x: [x[1, :, k].reshape(D, G * E) for k in range(2)],
    ("attention", "o"): lambda x: [x[1].reshape(H * E, D)],
    ("mlp", "gate_up"): lambda x: [x[1, :, k] for k in range(2)],
    ("mlp", "down"): lambda x: [x[1]],
  }
  assert F != D
  for (part, name), split in matrices.items():
    trees = (params, grads, update)
    for w, g, u in zip(*(split(np.float64(t["backbone"]["layers"][part][name])) for t in trees),
                       strict=True):
      left, _, right = np.linalg.svd(g, full_matrices=False)
      moved = -(u + rate * decay * w) / (rate * 0.2 * np.sqrt(max(g.shape)))
      assert (moved * (left @ right)).sum() / np.linalg.norm(moved) > 0.9 * np.sqrt(min(g.shape))
      values = np.linalg.svd(moved, compute_uv=False)
      assert values.min() > 0.5 and values.max() < 1.3  # what five Newton-Schulz steps give


def test_muon_leaves_the_rest_to_adamw_with_nesterov_momentum(muon):
  recipe, params, grads, update = muon
  o = recipe.optimizer
  grads = jax.tree.map(lambda g: g * jnp.minimum(1, o.clip_norm / optax.tree.norm(grads)), grads)
  adamw = optax.adamw(o.learning_rate / 2, o.b1, o.b2, o.eps, weight_decay=o.weight_decay,
                      nesterov=True)
  theirs, _ = adamw.update(grads, adamw.init(params), params)
  for tree in (update, theirs):
    del tree["backbone"]["layers"]["attention"], tree["backbone"]["layers"]["mlp"]
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-9), update, theirs)


def test_moments_lie_where_their_parameters_lie(muon):
  recipe, *_ = muon
  mesh = AbstractMesh((1, 1, 4, 1, 2), tuple(sharding.AXES))
  for name in ("adamw", "muon"):
    optimizer = dataclasses.replace(recipe.optimizer, name=name)
    state = nn.meta.unbox(step_lib.state_shardings(
      dataclasses.replace(recipe, optimizer=optimizer), mesh))
    lies = traverse_util.flatten_dict(state.params)
    moments = dict.fromkeys(lies, 0)
    for path, where in jax.tree_util.tree_leaves_with_path(state.opt_state):
      keys = tuple(key.key for key in path if isinstance(key, jax.tree_util.DictKey))
      parameter = next((keys[n:] for n in range(len(keys)) if keys[n:] in lies), None)
      if parameter is None:
        assert where.is_fully_replicated  # a count
      else:
        assert where == lies[parameter], parameter
        moments[parameter] += 1
    few = {keys for keys, count in moments.items() if count == 1}  # Muon has one, AdamW two
    assert set(moments.values()) <= {1, 2}
    assert len(few) == (len(backbone.MATRICES) if name == "muon" else 0)


# Adafactor --------------------------------------------------------------------------------


_SHAPES = {"kernel": (3, 40, 50), "short": (31, 70), "scale": (40,)}


def _trees(seed, count):
  rng = np.random.default_rng(seed)
  return [{name: np.float32(rng.normal(size=shape)) for name, shape in _SHAPES.items()}
          for _ in range(count)]


def _adafactor(**settings):
  settings = {"learning_rate": 0.1, "warmup_steps": 0, "total_steps": 10, "clip_norm": 1e9,
              "name": "adafactor", **settings}
  return optimizer_lib.make(optimizer_lib.Config(**settings))


def _updates(optimizer, params, grads):
  state, updates = optimizer.init(params), []
  for g in grads:
    update, state = optimizer.update(g, state, params)
    updates.append(update)
  return updates, state


def _assert_close(ours, theirs, **tolerance):
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), ours, theirs)


def test_adafactor_is_optaxs_own():
  """Where its settings can say the same: a constant rate, no decay, no bound on that of moments."""
  params, *grads = _trees(0, 6)
  theirs = optax.adafactor(0.1, min_dim_size_to_factor=32, multiply_by_parameter_scale=False,
                           momentum=0.9)
  _assert_close(_updates(_adafactor(b2=1.0, weight_decay=0.0), params, grads)[0],
                _updates(theirs, params, grads)[0], rtol=1e-5, atol=1e-7)


def test_adafactor_by_the_published_formulas():
  """In float64, with the bound on the decay of moments, and decay of parameters as AdamW's."""
  params, *grads = _trees(1, 6)
  ours, state = _updates(_adafactor(b2=0.6, b1=0.8, weight_decay=0.3), params, grads)
  assert optax.tree_utils.tree_get(state, "v_row")["kernel"].shape == (3, 40)
  assert optax.tree_utils.tree_get(state, "v")["kernel"].size == 1
  for name, shape in _SHAPES.items():
    v, m = np.zeros(shape), np.zeros(shape)
    rows, columns = np.zeros(shape[:-1]), np.zeros((*shape[:-2], *shape[-1:]))
    for t, g in enumerate(grads, start=1):
      g = np.float64(g[name])
      decay = min(0.6, 1 - t**-0.8)
      if name == "kernel":  # the product of rows and columns, over the mean of either
        rows = decay * rows + (1 - decay) * (g**2).mean(-1)
        columns = decay * columns + (1 - decay) * (g**2).mean(-2)
        v = rows[..., None] * columns[..., None, :] / rows.mean(-1)[..., None, None]
      else:
        v = decay * v + (1 - decay) * g**2
      u = g / np.sqrt(v)
      m = 0.8 * m + 0.2 * u / max(1, np.sqrt((u**2).mean()))
      np.testing.assert_allclose(ours[t - 1][name], -0.1 * (m + 0.3 * params[name]), rtol=2e-4,
                                 atol=1e-6)


def test_a_first_moment_in_bfloat16_is_the_rounded_one():
  """The second one stays float32; Adafactor has no first one where b1 is 0."""
  params, *grads = _trees(2, 1)
  for name in optimizer_lib.NAMES[::2]:
    found = {}
    for moments in optimizer_lib.MOMENTS:
      config = optimizer_lib.Config(0.1, 0, 10, name=name, moments=moments)
      updates, state = _updates(optimizer_lib.make(config), params, grads)
      key = "mu" if name == "adamw" else "ema"
      found[moments] = optax.tree_utils.tree_get(state, key)
      wide = [x for x in jax.tree.leaves(state) if x.ndim and x.dtype == jnp.float32]
      assert len(wide) >= len(_SHAPES)  # the second moments
      assert all(np.isfinite(x).all() for x in jax.tree.leaves(updates))
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), found["float32"])
    jax.tree.map(np.testing.assert_array_equal, rounded, found["bfloat16"])
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(found["bfloat16"]))
  size = lambda **settings: sum(x.size for x in jax.tree.leaves(
    _adafactor(**settings).init(params)))
  assert size() - size(b1=0.0) >= sum(math.prod(shape) for shape in _SHAPES.values())


def test_second_moments_of_the_published_model_are_small():
  """A half per cent of its parameters; AdamW has as many as it has parameters."""
  params = model.abstract_params(config_lib.model(presets.paper()))
  state = jax.eval_shape(_adafactor(b1=0.0).init, params)
  count = sum(x.size for x in jax.tree.leaves(params))
  assert sum(x.size for x in jax.tree.leaves(state)) < 5e-3 * count


def test_rows_and_columns_lie_where_their_parameter_lies():
  """Over a mesh that splits width and heads; means over a split axis lie on all its devices."""
  recipe = config_lib.recipe(presets.paper())
  recipe = dataclasses.replace(recipe, optimizer=dataclasses.replace(
    recipe.optimizer, name="adafactor"))
  mesh = AbstractMesh((1, 1, 4, 1, 2), tuple(sharding.AXES))
  state = step_lib.state_shardings(recipe, mesh).opt_state
  layers = lambda name, part, leaf: optax.tree_utils.tree_get(state, name)["backbone"]["layers"][
    part][leaf].spec
  assert tuple(layers("ema", "attention", "q")) == (None, "fsdp", "tensor", None)
  factors = lambda *path: {tuple(layers(name, *path)) for name in ("v_row", "v_col")}
  # [layers, embed, heads, head] without embed, and without head
  assert factors("attention", "q") == {(None, "tensor", None), (None, "fsdp", "tensor")}
  assert factors("mlp", "down") == {(None, "fsdp"), (None, "tensor")}
  assert layers("v", "mlp", "down") == PartitionSpec()  # nothing is in it
