"""What is compiled: attention, gradients of one layer, a clip or a train step of the whole."""

from collections.abc import Callable
import dataclasses
import functools
import importlib.util
import pathlib
from typing import Any

from flax import traverse_util
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec

from videogpt_jax import attention
from videogpt_jax import backbone
from videogpt_jax import cache
from videogpt_jax import codec
from videogpt_jax import config
from videogpt_jax import layout
from videogpt_jax import mask
from videogpt_jax import model
from videogpt_jax import objective
from videogpt_jax import optimizer
from videogpt_jax import rollout
from videogpt_jax import sharding
from videogpt_jax import step
from videogpt_jax.benchmarks import rollout as rollout_benchmark

Sizes = tuple[tuple[str, int], ...]  # of a mesh's axes, by name; of those not named 1
ONE: Sizes = ()  # a mesh of one chip
ALL_AXES: Sizes = tuple((axis, 2) for axis in ("data", "fsdp", "sequence", "tensor"))


@dataclasses.dataclass(frozen=True)
class Attention:
  """Attention with ranks and block map made inside, of samples in the layout of training.

  Defaults are the published model at its full size: 35,298 tokens.
  """

  gradient: bool = False
  batch: int = 1
  frames: int = 80
  patches: int = 220
  heads: int = 32
  kv_heads: int = 32
  head_size: int = 96
  dtype: str = "bfloat16"
  mesh: Sizes = ONE

  def build(self, name: str, mesh: Mesh) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """The function, attending by implementation `name`, and the shapes of its arguments."""
    function = functools.partial(_attend, self.patches, name)
    if self.gradient:
      function = functools.partial(_loss_and_gradients, function)
    frame = self.patches + layout.MARKERS
    length = (2 * self.frames - 1) * frame
    length += -length % mesh.shape["sequence"]
    rows = functools.partial(NamedSharding, mesh)
    shape = lambda heads: jax.ShapeDtypeStruct(
        (self.batch, length, heads, self.head_size), jnp.dtype(self.dtype),
        sharding=rows(PartitionSpec(sharding.BATCH_AXES, "sequence", "tensor")))
    clip = jax.ShapeDtypeStruct((self.batch, self.frames), jnp.int32,
                                sharding=rows(PartitionSpec(sharding.BATCH_AXES)))
    return function, (clip, shape(self.heads), shape(self.kv_heads), shape(self.kv_heads))


def _attend(patches, name, clip, q, k, v):
  tokens = layout.tokens(layout.training(clip), patches, multiple=sharding.size("sequence"))
  ranks = mask.ranks(tokens)
  block_map = attention.plan(ranks, ranks, frame_tokens=patches + layout.MARKERS,
                             head_size=q.shape[-1], dtype=q.dtype, implementation=name)
  return attention.attend(q, k, v, ranks, ranks, block_map, implementation=name)


def _loss_and_gradients(function, clip, *inputs):
  loss = lambda *inputs: jnp.square(function(clip, *inputs).astype(jnp.float32)).sum()
  return jax.value_and_grad(loss, argnums=(0, 1, 2))(*inputs)


@dataclasses.dataclass(frozen=True)
class Layer:
  """Loss and gradients of a whole model with one layer, otherwise as large as the published."""

  batch: int = 1
  frames: int = 80
  mesh: Sizes = ONE
  head_size: int = 96
  dtype: str = "bfloat16"

  def build(self, name: str, mesh: Mesh) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """As in `Attention`; the latents have 22 x 40 cells, so a frame has 220 patches."""
    stack = backbone.Config(
        hidden_size=32 * self.head_size, intermediate_size=8192, num_layers=1, num_heads=32,
        num_kv_heads=32, dtype=jnp.dtype(self.dtype), attention=name, remat="full")
    pixels = codec.Pixels(block=2)
    recipe = step.Recipe(
        model=model.Config(backbone=stack, channels=pixels.channels), codec=pixels,
        objective=objective.next_clip(objective.random_partition),
        optimizer=optimizer.Config(learning_rate=1e-4, warmup_steps=1, total_steps=1))
    stored = jax.ShapeDtypeStruct((self.batch, self.frames, 22, 40, pixels.channels),
                                  pixels.dtype, sharding=sharding.rows(mesh))

    def function(params, stored):
      keys = objective.row_keys(0, jnp.int32(0), self.batch)
      return step.gradients(recipe, params, keys, stored)

    return function, (step.abstract_state(recipe, mesh).params, stored)


