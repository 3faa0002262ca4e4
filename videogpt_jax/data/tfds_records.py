"""Reads videos out of a data set that TFDS has prepared: what a decoder process does with one.

Records are parsed here, by the folder's `features.json`, and not by the builder: TFDS cannot
even construct `tfds.features.Video` without TensorFlow, and would decode pictures by whichever
library is installed, so that the same set would give other pixels on other machines.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import dataclasses
import functools
import io
import json
import pathlib
from typing import Any
import zlib

from array_record.python import array_record_data_source
from jaxtyping import UInt8
import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.proto import tf_example_pb2

from videogpt_jax.data import load
from videogpt_jax.data import video
from videogpt_jax.errors import InputError

INFO, FEATURES = "dataset_info.json", "features.json"
ASSUMED_FPS = 25.0  # of records that state no rate
_CAPTIONS = ("caption", "captions", "text", "description")
_RATES = ("fps", "frame_rate", "framerate")

Item = tuple[str, int]  # split as TFDS calls it, number of the record in it


@dataclasses.dataclass(frozen=True)
class Layout:
  """Where the fields of a record are, as the keys of its `tf.train.Example`.

  Attributes:
    frames: of the frames, encoded pictures unless `shape` is given.
    shape: of frames that are a tensor [T, H, W, C]; None where records differ.
    encoding: of the tensor: none, bytes, zlib.
    label, caption, fps: empty where there is none.
    names: of the classes.
  """

  frames: str
  shape: tuple[int | None, ...] | None = None
  encoding: str = "none"
  label: str = ""
  caption: str = ""
  fps: str = ""
  names: tuple[str, ...] = ()


def layout(folder: pathlib.Path) -> Layout:
  """What a prepared data set consists of.

  The video is a `Video`, a sequence of 8-bit `Image`s or a uint8 tensor of rank 4; of several
  the first in colour, and of these the least nested.

  Raises:
    InputError: there is no video, or no description of the records.
  """
  try:
    features = list(_leaves(json.loads((folder / FEATURES).read_text())))
  except (OSError, ValueError, KeyError) as error:
    raise InputError(f"{folder / FEATURES} cannot be read ({error}); prepare the set again"
                     ) from error
  videos = [found for key, kind, content, depth in features
            if (found := _video(key, kind, content, depth))]
  if not videos:
    kinds = ", ".join(f"{key} ({kind}{', in a sequence' * depth})"
                      for key, kind, _, depth in features)
    raise InputError(f"the data set in {folder} has no video, that is, no Video, no sequence of "
                     f"8-bit Image and no uint8 Tensor of rank 4; it has {kinds}")
  _, _, best = min(videos, key=lambda found: found[:2])
  scalar = {key: kind for key, kind, content, depth in features
            if not depth and not content.get("shape", {}).get("dimensions")}
  label = _first(scalar, lambda key, kind: kind == "ClassLabel")
  classes = next((content for key, _, content, _ in features if key == label), {})
  return dataclasses.replace(
    best,
    label=label,
    names=_names(folder, label, int(classes.get("numClasses", 0))),
    caption=_first(scalar, lambda key, kind: kind == "Text" and _last(key) in _CAPTIONS),
    fps=_first(scalar, lambda key, kind: kind in ("Tensor", "Scalar") and _last(key) in _RATES),
  )


def _leaves(node: Mapping[str, Any], path: tuple[str, ...] = (), depth: int = 0
            ) -> Iterator[tuple[str, str, Mapping[str, Any], int]]:
  """Key, kind, content and number of sequences around it of every feature that is no container."""
  kind = node["pythonClassName"].rpartition(".")[2]
  if "featuresDict" in node:
    for name, child in node["featuresDict"].get("features", {}).items():
      yield from _leaves(child, (*path, name), depth)
  elif "sequence" in node:
    yield from _leaves(node["sequence"]["feature"], path, depth + 1)
  else:
    content = next((value for value in node.values() if isinstance(value, dict)), {})
    yield "/".join(path), kind, content, depth


def _video(key: str, kind: str, content: Mapping[str, Any], depth: int
           ) -> tuple[bool, int, Layout] | None:
  """Whether it is grey, how nested, and the layout, if a feature is a video."""
  stated = [int(size) for size in content.get("shape", {}).get("dimensions", ())]
  shape = tuple(None if size < 0 else size for size in stated)
  if content.get("dtype", "uint8") != "uint8":
    return None
  order = bool(shape) and shape[-1] != 3, key.count("/")
  if (kind == "Video" and not depth) or (kind == "Image" and depth == 1):
    return *order, Layout(key)
  if kind == "Tensor" and not depth and len(shape) == 4 and shape[-1] in (1, 3):
    return *order, Layout(key, shape, content.get("encoding", "none"))
  return None


def _first(scalar: Mapping[str, str], matches: Callable[[str, str], bool]) -> str:
  """The least nested key that matches; `label` before others."""
  keys = [key for key, kind in scalar.items() if matches(key, kind)]
  return min(keys, key=lambda key: (key.count("/"), key != "label", key), default="")


def _last(key: str) -> str:
  return key.rpartition("/")[2]


def _names(folder: pathlib.Path, label: str, count: int) -> tuple[str, ...]:
  """Names of the classes: as the folder lists them, or else their numbers."""
  if not label:
    return ()
  path = folder / f"{label.replace('/', '-')}.labels.txt"
  if not path.exists():
    return tuple(map(str, range(count)))
  lines = path.read_text(encoding="utf-8").split("\n")
  return tuple(line.strip() for line in lines if line.strip())


def splits(folder: pathlib.Path) -> dict[str, tfds.core.SplitInfo]:
  """The splits of a prepared data set.

  Raises:
    InputError: its description cannot be read, or its records are in no ArrayRecord files.
  """
  try:
    info = tfds.core.dataset_info.read_from_json(folder / INFO)
  except OSError as error:
    raise InputError(f"{folder / INFO} cannot be read; prepare the set again") from error
  if info.file_format != "array_record":
    raise InputError(
      f"{folder} was prepared as {info.file_format or 'tfrecord'}, which cannot be read at random; "
      "set data.root to another folder, and the set is prepared there as array_record")
  template = tfds.core.ShardedFileTemplate(
    dataset_name=info.name, data_dir=folder, filetype_suffix="array_record")
  found = tfds.core.splits.SplitDict.from_proto(info.splits, template)
  return {name: split for name, split in found.items() if split.num_examples}


@functools.lru_cache(maxsize=8)  # once a process
def _source(folder: pathlib.Path, split: str) -> Sequence[bytes]:
  """The records of a split, as they are stored."""
  instructions = splits(folder)[split].file_instructions
  return array_record_data_source.ArrayRecordDataSource(instructions)


def _features(folder: pathlib.Path, item: Item) -> Mapping[str, Any]:
  try:
    content = _source(folder, item[0])[item[1]]
  except (RuntimeError, ValueError) as error:  # ArrayRecord's only kinds
    raise InputError(f"damaged: the record cannot be read: {error}") from error
  return tf_example_pb2.Example.FromString(content).features.feature


@dataclasses.dataclass(frozen=True)
class Records(load.Rules):
  """Loads `Item`s of a prepared data set, by the rules of video files.

  Records of a known rate are taken at `fps`, if that is not 0; of records that state none
  `fps` (or else 25) is believed to be the rate, and all frames are taken.

  Attributes:
    folder: of the version, with its `dataset_info.json`.
    title: of the set, in the names of clips.
    layout: of the records.
  """

  folder: pathlib.Path
  title: str
  layout: Layout

  def name(self, item: Item) -> str:
    """Of a record: the set, the split and the number."""
    return f"{self.title}/{item[0]}/{item[1]}"

  def __call__(self, item: Item, beat: Callable[[], None]) -> list[load.Clip]:
    features = _features(self.folder, item)
    stored, rate = self._frames(features), self._rate(features)
    frames, shape = [], None
    for number in self._wanted(len(stored), rate):
      frame = _picture(stored[number], number)
      beat()
      if shape is not None and frame.shape != shape:
        raise InputError("frames change their size")
      shape = frame.shape
      frames.append(self.shrink(frame))
    if not frames:
      raise InputError("no frames")
    return self.clips(np.stack(frames), (self.fps or rate) / self.stride, self.name(item),
                      self._label(features), self._caption(features))

  def header(self, item: Item) -> load.Header:
    """Length, rate and size of a record; no picture is decoded but the first."""
    features = _features(self.folder, item)
    stored, rate = self._frames(features), self._rate(features)
    if not len(stored):
      raise InputError("no frames")
    height, width, _ = _picture(stored[0], 0).shape
    return load.Header(len(stored) / rate, rate, height, width)

  @property
  def headers(self) -> load.Loader:
    return Headers(self)

  def _wanted(self, count: int, rate: float) -> range | list[int]:
    """Numbers of the frames to keep: every stride-th of those shown at ticks of `fps`."""
    numbers: range | list[int] = range(count)
    if self.fps and self.fps != rate:
      ticks = np.arange(int(np.ceil(count / rate * self.fps - 1e-6)))
      shown = np.floor(ticks * (rate / self.fps) + 1e-6).astype(int)
      numbers = np.minimum(shown, count - 1).tolist()
    return numbers[::self.stride][:self.limit]

  def _rate(self, features: Mapping[str, Any]) -> float:
    if self.layout.fps in features:
      feature = features[self.layout.fps]
      values = feature.float_list.value or feature.int64_list.value
      if values and values[0] > 0:
        return float(values[0])
    return self.fps or ASSUMED_FPS

  def _label(self, features: Mapping[str, Any]) -> int:
    values = features[self.layout.label].int64_list.value if self.layout.label in features else ()
    return max(int(values[0]), load.NO_LABEL) if values else load.NO_LABEL

  def _caption(self, features: Mapping[str, Any]) -> str:
    key = self.layout.caption
    values = features[key].bytes_list.value if key in features else ()
    return values[0].decode("utf-8", "replace") if values else ""

  def _frames(self, features: Mapping[str, Any]) -> Sequence[bytes] | UInt8[np.ndarray, "T H W C"]:
    """The frames: encoded pictures, or a tensor."""
    key, shape = self.layout.frames, self.layout.shape
    if shape is None:
      return features[key].bytes_list.value if key in features else ()
    if shape.count(None) > 1:  # then the record states its shape
      shape = tuple(features[f"{key}/shape"].int64_list.value)
      key = f"{key}/value"
    feature = features[key]
    if self.layout.encoding == "none":
      flat = np.array(feature.int64_list.value, np.uint8)
    else:
      content = feature.bytes_list.value[0]
      content = zlib.decompress(content) if self.layout.encoding == "zlib" else content
      flat = np.frombuffer(content, np.uint8)
    return flat.reshape([-1 if size is None else size for size in shape])


def _picture(stored: bytes | UInt8[np.ndarray, "H W C"], number: int) -> UInt8[np.ndarray, "H W 3"]:
  """A frame in colour; grey ones become equal channels."""
  if isinstance(stored, bytes):
    try:
      return video.read_picture(io.BytesIO(stored))[0]
    except video.VideoError as error:
      raise InputError(f"damaged: frame {number + 1} is {error}") from error
  return np.repeat(stored, 3, axis=-1) if stored.shape[-1] == 1 else stored


@dataclasses.dataclass(frozen=True)
class Headers:
  """Loads the `load.Header`s of records."""

  records: Records

  def __call__(self, item: Item, beat: Callable[[], None]) -> load.Header:
    return self.records.header(item)
