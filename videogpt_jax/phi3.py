"""Phi-3 as released: the backbone that a new Video-GPT starts from.

Its tensors are those of the published model's `llm.` under the prefix `model.`, without
the language model's head. What it lacks is drawn as the published training code does
(`LVMTraining.initialize_weights`): no signal from noisy patches and none out of the last
layer at first, Glorot-uniform clean patches, normal time embeddings of deviation 0.02.
"""

from collections.abc import Mapping
import functools
import math
import zlib

import numpy as np

from videogpt_jax import model
from videogpt_jax import published
from videogpt_jax import tensors as tensor_files

_THEIRS, _OURS = "model.", "llm."
_HEAD = "lm_head.weight"
_EMBEDDING = _THEIRS + "embed_tokens.weight"
_TIME_DEVIATION = 0.02


def is_release(tensors: Mapping[str, np.ndarray]) -> bool:
  """Whether these are the tensors of a Phi-3 (rather than of a Video-GPT, or of a Llama)."""
  return _EMBEDDING in tensors and any(name.endswith("qkv_proj.weight") for name in tensors)


def complete(
    tensors: tensor_files.TensorFiles, config: model.Config, seed: int = 0
) -> tensor_files.TensorFiles:
  """A new Video-GPT's tensors under the published names: Phi-3's backbone, the rest drawn.

  Drawn tensors are float32; each depends on `seed` and its own name alone.
  """
  entries: dict[str, tensor_files.Entry] = {}
  for name, entry in tensors.entries.items():
    if name != _HEAD:
      ours = _OURS + name.removeprefix(_THEIRS) if name.startswith(_THEIRS) else name
      entries[ours] = entry
  for name, shape in published.shapes(config).items():
    if not name.startswith(_OURS):
      draw = functools.partial(_draw, name, shape, seed)
      entries[name] = tensor_files.Entry(draw, shape, np.dtype(np.float32))
  return tensor_files.TensorFiles(entries)


def _draw(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
  rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
  if name == "input_x_embedder.proj.weight":  # as a linear layer: D outputs, C p p inputs
    bound = math.sqrt(6 / (shape[0] + math.prod(shape[1:])))
    return rng.uniform(-bound, bound, shape).astype(np.float32)
  if name.startswith(("time_token.", "t_embedder.")) and name.endswith("weight"):
    return _TIME_DEVIATION * rng.standard_normal(shape, np.float32)
  return np.zeros(shape, np.float32)
