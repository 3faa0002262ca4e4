"""Shows what a latent data set holds, before anything is trained on it.

    python -m videogpt_jax.inspect --data=data/tiny
    python -m videogpt_jax.inspect --data=data/mine --vae=sdxl-vae --split=train --records=16

Prints what the data set was made of and, of every split, how many records of which sizes and
lengths there are, their labels and captions, and what the latents look like as they are stored
and as the model sees them (its input should have a standard deviation of about 1); then the
videos that were left out, by reason. Writes into the output folder `inspection.json` with all
figures, `lengths.png`, `latents.png` and contact sheets of some records: `contact_sheet.png`,
or one `contact_sheet_HxW.png` for every size of frames. Latents of an autoencoder are shown
only where --vae says which it was. The data set itself is read only.

What only the records tell (fps, labels, captions, latents) comes from a random sample of them
where there are many; --seed decides which, and which are shown.
"""

import collections
from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import io
import json
import math
import os
import pathlib
import sys
import textwrap
from typing import Any
import zlib

from absl import flags
from etils import epath
import jax.numpy as jnp
from jaxtyping import Float, Int64, Shaped, UInt8
import numpy as np

from videogpt_jax import cli
from videogpt_jax import codec as codec_lib
from videogpt_jax import encode
from videogpt_jax import files
from videogpt_jax.data import load
from videogpt_jax.data import projection
from videogpt_jax.data import store
from videogpt_jax.data import video
from videogpt_jax.errors import InputError

INSPECTION = "inspection.json"

_METADATA = "metadata.json"
_FRAMES = (16, 48, 80)  # of samples, for which records are counted that are long enough
# A sample of a split's records ends where either is reached, but has the fewest.
_SAMPLE, _SAMPLE_BYTES, _FEWEST = 512, 2**28, 16
_ROWS = 2**16  # latent cells that are looked at at once
_KEPT = 2**17  # latent cells of a split that are kept for histograms
_COLUMNS = 8  # frames of a contact sheet's row
_ENLARGED, _LARGEST = 160, 192  # px; about so large small frames are shown, and at most
_NAME = 30  # characters of a source's name in a contact sheet
_PEAK = 2  # times 1 / std, a density from which its axis is logarithmic; the normal's is 0.4
_BINS = 40  # few enough to hold several of the values that bfloat16 knows
_LISTED = 8  # labels and reasons that are printed; inspection.json has all
_WIDTH, _INDENT = 96, 15  # characters

_BY_CHANNEL = ("count", "mean", "squares", "lowest", "highest")  # arrays of `Statistics`

# A group is what the channels of one name have in common.
_Groups = dict[str, Int64[np.ndarray, " g"]]


# Figures ------------------------------------------------------------------------------------


class Statistics:
  """Mean, standard deviation and range of every channel, gathered piece by piece.

  Values that are not finite are counted and left out.
  """

  def __init__(self, channels: int) -> None:
    self.count = np.zeros(channels, np.int64)
    self.mean, self.squares = np.zeros(channels), np.zeros(channels)  # the latter: from the mean
    self.lowest, self.highest = np.full(channels, np.inf), np.full(channels, -np.inf)
    self.non_finite = 0

  def add(self, rows: Shaped[np.ndarray, "n c"]) -> int:
    """Takes more values; returns how many of them are not finite."""
    values = rows.astype(np.float64)
    good = np.isfinite(values)
    part = Statistics(values.shape[1])
    part.count = good.sum(0)
    part.mean = values.sum(0, where=good) / np.maximum(part.count, 1)
    part.squares = ((values - part.mean)**2).sum(0, where=good)
    part.lowest = values.min(0, where=good, initial=np.inf)
    part.highest = values.max(0, where=good, initial=-np.inf)
    part.non_finite = int(values.size - part.count.sum())
    self._take(_joined([self, part]))
    return part.non_finite

  def grouped(self, groups: _Groups) -> "Statistics":
    """Of groups of channels."""
    parts = [_joined([self._channel(i) for i in group]) for group in groups.values()]
    joined = Statistics(len(parts))
    for name in _BY_CHANNEL:
      setattr(joined, name, np.concatenate([getattr(part, name) for part in parts]))
    joined.non_finite = self.non_finite
    return joined

  @property
  def std(self) -> Float[np.ndarray, " c"]:
    """Standard deviations."""
    return np.sqrt(self.squares / np.maximum(self.count, 1))

  def to_json(self) -> dict[str, Any]:
    """A list with a number a channel (None where it has no finite value) for each figure."""
    figures = {"mean": self.mean, "std": self.std, "min": self.lowest, "max": self.highest}
    known = lambda values: [float(x) if n else None
                            for x, n in zip(values, self.count, strict=True)]
    return {name: known(values) for name, values in figures.items()}

  def _channel(self, index: int) -> "Statistics":
    one = Statistics(1)
    for name in _BY_CHANNEL:
      setattr(one, name, getattr(self, name)[index:index + 1])
    return one

  def _take(self, other: "Statistics") -> None:
    for name in (*_BY_CHANNEL, "non_finite"):
      setattr(self, name, getattr(other, name))


