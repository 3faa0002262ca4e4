"""Sets of videos that FVD compares: which ones, which window of each, and at which size."""

from collections.abc import Sequence
import dataclasses
import pathlib
from typing import Any

import numpy as np

from videogpt_jax import weights as weights_lib
from videogpt_jax.data import fit as fit_lib
from videogpt_jax.data import listing as listing_lib
from videogpt_jax.data import windows
from videogpt_jax.errors import InputError
from videogpt_jax.metrics import fvd
from videogpt_jax.metrics import i3d

_WORLDS = 64  # videos of the simulated world, where a protocol leaves their number open


@dataclasses.dataclass(frozen=True)
class Videos:
  """A set of videos that are read window by window.

  Attributes:
    items: what the loader takes.
    names: of the videos.
    files: of each, what tells it from another one of the same name; empty: names say all.
    loader: makes windows of them.
    identity: JSON-able, what decides the windows.
    sizes: height and width of their frames, px; empty: they stay as they are.
    must_all: whether every one has to be usable.
  """

  items: Sequence[Any]
  names: Sequence[str]
  files: Sequence[str]
  loader: windows.Files | windows.Worlds
  identity: dict[str, Any]
  sizes: tuple[fit_lib.Size, ...] = ()
  must_all: bool = False


def of_world(model: weights_lib.Weights, protocol: fvd.Protocol) -> Videos:
  """Held-out videos of the simulated world that a model was trained on.

  Raises:
    InputError: it was trained on something else, or the world's videos are too short.
  """
  try:
    from videogpt_jax.data import world
  except ImportError as error:
    raise InputError(f"without --videos_dir the simulated world is needed: {error.name} is "
                     "missing, pip install 'videogpt_jax[demo]'") from error
  if model.config["data"].get("source", "world") != "world":
    raise InputError(f"{model.path} was not trained on the simulated world: give real videos with "
                     "--videos_dir=DIR")
  settings = world.Settings(**model.config["world"])
  if settings.frames < protocol.frames:
    raise InputError(f"videos of this world have {settings.frames} frames, the window "
                     f"{protocol.frames}: give --frames={settings.frames}, if that is at least "
                     f"{i3d.MIN_FRAMES}, or --videos_dir=DIR")
  count = protocol.videos or _WORLDS
  seeds = [world.held_out_seed(i) for i in range(count)]
  return Videos(seeds, [f"held_out_{i}" for i in range(count)], [],
                windows.Worlds(settings, protocol.frames),
                {"world": dataclasses.asdict(settings), "videos": count},
                sizes=((settings.size, settings.size),))


def listed(path: str, protocol: fvd.Protocol, *, recipe: str = "", root: str = "",
           interval: int = 1, drawn: bool = False, fit: fit_lib.Fit | None,
           must_all: bool = False) -> Videos:
  """The videos of a folder or list: all, or as many as the protocol wants, drawn by position.

  Args:
    path: of the folder or list.
    protocol: says how many, and of how many frames.
    recipe, root: of a list, see `listing.read`.
    interval, drawn, fit: of the windows, see `windows.Files`.
    must_all: see `Videos`.

  Raises:
    InputError: see `listing.read`; or there are too few.
  """
  listing = listing_lib.read(path, recipe=recipe, root=root)
  count = protocol.videos or len(listing)
  if len(listing) < count:
    raise InputError(f"{path} has {len(listing)} videos, the protocol {protocol.name} takes "
                     f"{count}; give more, or --videos={len(listing)} for a distance that compares "
                     "with no published one")
  chosen = np.sort(np.random.default_rng(0).permutation(len(listing))[:count])
  segments = [listing[int(i)] for i in chosen]
  return Videos(segments, [segment.name for segment in segments],
                [_file_state(listing.root / segment.path) for segment in segments],
                windows.Files(listing.root, protocol.frames, interval, fit, drawn),
                {"listing": listing.digest, "videos": count, "interval": interval,
                 "drawn": drawn, "fit": str(fit)},
                sizes=fit.sizes if fit else (), must_all=must_all)


def _file_state(path: pathlib.Path) -> str:
  """Size and time of a file: a list names the same videos when others have taken their place."""
  try:
    found = path.stat()
  except OSError:
    return "missing"
  return f"{found.st_size} {found.st_mtime_ns}"


def fit_of(protocol: fvd.Protocol, model: weights_lib.Weights | None) -> fit_lib.Fit | None:
  """Of what is compared: the protocol's size, so that the truth is as sharp for every model."""
  if protocol.size:
    return fit_lib.Fit(sizes=(protocol.size,))
  return None if model is None else _model_fit(model)


def _model_fit(model: weights_lib.Weights) -> fit_lib.Fit:
  return fit_lib.of(model.config["data"], model.codec.downsample, model.model.patch_size)


def continued(real: Videos, protocol: fvd.Protocol, model: weights_lib.Weights) -> Videos:
  """The real videos, with their first frames as the model wants them where that is another size."""
  if protocol.size is None or not isinstance(real.loader, windows.Files):
    return real
  fit = _model_fit(model)
  loader = dataclasses.replace(real.loader, model_fit=fit, history=protocol.history)
  return dataclasses.replace(real, loader=loader, identity={**real.identity, "given": str(fit)})
