"""Latent data sets on disk: ArrayRecord shards that `tensorflow_datasets` can read.

A data set is a folder:

    metadata.json                           what the records are (`Spec`), how many shards
    videogpt-SPLIT.array_record-00000-of-00002   the records, one video segment each
    shapes-SPLIT.npy                        stored frames, h and w of every record, int32 [R, 3]
    rejected.jsonl                          videos that were left out, with the reason
    features.json, dataset_info.json        what `tfds.builder_from_directory` reads

Shards appear whole or not at all: each is written under a temporary name in `.partial`
and renamed, and `dataset_info.json` comes last, when all of them are there. So a writer
may be killed at any moment; the next one finishes what is missing, to the same bytes.

A data set is read from where it lies: a path, or `gs://` with the extra [gcs].
"""

from collections.abc import Iterator, Mapping, Sequence
import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import os
from pathlib import Path
import shutil
import socket
from typing import Any

from array_record.python import array_record_module
from etils import epath
from jaxtyping import Int32
import ml_dtypes  # noqa: F401 - makes numpy know the name bfloat16
import numpy as np
import tensorflow_datasets as tfds

from videogpt_jax.data.load import NO_LABEL
from videogpt_jax.errors import InputError

NAME = "videogpt"
REJECTED = "rejected.jsonl"
VERSION = "1.0.0"

_FORMAT = 2  # 1 had one size for all records
_METADATA = "metadata.json"
_COMPLETE = "dataset_info.json"  # its presence says that the data set is whole
_PARTIAL = ".partial"
# One record a group: random access reads nothing else. Pixels shrink well; latents by a fifteenth,
# and reading them would take four times as long.
_WRITER_OPTIONS = {True: "group_size:1,zstd:3", False: "group_size:1,uncompressed"}


@dataclasses.dataclass(frozen=True)
class Spec:
  """What every record of a data set has in common.

  Attributes:
    channels: of a stored latent frame [h, w, channels].
    dtype: numpy name of the stored latents' type.
    codec: the codec's `spec()`: its id, scale, shift and other settings.
    moments: whether the channels are a posterior's C means and C log-variances.
    stride: every stride-th source frame is stored.
    masks: whether records carry per-object masks, uint8 [T, O, H, W].
    labels: names of the classes, by label; empty if there are none.
  """

  channels: int
  dtype: str
  codec: dict[str, Any]
  moments: bool = False
  stride: int = 1
  masks: bool = False
  labels: tuple[str, ...] = ()

  def to_json(self) -> dict[str, Any]:
    """A JSON-able dict from which `from_json` builds the same spec."""
    return {**dataclasses.asdict(self), "labels": list(self.labels)}

  @classmethod
  def from_json(cls, fields: Mapping[str, Any]) -> "Spec":
    return cls(**{**fields, "labels": tuple(fields["labels"])})


def features(spec: Spec) -> tfds.features.FeaturesDict:
  """What TFDS has to know of the records."""
  fields = {
    "latents": tfds.features.Tensor(
      shape=(None, None, None, spec.channels), dtype=np.dtype(spec.dtype), encoding="bytes"
    ),
    "fps": np.float32,
    "stride": np.int32,
    "source": tfds.features.Text(),
    "label": np.int64,
    "caption": tfds.features.Text(),
  }
  if spec.masks:
    fields["masks"] = tfds.features.Tensor(
      shape=(None, None, None, None), dtype=np.uint8, encoding="bytes"
    )
  return tfds.features.FeaturesDict(fields)


def _shard_name(split: str, index: int, shards: int) -> str:
  return f"{NAME}-{split}.array_record-{index:05d}-of-{shards:05d}"


def _writer() -> str:
  """Names this process among all machines; in containers all have one number."""
  return f"{socket.gethostname()}-{os.getpid()}"


def _write_atomically(path: Path, content: bytes, aside: Path) -> None:
  """Writes in the folder `aside` of the same file system, then renames."""
  temporary = aside / f"{path.name}.new-{_writer()}"
  with open(temporary, "wb") as file:
    file.write(content)
    file.flush()
    os.fsync(file.fileno())
  os.replace(temporary, path)