def _joined(parts: Sequence[Statistics]) -> Statistics:
  """Of all values together, channel by channel."""
  joined = Statistics(len(parts[0].count))
  joined.count = np.sum([part.count for part in parts], axis=0)
  total = np.maximum(joined.count, 1)
  joined.mean = np.sum([part.count * part.mean for part in parts], axis=0) / total
  joined.squares = np.sum([part.squares + part.count * (part.mean - joined.mean)**2
                           for part in parts], axis=0)
  joined.lowest = np.min([part.lowest for part in parts], axis=0)
  joined.highest = np.max([part.highest for part in parts], axis=0)
  joined.non_finite = sum(part.non_finite for part in parts)
  return joined


class _Sample:
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
    rng = _random(seed, source.split)
    self.split, self.records = source.split, _chosen(source, rng)
    self.fps: list[float] = []
    self.labels: list[int] = []
    self.captions: list[str] = []
    self.stored, self.seen = Statistics(source.info.channels), Statistics(codec.channels)
    self.damaged: list[int] = []
    kept = [np.zeros((0, source.info.channels), np.float32)]
    share = _KEPT / max(int(_raw_bytes(source)[self.records].sum()), 1)
    for number in self.records.tolist():
      record = source[number]
      self.fps.append(float(record["fps"]))
      self.labels.append(int(record["label"]))
      self.captions.append(record["caption"])
      cells = record["latents"].reshape(-1, source.info.channels)
      bad = 0
      for rows in (cells[i:i + _ROWS] for i in range(0, len(cells), _ROWS)):
        bad += self.stored.add(rows)
        self.seen.add(_normalized(codec, rows))
      if bad:
        self.damaged.append(number)
      if len(cells):
        some = rng.integers(len(cells), size=math.ceil(cells.nbytes * share))
        kept.append(cells[some].astype(np.float32))
    self.kept = np.concatenate(kept)


def _random(seed: int, split: str) -> np.random.Generator:
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


def _normalized(codec: codec_lib.Codec, rows: Shaped[np.ndarray, "n c"]
                ) -> Float[np.ndarray, "n C"]:
  """What the model sees of stored latent cells.

  They are padded to a power of two, since jax compiles for every new shape.
  """
  size = 1 << (len(rows) - 1).bit_length()
  padded = np.concatenate([rows, np.zeros((size - len(rows), rows.shape[1]), rows.dtype)])
  return np.asarray(codec.normalize(jnp.asarray(padded)))[:len(rows)]


def _split_figures(source: store.Source, shards: int, codec: codec_lib.Codec, sample: _Sample
                   ) -> dict[str, Any]:
  """All figures of a split, as in `inspection.json`."""
  frames = int(source.lengths.sum(dtype=np.int64))
  raw = int(_raw_bytes(source).sum())
  seconds = _seconds(source, sample)
  return {
    "records": len(source),
    "shards": shards,
    "frames": frames,
    "hours": None if seconds is None else seconds / 3600,
    "fps": _fps(sample),
    "bytes": source.num_bytes,
    "bytes_per_frame": source.num_bytes / frames if frames else None,
    "bytes_in_memory": raw,
    "buckets": _buckets(source, codec.downsample),
    "lengths": _summary(source.lengths),
    "long_enough": {str(n): int(np.count_nonzero(source.lengths >= n)) for n in _FRAMES},
    "sampled_records": len(sample.records),
    "labels": _labels(source.info.labels, sample),
    "captions": sum(map(bool, sample.captions)),
    "latents": {
      "values": int(sample.stored.count.sum()) + sample.stored.non_finite,
      "non_finite": sample.stored.non_finite,
      "non_finite_records": sample.damaged,
      **sample.stored.to_json(),
    },
    "model_sees": _model_sees(codec, sample.seen),
  }


