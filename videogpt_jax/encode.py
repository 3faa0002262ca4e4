"""Videos to a latent data set, once, before training.

    python -m videogpt_jax.encode --config=configs/tiny.py
    python -m videogpt_jax.encode --config=configs/videos.py --videos=my_videos --out=data/mine
    python -m videogpt_jax.encode --config=configs/stage1.py --videos=list.csv --shard=3/64
    python -m videogpt_jax.encode --config=configs/videos.py --videos=tfds:moving_mnist --out=...

The videos come from a folder, a list (see `data/listing.py`), a TFDS data set (see
`data/tfds_videos.py`) or the simulated world (`config.data.source`). A video that cannot be
used is listed in `rejected.jsonl` with its reason and the run goes on, also when its decoder
hangs or crashes. After an interruption of any kind the same command continues where it stopped,
and the data set has the same bytes whatever happened on the way and however many processes and
machines took part.
"""

import collections
from collections.abc import Iterator
import dataclasses
import os
from pathlib import Path
import shutil
import sys
import time
from typing import Any

from absl import flags
import jax
from ml_collections import config_flags
from ml_collections import ConfigDict

from videogpt_jax import cli
from videogpt_jax import codec as codec_lib
from videogpt_jax import config as config_lib
from videogpt_jax import distributed
from videogpt_jax import machine
from videogpt_jax import transcode
from videogpt_jax.data import clips
from videogpt_jax.data import projection
from videogpt_jax.data import store
from videogpt_jax.errors import InputError

_REDRAW_S = {True: 0.2, False: 5.0}  # between progress lines: on a terminal, in a log
_TFDS = "tfds:"  # of --videos


@dataclasses.dataclass(frozen=True)
class _Job:
  """What belongs into which shard."""

  videos: clips.Videos
  codec: codec_lib.Codec
  writer: store.Writer
  per_shard: int

  def numbers(self, shard: transcode.Shard) -> range:
    """The numbers of the videos that belong into a shard."""
    split, index = shard
    first = index * self.per_shard
    return range(first, min(first + self.per_shard, self.videos.count(split)))

  def items(self, shard: transcode.Shard) -> Iterator[tuple[str, Any]]:
    """See `transcode.Work`."""
    split, _ = shard
    for number in self.numbers(shard):
      yield self.videos.name(split, number), self.videos.item(split, number)


class _Progress:
  """One line: redrawn in place on a terminal, now and then a new one in a log."""

  def __init__(self, total: int):
    self._total = total
    self._drawn = -float("inf")
    self._tty = sys.stdout.isatty()

  def __call__(self, usage: transcode.Usage, final: bool = False) -> None:
    now = time.monotonic()
    if not final and now - self._drawn < _REDRAW_S[self._tty]:
      return
    self._drawn = now
    rate = usage.videos / max(usage.elapsed, 1e-9)
    eta = f"{(self._total - usage.videos) / rate:.0f}s" if usage.videos else "?"
    line = (
      f"encode {usage.videos}/{self._total} videos {100 * usage.videos / self._total:5.1f}% | "
      f"{usage.frames / max(usage.elapsed, 1e-9):.0f} frames/s | {usage.rejected} rejected | "
      f"{usage.shares()} | eta {eta}"
    )
    if self._tty:
      print(f"\r{line}\033[K", end="\n" if final else "", flush=True)
    else:
      print(line, flush=True)