def _sync(path: Path) -> None:
  """Makes a file's content durable before it is renamed into place."""
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


@contextlib.contextmanager
def _clear_errors(path: Path) -> Iterator[None]:
  """Turns failures of the file system into an `InputError` that names the folder."""
  try:
    yield
  except OSError as error:
    raise InputError(
      f"cannot write the data set to {path}: {error.strerror or error}; "
      "free space or choose another folder, then run the same command again"
    ) from error


class ShardWriter:
  """Collects one shard's records; made by `Writer.shard`."""

  def __init__(self, spec: Spec, path: Path):
    self._path = path
    self._spec = spec
    self._features = features(spec)
    self._serializer = tfds.core.example_serializer.ExampleSerializer(
      self._features.get_serialized_info()
    )
    options = _WRITER_OPTIONS[np.issubdtype(np.dtype(spec.dtype), np.integer)]
    self._file = self._guard(array_record_module.ArrayRecordWriter, str(path), options)
    self.shapes: list[tuple[int, int, int]] = []
    self.rejected: list[dict[str, Any]] = []
    self.num_bytes = 0

  def add(
    self,
    latents: np.ndarray,
    *,
    fps: float,
    source: str,
    label: int = NO_LABEL,
    caption: str = "",
    masks: np.ndarray | None = None,
  ) -> None:
    """Appends a record.

    Args:
      latents: [T, h, w, channels] of the spec's channels and type.
      fps: source frames per second.
      source: where the video came from.
      label: class, or `NO_LABEL`.
      caption: text, or empty.
      masks: uint8 [T, O, H, W], exactly if the spec says so.

    Raises:
      ValueError: an array does not have the spec's channels or type.
      InputError: the disk is full.
    """
    record: dict[str, Any] = {
      "latents": latents,
      "fps": fps,
      "stride": self._spec.stride,
      "source": source,
      "label": label,
      "caption": caption,
    }
    if self._spec.masks:
      record["masks"] = masks
    example = self._serializer.get_tf_example(self._features.encode_example(record))
    # A protobuf map has no order of its own: deterministic is what makes shards repeatable.
    content = example.SerializeToString(deterministic=True)
    self._guard(self._file.write, content)
    length, h, w, _ = latents.shape
    self.shapes.append((length, h, w))
    self.num_bytes += len(content)

  def reject(self, source: str, reason: str) -> None:
    """Notes a video that is left out; it ends up in `rejected.jsonl`."""
    self.rejected.append({"source": source, "reason": reason})

  def close(self) -> None:
    self._guard(self._file.close)

  def _guard(self, call: Any, *args: Any) -> Any:
    try:
      return call(*args)
    except RuntimeError as error:  # ArrayRecord's only kind; the message names the cause
      raise InputError(
        f"cannot write {self._path}: {error}; free space or choose another folder, "
        "then run the same command again"
      ) from error


