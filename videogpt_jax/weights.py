"""Weights: a training run, a weights folder, or those that come along; opened and loaded."""

from collections.abc import Callable, Iterator, Mapping, Sequence
import dataclasses
import functools
import hashlib
import os
import pathlib
import time
from typing import Any

from flax import traverse_util
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, UInt8
import numpy as np

from videogpt_jax import backbone
from videogpt_jax import base as base_lib
from videogpt_jax import codec as codec_lib
from videogpt_jax import distributed
from videogpt_jax import folder as folder_lib
from videogpt_jax import model as model_lib
from videogpt_jax import rollout
from videogpt_jax import sharding
from videogpt_jax.errors import InputError
from videogpt_jax.sampler import Sampler

PRETRAINED = str(pathlib.Path(__file__).parent / "pretrained" / "world")
SECTIONS = ("codec", "data", "sample")  # of a configuration, needed for prediction
_STACK = "layers"  # in the path of parameters that have layers in front


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
class Clip:
  """One predicted clip: as the model made it, and as frames."""

  latents: Float[np.ndarray, "B g h w C"]
  frames: UInt8[np.ndarray, "B g H W 3"]


@dataclasses.dataclass(frozen=True)
class Weights:
  """A model ready to predict.

  Attributes:
    model: its settings.
    params: its (EMA) parameters.
    codec: of its latents.
    config: the sections `data`, `sample` and `world` of the run that trained it.
    path: where it was loaded from.
    mesh: of devices, over which the parameters lie; None: everything is on one.
  """

  model: model_lib.Config
  params: Any
  codec: codec_lib.Codec
  config: dict[str, Any]
  path: str
  mesh: jax.sharding.Mesh | None = None

  def continue_video(
    self,
    frames: UInt8[np.ndarray, "B h_ H W 3"],
    num_frames: int,
    *,
    clip_frames: int | None = None,
    sampler: Sampler | None = None,
    window: rollout.Window | None = None,
    rng: PRNGKeyArray,
  ) -> UInt8[np.ndarray, "B n H W 3"]:
    """Predicts the `num_frames` frames after `frames`; see `stream`."""
    clips = self.stream(frames, num_frames, clip_frames=clip_frames, sampler=sampler,
                        window=window, rng=rng)
    return np.concatenate([clip.frames for clip in clips], axis=1)

  def stream(
    self,
    frames: UInt8[np.ndarray, "B h_ H W 3"],
    num_frames: int | None,
    *,
    clip_frames: int | None = None,
    sampler: Sampler | None = None,
    window: rollout.Window | None = None,
    rng: PRNGKeyArray,
    finished: Sequence[Float[np.ndarray, "B g h w C"]] = (),
    stop: Callable[[], bool] = lambda: False,
  ) -> Iterator[Clip]:
    """Continues videos clip by clip: one is decoded and yielded while the next is computed.

    Memory does not grow with what has been predicted, where there is a window.

    Args:
      frames: the videos' first frames.
      num_frames: frames to predict; None: without end.
      clip_frames: frames of a clip; this and the next two default to the run's configuration.
      sampler: how a clip is denoised.
      window: what it sees of the video before it.
      rng: key of the noise.
      finished: latents of the first clips, from a call that did not come to its end; they are
        yielded, but not computed again.
      stop: asked while the device computes: whether to end with a `KeyboardInterrupt`.

    Raises:
      ValueError: see `rollout.clips`.
    """
    clips = self._clips(np.asarray(frames), num_frames, clip_frames, sampler, window, rng, finished,
                        stop)
    return sharding.under(self.mesh, clips)

  def _clips(self, given: np.ndarray, num_frames: int | None, clip_frames: int | None,
             sampler: Sampler | None, window: rollout.Window | None, rng: PRNGKeyArray,
             finished: Sequence[np.ndarray],
             stop: Callable[[], bool]) -> Iterator[Clip]:
    count = len(given)
    rows = functools.partial(_whole_rows, multiple=sharding.size(*sharding.BATCH_AXES))
    place = jnp.asarray if self.mesh is None else functools.partial(_on_rows, self.mesh)
    history = self.codec.normalize(place(rows(self.codec.encode(given))))
    clips = rollout.clips(
      self.model, self.params, history, num_frames=num_frames,
      clip_frames=clip_frames or self.config["sample"]["clip_frames"],
      sampler=sampler or default_sampler(self.config),
      window=window or default_window(self.config), rng=rng,
      finished=(place(rows(clip)) for clip in finished))
    for clip in finished:
      yield Clip(clip, self.codec.start_decode(jnp.asarray(clip))())
    before: Callable[[], Clip] | None = None
    for latents in clips:
      started = self._start(jnp.asarray(distributed.everywhere(latents))[:count], stop)
      if before is not None:
        yield before()
      before = started
    if before is not None:
      yield before()

  def _start(self, latents: jax.Array, stop: Callable[[], bool]) -> Callable[[], Clip]:
    frames = self.codec.start_decode(latents)
    ready: Any = getattr(latents, "is_ready")  # noqa: B009, jax's stubs do not know it

    def wait() -> Clip:
      while not ready():  # inside jax nobody would hear a signal
        if stop():
          raise KeyboardInterrupt
        time.sleep(0.001)
      if stop():
        raise KeyboardInterrupt
      return Clip(jax.device_get(latents), frames())

    return wait


