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
from collections.abc import Mapping, Sequence
import dataclasses
import os
import pathlib
import sys
import textwrap
from typing import Any

from absl import flags
from etils import epath
import numpy as np

from videogpt_jax import cli
from videogpt_jax import codec as codec_lib
from videogpt_jax import encode
from videogpt_jax import files
from videogpt_jax.data import inspection
from videogpt_jax.data import inspection_pictures as pictures
from videogpt_jax.data import projection
from videogpt_jax.data import store
from videogpt_jax.errors import InputError

INSPECTION = "inspection.json"

_LISTED = 8  # labels, sizes and reasons that are printed; inspection.json has all
_WIDTH, _INDENT = 96, 15  # characters


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
  figures = {**inspection.of_set(folder, info), "seed": seed, "splits": {}}
  _print_set(figures, codec)
  groups, shards, kept = inspection.groups(codec, info), store.metadata(folder)["shards"], []
  for source in sources:
    sample = inspection.Sample(source, codec, seed)
    found = inspection.of_split(source, shards[source.split], codec, sample)
    figures["splits"][source.split] = found
    _print_split(found, sample, groups)
    kept.append(sample.kept)
  figures["rejected"] = _print_rejected(inspection.rejected(folder))
  print(flush=True)
  written = []
  cells = np.concatenate(kept)
  if len(cells):
    try:
      written = [pictures.plot_lengths(sources, place / "lengths.png"),
                 pictures.plot_latents(cells, codec, groups, place / "latents.png")]
    except InputError as error:
      _warn(str(error))
  if missing:
    print(f"no contact sheet: {missing}")
  else:
    written += pictures.contact_sheets(sources, codec, records, seed, place)
  figures["files"] = [file.name for file in written]
  files.write_json(place / INSPECTION, figures)
  for file in (*written, place / INSPECTION):
    print(f"wrote {file}")
  return figures


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
  files.make_folder(folder, "--out")
  return folder


def _print_set(figures: Mapping[str, Any], codec: codec_lib.Codec) -> None:
  print(figures["path"])
  settings = dict(figures["origin"])
  source = str(settings.pop("source", "unknown"))
  counts = settings.pop("counts", None) or settings.pop("videos", None) or {}
  digest = settings.pop("digest", None)
  _field("made of", ", ".join([source, *(f"{_count(n)} {split}" for split, n in counts.items())])
         + (f"; digest of the list {digest}" if digest else ""))
  if settings := {**settings.pop("settings", {}), **settings}:
    _field("made with", _named(settings))
  scaling = {name: figures["codec"][name] for name in ("scale", "shift")}
  _field("codec", f"{figures['codec']['id']}, cells of {codec.downsample}x{codec.downsample} px, "
         f"{codec.channels} channels; {_named(scaling)}")
  kind = ""
  if not isinstance(codec, codec_lib.Pixels):
    kind = (f", {codec.channels} means and {codec.channels} log-variances of a posterior"
            if figures["moments"] else ", means of a posterior")
  _field("stored", f"{figures['dtype']}{kind}"
         + ("; with masks of objects" if figures["masks"] else ""))
  stride = figures["stride"]
  _field("stride", f"{stride}: " + ("every source frame" if stride == 1 else
                                    f"one of {stride} source frames"))
  _field("format", str(figures["format"]))


def _named(values: Mapping[str, Any]) -> str:
  return ", ".join(f"{name} {value}" for name, value in values.items())


def _print_split(figures: Mapping[str, Any], sample: inspection.Sample, groups: inspection.Groups
                 ) -> None:
  records, sampled = figures["records"], figures["sampled_records"]
  about, looked = ("", _count(records)) if sampled == records else (
    "about ", f"{_count(sampled)} sampled")
  print(f"\n{sample.split}")
  _field("records", f"{_count(records)} in {_counted(figures['shards'], 'shard')}")
  if not records:
    return
  fps, lengths, captions = figures["fps"], figures["lengths"], figures["captions"]
  rate = f"{fps['median']:g}" + (f", {fps['min']:g} to {fps['max']:g}"
                                 if fps["min"] < fps["max"] else "")
  hours = figures["hours"]
  _field("frames", _count(figures["frames"]))
  _field("video", f"{'unknown' if hours is None else about + _time(hours * 3600)} "
         f"({rate} source frames/s)")
  _field("on disk", f"{projection.size(figures['bytes'])}, "
         f"{projection.size(figures['bytes_per_frame'])} a frame "
         f"({100 * figures['bytes'] / max(figures['bytes_in_memory'], 1):.0f}% of the latents in "
         "memory)")
  _field("lengths", f"all {lengths['min']} frames" if lengths["min"] == lengths["max"] else
         f"{lengths['min']} to {lengths['max']} frames, median {lengths['median']:g}, "
         f"mean {lengths['mean']:.1f}")
  _field("long enough", ", ".join(
    f"for {frames} frames {_count(n)} ({_share(n / records)})"
    for frames, n in figures["long_enough"].items()) + "; at the shortest interval")
  _field("labels", _labels(figures["labels"], looked))
  example = next((f', as "{textwrap.shorten(text, 60)}"' for text in sample.captions if text), "")
  _field("captions", f"{_count(captions) if captions else 'none'} of {looked}{example}")
  _print_buckets(figures["buckets"])
  _print_latents(figures, sample, groups)


