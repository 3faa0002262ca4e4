"""A configuration and data set so small that whole runs fit into a test."""

import dataclasses
import pathlib
import subprocess
import sys

from flax import traverse_util
import numpy as np

from videogpt_jax import checkpoint_files
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
  c.train.batch_size = 8
  c.optimizer.warmup_steps = 2
  c.checkpoint.every = 3
  c.log.every = 2
  c.log.validate_every = 6
  c.log.validation_batches = 1
  c.log.videos_every = 12
  c.log.videos = 1
  c.log.rollouts = 0
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


@dataclasses.dataclass(frozen=True)
class Finished:
  """A training run of 24 steps by the command, from the first to the last."""

  config_file: pathlib.Path
  workdir: pathlib.Path
  result: subprocess.CompletedProcess


def finished(folder, data):
  """Runs `videogpt_jax.main` to its end on the data set `data`."""
  c = config(data)
  c.train.steps = c.log.videos_every = 24
  c.log.validate_every = 12
  file, workdir = config_file(c, folder / "config.py"), folder / "run"
  result = run("main", f"--config={file}", f"--workdir={workdir}", "--config.platform=cpu")
  assert result.returncode == 0, result.stderr
  return Finished(file, workdir, result)


def saved_state(workdir):
  """Every array of the newest checkpoint, by its path in the train state."""
  names = ("step", "params", "ema", "opt_state", "bad_steps", "skipped", "typical_norm")
  tree = {name: checkpoint_files.load_params(workdir, name)[0] for name in names}
  return traverse_util.flatten_dict(tree, sep="/")


def assert_same_state(workdir, other):
  """The newest checkpoints of two runs hold the same bits."""
  ours, theirs = saved_state(workdir), saved_state(other)
  assert ours.keys() == theirs.keys()
  assert sum(np.size(x) for x in ours.values()) > 1000
  for name, value in ours.items():
    assert value.dtype == theirs[name].dtype, name
    np.testing.assert_array_equal(value, theirs[name], err_msg=name)