@dataclasses.dataclass(frozen=True)
class Writer:
  """A data set that is being written; made by `create`, can be sent to other processes.

  Attributes:
    path: the folder.
    spec: what the records have in common.
    shards: number of shards of each split.
  """

  path: Path
  spec: Spec
  shards: Mapping[str, int]

  def pending(self) -> list[tuple[str, int]]:
    """(split, index) of the shards that are not finished."""
    if self.complete:
      return []
    return [shard for shard in self.every() if not self._finished(*shard)]

  def every(self) -> list[tuple[str, int]]:
    """(split, index) of all shards, in order."""
    return [(split, index) for split, n in self.shards.items() for index in range(n)]

  @property
  def complete(self) -> bool:
    """Whether the data set is whole and readable."""
    return (self.path / _COMPLETE).exists()

  @contextlib.contextmanager
  def shard(self, split: str, index: int) -> Iterator[ShardWriter]:
    """Writes one shard: it stands in its place when the block ends without an exception.

    Raises:
      InputError: the disk is full, the folder unwritable or used by another writer.
    """
    name = _shard_name(split, index, self.shards[split])
    partial = self.path / _PARTIAL
    temporary = partial / f"{name}.tmp-{_writer()}"
    with _clear_errors(self.path):
      for leftover in partial.glob(f"{name}.tmp-*"):  # of a writer that was killed
        leftover.unlink(missing_ok=True)
    writer = ShardWriter(self.spec, temporary)
    try:
      yield writer
      writer.close()
      summary = {key: getattr(writer, key) for key in ("shapes", "num_bytes", "rejected")}
      with _clear_errors(self.path):
        _sync(temporary)
        _write_atomically(partial / f"{name}.json", json.dumps(summary).encode(), partial)
        os.replace(temporary, self.path / name)
    finally:
      temporary.unlink(missing_ok=True)

  def rejected(self) -> list[dict[str, str]]:
    """The videos left out so far, `source` and `reason`, in the order of the shards."""
    if self.complete:
      lines = (self.path / REJECTED).read_text().splitlines()
      return [json.loads(line) for line in lines]
    done = [shard for shard in self.every() if self._finished(*shard)]
    return [entry for shard in done for entry in self._summary(*shard)["rejected"]]

  def num_records(self, split: str) -> int:
    """Records of a split in the shards finished so far."""
    if self.complete:
      return len(_read_shapes(self.path, split))
    done = [i for i in range(self.shards[split]) if self._finished(split, i)]
    return sum(len(self._summary(split, i)["shapes"]) for i in done)

  def abandon(self) -> None:
    """Removes all that was written but the list of the videos left out."""
    with _clear_errors(self.path):
      self._write_rejected()
      for split, index in self.every():
        (self.path / _shard_name(split, index, self.shards[split])).unlink(missing_ok=True)
      (self.path / _METADATA).unlink()
      shutil.rmtree(self.path / _PARTIAL)

  def finish(self) -> None:
    """Writes the metadata that makes the folder readable; all shards must be finished.

    Several writers that share the shards may each call it: they write the same bytes.

    Raises:
      InputError: shards are missing, or the folder cannot be written.
    """
    if missing := self.pending():
      raise InputError(f"{self.path} lacks {len(missing)} shards, the first is {missing[0]}")
    if not self.complete:
      try:
        with _clear_errors(self.path):
          self._write_metadata()
      except (FileNotFoundError, InputError):
        if not self.complete:  # else another writer finished and tidied up meanwhile
          raise
    shutil.rmtree(self.path / _PARTIAL, ignore_errors=True)

  def _write_metadata(self) -> None:
    summaries = {
      split: [self._summary(split, index) for index in range(n)]
      for split, n in self.shards.items()
    }
    partial = self.path / _PARTIAL
    self._write_rejected()
    for split, shards in summaries.items():
      content = io.BytesIO()
      shapes = [shape for shard in shards for shape in shard["shapes"]]
      np.save(content, np.array(shapes, np.int32).reshape(-1, 3))
      _write_atomically(self.path / f"shapes-{split}.npy", content.getvalue(), partial)
    # tfds does not write atomically itself: let it write aside, then move in order.
    aside = partial / f"tfds-{_writer()}"
    aside.mkdir(exist_ok=True)
    _tfds_info(aside, self.spec, summaries).write_to_directory(aside)
    for name in ("features.json", _COMPLETE):
      _sync(aside / name)
      os.replace(aside / name, self.path / name)

  def _write_rejected(self) -> None:
    lines = "".join(json.dumps(entry) + "\n" for entry in self.rejected())
    _write_atomically(self.path / REJECTED, lines.encode(), self.path / _PARTIAL)

  def _finished(self, split: str, index: int) -> bool:
    name = _shard_name(split, index, self.shards[split])
    return (self.path / name).exists() and self._summary_path(split, index).exists()

  def _summary_path(self, split: str, index: int) -> Path:
    return self.path / _PARTIAL / f"{_shard_name(split, index, self.shards[split])}.json"

  def _summary(self, split: str, index: int) -> dict[str, Any]:
    return json.loads(self._summary_path(split, index).read_text())


