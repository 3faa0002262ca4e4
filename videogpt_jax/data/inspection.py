"""Figures of a latent data set: what its records are and what their latents look like.

What the shapes of the records tell is exact; what only the records tell (fps, labels, captions,
latents) comes from a random `Sample` of them where there are many.
"""

import collections
from collections.abc import Sequence
import json
import math
import os
from typing import Any
import zlib

from etils import epath
import jax.numpy as jnp
from jaxtyping import Float, Int64, Shaped
import numpy as np

from videogpt_jax import codec as codec_lib
from videogpt_jax.data import load
from videogpt_jax.data import store
from videogpt_jax.errors import InputError

FRAMES = (16, 48, 80)  # of samples, for which records are counted that are long enough

# A sample of a split's records ends where either is reached, but has the fewest.
_SAMPLE, _SAMPLE_BYTES, _FEWEST = 512, 2**28, 16
_ROWS = 2**16  # latent cells that are looked at at once
_KEPT = 2**17  # latent cells of a split that are kept for histograms

Groups = dict[str, Int64[np.ndarray, " g"]]
"""The channels that are told together, by the name that they are told by."""


class Statistics:
  """Mean, standard deviation and range of every channel, gathered piece by piece.

  Values that are not finite are counted (`non_finite`, `finite`) and left out.
  """

  def __init__(self, channels: int) -> None:
    self.non_finite = 0
    self._parts = np.repeat([[0.0], [0.0], [0.0], [np.inf], [-np.inf]], channels, axis=1)

  @property
  def finite(self) -> int:
    return int(self._parts[0].sum())

  def add(self, rows: Shaped[np.ndarray, "n c"]) -> int:
    """Takes more values; returns how many of them are not finite."""
    values = rows.astype(np.float64)
    good = np.isfinite(values)
    mean = values.sum(0, where=good) / np.maximum(good.sum(0), 1)
    part = [good.sum(0), mean, ((values - mean)**2).sum(0, where=good),
            values.min(0, where=good, initial=np.inf), values.max(0, where=good, initial=-np.inf)]
    self._parts = _pooled(np.stack([self._parts, part], axis=1))
    bad = int(np.count_nonzero(~good))
    self.non_finite += bad
    return bad

  def grouped(self, groups: Groups) -> "Statistics":
    """Of groups of channels."""
    pooled = Statistics(len(groups))
    pooled.non_finite = self.non_finite
    pooled._parts = np.stack([_pooled(self._parts[:, g]) for g in groups.values()], axis=1)
    return pooled

  def to_json(self) -> dict[str, list[float | None]]:
    """For each figure a number a channel, None where it has no finite value."""
    count, mean, squares, lowest, highest = self._parts
    std = np.sqrt(squares / np.maximum(count, 1))
    return {name: [float(x) if n else None for x, n in zip(values, count, strict=True)]
            for name, values in (("mean", mean), ("std", std), ("min", lowest), ("max", highest))}


def _pooled(parts: Float[np.ndarray, "5 p ..."]) -> Float[np.ndarray, "5 ..."]:
  """Count, mean, sum of squares from the mean, minimum and maximum of all p parts together."""
  count, mean, squares, lowest, highest = parts
  whole = (count * mean).sum(0) / np.maximum(count.sum(0), 1)
  return np.stack([count.sum(0), whole, (squares + count * (mean - whole)**2).sum(0),
                   lowest.min(0), highest.max(0)])


class Sample:
  """Some records of a split, read one after the other: what only they tell.

  Attributes:
    split: its name.
    records: their numbers, ascending.
    fps, labels, captions: theirs.
    stored: of the latents.
    seen: of what the model sees.
    damaged: numbers of the records with values that are not finite.
    kept: some latent cells, for histograms.
  """

  def __init__(self, source: store.Source, codec: codec_lib.Codec, seed: int) -> None:
    rng = generator(seed, source.split)
    channels = source.info.channels
    self.split, self.records = source.split, _chosen(source, rng)
    self.fps: list[float] = []
    self.labels: list[int] = []
    self.captions: list[str] = []
    self.stored, self.seen = Statistics(channels), Statistics(codec.channels)
    self.damaged: list[int] = []
    kept = [np.zeros((0, channels), np.float32)]
    share = _KEPT / max(int(_raw_bytes(source)[self.records].sum()), 1)
    for number in self.records.tolist():
      record = source[number]
      self.fps.append(float(record["fps"]))
      self.labels.append(int(record["label"]))
      self.captions.append(record["caption"])
      cells = record["latents"].reshape(-1, channels)
      bad = 0
      for rows in (cells[i:i + _ROWS] for i in range(0, len(cells), _ROWS)):
        bad += self.stored.add(rows)
        self.seen.add(normalized(codec, rows))
      if bad:
        self.damaged.append(number)
      if len(cells):
        some = rng.integers(len(cells), size=math.ceil(cells.nbytes * share))
        kept.append(cells[some].astype(np.float32))
    self.kept = np.concatenate(kept)


def generator(seed: int, split: str) -> np.random.Generator:
  """Random numbers that differ from split to split."""
  return np.random.default_rng((seed, zlib.crc32(split.encode())))


def _chosen(source: store.Source, rng: np.random.Generator) -> Int64[np.ndarray, " S"]:
  """The numbers of a sample's records."""
  order = rng.permutation(len(source))
  last = np.searchsorted(np.cumsum(_raw_bytes(source)[order]), _SAMPLE_BYTES)
  return np.sort(order[:min(max(int(last), _FEWEST), _SAMPLE)])