def _seconds(source: store.Source, sample: _Sample) -> float | None:
  """Of all videos; those that are not in the sample are taken to be like it."""
  known = np.asarray(sample.fps) > 0
  lengths = source.lengths[sample.records][known].astype(np.float64)
  if not lengths.sum():
    return None
  shown = (lengths * source.info.stride / np.asarray(sample.fps)[known]).sum()
  return float(shown * source.lengths.sum(dtype=np.int64) / lengths.sum())


def _fps(sample: _Sample) -> dict[str, float] | None:
  """Of the source videos."""
  if not sample.fps:
    return None
  summary = _summary(np.asarray(sample.fps))
  return {name: value for name, value in summary.items() if name != "mean"}


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


def _labels(names: Sequence[str], sample: _Sample) -> dict[str, Any]:
  """How many of the sampled records have which label, the most common first."""
  counts = collections.Counter(label for label in sample.labels if label != load.NO_LABEL)
  name = lambda label: names[label] if 0 <= label < len(names) else str(label)
  ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
  return {"classes": len(names) or len(counts), "labelled": sum(counts.values()),
          "records": {name(label): count for label, count in ordered}}


def _model_sees(codec: codec_lib.Codec, seen: Statistics) -> dict[str, Any]:
  """Of all channels and of each; the scale that would make the standard deviation 1."""
  every = seen.grouped({"all": np.arange(len(seen.count))})
  together = {name: values[0] for name, values in every.to_json().items()}
  scale = codec.spec()["scale"]
  fitting = scale / together["std"] if together["std"] else None
  return {**together, "scale": scale, "scale_for_std_1": fitting, "channels": seen.to_json()}


def _set_figures(path: epath.Path, info: store.Spec) -> dict[str, Any]:
  """What all splits have in common."""
  return {"path": str(path), "format": _metadata(path)["format"], "origin": store.origin(path),
          "codec": info.codec, "dtype": info.dtype, "channels": info.channels,
          "moments": info.moments, "stride": info.stride, "masks": info.masks,
          "classes": list(info.labels)}


def _metadata(path: epath.Path) -> dict[str, Any]:
  """Of a data set that `store` has opened, so that it is there and whole."""
  return json.loads((path / _METADATA).read_text())


def _rejected(path: epath.Path) -> list[dict[str, str]]:
  """The videos that were left out, with their reasons."""
  file = path / store.REJECTED
  try:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
  except json.JSONDecodeError as error:
    raise InputError(f"{file} is damaged ({error})") from error


def _groups(codec: codec_lib.Codec, info: store.Spec) -> _Groups:
  """The channels that are told together: those of one colour, else each by itself."""
  numbers = np.arange(info.channels)
  if isinstance(codec, codec_lib.Pixels):
    return {name: numbers[i::3] for i, name in enumerate(("red", "green", "blue"))}
  if not info.moments:
    return {f"channel {i}": numbers[i:i + 1] for i in numbers.tolist()}
  kinds = ("mean", "log-variance")
  return {f"{kinds[i // codec.channels]} {i % codec.channels}": numbers[i:i + 1]
          for i in numbers.tolist()}


# Words --------------------------------------------------------------------------------------


def _field(name: str, text: str) -> None:
  """Prints a name and what belongs to it, on as many lines as it takes."""
  lines = textwrap.wrap(text, _WIDTH - _INDENT, break_on_hyphens=False) or [""]
  print(f"  {name:<{_INDENT - 2}}{lines[0]}")
  for line in lines[1:]:
    print(f"{'':<{_INDENT}}{line}")


def _table(rows: Sequence[Sequence[str]]) -> None:
  """Prints rows in columns: the first flush left, the others right."""
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  for first, *others in rows:
    cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
    print("  ".join([f"{'':<{_INDENT}}{first.ljust(widths[0])}", *cells]).rstrip())


def _print_set(figures: Mapping[str, Any], codec: codec_lib.Codec) -> None:
  print(figures["path"])
  _print_origin(figures["origin"])
  settings = {name: figures["codec"][name] for name in ("scale", "shift")}
  _field("codec", f"{figures['codec']['id']}, cells of {codec.downsample}x{codec.downsample} px, "
         f"{codec.channels} channels; {_named(settings)}")
  kind = ""
  if not isinstance(codec, codec_lib.Pixels):
    kind = (f", {codec.channels} means and {codec.channels} log-variances of a posterior"
            if figures["moments"] else ", means of a posterior")
  masks = "; with masks of objects" if figures["masks"] else ""
  _field("stored", f"{figures['dtype']}{kind}{masks}")
  every = "every source frame" if figures["stride"] == 1 else (
    f"one of {figures['stride']} source frames")
  _field("stride", f"{figures['stride']}: {every}")
  _field("format", str(figures["format"]))