def _whole_rows(x: np.ndarray, multiple: int) -> np.ndarray:
  """`x` with its last row repeated until the rows divide among the devices of a mesh."""
  return np.concatenate([x, *[x[-1:]] * (-len(x) % multiple)])


def _on_rows(mesh: jax.sharding.Mesh, x: Any) -> Array:
  """`x` on a mesh, its rows shared among the devices.

  Where processes share the mesh they need the same array, bit by bit. One that has a mesh of its
  own has rows of its own, and as many of them as it likes.
  """
  same = distributed.as_first if mesh.is_multi_process else lambda x: x
  return jax.device_put(same(np.asarray(x)), sharding.rows(mesh))


def default_sampler(config: Mapping[str, Any]) -> Sampler:
  """The sampler of a run's configuration; what is newer than the run has its default."""
  sample = {name: tuple(x) if isinstance(x, list) else x for name, x in config["sample"].items()}
  known: dict[str, Any] = {field.name: sample[field.name]
                           for field in dataclasses.fields(Sampler) if field.name in sample}
  return Sampler(**known)


def default_window(config: Mapping[str, Any]) -> rollout.Window:
  """The window of a run's configuration, likewise."""
  sample = config["sample"]
  return rollout.Window(
    sample["window"] or config["data"]["frames"], sample.get("window_mode", "recompute"),
    sample.get("history_noise", 0.0), sample.get("redraw_noise", False))


