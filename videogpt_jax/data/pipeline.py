"""The input pipeline: latent records to batches, in an order that the step alone decides.

The data position IS the step. Records of one size form a bucket; every batch comes from one
bucket. If k steps before step s took the same bucket, row r of step s is `order[k * B + r]`,
where order is an endless sequence of epochs of the bucket, each a permutation of its usable
records drawn from (seed, epoch), and the random segment of that row is drawn from its place
in it. Of several data sets that share a bucket each has an order of its own, and `Turns` say
whose record is next, as they say whose bucket. Nothing else enters: not the number of worker
processes, of hosts, or where a run was resumed.
"""

import collections
from collections.abc import Callable, Iterator, Sequence
import dataclasses
import functools
import hashlib
import queue
import signal
import threading
from typing import Any, NamedTuple, Protocol
import weakref

from absl import flags
import grain
from grain.experimental import index_shuffle
import jax
from jaxtyping import Int32, Int64, Shaped
import numpy as np

from videogpt_jax.data import turns
from videogpt_jax.data import worker
from videogpt_jax.errors import InputError

# Streams of random numbers of a seed; a row's segment never depends on its epoch's order.
_ORDER, _SEGMENT, _BUCKET, _SET = range(4)
_ENDLESS = 2**62
# Up to here an epoch's order is a table (grain's index_shuffle is slow for few records);
# beyond, it is computed place by place, so that memory does not grow with the records.
_TABLE = 2**16
_ROUNDS = 4  # of index_shuffle's cipher, grain's own choice
_POLL_SECONDS = 0.2
_THREADS = 2  # one reads while the other waits for the disk or decompresses without the GIL


class Batch(NamedTuple):
  """What this host feeds to one step; `to_device` makes it a global batch of jax arrays.

  Attributes:
    latents: [B, N, h, w, C] as stored, all of one bucket.
    index: int64 [B], the record of each row.
    start: int32 [B], the first source frame of each row.
    interval: int32 [B], source frames between its frames.
    data_set: int32 [B], which of a mixture's data sets the record is from.
  """

  latents: Any
  index: Any
  start: Any
  interval: Any
  data_set: Any


class Records(Protocol):
  """What the pipeline reads: `store.Source`, or anything alike (picklable for workers)."""

  @property
  def lengths(self) -> np.ndarray:
    """int32 [len], stored frames of every record."""

  @property
  def sizes(self) -> np.ndarray:
    """int32 [len, 2], h and w of every record."""

  def __len__(self) -> int:
    """Number of records."""

  @property
  def info(self) -> Any:
    """Has `stride`, the source frames between two stored ones."""

  @property
  def fingerprint(self) -> str:
    """Names the content."""

  def __getitem__(self, index: int) -> dict[str, Any]:
    """A record: at least `latents` [T, h, w, C]."""


