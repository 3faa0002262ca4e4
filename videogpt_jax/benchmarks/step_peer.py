"""PyTorch beside us in one run of the train step's benchmark: the same weights, noise and video.

The peer is `torch_step`, in a process of its own; both take turns, so that whatever else the
machine does slows both. Before anything is timed its loss and gradients have to be ours.
"""

import importlib.util
import json
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

import jax
from jaxtyping import Array, PRNGKeyArray
import numpy as np

from videogpt_jax import flow
from videogpt_jax import model
from videogpt_jax import published
from videogpt_jax import step as step_lib
from videogpt_jax.benchmarks import torch_step
from videogpt_jax.errors import InputError

_TOLERANCE = 1e-4  # of gradients, by the largest of each tensor; float32


def check() -> None:
  """Raises `InputError` where no peer can run: without torch, or where we do not run on a CPU."""
  if importlib.util.find_spec("torch") is None:
    raise InputError("torch is not installed: pip install -e '.[bench]'")
  if jax.default_backend() != "cpu":
    raise InputError("the peer in PyTorch runs on the CPU; set JAX_PLATFORMS=cpu")


class Peer:
  """A process of PyTorch that makes a step when it is told to; a context.

  Args:
    recipe: the model (of as many key/value heads as heads) and what is trained.
    params: the model's, unboxed.
    keys: of the noise, one row.
    stored: the latents, one row.
    gradients: what we find with these.

  Raises:
    InputError: torch fails, or finds other gradients.
  """

  def __init__(self, recipe: step_lib.Recipe, params: Any, keys: PRNGKeyArray, stored: Array,
               gradients: Any) -> None:
    self._folder = tempfile.TemporaryDirectory(prefix="torch_step")
    folder = pathlib.Path(self._folder.name)
    loss, arrays = _problem(recipe, params, keys, stored)
    np.savez(folder / torch_step.PROBLEM, **arrays)
    del arrays
    self._process = subprocess.Popen(
      [sys.executable, "-m", torch_step.__name__, str(folder)], stdin=subprocess.PIPE,
      stdout=subprocess.PIPE, text=True)
    try:
      self._line()  # it is ready
      with np.load(folder / torch_step.GRADIENTS) as file:
        theirs = dict(file)
      self.largest_difference = difference(
        loss, published.to_published(gradients, recipe.model), theirs)
    except BaseException:
      self.__exit__()
      raise

  def __enter__(self) -> "Peer":
    return self

  def __exit__(self, *_: Any) -> None:
    self._process.kill()
    self._process.wait()
    self._folder.cleanup()

  def step(self) -> float:
    """Seconds of a step."""
    return float(self._line("step"))

  def end(self) -> dict[str, Any]:
    """Ends the process; its version, the most memory it has had, MiB, and its product's rate."""
    return json.loads(self._line("end"))

  def _line(self, told: str = "") -> str:
    process: Any = self._process
    if told:
      process.stdin.write(f"{told}\n")
      process.stdin.flush()
    if not (line := process.stdout.readline().strip()):
      raise InputError("the peer in PyTorch failed, see above")
    return line


def _problem(recipe: step_lib.Recipe, params: Any, keys: PRNGKeyArray, stored: Array
             ) -> tuple[float, dict[str, Any]]:
  """Our loss, and what `torch_step.Step` wants."""
  @jax.jit
  def see(params: Any, keys: PRNGKeyArray, stored: Array) -> tuple[flow.Draw, Array]:
    draw, blocks = recipe.objective(keys, *step_lib.seen_latents(recipe, keys, stored))
    x1 = model.predict(recipe.model, params, draw.clean, draw.noisy, draw.t, blocks)
    return draw, flow.loss(x1, draw)[0]

  draw, loss = see(params, keys, stored)
  config, stack = recipe.model, recipe.model.backbone
  first = lambda frames: np.moveaxis(np.asarray(frames[0]), -1, 1)
  rows, columns = (side // config.patch_size for side in draw.noisy.shape[2:4])
  weights = published.to_published(params, config) | {published.POSITION: model.position_table(
    stack.hidden_size, config.pos_embed_max_size, rows, columns)}
  return float(loss), {
    **{torch_step.WEIGHT + name: np.ascontiguousarray(x) for name, x in weights.items()},
    "noisy": first(draw.noisy), "clean": first(draw.clean), "target": first(draw.target),
    "t": np.asarray(draw.t[0]), "clip": np.asarray(draw.clip[0]),
    "layers": np.asarray(stack.num_layers), "heads": np.asarray(stack.num_heads),
    "theta": np.asarray(stack.rope_theta), "eps": np.asarray(stack.rms_norm_eps),
    "markers": np.asarray([config.diff_id, config.img_id, config.end_img_id])}


def difference(loss: float, ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> float:
  """The largest one, of loss and gradients, by the largest magnitude of each tensor.

  Args:
    loss: ours.
    ours: our gradients, by published name.
    theirs: loss and gradients as `torch_step` writes them.

  Raises:
    InputError: it is more than float32 explains.
  """
  found = {name: float(np.abs(x - theirs.get(torch_step.WEIGHT + name, np.inf)).max()
                       / max(np.abs(x).max(), np.finfo(np.float32).tiny))
           for name, x in ours.items()}
  found[torch_step.LOSS] = abs(float(theirs[torch_step.LOSS]) / loss - 1)
  worst = max(found, key=lambda name: np.nan_to_num(found[name], nan=np.inf))
  if not found[worst] <= _TOLERANCE:
    raise InputError(f"the peer in PyTorch computes something else: {worst} is off by "
                     f"{found[worst]:.2g}")
  return found[worst]