def open_source(path: str = "", special_ids: Mapping[str, int] | None = None) -> Source:
  """Finds weights.

  Args:
    path: a workdir of `videogpt_jax.main`, a checkpoint, a weights folder (exported here, or
      the published one), or "" for the weights that come with the package.
    special_ids: see `folder.open_folder`.

  Adapters are merged into their base as they are read.

  Raises:
    InputError: neither kind of folder is there, or it is damaged; or the base of adapters is
      missing (if it has become another one, it is reading the parameters that says so).
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
  from videogpt_jax import checkpoint_files  # local, both: they need packages that folders do not
  from videogpt_jax import config as config_lib

  saved = checkpoint_files.open_params(path)
  config = config_lib.from_saved(saved.config)
  usual = {name: getattr(backbone.Config, name) for name in backbone.NUMERICS}
  model = config_lib.model(config)
  model = dataclasses.replace(model, backbone=dataclasses.replace(model.backbone, **usual))
  leaves: Mapping[str, Any] = saved.leaves
  if config.lora.rank:
    base = _base_of(path, config.checkpoint.init_from, saved.base)
    leaves = base_lib.merged(base.source.leaves, leaves, config.lora.alpha / config.lora.rank)
  return Source(path, model, leaves, config.to_dict())


def _base_of(path: str, init_from: str, record: Mapping[str, Any] | None) -> base_lib.Base:
  """The base of the adapters in `path`, where it lay, or lies seen from here."""
  recorded = init_from if record is None else record["path"]
  places = [place for place in (recorded, init_from) if os.path.isdir(place)]
  if not places:
    raise InputError(f"{path} holds adapters of the weights {recorded}, which are no longer there; "
                     "put them there again")
  base = base_lib.Base(open_source(places[0]))
  base.recognise(record, path)
  return base


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


def load(source: str | Source = "", *, attention: str = "auto", dtype: str = "auto",
         vae: str = "", mesh: jax.sharding.Mesh | None = None) -> Weights:
  """Loads weights for prediction.

  Args:
    source: what `open_source` found, or where it should look.
    attention: implementation, see `videogpt_jax.attention`.
    dtype: compute type; "auto" as in training.
    vae: where the autoencoder lies, see `videogpt_jax.vae.load`; by default where the
      weights' configuration says.
    mesh: of devices to share the model among.

  Raises:
    InputError: see `open_source`; or these weights work on pixels and `vae` is given.
  """
  if isinstance(source, str):
    source = open_source(source)
  codec = {**source.config["codec"], **({"path": vae} if vae else {})}
  if vae and codec["id"] != "vae":
    raise InputError(f"the weights {source.path} work on pixels: leave out --vae")
  numerics = {"attention": attention, "dtype": backbone.compute_dtype(dtype)}
  model = dataclasses.replace(
    source.model, backbone=dataclasses.replace(source.model.backbone, **numerics))
  encoder = codec_lib.from_settings(codec)
  if vae:
    encoder.prepare()  # a wrong path is told before anything large is read
  place = functools.partial(_placed, model.backbone.dtype, _shardings(model, mesh))
  return Weights(model, parameters(source, place), encoder, source.config, source.path, mesh)


def _placed(dtype: Any, shardings: Mapping[str, Any], name: str, array: np.ndarray) -> Array:
  """A parameter on its devices, in the type in which the model uses it.

  What the model rounds to its compute type anyway is kept rounded, in half the memory: the
  result is the same bit by bit. Norms, time embeddings, the last layer and biases stay float32.
  """
  return jax.device_put(array.astype(dtype) if model_lib.rounded(name) else array,
                        shardings.get(name))


def _shardings(model: model_lib.Config, mesh: jax.sharding.Mesh | None) -> dict[str, Any]:
  if mesh is None:
    return {}
  boxed = jax.eval_shape(lambda: model_lib.init_params(model, 0))
  return traverse_util.flatten_dict(sharding.of_tree(mesh, boxed), sep="/")


def parameters(source: Source, place: Callable[[str, np.ndarray], Any]) -> dict[str, Any]:
  """The parameter tree in float32, one leaf after the other.

  Args:
    source: of the weights.
    place: puts a leaf, by its path, where it belongs.
  """
  found = {name: place(name, leaf.read(np.float32)) for name, leaf in source.leaves.items()}
  return traverse_util.unflatten_dict(found, sep="/")


def fingerprint(params: Any) -> str:
  """Of weights, by a row of each parameter in each layer: few bytes, wherever training was.

  Args:
    params: the parameter tree; what is below `layers` has these in front.
  """
  rows = [np.asarray(distributed.everywhere(_first_rows(path, x))).reshape(-1)
          for path, x in jax.tree_util.tree_leaves_with_path(params)]
  return digest(np.concatenate([row.astype(np.float32) for row in rows]))


def _first_rows(path: Sequence[Any], x: Any) -> Any:
  """Of a parameter its first row; of one that is stacked, that of every layer."""
  stacked = any(getattr(key, "key", None) == _STACK for key in path)
  layers = (slice(None),) if stacked and x.ndim > 1 else ()
  return x[(*layers, *(0,) * (x.ndim - 1 - len(layers)))]


def identity(weights: Weights) -> dict[str, Any]:
  """JSON-able, what decides how weights predict, noise apart."""
  return {"checkpoint": weights.path, "parameters": fingerprint(weights.params),
          "dtype": np.dtype(weights.model.backbone.dtype).name,
          "sampler": dict(weights.config["sample"])}


def digest(array: np.ndarray) -> str:
  """Of the bytes of an array: equal arrays of one type and shape have equal ones."""
  return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:16]
