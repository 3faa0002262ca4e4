"""Which videos `encode` reads: files in folders and lists, TFDS sets, or the simulated world."""

from collections.abc import Mapping, Sequence
import dataclasses
import functools
import hashlib
from typing import Any, Protocol, TYPE_CHECKING

from jaxtyping import Int64
from ml_collections import ConfigDict
import numpy as np

from videogpt_jax.data import fit as fit_lib
from videogpt_jax.data import listing as listing_lib
from videogpt_jax.data import load
from videogpt_jax.data import pipeline
from videogpt_jax.errors import InputError

if TYPE_CHECKING:
  from videogpt_jax.data import world

SPLITS = ("train", "validation")


class Videos(Protocol):
  """Where clips come from: numbered items in splits, and what makes clips of them."""

  @property
  def loader(self) -> load.Loader:
    """Makes clips of an item, in another process."""

  @property
  def labels(self) -> tuple[str, ...]:
    """Names of the classes, by label; empty if there are none."""

  @property
  def timeout_s(self) -> float:
    """Without a new frame for so long, a decoder counts as hung."""

  def count(self, split: str) -> int:
    """Number of videos of a split."""

  def item(self, split: str, index: int) -> Any:
    """What `loader` makes clips of."""

  def name(self, split: str, index: int) -> str:
    """A name for lists."""

  def describe(self) -> dict[str, Any]:
    """A JSON-able identity: equal only if every `item` leads to the same clips."""


@dataclasses.dataclass(frozen=True)
class WorldVideos:
  """Videos of the simulated world: `train` and `validation` many, of disjoint seeds."""

  settings: "world.Settings"
  counts: Mapping[str, int]
  masks: bool = False
  timeout_s: float = 600.0

  @property
  def loader(self) -> load.Loader:
    return load.Simulated(self.settings, self.masks)

  @property
  def labels(self) -> tuple[str, ...]:
    return ()

  def count(self, split: str) -> int:
    return self.counts[split]

  def item(self, split: str, index: int) -> int:
    from videogpt_jax.data import world

    seed = world.train_seed if split == "train" else world.held_out_seed
    return seed(index)

  def name(self, split: str, index: int) -> str:
    return f"world/{self.item(split, index)}"

  def describe(self) -> dict[str, Any]:
    return {"source": "world", "settings": dataclasses.asdict(self.settings),
            "counts": dict(self.counts), "masks": self.masks}


@dataclasses.dataclass(frozen=True)
class VideoFiles:
  """The entries of a listing, decoded, resized and cropped.

  Attributes:
    listing: all entries.
    rows: int64, the entries of each split.
    loader: what becomes of them.
    timeout_s: see `Videos`.
  """

  listing: listing_lib.Listing
  rows: Mapping[str, Int64[np.ndarray, " R"]]
  loader: load.Files
  timeout_s: float

  @property
  def labels(self) -> tuple[str, ...]:
    return self.listing.labels

  def count(self, split: str) -> int:
    return len(self.rows[split])

  def item(self, split: str, index: int) -> load.Segment:
    return self.listing[int(self.rows[split][index])]

  def name(self, split: str, index: int) -> str:
    return self.item(split, index).name

  def describe(self) -> dict[str, Any]:
    loader = dataclasses.asdict(self.loader)
    del loader["root"]  # wherever the files lie, the digest names them
    counts = {split: len(rows) for split, rows in self.rows.items()}
    # Which entries are held out is decided by what the digest covers, and by the counts.
    return {"source": "videos", "videos": counts, "digest": self.listing.digest, **loader}


