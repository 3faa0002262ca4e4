"""The train step: its state, and one pure function from (state, batch) to (state, metrics).

Nothing here reads files or configurations, so benchmarks build the very step that
training runs.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

from flax import serialization
from flax import traverse_util
import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray
import optax

from videogpt_jax import codec as codec_lib
from videogpt_jax import flow
from videogpt_jax import lora
from videogpt_jax import model
from videogpt_jax import objective as objective_lib
from videogpt_jax import offload
from videogpt_jax import optimizer as optimizer_lib
from videogpt_jax import sharding

NOISE_BINS = 5  # the loss is logged by time t in as many equal bins
CLIP_BINS = 8  # and by clip index, the last bin holding all later clips

Metrics = dict[str, Array]


# The mean; one draw for both copies of a frame; one draw for each (as published).
POSTERIORS = ("mean", "sample", "separate")
_SPIKE_WARMUP = 100  # updates before any is taken for a spike, and over which norms are averaged
# What lies in the host's memory between its uses: nothing, the optimizer's moments, or what the
# backward pass keeps of each layer (remat "offload" of the backbone).
OFFLOADS = ("none", "optimizer", "activations")
_POSTERIOR_STREAM = 1 << 20  # of a row's key: noise of the posterior is independent of the rest


@flax.struct.dataclass
class TrainState:
  """Everything that a step changes, and what it is computed from.

  `step` counts batches seen and is the data position. `params` are what is trained: all of the
  model, or adapters beside the frozen `base`. `ema` is their moving average; None: none is kept.
  `bad_steps` counts updates skipped in a row because loss or gradients were not finite or spiked,
  `skipped` all of them. `typical_norm` follows the norms of the gradients that were not skipped.
  """

  step: Int[Array, ""]
  params: Any
  ema: Any
  opt_state: Any
  bad_steps: Int[Array, ""]
  skipped: Int[Array, ""]
  typical_norm: Float[Array, ""]
  base: Any = None

  @property
  def shown(self) -> Any:
    """The model's parameters to predict with: the average where there is one."""
    return lora.join(self.base, self.params if self.ema is None else self.ema)


def _to_saved(state: TrainState) -> dict[str, Any]:
  fields = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
  del fields["base"]
  return {name: serialization.to_state_dict(x) for name, x in fields.items() if x is not None}


def _from_saved(state: TrainState, saved: dict[str, Any]) -> TrainState:
  return dataclasses.replace(state, **{
    name: serialization.from_state_dict(getattr(state, name), x) for name, x in saved.items()})


# A checkpoint has no entry for what is not there, and none for the base.
serialization.register_serialization_state(TrainState, _to_saved, _from_saved, override=True)


@dataclasses.dataclass(frozen=True)
class Recipe:
  """What a train step needs to know, all of it static.

  `posterior` says what becomes of stored moments: see `POSTERIORS`; `offload`, what lies in the
  host's memory: see `OFFLOADS`. `ema_decay` of 0 is no EMA. An update whose gradients have more
  than `spike` times their typical norm is skipped; 0: none is for its norm.
  """

  model: model.Config
  codec: codec_lib.Codec
  objective: objective_lib.Objective
  optimizer: optimizer_lib.Config
  posterior: str = "mean"
  ema_decay: float = 0.999
  spike: float = 0.0
  accumulation: int = 1
  seed: int = 0
  offload: str = "none"


def init_state(recipe: Recipe) -> TrainState:
  """A fresh state, its leaves boxed with their logical axis names."""
  return _state_of(recipe, model.init_params(recipe.model, recipe.seed))


def _state_of(recipe: Recipe, params: Any) -> TrainState:
  base, zero = None, jnp.zeros((), jnp.int32)
  if adapters := recipe.model.backbone.lora:
    base, params = lora.split(params)
    base = model.with_type(base, adapters.base_dtype)
  return TrainState(
    step=zero,
    params=params,
    ema=jax.tree.map(jnp.copy, params) if recipe.ema_decay else None,
    opt_state=optimizer_lib.make(recipe.optimizer).init(nn.meta.unbox(params)),
    bad_steps=zero,
    skipped=zero,
    typical_norm=jnp.zeros((), jnp.float32),
    base=base,
  )


def state_shardings(recipe: Recipe, mesh: jax.sharding.Mesh) -> TrainState:
  """A sharding for every leaf of the state.

  Raises:
    InputError: something is to lie in the host's memory, and the devices cannot reach it.
  """
  if recipe.offload != "none":
    sharding.require_host_memory(mesh)
  abstract = jax.eval_shape(functools.partial(init_state, recipe))
  found = sharding.of_tree(mesh, dataclasses.replace(abstract, opt_state=()))
  of_params = traverse_util.flatten_dict(nn.meta.unbox(found.params))
  # Unboxed inside: under a mesh that is where sharding constraints can be met.
  shapes = traverse_util.flatten_dict(jax.eval_shape(nn.meta.unbox, abstract.params))
  moments = optimizer_lib.shardings(abstract.opt_state, shapes, of_params, mesh)
  if recipe.offload == "optimizer":  # its counts are small, and wanted on the device
    moments = jax.tree.map(lambda x, where: where.with_memory_kind(sharding.HOST) if x.ndim
                           else where, abstract.opt_state, moments)
  return dataclasses.replace(found, opt_state=moments)