@dataclasses.dataclass(frozen=True)
class Mixture:
  """Data sets that are read together.

  Attributes:
    sources: the data sets.
    weights: positive, the shares of rows that come from each; empty: by usable records.
    min_bucket: sizes of which there are fewer usable records in all are left out.
  """

  sources: tuple[Records, ...]
  weights: tuple[float, ...] = ()
  min_bucket: int = 1

  def __post_init__(self) -> None:
    if self.weights and len(self.weights) != len(self.sources):
      raise InputError(f"{len(self.weights)} weights for {len(self.sources)} data sets")
    if not all(0 < weight < float("inf") for weight in self.weights):
      raise InputError(f"the weights of a mixture must be positive, got {self.weights}")

  def __len__(self) -> int:
    return sum(map(len, self.sources))

  @property
  def fingerprint(self) -> str:
    """Names the content and the proportions."""
    names = [source.fingerprint for source in self.sources]
    if len(names) == 1 and self.min_bucket == 1:
      return names[0]
    text = repr((names, self.weights, self.min_bucket))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def intervals(
  length: int, stride: int, frames: int, interval: tuple[int, int]
) -> tuple[int, int] | None:
  """The intervals a record may be sampled at, in STORED frames: (lowest, highest), or None.

  Args:
    length: stored frames of the record.
    stride: source frames between two stored ones.
    frames: N, frames of a sample.
    interval: (lo, hi) in source frames, both included.
  """
  lowest = -(-interval[0] // stride)
  highest = interval[1] // stride
  if frames > 1:  # a single frame has no interval to fit in
    highest = min(highest, (length - 1) // (frames - 1))
  return (lowest, highest) if length >= 1 and lowest <= highest else None


def plan(
  lengths: Int32[np.ndarray, " R"], stride: int, frames: int, interval: tuple[int, int]
) -> Int64[np.ndarray, " U"]:
  """Indices of the records that are long enough for a sample, ascending.

  Args:
    lengths: stored frames of every record.
    stride: source frames between two stored ones.
    frames: N, frames of a sample.
    interval: (lo, hi) frame interval in source frames, both included.

  Raises:
    InputError: the interval does not fit the stride, or no record is usable (with counts).
  """
  check_interval(stride, frames, interval)
  needed = (frames - 1) * -(-interval[0] // stride) + 1
  usable = np.flatnonzero(np.asarray(lengths) >= needed)
  if not len(usable):
    if not len(lengths):
      raise InputError("no usable video: the split has no records; see rejected.jsonl beside it")
    counts = collections.Counter(int(length) for length in lengths)
    top = ", ".join(f"{n} have {t}" for t, n in sorted(counts.items(), reverse=True)[:4])
    raise InputError(
      f"no usable video: {frames} frames at interval {interval[0]} need {needed} stored frames "
      f"(stride {stride}), but all {len(lengths)} records are shorter ({top} frames); "
      "lower data.frames or data.interval, or encode longer videos"
    )
  return usable.astype(np.int64)


def check_interval(stride: int, frames: int, interval: tuple[int, int]) -> None:
  """Raises `InputError` unless some multiple of the stored stride lies in the interval."""
  lo, hi = interval
  if frames < 1:
    raise InputError(f"data.frames must be at least 1, got {frames}")
  if not 1 <= lo <= hi:
    raise InputError(f"data.interval must be (lo, hi) with 1 <= lo <= hi, got ({lo}, {hi})")
  if hi // stride * stride < lo:
    raise InputError(
      f"data.interval ({lo}, {hi}) has no multiple of the stored stride {stride}; choose "
      f"({stride}, {stride}) or encode the videos again with data.stride=1"
    )


@dataclasses.dataclass(frozen=True)
class _Rows:
  """Position in the endless order -> record index and segment; a pure function.

  Of the usable records of one size in one data set.
  """

  data_set: int
  usable: Int64[np.ndarray, " U"]
  lengths: Int32[np.ndarray, " U"]
  stride: int
  frames: int
  interval: tuple[int, int]
  key: tuple[int, ...]

  def record(self, position: int) -> int:
    """Which of the usable records stands at `position`."""
    epoch, place = divmod(position, len(self.usable))
    if len(self.usable) <= _TABLE:
      return int(_table(self.key, epoch, len(self.usable))[place])
    return index_shuffle(place, len(self.usable) - 1, _epoch_seed(self.key, epoch), _ROUNDS)

  def segment(self, position: int, length: int) -> tuple[int, int]:
    """(start, interval) of the row at `position`, both in stored frames."""
    bounds = intervals(length, self.stride, self.frames, self.interval)
    assert bounds is not None, "plan() keeps usable records only"
    rng = np.random.default_rng((*self.key, _SEGMENT, position))
    step = int(rng.integers(bounds[0], bounds[1], endpoint=True))
    start = int(rng.integers(length - (self.frames - 1) * step))
    return start, step


@functools.lru_cache(maxsize=64)  # threads may be in neighbouring epochs, of several buckets
def _table(key: tuple[int, ...], epoch: int, count: int) -> Int64[np.ndarray, " count"]:
  return np.random.default_rng((*key, _ORDER, epoch)).permutation(count)


@functools.lru_cache(maxsize=64)
def _epoch_seed(key: tuple[int, ...], epoch: int) -> int:
  return int(np.random.SeedSequence((*key, _ORDER, epoch)).generate_state(1)[0])


@dataclasses.dataclass(frozen=True)
class _Bucket:
  """Records of one size, of one or several data sets that take turns."""

  size: tuple[int, int]
  share: float  # of all rows
  rows: tuple[_Rows, ...]
  turns: turns.Turns

  def row(self, position: int) -> tuple[_Rows, int]:
    """Where the row at a position of the bucket's endless order comes from."""
    which, place = self.turns(position)
    return self.rows[which], place


def buckets(mixture: Mixture, frames: int, interval: tuple[int, int]
            ) -> dict[tuple[int, int], float]:
  """The share of all rows that every size (h, w) has in training; raises as `batches`."""
  return {bucket.size: bucket.share for bucket in _buckets(mixture, frames, interval, 0)}


def _buckets(mixture: Mixture, frames: int, interval: tuple[int, int], seed: int
             ) -> tuple[_Bucket, ...]:
  usable = [plan(source.lengths, source.info.stride, frames, interval)
            for source in mixture.sources]
  counts = [len(found) for found in usable]
  # A data set's share is divided among its sizes by records.
  weights = [weight / count for weight, count in zip(mixture.weights or counts, counts,
                                                     strict=True)]
  members: dict[tuple[int, int], list[tuple[int, np.ndarray]]] = {}
  for number, (source, found) in enumerate(zip(mixture.sources, usable, strict=True)):
    sizes, which = np.unique(np.asarray(source.sizes)[found], axis=0, return_inverse=True)
    for i, (h, w) in enumerate(sizes.tolist()):
      members.setdefault((h, w), []).append((number, found[which.reshape(-1) == i]))
  kept = {size: parts for size, parts in sorted(members.items())
          if sum(len(found) for _, found in parts) >= mixture.min_bucket}
  if not kept:
    largest = max(sum(len(found) for _, found in parts) for parts in members.values())
    raise InputError(f"no size of frames has {mixture.min_bucket} usable records, the largest "
                     f"bucket holds {largest}; lower data.min_bucket")
  single = len(kept) == len(mixture.sources) == 1
  total = sum(weights[number] * len(found) for parts in kept.values() for number, found in parts)
  made = []
  for (h, w), parts in kept.items():
    rows = tuple(
      _Rows(number, found, np.asarray(mixture.sources[number].lengths)[found],
            mixture.sources[number].info.stride, frames, (interval[0], interval[1]),
            (seed,) if single else (seed, number, h, w))
      for number, found in parts)
    shares = [weights[number] * len(found) for number, found in parts]
    order = turns.fair(shares, (seed, _SET, h, w))
    made.append(_Bucket((h, w), sum(shares) / total, rows, order))
  return tuple(made)


@dataclasses.dataclass(frozen=True)
class _Steps:
  """Step -> this host's rows of the batch, read from the records."""

  sources: tuple[Records, ...]
  buckets: tuple[_Bucket, ...]
  turns: turns.Turns
  batch_size: int
  rows: Sequence[int]

  def __call__(self, step: int) -> Batch:
    which, before = self.turns(step)
    bucket = self.buckets[which]
    latents, index, start, interval, data_set = [], [], [], [], []
    for row in self.rows:
      rows, position = bucket.row(before * self.batch_size + row)
      place = rows.record(position)
      begin, skip = rows.segment(position, int(rows.lengths[place]))
      record = int(rows.usable[place])
      stop = begin + (rows.frames - 1) * skip + 1
      latents.append(self.sources[rows.data_set][record]["latents"][begin:stop:skip])
      index.append(record)
      start.append(begin * rows.stride)
      interval.append(skip * rows.stride)
      data_set.append(rows.data_set)
    return Batch(
      np.stack(latents),
      np.asarray(index, np.int64),
      np.asarray(start, np.int32),
      np.asarray(interval, np.int32),
      np.asarray(data_set, np.int32),
    )


def batches(
  source: Records | Mixture,
  *,
  frames: int,
  interval: tuple[int, int],
  batch_size: int,
  seed: int,
  start_step: int = 0,
  workers: int = 0,
  prefetch: int = 2,
  rows: Sequence[int] | None = None,
) -> Iterator[Batch]:
  """Endless batches from `start_step` on: this host's rows of each global batch.

  Args:
    source: the records, or a mixture of data sets.
    frames: N, frames of a sample.
    interval: (lo, hi) in source frames; a sample draws its interval uniformly from the
      multiples of the stored stride in lo..min(hi, what its video is long enough for).
    batch_size: B, rows of the global batch.
    seed: decides the order and the segments.
    start_step: the step of the first batch.
    workers: processes that read ahead; 0 reads ahead in threads of this process.
    prefetch: batches kept ready, per worker.
    rows: this host's rows of the global batch, see `local_rows`; by default all.

  Raises:
    InputError: no usable record.
  """
  mixture = source if isinstance(source, Mixture) else Mixture((source,))
  found = _buckets(mixture, frames, interval, seed)
  order = turns.fair([bucket.share for bucket in found], (seed, _BUCKET))
  read = _Steps(mixture.sources, found, order, batch_size,
                range(batch_size) if rows is None else tuple(rows))
  steps = grain.MapDataset.range(_ENDLESS).map(read)[start_step:]
  options = grain.ReadOptions(num_threads=min(_THREADS, prefetch), prefetch_buffer_size=prefetch)
  dataset = steps.to_iter_dataset(options)
  if not flags.FLAGS.is_parsed():  # grain reads flags; notebooks and tests never parse any
    flags.FLAGS.mark_as_parsed()
  if workers:
    dataset = dataset.mp_prefetch(
      grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=max(1, prefetch)),
      worker_init_fn=_start_worker,
    ).map(_copy)
  return iter(dataset)


def _copy(batch: Batch) -> Batch:
  """Out of the shared memory, which is freed at once and not whenever jax lets go of it."""
  return Batch(*(np.array(leaf) for leaf in batch))


def _start_worker(index: int, count: int) -> None:
  del index, count
  worker.obey_parent(signal.SIGTERM)  # the parent may still need a batch; grain stops its workers


def local_rows(sharding: jax.sharding.Sharding, batch_size: int) -> tuple[int, ...]:
  """The rows of the global batch that devices of this process hold, ascending.

  Where a mesh splits samples (heads, sequence) over processes, several hold the same rows.

  Args:
    sharding: of the leading axis of a batch.
    batch_size: B, rows of the global batch.

  Raises:
    InputError: the rows do not divide among the devices.
  """
  try:
    held = sharding.addressable_devices_indices_map((batch_size,)).values()
  except ValueError as error:
    raise InputError(
      f"a batch of {batch_size} rows does not divide among the devices of {sharding}; "
      "change train.batch_size or the mesh"
    ) from error
  everything = range(batch_size)
  return tuple(sorted({row for index in held for row in everything[(index or (slice(None),))[0]]}))


class DeviceBatches(Iterator[Batch]):
  """Batches on their way to the devices; see `to_device`."""

  def __init__(self, iterator: Iterator[Batch], put: Callable[[Batch], Batch], prefetch: int):
    self._ready: queue.SimpleQueue[Batch | BaseException | None] = queue.SimpleQueue()
    self._ahead, stop = threading.Semaphore(prefetch + 1), threading.Event()
    self._next: list[Batch | BaseException | None] = []  # taken from the queue, not asked for yet
    self._in_use = False
    # The thread must not know of this object, whose end is its own.
    arguments = iterator, put, self._ready, self._ahead, stop
    thread = threading.Thread(target=_feed, args=arguments, name="batches to devices", daemon=True)
    thread.start()
    self._end = weakref.finalize(self, _end_feed, iterator, self._ahead, stop, thread)
    self._end.atexit = False  # the thread may never end

  def wait(self, stop: Callable[[], bool]) -> bool:
    """Waits for the next batch; whether it is there, or `stop` said so before."""
    self._release()
    while not self._next:
      try:
        self._next.append(self._ready.get(timeout=_POLL_SECONDS))
      except queue.Empty:
        if stop():
          return False
    return True

  def __next__(self) -> Batch:
    if not self._end.alive:
      raise StopIteration
    self._release()
    batch = self._next.pop() if self._next else self._ready.get()
    if isinstance(batch, Batch):
      self._in_use = True
      return batch
    self.close()
    if batch is None:
      raise StopIteration
    raise batch

  def close(self) -> None:
    """Waits until the batch being read is there, and ends the thread and the iterator's workers."""
    self._end()

  def _release(self) -> None:
    """The batch given out last is not in use any more."""
    if self._in_use:
      self._in_use = False
      self._ahead.release()


def _feed(iterator: Iterator[Batch], put: Callable[[Batch], Batch],
          ready: "queue.SimpleQueue[Batch | BaseException | None]",
          ahead: threading.Semaphore, stop: threading.Event) -> None:
  try:
    while ahead.acquire() and not stop.is_set():
      ready.put(put(next(iterator)))
  except StopIteration:
    ready.put(None)
  except BaseException as error:  # raised where the batch is asked for
    ready.put(error)


def _end_feed(iterator: Iterator[Batch], ahead: threading.Semaphore, stop: threading.Event,
              thread: threading.Thread) -> None:
  stop.set()
  ahead.release()
  thread.join()
  if hasattr(iterator, "close"):
    iterator.close()  # left to the garbage collector, shared memory of workers leaks


def to_device(
  iterator: Iterator[Batch], sharding: jax.sharding.Sharding, prefetch: int = 2,
  batch_size: int | None = None,
) -> DeviceBatches:
  """Puts batches on the devices ahead of time, in a thread, so that a step never waits for that.

  Closing it ends the iterator's workers too.

  Args:
    iterator: host batches; every process passes its `local_rows`.
    sharding: of the leading axis of every leaf, over the devices of all processes.
    prefetch: batches on their way or there beyond the one in use.
    batch_size: B, rows of the global batch; by default those that this process passes.

  Raises:
    InputError: the rows do not divide among the devices; where the first batch is asked for.
  """
  return DeviceBatches(iterator, lambda batch: _put(batch, sharding, batch_size), prefetch)


def _put(batch: Batch, sharding: jax.sharding.Sharding, batch_size: int | None) -> Batch:
  """The global batch, of which `batch` holds this process's rows."""
  size = batch_size or len(batch.index)
  rows = np.asarray(local_rows(sharding, size))
  assert len(rows) == len(batch.index), "read by rows=local_rows(...)"

  def put(held: Shaped[np.ndarray, "b ..."]) -> jax.Array:
    def of_device(index: tuple[slice, ...] | None) -> np.ndarray:
      begin, end, _ = (index or (slice(None),))[0].indices(size)
      return held[np.searchsorted(rows, begin):np.searchsorted(rows, end)]

    return jax.make_array_from_callback((size, *held.shape[1:]), sharding, of_device)

  return Batch(*(put(leaf) for leaf in batch))
