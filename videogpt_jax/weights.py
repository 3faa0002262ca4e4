"""Weights: a training run, a weights folder, or those that come along; opened and loaded."""

from collections.abc import Callable, Mapping
import dataclasses
import os
import pathlib
from typing import Any

from flax import traverse_util
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, UInt8
import numpy as np

from videogpt_jax import backbone
from videogpt_jax import codec as codec_lib
from videogpt_jax import folder as folder_lib
from videogpt_jax import model as model_lib
from videogpt_jax import rollout
from videogpt_jax.errors import InputError

PRETRAINED = str(pathlib.Path(__file__).parent / "pretrained" / "world")
SECTIONS = ("codec", "data", "sample")  # of a configuration, needed for prediction


@dataclasses.dataclass(frozen=True)
class Source:
  """Weights that are not read yet, whatever they lie in.

  Attributes:
    path: where.
    model: what model they belong to, with default numerics.
    leaves: the parameters by path `a/b/c`; each has `shape`, `dtype`, `stacked`, and
      `read()` and `pieces()` that read it whole or piece by piece.
    config: sections of the configuration they were trained with.
  """

  path: str
  model: model_lib.Config
  leaves: Mapping[str, Any]
  config: dict[str, Any]


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
    return rollout.Sampler(sample["steps"], sample["guidance"], sample["shift"],
                           sample.get("history_noise", 0.0))

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
      jnp.asarray(self.codec.encode(frames)))
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


def open_source(path: str = "", special_ids: Mapping[str, int] | None = None) -> Source:
  """Finds weights.

  Args:
    path: a workdir of `videogpt_jax.main`, a checkpoint, a weights folder (exported here, or
      the published one), or "" for the weights that come with the package.
    special_ids: see `folder.open_folder`.

  Raises:
    InputError: neither kind of folder is there, or it is damaged.
  """
  path = path or PRETRAINED
  if folder_lib.is_folder(path):
    found = folder_lib.open_folder(path, special_ids)
    config = found.extra or _published_config(found)
    missing = [name for name in SECTIONS if name not in config]
    if missing:
      raise InputError(f"{path}/config.json does not say how to make videos with these weights: "
                       f"\"videogpt_jax\" in it lacks {', '.join(missing)}; export them with "
                       "python -m videogpt_jax.convert")
    return Source(path, found.model, found.leaves, config)
  if not os.path.isdir(path):
    raise InputError(f"no weights at {path}: expected a training workdir or a weights folder")
  from videogpt_jax import checkpoint  # local, both: they need packages that folders do not
  from videogpt_jax import config as config_lib

  saved = checkpoint.open_params(path)
  config = config_lib.from_saved(saved.config)
  usual = {name: getattr(backbone.Config, name) for name in backbone.NUMERICS}
  model = config_lib.model(config)
  model = dataclasses.replace(model, backbone=dataclasses.replace(model.backbone, **usual))
  return Source(path, model, saved.leaves, config.to_dict())


def _published_config(found: folder_lib.Folder) -> dict[str, Any]:
  """What the published scripts say beside their weights, and the autoencoder that lies there."""
  from videogpt_jax import config as config_lib
  from videogpt_jax import presets

  config = config_lib.with_model(presets.paper(), found.model)
  config.codec.channels = found.model.channels
  autoencoder = os.path.abspath(os.path.join(found.path, "vae"))
  if os.path.isdir(autoencoder):
    config.codec.path = autoencoder
  return config.to_dict()


def load(path: str = "", *, attention: str = "auto", dtype: str = "auto", vae: str = "") -> Weights:
  """Loads weights for prediction.

  Args:
    path: see `open_source`.
    attention: implementation, see `videogpt_jax.attention`.
    dtype: compute type; "auto" as in training.
    vae: where the autoencoder lies, see `videogpt_jax.vae.load`; by default where the
      weights' configuration says.

  Raises:
    InputError: see `open_source`; or these weights work on pixels and `vae` is given.
  """
  source = open_source(path)
  codec = {**source.config["codec"], **({"path": vae} if vae else {})}
  if vae and codec["id"] != "vae":
    raise InputError(f"the weights {source.path} work on pixels: leave out --vae")
  numerics = {"attention": attention, "dtype": backbone.compute_dtype(dtype)}
  model = dataclasses.replace(
    source.model, backbone=dataclasses.replace(source.model.backbone, **numerics))
  encoder = codec_lib.from_settings(codec)
  if vae:
    encoder.prepare()  # a wrong path is told before anything large is read
  params = parameters(source, lambda name, array: jnp.asarray(array))
  return Weights(model, params, encoder, source.config, source.path)


def parameters(source: Source, place: Callable[[str, np.ndarray], Any]) -> dict[str, Any]:
  """The parameter tree in float32, one leaf after the other.

  Args:
    source: of the weights.
    place: puts a leaf, by its path, where it belongs.
  """
  found = {name: place(name, leaf.read(np.float32)) for name, leaf in source.leaves.items()}
  return traverse_util.unflatten_dict(found, sep="/")


def computed_types(params: Any, dtype: Any) -> Any:
  """Parameters as prediction keeps them: what the model rounds to `dtype` anyway, rounded.

  The result of the model is the same bit by bit, in half the memory under bfloat16. Norms,
  time embeddings, the last layer and biases are computed in float32 and stay so.
  """
  flat = traverse_util.flatten_dict(params, sep="/")
  return traverse_util.unflatten_dict(
    {name: x.astype(dtype) if model_lib.rounded(name) else x for name, x in flat.items()}, sep="/")