def _print_origin(origin: Mapping[str, Any]) -> None:
  settings = dict(origin)
  source = str(settings.pop("source", "unknown"))
  counts = settings.pop("counts", None) or settings.pop("videos", None) or {}
  digest = settings.pop("digest", None)
  _field("made of", ", ".join([source, *(f"{_count(n)} {split}" for split, n in counts.items())])
         + (f"; digest of the list {digest}" if digest else ""))
  if settings := {**settings.pop("settings", {}), **settings}:
    _field("made with", _named(settings))


def _named(values: Mapping[str, Any]) -> str:
  """Settings in words, those of a group by `group.name`."""
  return ", ".join(_named({f"{name}.{key}": x for key, x in value.items()})
                   if isinstance(value, Mapping) else f"{name} {_plain(value)}"
                   for name, value in values.items())


def _plain(value: Any) -> str:
  if isinstance(value, Sequence) and not isinstance(value, str):
    return f"({' '.join(map(_plain, value))})"
  return f"{value:g}" if isinstance(value, float) else str(value)


def _print_split(name: str, figures: Mapping[str, Any], sample: _Sample, groups: _Groups) -> None:
  records, whole = figures["records"], figures["sampled_records"] == figures["records"]
  about, looked = ("", _count(records)) if whole else (
    "about ", f"{_count(len(sample.records))} sampled")
  print(f"\n{name}")
  _field("records", f"{_count(records)} in {_counted(figures['shards'], 'shard')}")
  if not records:
    return
  fps = figures["fps"]
  rate = f"{fps['median']:g}" + (f", {fps['min']:g} to {fps['max']:g}"
                                 if fps["min"] < fps["max"] else "")
  _field("frames", _count(figures["frames"]))
  _field("video", (f"{about}{_time(figures['hours'] * 3600)}" if figures["hours"] is not None
                   else "unknown") + f" ({rate} source frames/s)")
  _field("on disk", f"{projection.size(figures['bytes'])}, "
         f"{projection.size(figures['bytes_per_frame'])} a frame "
         f"({100 * figures['bytes'] / max(figures['bytes_in_memory'], 1):.0f}% of the latents in "
         "memory)")
  lengths = figures["lengths"]
  _field("lengths", f"all {lengths['min']} frames" if lengths["min"] == lengths["max"] else
         f"{lengths['min']} to {lengths['max']} frames, median {lengths['median']:g}, "
         f"mean {lengths['mean']:.1f}")
  _field("long enough", ", ".join(
    f"for {frames} frames {_count(n)} ({_share(n / records)})"
    for frames, n in figures["long_enough"].items()) + "; at the shortest interval")
  _print_labels(figures, whole, looked)
  captions = figures["captions"]
  example = next((f', as "{textwrap.shorten(text, 60)}"' for text in sample.captions if text), "")
  _field("captions", f"{_count(captions) if captions else 'none'} of {looked}{example}")
  _print_buckets(figures["buckets"])
  _print_latents(figures, sample, groups)


def _print_labels(figures: Mapping[str, Any], whole: bool, looked: str) -> None:
  """How many classes, and the most common ones by records, in a sample by their share."""
  labels, counts = figures["labels"], list(figures["labels"]["records"].items())
  if not counts:
    _field("labels", f"none of {looked}")
    return
  common = ", ".join(
    f"{name} ({_count(n) if whole else _share(n / figures['sampled_records'])})"
    for name, n in counts[:_LISTED])
  found = f", {_count(len(counts))} of them" if len(counts) < labels["classes"] else ""
  rest = f", and {_count(len(counts) - _LISTED)} more" if len(counts) > _LISTED else ""
  _field("labels", f"{_counted(labels['classes'], 'class', 'classes')}{found} in "
         f"{_count(labels['labelled'])} of {looked}: {common}{rest}")


def _print_buckets(buckets: Sequence[Mapping[str, Any]]) -> None:
  _field("sizes", _counted(len(buckets), "bucket"))
  rows = [("pixels", "latents", "records", "share", "frames")]
  rows += [(f"{b['height']}x{b['width']}", f"{b['h']}x{b['w']}", _count(b["records"]),
            _share(b["share"]), _count(b["frames"])) for b in buckets[:_LISTED]]
  if others := buckets[_LISTED:]:
    total = lambda name: sum(b[name] for b in others)
    rows.append((f"{len(others)} others", "", _count(total("records")), _share(total("share")),
                 _count(total("frames"))))
  _table(rows)