def _labels(labels: Mapping[str, Any], looked: str) -> str:
  """How many classes, and the most common ones by records."""
  counts = labels["records"]
  if not counts:
    return f"none of {looked}"
  found = f", {_count(len(counts))} of them" if len(counts) < labels["classes"] else ""
  common = [f"{name} ({_count(n)})" for name, n in list(counts.items())[:_LISTED]]
  rest = f", and {_count(len(counts) - _LISTED)} more" if len(counts) > _LISTED else ""
  return (f"{_counted(labels['classes'], 'class', 'classes')}{found} in "
          f"{_count(labels['labelled'])} of {looked}: {', '.join(common)}{rest}")


def _print_buckets(buckets: Sequence[Mapping[str, Any]]) -> None:
  _field("sizes", _counted(len(buckets), "bucket"))
  rows = [("pixels", "latents", "records", "share", "frames")]
  rows += [(f"{b['height']}x{b['width']}", f"{b['h']}x{b['w']}", _count(b["records"]),
            _share(b["share"]), _count(b["frames"])) for b in buckets[:_LISTED]]
  if others := buckets[_LISTED:]:
    rows.append((f"{len(others)} more", "", _count(sum(b["records"] for b in others)), "", ""))
  _table(rows)


def _print_latents(figures: Mapping[str, Any], sample: inspection.Sample,
                   groups: inspection.Groups) -> None:
  """The stored latents by group, and in the last row what the model sees."""
  latents, seen = figures["latents"], figures["model_sees"]
  bad = f"{_count(latents['non_finite'])} not finite" if latents["non_finite"] else "all finite"
  _field("latents", f"of {_counted(figures['sampled_records'], 'record')}: "
         f"{_count(latents['values'])} values, {bad}")
  stored = sample.stored.grouped(groups).to_json()
  rows = [("", *stored)]
  rows += [(name, *(_number(values[i]) for values in stored.values()))
           for i, name in enumerate(groups)]
  rows.append(("the model sees", *(_number(seen[figure]) for figure in stored)))
  _table(rows)
  if seen["scale_for_std_1"]:
    _field("scale", f"{seen['scale']:g} (one of {seen['scale_for_std_1']:.4g} would make the "
           "standard deviation that the model sees 1)")
  if latents["non_finite"]:
    some = ", ".join(map(str, sample.damaged[:_LISTED]))
    _warn(f"{_count(latents['non_finite'])} stored values of split {sample.split!r} "
          f"are not finite, in {_counted(len(sample.damaged), 'record')} ({some}"
          f"{', ...' if len(sample.damaged) > _LISTED else ''}); encode the data again")


def _print_rejected(rejected: Sequence[Mapping[str, str]]) -> dict[str, Any]:
  """Prints how many videos were left out for which kind of reason; returns the figures."""
  print("\nleft out")
  _field("videos", _count(len(rejected)) if rejected else "none")
  examples: dict[str, str] = {}
  for entry in rejected:
    examples.setdefault(encode.kind(entry["reason"]), entry["source"])
  kinds = dict(collections.Counter(encode.kind(x["reason"]) for x in rejected).most_common())
  for kind, count in list(kinds.items())[:_LISTED]:
    print(f"{'':<{_INDENT}}{_count(count)} {kind}, as {examples[kind]}")
  if others := list(kinds.values())[_LISTED:]:
    print(f"{'':<{_INDENT}}{_count(sum(others))} for {_counted(len(others), 'other reason')}")
  return {"videos": len(rejected), "kinds": kinds}


def _field(name: str, text: str) -> None:
  """Prints a name and what belongs to it, on as many lines as it takes."""
  print(textwrap.fill(text, _WIDTH, initial_indent=f"  {name:<{_INDENT - 2}}",
                      subsequent_indent=" " * _INDENT, break_on_hyphens=False))


def _table(rows: Sequence[Sequence[str]]) -> None:
  """Prints rows in columns: the first flush left, the others right."""
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  for first, *others in rows:
    cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
    print("  ".join([f"{'':<{_INDENT}}{first.ljust(widths[0])}", *cells]))


def _warn(text: str) -> None:
  sys.stdout.flush()
  print(f"warning: {text}", file=sys.stderr, flush=True)


def _count(number: int) -> str:
  return f"{number:,}".replace(",", " ") if number >= 10_000 else str(number)


def _counted(number: int, one: str, several: str = "") -> str:
  return f"{_count(number)} {one if number == 1 else several or one + 's'}"


def _share(part: float) -> str:
  return f"{100 * part:.1f}%" if 0 < part < 1 else f"{100 * part:.0f}%"


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
