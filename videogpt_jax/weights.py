"""Weights to predict with: a training run, an exported folder, or those that come along."""

import dataclasses
import os
import pathlib
from typing import Any

import jax
from jaxtyping import Array, Float, PRNGKeyArray, UInt8
import numpy as np

from videogpt_jax import codec as codec_lib
from videogpt_jax import model as model_lib
from videogpt_jax import published
from videogpt_jax import rollout
from videogpt_jax.errors import InputError

PRETRAINED = str(pathlib.Path(__file__).parent / "pretrained" / "world")


@dataclasses.dataclass(frozen=True)
class Weights:
  """A model ready to predict.

  Attributes:
    model: its settings.
    params: its (EMA) parameters.
    codec: of its latents.
    config: the sections `data`, `sample` and `world` of the run that trained it.
    path: where it was loaded from.
  """

  model: model_lib.Config
  params: Any
  codec: codec_lib.Codec
  config: dict[str, Any]
  path: str

  @property
  def frame_size(self) -> tuple[int, int]:
    """(height, width) in px that the model was trained on."""
    return self.config["data"]["height"], self.config["data"]["width"]

  @property
  def sampler(self) -> rollout.Sampler:
    """The sampler of the run's configuration."""
    sample = self.config["sample"]
    return rollout.Sampler(sample["steps"], sample["guidance"], sample["shift"])

  def continue_video(
    self,
    frames: UInt8[np.ndarray, "B h_ H W 3"],
    num_frames: int,
    *,
    clip_frames: int | None = None,
    sampler: rollout.Sampler | None = None,
    window: int | None = None,
    rng: PRNGKeyArray,
  ) -> UInt8[np.ndarray, "B n H W 3"]:
    """Predicts the `num_frames` frames after `frames`; defaults as in the run's configuration."""
    sample = self.config["sample"]
    latents: Float[Array, "B h_ h w C"] = self.codec.normalize(
      jax.numpy.asarray(self.codec.encode(frames)))
    new = rollout.generate(
      self.model,
      self.params,
      latents,
      num_frames=num_frames,
      clip_frames=clip_frames or sample["clip_frames"],
      sampler=sampler or self.sampler,
      window=(sample["window"] or self.config["data"]["frames"]) if window is None else window,
      rng=rng,
    )
    return self.codec.decode(jax.device_get(self.codec.denormalize(new)))


def load(path: str = "", *, attention: str = "auto", dtype: str = "auto") -> Weights:
  """Loads weights for prediction.

  Args:
    path: a workdir of `videogpt_jax.main`, a weights folder (`videogpt_jax.convert`), or
      "" for the weights that come with the package.
    attention: implementation, see `videogpt_jax.attention`.
    dtype: compute type; "auto" as in training.

  Raises:
    InputError: neither kind of folder is there, or it is damaged.
  """
  from videogpt_jax import config as config_lib  # local: needs ml_collections for workdirs only

  path = path or PRETRAINED
  numerics = {"attention": attention, "dtype": config_lib.compute_dtype(dtype)}
  if published.is_folder(path):
    params, model, config = published.load_folder(path, **numerics)
    missing = [name for name in ("codec", "data", "sample") if name not in config]
    if missing:
      raise InputError(f"{path}/config.json does not say how to make videos with these weights: "
                       f"\"videogpt_jax\" in it lacks {', '.join(missing)}; export them with "
                       "python -m videogpt_jax.convert")
  elif os.path.isdir(path):
    from videogpt_jax import checkpoint

    params, config = checkpoint.load_params(path)
    model = config_lib.model(config_lib.from_saved(config))
    model = dataclasses.replace(model, backbone=dataclasses.replace(model.backbone, **numerics))
  else:
    raise InputError(f"no weights at {path}: expected a training workdir or a weights folder")
  params = jax.tree.map(jax.numpy.asarray, params)
  return Weights(model, params, codec_lib.from_settings(config["codec"]), config, path)