def _print_latents(figures: Mapping[str, Any], sample: _Sample, groups: _Groups) -> None:
  """The stored latents by group, and in the last row what the model sees."""
  latents, seen = figures["latents"], figures["model_sees"]
  bad = f"{_count(latents['non_finite'])} not finite" if latents["non_finite"] else "all finite"
  _field("latents", f"of {_counted(figures['sampled_records'], 'record')}: "
         f"{_count(latents['values'])} values, {bad}")
  stored = sample.stored.grouped(groups).to_json()
  order = ("mean", "std", "min", "max")
  rows: list[tuple[str, ...]] = [("", *order)]
  rows += [(name, *(_number(stored[figure][i]) for figure in order))
           for i, name in enumerate(groups)]
  rows.append(("the model sees", *(_number(seen[figure]) for figure in order)))
  _table(rows)
  if seen["scale_for_std_1"]:
    _field("scale", f"{seen['scale']:g} (one of {seen['scale_for_std_1']:.4g} would make the "
           "standard deviation that the model sees 1)")
  if latents["non_finite"]:
    some = ", ".join(map(str, sample.damaged[:_LISTED]))
    _warn(f"{_count(latents['non_finite'])} stored values of split {sample.split!r} "
          f"are not finite, in {_counted(len(sample.damaged), 'record')} ({some}"
          f"{', ...' if len(sample.damaged) > _LISTED else ''}); encode the data again")


def _print_rejected(rejected: Sequence[Mapping[str, str]], kinds: Mapping[str, int]) -> None:
  print("\nleft out")
  _field("videos", _count(len(rejected)) if rejected else "none")
  if not rejected:
    return
  examples: dict[str, str] = {}
  for entry in rejected:
    examples.setdefault(encode.kind(entry["reason"]), entry["source"])
  lines = [(_count(count), f"{kind}, as {examples[kind]}") for kind, count in kinds.items()]
  if others := list(kinds.values())[_LISTED:]:
    lines[_LISTED:] = [(_count(sum(others)), f"for {_counted(len(others), 'other reason')}")]
  width = max(len(count) for count, _ in lines)
  for count, words in lines:
    print(f"{'':<{_INDENT}}{count:>{width}} {words}")


def _warn(text: str) -> None:
  sys.stdout.flush()
  print(f"warning: {text}", file=sys.stderr, flush=True)


def _count(number: int) -> str:
  return f"{number:,}".replace(",", " ") if number >= 10_000 else str(number)


def _counted(number: int, one: str, several: str = "") -> str:
  return f"{_count(number)} {one if number == 1 else several or one + 's'}"


def _share(part: float) -> str:
  """In per cent; only what is nothing is 0%, only what is all is 100%."""
  if 0 < part < 0.001 or 0.999 < part < 1:
    return "<0.1%" if part < 0.5 else ">99.9%"
  return f"{100 * part:.1f}%" if part not in (0, 1) else f"{100 * part:.0f}%"


def _time(seconds: float) -> str:
  for unit, size in (("hours", 3600), ("minutes", 60)):
    if seconds >= size:
      return f"{seconds / size:.1f} {unit}"
  return f"{seconds:.1f} seconds"


def _number(value: float | None) -> str:
  """With the digits that count, in columns."""
  if value is None:
    return "none"
  return f"{value:.2e}" if abs(value) >= 1e5 else f"{value:.3f}"


# Pictures -----------------------------------------------------------------------------------


def _figure(width: float, height: float) -> Any:
  try:
    from matplotlib import figure  # an extra: figures in words do without it
  except ImportError as error:
    raise InputError("no plots: they need matplotlib; pip install 'videogpt_jax[demo]'") from error
  return figure.Figure(figsize=(width, height), layout="constrained")


def _save(fig: Any, path: pathlib.Path) -> pathlib.Path:
  buffer = io.BytesIO()
  fig.savefig(buffer, format="png", dpi=120)
  files.replace(path, buffer.getvalue())
  return path