def _plan(config: ConfigDict, videos: clips.Videos, out: Path, masks: bool) -> _Job:
  """Decides what the records and shards are, and opens the folder for writing."""
  codec = config_lib.codec(config)
  per_shard = config.data.videos_per_shard
  if per_shard < 1:
    raise InputError(f"data.videos_per_shard must be at least 1, got {per_shard}")
  spec = store.Spec(
    channels=codec_lib.stored_channels(codec),
    dtype=codec.dtype.name,
    codec=codec.spec(),
    moments=codec.moments,
    stride=config.data.stride,
    masks=masks,
    labels=videos.labels,
  )
  shards = {s: -(-videos.count(s) // per_shard) for s in clips.SPLITS if videos.count(s)}
  writer = store.create(out, spec, shards, {**videos.describe(), "per_shard": per_shard})
  return _Job(videos, codec, writer, per_shard)


def encode(
  config: ConfigDict,
  *,
  out: str | os.PathLike[str] = "",
  processes: int = 0,
  shard: int = 0,
  shards: int = 1,
  masks: bool = False,
) -> Path:
  """Writes the data set that `config` describes, or finishes what an earlier run began.

  Args:
    config: see `videogpt_jax.config`; sections data, codec and (for the world) world.
    out: the folder; default `config.data.path`.
    processes: how many decode; 0: as many as there are CPU cores.
    shard, shards: do only part number `shard` of so many, so that several machines or jobs
      share the work in one folder; who comes last completes the data set.
    masks: store the per-object masks of the simulated world.

  Returns:
    The folder.

  Raises:
    InputError: no video can be used (says why), settings that fit no video, a folder that
      cannot be written or holds something else, a full disk.
  """
  out = out or config.data.path
  if not out:
    raise InputError("no folder to write to: give --out=DIR (or set data.path)")
  if not 0 <= shard < shards:
    raise InputError(f"--shard={shard}/{shards}: I of I/N goes from 0 to N less one")
  start = time.monotonic()
  videos = clips.find(config, masks)
  job = _plan(config, videos, Path(out), masks)
  writer = job.writer
  if not writer.complete:
    pending = set(writer.pending())
    todo = [one for one in writer.every()[shard::shards] if one in pending]
    if todo:
      _write(job, todo, processes or machine.usable_cores())
    if left := writer.pending():
      print(f"encode: {len(left)} of {len(writer.every())} shards are left to other jobs; the "
            "last one completes the data set")
      return writer.path
    _refuse_if_empty(job)
    writer.finish()
  _report(writer, time.monotonic() - start)
  return writer.path


def _write(job: _Job, todo: list[transcode.Shard], processes: int) -> None:
  """Writes shards, told before, meanwhile and after."""
  count = sum(len(job.numbers(one)) for one in todo)
  print(f"encode {count} videos ({job.videos.describe()['source']}) to {job.writer.path}, "
        f"{len(todo)} shards", flush=True)
  expected = projection.project(job.videos, job.codec)
  print(f"encode expects about {expected.describe()}", flush=True)
  free = shutil.disk_usage(job.writer.path).free
  if expected.num_bytes > free:
    print(f"warning: only {projection.size(free)} are free there", file=sys.stderr, flush=True)
  job.codec.prepare()
  progress = _Progress(count)
  usage = transcode.run(job, todo, job.writer, job.codec, job.videos.loader, processes=processes,
                        timeout_s=job.videos.timeout_s, show=progress)
  progress(usage, final=True)
  rate = usage.frames / max(usage.elapsed, 1e-9)
  print(f"encode: {usage.videos} videos, {usage.clips} clips of {usage.frames} frames in "
        f"{usage.elapsed:.1f} s, {rate:.1f} frames/s; busy: {usage.shares()}; waited for "
        f"decoders {usage.starved:.1f} s, for latents and disk {usage.blocked:.1f} s")


def _refuse_if_empty(job: _Job) -> None:
  """Raises `InputError`, after tidying up, if no training video was usable."""
  writer = job.writer
  if writer.num_records("train"):
    return
  rejected = writer.rejected()
  kinds = collections.Counter(entry["reason"].split(":")[0] for entry in rejected)
  counts = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
  some = "".join(f"\n  {entry['source']}: {entry['reason']}" for entry in rejected[:5])
  writer.abandon()
  raise InputError(
    f"none of {len(rejected)} videos can be used for training ({counts}); all are listed in "
    f"{writer.path / store.REJECTED}, the first are:{some}"
  )


def _report(writer: store.Writer, seconds: float) -> None:
  rejected = writer.rejected()
  for split in writer.shards:
    source = store.open_split(writer.path, split)
    sizes = ", ".join(f"{count} of {h}x{w}" for (h, w), count in source.buckets().items())
    print(f"encode {split}: {len(source)} records, {int(source.lengths.sum())} frames, "
          f"{projection.size(source.num_bytes)}; latents {sizes or 'none'}")
    if not len(source):
      print(f"warning: no usable video in split {split!r}", file=sys.stderr)
  counts = {split: writer.num_records(split) for split in writer.shards}
  held = " and ".join(f"{count} {split}" for split, count in counts.items())
  if rejected:
    kinds = collections.Counter(kind(entry["reason"]) for entry in rejected)
    print(f"encode left out {len(rejected)} videos, see {writer.path / store.REJECTED}:")
    for name, count in kinds.most_common():
      print(f"  {count:>8} {name}")
  print(f"encode done: {held} records in {writer.path}, {seconds:.1f} s")


def kind(reason: str) -> str:
  """What sort of reason it is, without the numbers of one video."""
  return reason.partition(":")[0]


def _shard_of(text: str) -> tuple[int, int]:
  """I and N of --shard=I/N; without it, all."""
  if not text:
    return 0, 1
  index, slash, count = text.partition("/")
  if not (slash and index.isdecimal() and count.isdecimal() and int(index) < int(count)):
    raise InputError(f"--shard={text} is not I/N with I from 0 to N less one, as in 0/64")
  return int(index), int(count)


def _process_of_cluster() -> tuple[int, int]:
  """This process's number among those of jax.distributed, and how many there are.

  Raises:
    InputError: the environment names no cluster.
    RuntimeError: the others do not come.
  """
  distributed.initialize(otherwise="share the work by --shard=I/N")
  process = jax.process_index(), jax.process_count()
  # From here on nobody waits for another: who is done goes, and who dies takes nobody along.
  jax.distributed.shutdown()
  return process


def main() -> None:
  """The command; see the module's documentation."""
  f = flags.FLAGS
  config = f.config
  if f.vae:
    if config.codec.id != "vae":
      raise InputError(f"config.codec.id is {config.codec.id!r}: leave out --vae, or set it to "
                       "\"vae\"")
    config.codec.path = f.vae
  if f.videos:
    named = f.videos.startswith(_TFDS)
    config.data.source = "tfds" if named else "videos"
    config.data.videos = f.videos.removeprefix(_TFDS)
  if f.distributed and f.shard:
    raise InputError("--distributed and --shard both share the work; give one of them")
  shard, shards = _process_of_cluster() if f.distributed else _shard_of(f.shard)
  machine.use_platform(config.platform)
  out = Path(f.out or config.data.path or ".").expanduser()
  if not f.resume and out.is_dir() and any(out.iterdir()):
    raise InputError(f"--noresume: {out} is not empty; delete it or choose another folder")
  encode(config, out=f.out, processes=f.processes, shard=shard, shards=shards, masks=f.masks)


def _define_flags() -> None:
  config_flags.DEFINE_config_file("config", None, "The experiment, such as configs/tiny.py. Any "
                                  "leaf can be set, such as --config.data.min_side=128.")
  flags.DEFINE_string("videos", "", "Folder of video files, or a list of them: .txt (a path a "
                      "line, or path, tab, frames), .csv or .parquet (columns path, start, end, "
                      "label, caption, split), or a published list with --config.data.recipe; "
                      "or tfds:NAME[/CONFIG][:VERSION], a TensorFlow data set such as "
                      "tfds:moving_mnist; default: config.data.videos.")
  flags.DEFINE_string("vae", "", "Folder (or hub name) of the autoencoder; default: "
                      "config.codec.path.")
  flags.DEFINE_string("out", "", "Folder of the data set; default: config.data.path.")
  flags.DEFINE_integer("processes", 0, "Processes that decode; 0: one per CPU core.",
                       lower_bound=0)
  flags.DEFINE_string("shard", "", "I/N: do part I (from 0) of N, all in one folder; whoever is "
                      "last completes the data set.")
  flags.DEFINE_boolean("distributed", False, "Share the work among the processes of "
                       "jax.distributed, as its environment says (TPU pods, SLURM, GKE).")
  flags.DEFINE_boolean("resume", True, "Skip what an interrupted run has finished; --noresume "
                       "refuses a folder that holds anything.")
  flags.DEFINE_boolean("masks", False, "Store the simulated world's object masks.")
  flags.mark_flag_as_required("config")


if __name__ == "__main__":
  _define_flags()
  cli.run(main)