@dataclasses.dataclass(frozen=True)
class Clip:
  """A clip of the published model generated, whole: 56 frames in the cache, 24 new, 50 steps."""

  history: int = 56
  generated: int = 24
  guidance: float = 1.5
  mesh: Sizes = ONE
  head_size: int = 96
  dtype: str = "bfloat16"

  def build(self, name: str, mesh: Mesh) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """As in `Layer`; parameters in the types in which prediction keeps them."""
    case = rollout_benchmark.full()
    stack = dataclasses.replace(case.model.backbone, attention=name)
    config = dataclasses.replace(case.model, backbone=stack)
    boxed = jax.eval_shape(lambda: model.init_params(config, 0))
    shardings = traverse_util.flatten_dict(sharding.of_tree(mesh, boxed), sep="/")
    leaves = traverse_util.flatten_dict(model.abstract_params(config), sep="/")
    params = traverse_util.unflatten_dict({
        leaf: jax.ShapeDtypeStruct(
            x.shape, stack.dtype if model.rounded(leaf) else x.dtype, sharding=shardings[leaf])
        for leaf, x in leaves.items()}, sep="/")
    heads = NamedSharding(mesh, PartitionSpec(None, sharding.BATCH_AXES, None, None,
                                              sharding.HEAD_AXES))
    ring = jax.ShapeDtypeStruct((stack.num_layers, self.batch(mesh), self.history, 222, 32, 96),
                                stack.dtype, sharding=heads)
    counter = jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec()))
    noise = jax.ShapeDtypeStruct((self.batch(mesh), self.generated, *case.cells, 4), jnp.float32,
                                 sharding=sharding.rows(mesh))
    sampler = rollout.Sampler(case.steps, self.guidance)

    def function(params, keys, values, counter, noise):
      held = cache.Cache(keys, values, counter, counter + self.history)
      return rollout.denoise_clip(config, params, held, noise, sampler)

    return function, (params, ring, ring, counter, noise)

  def batch(self, mesh: Mesh) -> int:
    """One video for each device that has videos of its own."""
    return mesh.size // sharding.rows(mesh).shard_shape((mesh.size,))[0]


@dataclasses.dataclass(frozen=True)
class Step:
  """The whole train step of a run card, but for frames and videos: these one after the other."""

  card: str
  frames: int
  videos: int = 1
  mesh: Sizes = ONE
  head_size: int = 96
  dtype: str = "bfloat16"

  def build(self, name: str, mesh: Mesh) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """As in `Layer`, on stored moments of 176 x 320 px."""
    c = _card(self.card)
    c.data.frames, c.model.attention, c.model.dtype = self.frames, name, self.dtype
    c.train.batch_size = c.train.accumulation = self.videos
    recipe = config.recipe(c)
    stored = jax.ShapeDtypeStruct(
        (self.videos, self.frames, 22, 40, codec.stored_channels(recipe.codec)),
        jnp.dtype(recipe.codec.dtype), sharding=sharding.rows(mesh))

    def function(state, stored):
      new, metrics = step.train_step(recipe, state, stored)
      return dataclasses.replace(new, base=None), metrics  # it is the old one, in its place

    return function, (step.abstract_state(recipe, mesh), stored)


def _card(name: str) -> Any:
  """The configuration of a file in configs/."""
  path = pathlib.Path(__file__).parents[2] / "configs" / f"{name}.py"
  spec = importlib.util.spec_from_file_location("card", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config()


Program = Attention | Layer | Clip | Step