def _tfds_info(
  path: Path, spec: Spec, summaries: Mapping[str, Sequence[Mapping[str, Any]]]
) -> tfds.core.DatasetInfo:
  identity = tfds.core.dataset_info.DatasetIdentity(
    name=NAME, version=tfds.core.Version(VERSION), data_dir=str(path), module_name=""
  )
  info = tfds.core.DatasetInfo(builder=identity, features=features(spec))
  info.set_file_format("array_record")
  splits = [
    tfds.core.SplitInfo(
      name=split,
      shard_lengths=[len(shard["shapes"]) for shard in shards],
      num_bytes=sum(shard["num_bytes"] for shard in shards),
      filename_template=None,
    )
    for split, shards in summaries.items()
  ]
  info.set_splits(tfds.core.splits.SplitDict(splits))
  return info


def create(
  path: str | os.PathLike[str],
  spec: Spec,
  shards: Mapping[str, int],
  origin: Mapping[str, Any],
) -> Writer:
  """Starts a data set, or takes up one that an earlier run with the same arguments left.

  Args:
    path: the folder; made if missing.
    spec: what the records have in common.
    shards: number of shards of each split.
    origin: JSON-able description of the videos and settings that the records come from;
      a run with another one does not continue this data set.

  Raises:
    InputError: the folder cannot be written, holds other files or another data set.
  """
  path = Path(path).expanduser()
  content = {"format": _FORMAT, "spec": spec.to_json(), "shards": shards, "origin": origin}
  content = json.loads(json.dumps(content))  # tuples become the lists that a file gives back
  with _clear_errors(path):
    path.mkdir(parents=True, exist_ok=True)
    there = {entry.name for entry in path.iterdir()}
    if not there <= {_PARTIAL, REJECTED} and _METADATA not in there:
      raise InputError(f"{path} holds other files; choose an empty or a new folder")
    if _METADATA not in there:
      # Writers that begin together write the same, or the later one finds the difference.
      (path / _PARTIAL).mkdir(exist_ok=True)
      text = json.dumps(content, indent=2)
      _write_atomically(path / _METADATA, text.encode(), path / _PARTIAL)
    if differing := _differences(_read_metadata(path), content):
      raise InputError(
        f"{path} holds a data set that was written with other settings "
        f"({'; '.join(differing[:5])}); delete that folder or choose another"
      )
    writer = Writer(path, spec, dict(shards))
    if not writer.complete:
      (path / _PARTIAL).mkdir(exist_ok=True)
  return writer


def _differences(old: Any, new: Any, where: str = "") -> list[str]:
  """The leaves in which two JSON values differ, as `name: old, now new`."""
  if isinstance(old, dict) and isinstance(new, dict):
    keys = sorted({*old, *new})
    return [
      d for key in keys for d in _differences(old.get(key), new.get(key), f"{where}.{key}")
    ]
  return [] if old == new else [f"{where.lstrip('.')}: {old}, now {new}"]


def _read_metadata(path: Path | epath.Path) -> dict[str, Any]:
  try:
    return json.loads((path / _METADATA).read_text())
  except json.JSONDecodeError as error:
    raise InputError(f"{path / _METADATA} is damaged ({error}); encode the data again") from error


def _read_shapes(path: Path | epath.Path, split: str) -> Int32[np.ndarray, "R 3"]:
  return np.load(io.BytesIO((path / f"shapes-{split}.npy").read_bytes()))