def create_state(recipe: Recipe, mesh: jax.sharding.Mesh, params: Any = None) -> TrainState:
  """A fresh state, every leaf born with its sharding.

  Args:
    recipe: what is trained.
    mesh: of devices.
    params: to start from, if there are some: of the whole model, donated; or of the base.
  """
  shardings = nn.meta.unbox(state_shardings(recipe, mesh))
  with sharding.use(mesh):
    if params is not None and recipe.model.backbone.lora:
      fresh = lambda: dataclasses.replace(nn.meta.unbox(init_state(recipe)), base=None)
      return dataclasses.replace(
        jax.jit(fresh, out_shardings=dataclasses.replace(shardings, base=None))(), base=params)
    if params is not None:
      init = functools.partial(_state_of, recipe)
      return jax.jit(init, out_shardings=shardings, donate_argnums=0)(params)
    return jax.jit(lambda: nn.meta.unbox(init_state(recipe)), out_shardings=shardings)()


def abstract_state(recipe: Recipe, mesh: jax.sharding.Mesh) -> TrainState:
  """The state as shapes, types and shardings, to restore into."""
  shapes = nn.meta.unbox(jax.eval_shape(functools.partial(init_state, recipe)))
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    shapes,
    state_shardings(recipe, mesh),
  )


def loss_metrics(aux: dict[str, Float[Array, "B N"]]) -> Metrics:
  """Sums of loss and weight by noise level and by clip index, for means over many steps."""
  loss, weight = aux["frame_loss"], aux["frame_weight"]
  noise_bin = jnp.minimum((aux["t"] * NOISE_BINS).astype(jnp.int32), NOISE_BINS - 1)
  clip_bin = jnp.minimum(aux["clip"], CLIP_BINS - 1)

  def by(index: Array, bins: int) -> tuple[Array, Array]:
    member = jax.nn.one_hot(index, bins) * weight[..., None]
    return jnp.einsum("BN,BNb->b", loss, member), member.sum((0, 1))

  noise_sum, noise_count = by(noise_bin, NOISE_BINS)
  clip_sum, clip_count = by(clip_bin, CLIP_BINS)
  return {
    "loss_sum": loss.sum(),
    "loss_count": weight.sum(),
    "noise_sum": noise_sum,
    "noise_count": noise_count,
    "clip_sum": clip_sum,
    "clip_count": clip_count,
  }


def seen_latents(
  recipe: Recipe, rng: PRNGKeyArray, stored: Array
) -> tuple[Float[Array, "B N h w C"], Float[Array, "B N h w C"]]:
  """Normalised latents for what is noised and predicted, and for the clean copies.

  Args:
    recipe: says the codec, and what becomes of a posterior.
    rng: one key per row.
    stored: [B, N, h, w, C or 2C].
  """
  codec = recipe.codec
  if recipe.posterior == "mean":
    return (codec.normalize(stored),) * 2
  shape = (*stored.shape[1:-1], codec.channels)

  def draw(stream: int) -> Array:
    keys = jax.vmap(lambda key: jax.random.fold_in(key, _POSTERIOR_STREAM + stream))(rng)
    return codec.sample(stored, jax.vmap(lambda key: jax.random.normal(key, shape))(keys))

  latents = draw(0)
  return latents, draw(1) if recipe.posterior == "separate" else latents


def _loss(recipe: Recipe, params: Any, rng: Array, stored: Array, total: Array, base: Any = None):
  draw, blocks = recipe.objective(rng, *seen_latents(recipe, rng, stored))
  x1 = model.predict(recipe.model, lora.join(base, params), draw.clean, draw.noisy, draw.t, blocks)
  loss, aux = flow.loss(x1, draw, normalizer=total)
  return loss, loss_metrics(aux)


