"""What the benchmark of the train step measures, and what is known of the published code there."""

from collections.abc import Mapping
import dataclasses
from typing import Any

import jax.numpy as jnp

from videogpt_jax import backbone
from videogpt_jax import codec
from videogpt_jax import machine
from videogpt_jax import model
from videogpt_jax import objective
from videogpt_jax import optimizer
from videogpt_jax import step as step_lib

_SHORT = 16  # frames of the small model up to which memory is no concern
GROWTH = (8, 16, 32, 48, 80)  # frames of the small model, one a clip

# The published PyTorch implementation with its dense mask, forward and backward on 2 cores of
# an x86-64 server CPU of about 190 GFLOP/s (float32 2048^3 product).
PUBLISHED: dict[str, dict[str, float]] = {
  "laptop": {"seconds_per_step": 1.63, "useful_tokens_per_s": 1133.0, "peak_rss_mib": 1140.0},
  "laptop8": {"seconds_per_step": 0.827, "peak_rss_mib": 812.0},
  "laptop16": {"seconds_per_step": 1.89, "peak_rss_mib": 1165.0},
  "laptop32": {"seconds_per_step": 6.97, "peak_rss_mib": 1926.0},
  "laptop48": {"seconds_per_step": 15.0, "useful_tokens_per_s": 418.0, "peak_rss_mib": 2732.0},
}
PUBLISHED_PRODUCT_GFLOPS = 190.0  # of that machine, by `machine.product_rate`'s measure


@dataclasses.dataclass(frozen=True)
class Case:
  """What is measured: a recipe and the stored latents [B, N, h, w, C or 2C] it is fed."""

  recipe: step_lib.Recipe
  latents: tuple[int, int, int, int, int]
  update: bool  # the whole train step, or forward and backward alone
  mesh: Mapping[str, int]
  cpu_devices: int  # see `machine.split_cpu`; 0: one


def of(name: str) -> Case:
  """The case of that name, one of `NAMES`."""
  if name == "laptop":
    return _laptop(objective.fixed((4, 4, 4, 4)), 16)
  if name.startswith("laptop"):
    return _laptop(objective.next_clip(objective.single_partition), int(name[len("laptop"):]))
  return _full(*_FULL[name])


def _laptop(what: objective.Objective, frames: int) -> Case:
  """Hidden 384, 6 layers, frames of 64 patches, batch 1, float32."""
  remat = "none" if frames <= _SHORT else "attention"
  stack = backbone.Config(hidden_size=384, intermediate_size=1024, num_layers=6, num_heads=6,
                          num_kv_heads=6, remat=remat)
  pixels = codec.Pixels(block=4)
  recipe = step_lib.Recipe(
    model=model.Config(backbone=stack, channels=pixels.channels, patch_size=2),
    codec=pixels, objective=what,
    optimizer=optimizer.Config(learning_rate=1e-4, warmup_steps=1, total_steps=1))
  mesh = {"data": 1, "fsdp": 1, "sequence": 1, "tensor": -1}  # its batch is one video
  return Case(recipe, (1, frames, 16, 16, pixels.channels), update=False, mesh=mesh,
              cpu_devices=min(2, machine.usable_cores()))


# Frames, videos of a step, partition: about 60,000 tokens, of which the whole train step (state
# in float32: parameters, EMA, two moments) fits one H200, in the 75% of its memory that jax takes.
_FULL: dict[str, tuple[int, int, Any]] = {
  "full_stage1": (16, 8, objective.single_partition),
  "full_stage2": (48, 3, objective.random_partition),
  "full_stage4": (80, 2, objective.random_partition),
}
NAMES = ("laptop", *(f"laptop{frames}" for frames in GROWTH), *_FULL)


def _full(frames: int, videos: int, partition: objective.Partition) -> Case:
  """The whole train step of the published model at 176 x 320, as configs/stage*.py have it."""
  stack = backbone.Config(hidden_size=3072, intermediate_size=8192, num_layers=32, num_heads=32,
                          num_kv_heads=32, dtype=jnp.bfloat16, remat="attention")
  latents = codec.Vae(moments=True)
  network = model.Config(backbone=stack, channels=latents.channels, vocab_size=32_064,
                         img_id=32_012, end_img_id=32_013, diff_id=32_011)
  recipe = step_lib.Recipe(
    model=network, codec=latents, objective=objective.next_clip(partition), posterior="separate",
    optimizer=optimizer.Config(learning_rate=1e-4, warmup_steps=1, total_steps=1))
  return Case(recipe, (videos, frames, 22, 40, codec.stored_channels(latents)), update=True,
              mesh={"data": -1, "fsdp": 1, "sequence": 1, "tensor": 1}, cpu_devices=0)