def _raw_bytes(source: store.Source) -> Int64[np.ndarray, " R"]:
  """Of every record's latents in memory."""
  frame = source.sizes.astype(np.int64).prod(axis=1) * source.info.channels
  return source.lengths * frame * np.dtype(source.info.dtype).itemsize


def normalized(codec: codec_lib.Codec, rows: Shaped[np.ndarray, "n c"]
               ) -> Float[np.ndarray, "n C"]:
  """What the model sees of stored latent cells.

  They are padded to a power of two, since jax compiles for every new shape.
  """
  padding = (1 << (len(rows) - 1).bit_length()) - len(rows)
  padded = np.concatenate([rows, np.zeros((padding, rows.shape[1]), rows.dtype)])
  return np.asarray(codec.normalize(jnp.asarray(padded)))[:len(rows)]


def groups(codec: codec_lib.Codec, info: store.Spec) -> Groups:
  """The channels of one colour together, else each by itself."""
  numbers = np.arange(info.channels)
  if isinstance(codec, codec_lib.Pixels):
    return {name: numbers[i::3] for i, name in enumerate(("red", "green", "blue"))}
  kinds = ("mean", "log-variance") if info.moments else ("channel",)
  return {f"{kinds[i // codec.channels]} {i % codec.channels}": numbers[i:i + 1]
          for i in numbers.tolist()}


def of_set(path: str | os.PathLike[str], info: store.Spec) -> dict[str, Any]:
  """What all splits have in common."""
  metadata = store.metadata(path)
  return {"path": str(path), "format": metadata["format"], "origin": metadata["origin"],
          "codec": info.codec, "dtype": info.dtype, "channels": info.channels,
          "moments": info.moments, "stride": info.stride, "masks": info.masks,
          "classes": list(info.labels)}


def of_split(source: store.Source, shards: int, codec: codec_lib.Codec, sample: Sample
             ) -> dict[str, Any]:
  """Of one split, which has so many shards."""
  frames = int(source.lengths.sum(dtype=np.int64))
  stored = sample.stored
  return {
    "records": len(source),
    "shards": shards,
    "frames": frames,
    "hours": _hours(source, sample),
    "fps": _summary(np.asarray(sample.fps)),
    "bytes": source.num_bytes,
    "bytes_per_frame": source.num_bytes / frames if frames else None,
    "bytes_in_memory": int(_raw_bytes(source).sum()),
    "buckets": _buckets(source, codec.downsample),
    "lengths": _summary(source.lengths),
    "long_enough": {str(n): int(np.count_nonzero(source.lengths >= n)) for n in FRAMES},
    "sampled_records": len(sample.records),
    "labels": _labels(source.info.labels, sample),
    "captions": sum(map(bool, sample.captions)),
    "latents": {"values": stored.finite + stored.non_finite, "non_finite": stored.non_finite,
                "non_finite_records": sample.damaged, **stored.to_json()},
    "model_sees": _model_sees(codec, sample.seen),
  }


def _hours(source: store.Source, sample: Sample) -> float | None:
  """Of all videos; those that are not in the sample are taken to be like it."""
  fps = np.asarray(sample.fps)
  known = fps > 0
  lengths = source.lengths[sample.records][known].astype(np.float64)
  if not lengths.sum():
    return None
  shown = (lengths * source.info.stride / fps[known]).sum() / 3600
  return float(shown * source.lengths.sum(dtype=np.int64) / lengths.sum())


def _summary(values: Shaped[np.ndarray, " n"]) -> dict[str, Any]:
  if not len(values):
    return dict.fromkeys(("min", "median", "mean", "max"))
  return {"min": values.min().item(), "median": float(np.median(values)),
          "mean": float(values.mean(dtype=np.float64)), "max": values.max().item()}


def _buckets(source: store.Source, cell: int) -> list[dict[str, Any]]:
  """The sizes, those with most records first; `share` is of the records."""
  found = []
  for (h, w), count in source.buckets().items():
    here = (source.sizes == (h, w)).all(axis=1)
    found.append({"height": h * cell, "width": w * cell, "h": h, "w": w, "records": count,
                  "frames": int(source.lengths[here].sum(dtype=np.int64)),
                  "share": count / len(source)})
  return sorted(found, key=lambda bucket: -bucket["records"])


def _labels(names: Sequence[str], sample: Sample) -> dict[str, Any]:
  """How many of the sampled records have which label, the most common first."""
  counts = collections.Counter(label for label in sample.labels if label != load.NO_LABEL)
  name = lambda label: names[label] if 0 <= label < len(names) else str(label)
  ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
  return {"classes": len(names) or len(counts), "labelled": sum(counts.values()),
          "records": {name(label): count for label, count in ordered}}


def _model_sees(codec: codec_lib.Codec, seen: Statistics) -> dict[str, Any]:
  """Of all channels and of each; the scale that would make the standard deviation 1."""
  every = seen.grouped({"all": np.arange(codec.channels)}).to_json()
  together = {name: values[0] for name, values in every.items()}
  scale, std = codec.spec()["scale"], together["std"]
  return {**together, "scale": scale, "scale_for_std_1": scale / std if std else None,
          "channels": seen.to_json()}


def rejected(path: str | os.PathLike[str]) -> list[dict[str, str]]:
  """The videos that were left out: `source` and `reason`.

  Raises:
    InputError: the list is damaged.
  """
  file = epath.Path(path) / store.REJECTED
  try:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
  except json.JSONDecodeError as error:
    raise InputError(f"{file} is damaged ({error})") from error