def gradients(recipe: Recipe, params: Any, rng: Array, stored: Array, base: Any = None
              ) -> tuple[Any, Metrics]:
  """Gradients of the global batch and its loss sums, over `accumulation` microbatches.

  Every real frame of the global batch weighs the same, whichever part it stands in. There are
  gradients with respect to `params` alone, which may be adapters of the frozen `base`.
  """
  batch = stored.shape[0]
  draws = lambda keys, x: recipe.objective(keys, *seen_latents(recipe, keys, x))[0].target
  frames = jax.eval_shape(draws, rng, stored).shape[1]
  total = jnp.float32(batch * frames)
  grad_fn = jax.grad(functools.partial(_loss, recipe, base=base), has_aux=True)
  if recipe.accumulation == 1:
    return grad_fn(params, rng, stored, total)

  rows = batch // recipe.accumulation
  # Every accumulation-th row: a reshape that keeps each device's rows on it.
  parts = lambda x: jnp.moveaxis(
    x.reshape(rows, recipe.accumulation, *x.shape[1:]), 1, 0
  )
  # Of as many rows as there will be: a mesh may be unable to split fewer.
  shapes = jax.eval_shape(grad_fn, params, rng[:rows], stored[:rows], total)
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

  def add(carry: Any, part: tuple[Array, Array]) -> tuple[Any, None]:
    return jax.tree.map(jnp.add, carry, grad_fn(params, *part, total)), None

  return jax.lax.scan(add, zeros, (parts(rng), parts(stored)))[0]


def train_step(recipe: Recipe, state: TrainState, stored: Array) -> tuple[TrainState, Metrics]:
  """One update from stored latents [B, N, h, w, C].

  An update with a non-finite loss or gradient, or with a gradient far larger than usual, is
  skipped: parameters, EMA and optimizer stay as they are, and the skip is counted.
  """
  rng = objective_lib.row_keys(recipe.seed, state.step, stored.shape[0])
  grads, metrics = gradients(recipe, state.params, rng, stored, state.base)
  norm = optax.tree.norm(grads)
  good = jnp.isfinite(norm) & jnp.isfinite(metrics["loss_sum"])
  kept = state.step - state.skipped  # updates so far
  if recipe.spike:
    usual = recipe.spike * state.typical_norm
    good &= (kept < _SPIKE_WARMUP) | (state.typical_norm == 0) | (norm <= usual)

  keep = lambda new, old: jax.tree.map(lambda a, b: jnp.where(good, a, b), new, old)
  optimizer = optimizer_lib.make(recipe.optimizer)
  rate = optimizer_lib.learning_rate(recipe.optimizer)(optimizer_lib.count(state.opt_state))
  if recipe.offload == "optimizer":
    clip = optax.clip_by_global_norm(recipe.optimizer.clip_norm)
    updates, opt_state = offload.update(
      optimizer, clip.update(grads, optax.EmptyState())[0], state.opt_state, state.params, good)
  else:
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    opt_state = keep(opt_state, state.opt_state)
  params = optax.apply_updates(state.params, updates)
  ema = None
  if state.ema is not None:
    count = state.step.astype(jnp.float32)
    decay = jnp.minimum(recipe.ema_decay, (1 + count) / (10 + count))  # follows fast at first
    ema = jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, state.ema, params)

  pace = jnp.maximum(1 / (kept + 1), 1 / _SPIKE_WARMUP)  # a mean, later one that follows
  pace = jnp.where(state.typical_norm == 0, 1.0, pace)  # none is known yet
  typical = state.typical_norm + pace * (norm - state.typical_norm)

  bad = jnp.where(good, 0, state.bad_steps + 1)
  state = TrainState(
    step=state.step + 1,
    params=keep(params, state.params),
    ema=keep(ema, state.ema),
    opt_state=opt_state,
    bad_steps=bad,
    skipped=state.skipped + (1 - good.astype(jnp.int32)),
    typical_norm=keep(typical, state.typical_norm),
    base=state.base,
  )
  metrics |= {"grad_norm": norm, "bad_steps": bad, "skipped": state.skipped,
              "learning_rate": rate}
  return state, metrics


def compile_step(recipe: Recipe, mesh: jax.sharding.Mesh) -> jax.stages.Wrapped:
  """The jitted train step, to be called under `sharding.use(mesh)`; the state is donated."""
  shardings = state_shardings(recipe, mesh)
  return jax.jit(
    functools.partial(train_step, recipe),
    donate_argnums=0,
    in_shardings=(shardings, sharding.rows(mesh)),
    out_shardings=(shardings, sharding.replicated(mesh)),
  )


def compile_validation(
  recipe: Recipe, mesh: jax.sharding.Mesh
) -> Callable[[Any, Array, Array], Metrics]:
  """A jitted (params, batch index, stored latents) -> loss sums, the same noise every time.

  To be called under `sharding.use(mesh)`.
  """

  def validate(params: Any, index: Array, stored: Array) -> Metrics:
    # Far from the seeds of training: the held-out noise is drawn from a key of its own.
    rng = objective_lib.row_keys(recipe.seed + (1 << 30), index, stored.shape[0])
    return _loss(recipe, params, rng, stored, jnp.float32(1))[1]

  return jax.jit(validate, out_shardings=sharding.replicated(mesh))