class Source:
  """Random access to the records of one split; made by `open_split`.

  Cheap to send to other processes: files are opened by the first read in each.

  Attributes:
    path: the folder.
    split: name of the split.
    info: what the records have in common.
    lengths: int32 [len(self)], stored frames of every record.
    sizes: int32 [len(self), 2], h and w of every record, latent cells.
    num_bytes: of the shards.
    fingerprint: names the content; differs between any two data sets or splits that
      were not written from the same videos with the same settings.
  """

  def __init__(self, path: epath.Path, split: str, info: Spec, shapes: Int32[np.ndarray, "R 3"],
               num_bytes: int, fingerprint: str):
    self.path = path
    self.split = split
    self.info = info
    self.lengths, self.sizes = shapes[:, 0], shapes[:, 1:]
    self.num_bytes = num_bytes
    self.fingerprint = fingerprint

  def __len__(self) -> int:
    return len(self.lengths)

  def buckets(self) -> dict[tuple[int, int], int]:
    """How many records there are of every size (h, w)."""
    sizes, counts = np.unique(self.sizes, axis=0, return_counts=True)
    return {(h, w): count for (h, w), count in zip(sizes.tolist(), counts.tolist(), strict=True)}

  def __repr__(self) -> str:
    return f"Source({self.path}, {self.split!r}, {len(self)} records)"

  def __getitem__(self, index: int) -> dict[str, Any]:
    """Record `index`: latents [T, h, w, C], fps, stride, source, label, caption (and masks).

    Raises:
      IndexError: there is no such record.
      InputError: the shard is damaged or out of reach.
    """
    if not 0 <= index < len(self):
      raise IndexError(f"record {index} of {len(self)}")
    try:
      record = self._records[index]
    except RuntimeError as error:  # ArrayRecord's only kind
      cloud = str(self.path).startswith("gs://")
      raise InputError(
        f"record {index} of {self.path}, split {self.split!r}, cannot be read ({error}); "
        + ("check the bucket, your access to it and the network" if cloud else
           "delete the folder and encode the data again")
      ) from error
    return {k: v.decode() if isinstance(v, bytes) else v for k, v in record.items()}

  @functools.cached_property
  def _records(self) -> Sequence[dict[str, Any]]:
    return tfds.builder_from_directory(self.path).as_data_source(self.split)

  def __getstate__(self) -> dict[str, Any]:
    return {k: v for k, v in self.__dict__.items() if k != "_records"}


def splits(path: str | os.PathLike[str]) -> list[str]:
  """Names of the splits of a finished data set; raises as `metadata`."""
  return sorted(metadata(path)["shards"])


def origin(path: str | os.PathLike[str]) -> dict[str, Any]:
  """What a finished data set was made of (see `create`); raises as `metadata`."""
  return metadata(path)["origin"]


def open_split(path: str | os.PathLike[str], split: str) -> Source:
  """Opens one split of a finished data set.

  Args:
    path: the folder, here or on gs://.
    split: name of the split.

  Raises:
    InputError: no data set there, an unfinished or a damaged one, or no such split.
  """
  folder = epath.Path(path).expanduser()
  content = metadata(folder)
  shards = content["shards"]
  if split not in shards:
    raise InputError(f"{folder} has no split {split!r}, only {', '.join(sorted(shards))}")
  digest = hashlib.sha256((folder / _METADATA).read_bytes() + split.encode())
  present = {entry.name for entry in folder.iterdir()}
  num_bytes = 0
  for index in range(shards[split]):
    shard = folder / _shard_name(split, index, shards[split])
    if shard.name not in present:
      raise InputError(f"{shard} is missing; delete {folder} and encode the data again")
    size = shard.stat().length
    num_bytes += size
    digest.update(f"{shard.name} {size}\n".encode())
  shapes = _read_shapes(folder, split)
  digest.update(shapes.tobytes())
  spec = Spec.from_json(content["spec"])
  return Source(folder, split, spec, shapes, num_bytes, digest.hexdigest()[:16])


def metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
  """What `create` was told of a finished data set: `format`, `spec`, `shards`, `origin`.

  Raises:
    InputError: no data set there, an unfinished or a damaged one, one of another format, or
      one that cannot be read.
  """
  folder = epath.Path(path).expanduser()
  try:
    there, complete = (folder / _METADATA).exists(), (folder / _COMPLETE).exists()
  except ImportError as error:
    raise InputError(f"{folder} lies in the cloud: pip install 'videogpt_jax[gcs]'") from error
  except Exception as error:  # gcsfs, its credentials and the network have kinds of their own
    raise InputError(f"cannot read {folder}: {error}") from error
  if not there:
    raise InputError(f"no latent data set at {folder}; `python -m videogpt_jax.encode` writes one")
  if not complete:
    raise InputError(f"the data set at {folder} is unfinished; run its `encode` command again")
  content = _read_metadata(folder)
  if content.get("format") != _FORMAT:
    raise InputError(f"{folder} has format {content.get('format')}, this program reads {_FORMAT}; "
                     "encode the videos again into another folder")
  return content