def find(config: ConfigDict, masks: bool = False) -> Videos:
  """What `config.data` says the clips are made of; `masks`: the world's per-object masks too.

  Raises:
    InputError: unknown source, no videos, or settings under which none can be used.
  """
  data = config.data
  pipeline.check_interval(data.stride, data.frames, tuple(data.interval))
  min_frames = (data.frames - 1) * -(-data.interval[0] // data.stride) + 1
  if data.source == "world":
    return _world_videos(config, min_frames, masks)
  if data.source not in ("videos", "tfds"):
    raise InputError(f'data.source must be "videos" or "world" or "tfds", got {data.source!r}')
  if masks:
    raise InputError('video files have no object masks; those are for data.source="world"')
  if not data.videos:
    raise InputError("no videos: give --videos=FOLDER, --videos=LIST or --videos=tfds:NAME "
                     "(or set data.videos)")
  if 0 < data.max_frames < min_frames:
    raise InputError(
      f"data.max_frames={data.max_frames} cuts every video too short: {data.frames} frames at "
      f"interval {data.interval[0]} need {min_frames} stored frames"
    )
  for name in ("fps", "scene_cut", "decode_timeout"):
    if data[name] < 0:
      raise InputError(f"data.{name} must be at least 0, got {data[name]}")
  rules: dict[str, Any] = {name: data[name] for name in
                           ("fps", "stride", "max_frames", "min_side", "max_aspect", "scene_cut")}
  rules["fit"] = fit_lib.of(data, config.codec.block, config.model.patch_size)
  rules["min_frames"] = min_frames
  timeout = data.decode_timeout or float("inf")
  if data.source == "tfds":
    from videogpt_jax.data import tfds_videos  # which imports this module

    return tfds_videos.find(data.videos, data.root, rules, data.validation_fraction, timeout)
  listing = listing_lib.read(data.videos, recipe=data.recipe, root=data.root)
  loader = load.Files(root=listing.root, **rules)
  rows = split_rows(listing, data.validation_fraction)
  return VideoFiles(listing, rows, loader, timeout)


def _world_videos(config: ConfigDict, min_frames: int, masks: bool) -> WorldVideos:
  try:
    from videogpt_jax.data import world
  except ModuleNotFoundError as error:
    raise InputError(
      f"the simulated world needs {error.name}: pip install 'videogpt_jax[demo]'"
    ) from error
  data = config.data
  if data.stride != 1:
    raise InputError(f"data.stride must be 1 for the simulated world, got {data.stride}")
  if data.train_videos < 1:
    raise InputError("data.train_videos must be at least 1 for the simulated world")
  settings = world.Settings(**config.world.to_dict())
  fit_lib.of({"height": settings.size, "width": settings.size}, config.codec.block)
  if settings.frames < min_frames:
    raise InputError(
      f"every video of the world has {settings.frames} frames, but {data.frames} frames at "
      f"interval {data.interval[0]} need {min_frames}; raise world.frames or lower data.frames"
    )
  counts = {"train": data.train_videos, "validation": data.validation_videos}
  return WorldVideos(settings, counts, masks)


def split_rows(listing: listing_lib.Listing, fraction: float) -> dict[str, Int64[np.ndarray, " R"]]:
  """The entries of each split: as the list says, or else by a hash of the file's name.

  Parts of one file stay together, and entries that are added move no other.
  """
  split = listing.table.column("split").to_numpy(zero_copy_only=False)
  return split_by_name(listing.table.column("path").to_pylist(), split, fraction)


def split_by_name(names: Sequence[str], split: np.ndarray, fraction: float
                  ) -> dict[str, Int64[np.ndarray, " R"]]:
  """See `split_rows`; `split` has "train", "validation" or "" (by a hash) for every name."""
  rank = np.array([_rank(name) for name in names])
  free = split == ""
  held_out = (split == "validation") | (free & (rank < fraction))
  by_rank = np.flatnonzero(free)[np.argsort(rank[free], kind="stable")]
  if len(by_rank):
    if held_out.all():  # there must be training videos
      held_out[rank == rank[by_rank[-1]]] = False
    if fraction > 0 and not held_out.any() and rank[by_rank[0]] != rank[by_rank[-1]]:
      held_out[free & (rank == rank[by_rank[0]])] = True  # and held-out ones, if that can be helped
  return {"train": np.flatnonzero(~held_out), "validation": np.flatnonzero(held_out)}


@functools.lru_cache(maxsize=1)  # parts of a file stand together
def _rank(name: str) -> float:
  return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
