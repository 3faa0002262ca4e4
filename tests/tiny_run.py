"""A configuration and data set so small that whole runs fit into a test."""

import subprocess
import sys

from videogpt_jax import config as config_lib
from videogpt_jax import encode


def config(folder):
  """Settings of a run of seconds on a world of 16x16 px, its data set in `folder`."""
  c = config_lib.default()
  c.name = "test"
  c.data.path = str(folder)
  c.data.source = "world"
  c.data.height = c.data.width = 16
  c.data.frames = 4
  c.data.train_videos = 24
  c.data.validation_videos = 8
  c.codec.block = 4
  c.world.size = 16
  c.world.frames = 6
  c.world.objects = (1, 1)
  c.world.radius = (2.0, 3.0)
  c.world.speed = (0.5, 1.0)
  c.model.hidden_size = 16
  c.model.intermediate_size = 32
  c.model.num_layers = 2
  c.model.num_heads = c.model.num_kv_heads = 2
  c.train.steps = 12
  c.train.batch_size = 4
  c.optimizer.warmup_steps = 2
  c.checkpoint.every = 3
  c.log.every = 2
  c.log.validate_every = 6
  c.log.validation_batches = 1
  c.log.videos_every = 12
  c.log.videos = 1
  c.sample.history = 2
  c.sample.clip_frames = 2
  c.sample.steps = 2
  return c


def encoded(folder):
  """The configuration, its data set written."""
  c = config(folder / "data")
  encode.encode(c, processes=1)
  return c


def config_file(c, path):
  """`c` as a configuration file that commands can read."""
  path.write_text(
    "from ml_collections import ConfigDict\n\n\ndef get_config():\n"
    f"  return ConfigDict({c.to_dict()!r})\n"
  )
  return path


def run(module, *arguments, **kwargs):
  """Runs a command of the package in a process of its own."""
  return subprocess.run(
    [sys.executable, "-m", f"videogpt_jax.{module}", *map(str, arguments)],
    capture_output=True, text=True, timeout=300, check=False, **kwargs)