def _plot_lengths(sources: Sequence[store.Source], path: pathlib.Path) -> pathlib.Path:
  """Draws how many records there are of which length, a panel a split."""
  fig = _figure(8, 0.8 + 2.2 * len(sources))
  panels = fig.subplots(len(sources), 1, sharex=True, squeeze=False)[:, 0]
  lengths = np.concatenate([source.lengths for source in sources])
  edges, wide = _length_edges(lengths)
  right = 1.08 * max(edges[-1], min(_FRAMES))
  for panel, source in zip(panels, sources, strict=True):
    panel.hist(source.lengths, edges, color="tab:blue", edgecolor="white", linewidth=0.5)
    panel.set(ylabel="records", xscale="log" if wide else "linear")
    panel.set_title(f"{source.split}: {_counted(len(source), 'record')}", loc="left", fontsize=10)
    panel.yaxis.get_major_locator().set_params(integer=True)
    panel.grid(True, axis="y", alpha=0.3)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
    for frames in _FRAMES:
      if frames < right and (frames > edges[0] or not wide):
        panel.axvline(frames, color="tab:orange", linestyle="--", linewidth=1)
        panel.annotate(str(frames), (frames, 1), (2, -10), color="tab:orange", fontsize=8,
                       xycoords=("data", "axes fraction"), textcoords="offset points")
  panels[-1].set_xlabel("stored frames of a record (dashed: lengths of samples)")
  if wide:
    panels[-1].xaxis.set_major_formatter("{x:g}")
  else:
    panels[-1].set_xlim(0, right)
  return _save(fig, path)


def _length_edges(lengths: Shaped[np.ndarray, " n"]) -> tuple[Float[np.ndarray, " e"], bool]:
  """Edges of bins, and whether lengths differ so much that they grow by a factor."""
  if not len(lengths):
    return np.array([0.5, 1.5]), False
  low, high = int(lengths.min()), int(lengths.max())
  if high > 30 * max(float(np.median(lengths)), 1):
    return np.geomspace(max(low, 1) - 0.5, high + 0.5, 41), True
  width = -(-(high - low + 1) // 60)
  return np.arange(low, high + 1 + width, width) - 0.5, False


def _plot_latents(kept: Float[np.ndarray, "n c"], codec: codec_lib.Codec, groups: _Groups,
                  path: pathlib.Path) -> pathlib.Path:
  """Draws the distribution of every group as it is stored and as the model sees it."""
  means = {name: group for name, group in groups.items() if group[0] < codec.channels}
  others = {name: group for name, group in groups.items() if name not in means}
  fig = _figure(12 if others else 9, 3.6)
  panels = fig.subplots(1, 3 if others else 2)
  edges = _value_edges(kept[:, :codec.channels], codec)
  _draw_latents(panels[0], kept, means, edges)
  panels[0].set(title="stored", xlabel="value", ylabel="density")
  if others:
    _draw_latents(panels[1], kept, others, _value_edges(kept[:, codec.channels:], codec))
    panels[1].set(title="stored log-variances", xlabel="value")
  seen = _normalized(codec, kept)
  edges = np.asarray(codec.normalize(jnp.asarray(edges[:, None])))[:, 0]
  _draw_latents(panels[-1], seen, means, edges)
  x = np.linspace(min(edges[0], -3), max(edges[-1], 3), 200)
  panels[-1].plot(x, np.exp(-x**2 / 2) / np.sqrt(2 * np.pi), "--", color="0.3", linewidth=1,
                  label="normal")
  panels[-1].set(title="as the model sees it", xlabel="value")
  fig.legend(*panels[-1].get_legend_handles_labels(), loc="outside right upper", fontsize=8,
             frameon=False)
  return _save(fig, path)


def _value_edges(values: Float[np.ndarray, "n c"], codec: codec_lib.Codec
                 ) -> Float[np.ndarray, " e"]:
  """Edges of bins that hold nearly all values; those of bytes hold as many bytes each."""
  if codec.dtype == np.uint8:
    return np.arange(0, 257, 4) - 0.5
  finite = values[np.isfinite(values)]
  low, high = np.percentile(finite, (0.05, 99.95)) if len(finite) else (-1.0, 1.0)
  return np.linspace(low - 1e-3, high + 1e-3, _BINS + 1)


def _draw_latents(panel: Any, values: Float[np.ndarray, "n c"], groups: _Groups,
                  edges: Float[np.ndarray, " e"]) -> None:
  from matplotlib import colormaps

  colours = {"red": "tab:red", "green": "tab:green", "blue": "tab:blue"}
  for number, (name, group) in enumerate(groups.items()):
    colour = colours.get(name) or (f"C{number}" if len(groups) <= 8 else
                                   colormaps["viridis"](number / (len(groups) - 1)))
    column = values[:, group]
    column = column[np.isfinite(column)]
    density = np.histogram(column, edges)[0] / (max(len(column), 1) * np.diff(edges))
    label = name if name in colours else f"channel {number}"
    panel.stairs(density, edges, label=label, color=colour, linewidth=1.2)
    if len(column) and density.max() * column.std() > _PEAK:
      panel.set_yscale("log")
  panel.grid(True, alpha=0.3)
  panel.spines[["top", "right"]].set_visible(False)


def _shown(sources: Sequence[store.Source], records: int, seed: int
           ) -> dict[tuple[int, int], list[tuple[store.Source, int]]]:
  """The records of the contact sheets, by size (h, w).

  The sizes of all splits take turns, those with most records first.
  """
  waiting = []
  for source in sources:
    order = _random(seed, source.split).permutation(len(source))
    order = order[source.lengths[order] > 0]
    for size in source.buckets():
      here = order[(source.sizes[order] == size).all(axis=1)].tolist()
      waiting.append((size, source, here))
  waiting.sort(key=lambda group: -len(group[2]))
  taken: dict[tuple[int, int], list[tuple[store.Source, int]]] = {}
  for turn in range(records):
    for size, source, here in waiting:
      if turn < len(here) and sum(map(len, taken.values())) < records:
        taken.setdefault(size, []).append((source, here[turn]))
  names = [source.split for source in sources]
  place = lambda one: (names.index(one[0].split), one[1])
  return {size: sorted(rows, key=place) for size, rows in sorted(taken.items())}


def _contact_sheets(sources: Sequence[store.Source], codec: codec_lib.Codec, records: int,
                    seed: int, out: pathlib.Path) -> Iterator[pathlib.Path]:
  """Writes a sheet for every size; yields the files."""
  shown = _shown(sources, records, seed)
  sizes = {size for source in sources for size in source.buckets()}
  for (h, w), rows in shown.items():
    columns = min(_COLUMNS, max(int(source.lengths[number]) for source, number in rows))
    places = np.linspace(0, 1, columns)
    pictures = {}
    for source, number in rows:
      record = source[number]
      name = f"{source.split} {number}: {_shortened(record['source'])}"
      pictures[name] = _fitted(_decoded(record["latents"], codec, places))
    titles = [f"{100 * place:.0f}%" for place in places]
    titles = ["first", *titles[1:-1], "last"] if columns > 1 else ["first"]
    scale = max(1, round(_ENLARGED / max(next(iter(pictures.values())).shape[1:3])))
    suffix = f"_{h * codec.downsample}x{w * codec.downsample}" if len(sizes) > 1 else ""
    path = out / f"contact_sheet{suffix}.png"
    video.write_picture(path, video.contact_sheet(pictures, titles, scale))
    yield path


def _decoded(latents: Shaped[np.ndarray, "T h w c"], codec: codec_lib.Codec,
             places: Float[np.ndarray, " n"]) -> UInt8[np.ndarray, "n H W 3"]:
  """The frames of a record at places from 0, its first, to 1, its last."""
  chosen = np.rint(places * (len(latents) - 1)).astype(int)
  return codec.decode(latents[chosen][..., :codec.channels])  # of a posterior, the means


def _fitted(frames: UInt8[np.ndarray, "n H W 3"]) -> UInt8[np.ndarray, "n h w 3"]:
  """Frames that are too large for a sheet shrunk, in proportion."""
  height, width = frames.shape[1:3]
  factor = min(1.0, _LARGEST / max(height, width))
  return video.resize_and_crop(frames, max(1, round(height * factor)),
                               max(1, round(width * factor)))


def _shortened(name: str) -> str:
  """The end of a name, which tells more than its beginning."""
  return name if len(name) <= _NAME else f"...{name[3 - _NAME:]}"


# The command --------------------------------------------------------------------------------


def inspect(path: str | os.PathLike[str], out: str | os.PathLike[str] = "", *,
            splits: Sequence[str] = (), records: int = 8, vae: str = "", seed: int = 0
            ) -> dict[str, Any]:
  """Prints what a data set holds and writes the files; see the module's documentation.

  Args:
    path: the data set.
    out: folder for the files, outside the data set; default `runs/inspect/NAME`.
    splits: which; empty: all.
    records: how many the contact sheets show, in all.
    vae: the autoencoder that the latents are of, if it is at hand; see `vae.load`.
    seed: of the sample and of the records that are shown.

  Returns:
    What `inspection.json` holds.

  Raises:
    InputError: no whole data set, no such split, a folder that cannot be written.
  """
  folder = epath.Path(path).expanduser()
  sources = [store.open_split(folder, split)
             for split in dict.fromkeys(splits or store.splits(folder))]
  info = sources[0].info
  codec = _codec(info, vae)
  place = _out(folder, out)
  missing = _why_not_shown(codec, vae)
  figures = {**_set_figures(folder, info), "seed": seed, "splits": {}}
  _print_set(figures, codec)
  groups, shards, kept = _groups(codec, info), _metadata(folder)["shards"], []
  for source in sources:
    sample = _Sample(source, codec, seed)
    found = _split_figures(source, shards[source.split], codec, sample)
    figures["splits"][source.split] = found
    _print_split(source.split, found, sample, groups)
    kept.append(sample.kept)
  rejected = _rejected(folder)
  kinds = dict(collections.Counter(encode.kind(x["reason"]) for x in rejected).most_common())
  figures["rejected"] = {"videos": len(rejected), "kinds": kinds}
  _print_rejected(rejected, kinds)
  print(flush=True)
  written = _plots(sources, np.concatenate(kept), codec, groups, place)
  if missing:
    print(f"no contact sheet: {missing}")
  else:
    written += _contact_sheets(sources, codec, records, seed, place)
  figures["files"] = [file.name for file in written]
  files.write_json(place / INSPECTION, figures)
  for file in (*written, place / INSPECTION):
    print(f"wrote {file}")
  return figures


def _plots(sources: Sequence[store.Source], kept: Float[np.ndarray, "n c"],
           codec: codec_lib.Codec, groups: _Groups, out: pathlib.Path) -> list[pathlib.Path]:
  """The plots that can be drawn; says why where they cannot."""
  if not len(kept):
    return []
  try:
    return [_plot_lengths(sources, out / "lengths.png"),
            _plot_latents(kept, codec, groups, out / "latents.png")]
  except InputError as error:
    _warn(str(error))
    return []


def _codec(info: store.Spec, vae: str) -> codec_lib.Codec:
  """The data set's codec, with the autoencoder at `vae`."""
  codec = codec_lib.from_spec(info.codec)
  if isinstance(codec, codec_lib.Vae):
    return dataclasses.replace(codec, path=vae, moments=info.moments)
  if vae:
    raise InputError(f"--vae={vae}: this data set holds {info.codec['id']}, no latents of an "
                     "autoencoder; leave it out")
  return codec


def _why_not_shown(codec: codec_lib.Codec, vae: str) -> str:
  """Why latents cannot be decoded, or nothing."""
  if isinstance(codec, codec_lib.Vae) and not vae:
    return ("it takes the autoencoder that the latents are of; give --vae=DIR (or its hub name, "
            "such as stabilityai/sdxl-vae)")
  try:
    codec.prepare()
  except InputError as error:
    return " ".join(str(error).split())
  return ""


def _out(data: epath.Path, out: str | os.PathLike[str]) -> pathlib.Path:
  """The folder for the files, made where missing, outside the data set."""
  here = pathlib.Path(os.fspath(data)).resolve()
  folder = pathlib.Path(out).expanduser() if out else pathlib.Path("runs", "inspect", here.name)
  if folder.resolve().is_relative_to(here):
    raise InputError(f"--out={folder} lies in the data set, which is left as it is; choose "
                     "another folder")
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise InputError(f"cannot write to --out={folder}: {error.strerror or error}") from error
  return folder


def define_flags() -> None:
  """The command's flags."""
  flags.DEFINE_string("data", None, "Folder of the data set, as `videogpt_jax.encode` wrote it.")
  flags.DEFINE_string("out", "", "Folder for the results; default: runs/inspect/NAME.")
  flags.DEFINE_list("split", [], "Which splits, separated by commas; default: all.")
  flags.DEFINE_integer("records", 8, "How many records the contact sheets show.", lower_bound=0)
  flags.DEFINE_string("vae", "", "Folder (or hub name) of the autoencoder that the latents are "
                      "of; without it they are not shown as pictures.")
  flags.DEFINE_integer("seed", 0, "Of the sample that is looked at and the records shown.",
                       lower_bound=0)
  flags.mark_flag_as_required("data")


def main() -> None:
  """Reads the flags and inspects."""
  f = flags.FLAGS
  inspect(f.data, f.out, splits=f.split, records=f.records, vae=f.vae, seed=f.seed)


if __name__ == "__main__":
  define_flags()
  cli.run(main)
