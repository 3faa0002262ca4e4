"""The input pipeline: the step alone decides what is read, and every draw has its law."""

from collections import Counter
import itertools
import subprocess
import sys
import textwrap
import threading
import time
import tracemalloc
from types import SimpleNamespace

from absl import flags
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np
import pytest

from videogpt_jax.data import pipeline
from videogpt_jax.data import store
from videogpt_jax.errors import InputError


class Memory:
  """Records in memory; a latent says which record and which stored frame it is."""

  fingerprint = "memory"

  def __init__(self, lengths, stride=1, sizes=(1, 1)):
    self.lengths = np.asarray(lengths, np.int32)
    self.sizes = np.broadcast_to(np.asarray(sizes, np.int32), (len(lengths), 2))
    self.info = SimpleNamespace(stride=stride)

  def __len__(self):
    return len(self.lengths)

  def __getitem__(self, index):
    frames = np.arange(self.lengths[index], dtype=np.int32)
    stamp = (1000 * index + frames).reshape(-1, 1, 1, 1)
    return {"latents": stamp * np.ones((*self.sizes[index], 1), np.int32)}


def _take(count, source, **options):
  defaults = {"frames": 2, "interval": (1, 1), "batch_size": 4, "seed": 0}
  return list(itertools.islice(pipeline.batches(source, **{**defaults, **options}), count))


def _join(batches):
  return pipeline.Batch(*(np.concatenate(leaves) for leaves in zip(*batches, strict=True)))


def _same(a, b):
  for x, y in zip(a, b, strict=True):
    np.testing.assert_array_equal(x, y)


def _chi_square(counts, expected):
  return float(((np.asarray(counts) - expected) ** 2 / expected).sum())


@given(
  lengths=st.lists(st.integers(0, 30), min_size=1, max_size=12),
  stride=st.integers(1, 3),
  frames=st.integers(1, 6),
  low=st.integers(1, 4),
  span=st.integers(0, 6),
  batch_size=st.sampled_from([4, 8]),
  seed=st.integers(0, 2**31),
  start_step=st.integers(0, 10**9),
)
@settings(max_examples=60, deadline=None)
def test_every_batch_obeys_the_design(
  lengths, stride, frames, low, span, batch_size, seed, start_step
):
  """Checked from the latents alone, which say where each of them came from."""
  source = Memory(lengths, stride)
  options = {"frames": frames, "interval": (low, low + span), "batch_size": batch_size}
  legal = [k for k in range(low, low + span + 1) if k % stride == 0]
  sources_frames = [(n - 1) * stride + 1 for n in lengths]
  fits = {
    i: [k for k in legal if (frames - 1) * k + 1 <= total]
    for i, total in enumerate(sources_frames)
    if lengths[i] > 0
  }
  fits = {i: ks for i, ks in fits.items() if ks}
  if not fits:
    with pytest.raises(InputError):
      _take(1, source, seed=seed, **options)
    return
  (batch,) = _take(1, source, seed=seed, start_step=start_step, **options)
  assert batch.latents.shape == (batch_size, frames, 1, 1, 1)
  record, frame = np.divmod(batch.latents[..., 0, 0, 0], 1000)
  for row in range(batch_size):
    assert set(record[row]) == {batch.index[row]} <= set(fits)
    assert batch.interval[row] in fits[batch.index[row]]
    expected = batch.start[row] + batch.interval[row] * np.arange(frames)
    np.testing.assert_array_equal(frame[row] * stride, expected)
    assert batch.start[row] >= 0 and frame[row, -1] < lengths[batch.index[row]]


@given(
  records=st.integers(1, 20),
  seed=st.integers(0, 2**31),
  batch_size=st.sampled_from([4, 8, 12]),
  start_step=st.integers(0, 10),
  hosts=st.sampled_from([1, 2, 4]),
)
@settings(max_examples=30, deadline=None)
def test_the_order_is_that_of_one_endless_sequence(records, seed, batch_size, start_step, hosts):
  """Of any start, batch size and number of hosts: all are windows on the same rows."""
  source = Memory(np.arange(records) % 5 + 4)
  options = {"interval": (1, 3), "seed": seed}
  whole = _join(_take(2, source, batch_size=12 * 12 // 2, **options))
  shared = [
    _take(
      2, source, batch_size=batch_size, start_step=start_step,
      rows=range(batch_size)[host * (batch_size // hosts):(host + 1) * (batch_size // hosts)],
      **options
    )
    for host in range(hosts)
  ]
  first = start_step * batch_size
  together = _join([_join(parts) for parts in zip(*shared, strict=True)])
  _same(together, [leaf[first : first + 2 * batch_size] for leaf in whole])


def test_every_epoch_is_a_permutation_and_no_two_are_alike():
  source = Memory([3, 9, 9, 1, 9, 9, 9, 9])  # record 3 is too short
  order = _join(_take(70, source)).index  # 280 rows: 40 epochs of 7
  epochs = order.reshape(40, 7)
  assert {tuple(sorted(epoch)) for epoch in epochs} == {(0, 1, 2, 4, 5, 6, 7)}
  assert len({tuple(epoch) for epoch in epochs}) > 35
  assert not np.array_equal(order, _join(_take(70, source, seed=1)).index)


def test_many_records_are_a_permutation_too():
  """Beyond 2**16 records the order is computed place by place."""
  count = 2**16 + 5
  batches = _take(6, Memory([2] * count), batch_size=count // 3 + 1)  # two epochs, a little more
  order = _join(batches).index
  first, second = order[:count], order[count : 2 * count]
  assert sorted(first) == sorted(second) == list(range(count))
  assert np.mean(first == second) < 0.001
  for epoch in (first, second):  # no trend: neighbours are as far apart as at random
    assert abs(np.abs(np.diff(epoch)).mean() / count - 1 / 3) < 0.01
    assert abs(np.corrcoef(np.arange(count), epoch)[0, 1]) < 0.02


def test_places_in_an_epoch_are_uniform():
  """Which record stands first, over many epochs: chi-square, 9 degrees of freedom."""
  first = _join(_take(4000, Memory([2] * 10), batch_size=10)).index.reshape(4000, 10)
  for place in (0, 9):
    assert _chi_square(np.bincount(first[:, place], minlength=10), 400) < 33.7  # p = 1e-4


def test_segments_are_uniform():
  """20 stored frames, stride 2, N = 4: intervals 2..12 (six), and all their starts, evenly."""
  batch = _join(_take(3000, Memory([20], stride=2), frames=4, interval=(1, 99), batch_size=8))
  interval = Counter(batch.interval.tolist())
  assert sorted(interval) == [2, 4, 6, 8, 10, 12]
  assert _chi_square(list(interval.values()), 24000 / 6) < 25.7  # 5 degrees, p = 1e-4
  starts = np.bincount(batch.start[batch.interval == 10] // 2)
  assert len(starts) == 5  # the last frame starts at 2 * 19 - 3 * 10 = 8
  assert _chi_square(starts, starts.sum() / 5) < 23.5  # 4 degrees, p = 1e-4


def test_order_and_segments_are_independent():
  """A record does not always come with the same start, nor neighbours with equal ones."""
  batch = _join(_take(500, Memory([9, 9]), batch_size=4))
  per_record = [np.bincount(batch.start[batch.index == i], minlength=8) for i in (0, 1)]
  for counts in per_record:
    assert _chi_square(counts, counts.sum() / 8) < 29.9  # 7 degrees, p = 1e-4
  pairs = np.bincount(batch.start[:-1] * 8 + batch.start[1:], minlength=64)
  assert _chi_square(pairs, pairs.sum() / 64) < 116  # 63 degrees, p = 5e-5


def test_workers_change_nothing(tmp_path):
  writer = store.create(tmp_path, store.Spec(3, "uint8", {}), {"train": 1}, {})
  rng = np.random.default_rng(0)
  with writer.shard("train", 0) as shard:
    for length in range(3, 20):
      shard.add(rng.integers(0, 256, (length, 2, 2, 3), np.uint8), fps=1.0, source="x")
  writer.finish()
  source = store.open_split(tmp_path, "train")
  options = {"frames": 3, "interval": (1, 4), "start_step": 7}
  alone = _take(12, source, workers=0, **options)
  for batch, other in zip(alone, _take(12, source, workers=2, **options), strict=True):
    _same(batch, other)
  for batch, other in zip(alone, _take(12, source, prefetch=0, **options), strict=True):
    _same(batch, other)


def test_runs_in_a_program_that_never_parsed_flags():
  program = """
    from types import SimpleNamespace
    import numpy as np
    from videogpt_jax.data import pipeline
    class Source:
      lengths, info = np.array([4], np.int32), SimpleNamespace(stride=1)
      sizes = np.ones((1, 2), np.int32)
      def __getitem__(self, index):
        return {"latents": np.zeros((4, 1, 1, 1))}
    if __name__ == "__main__":
      it = pipeline.batches(Source(), frames=2, interval=(1, 1), batch_size=2, seed=0, workers=1)
      print(next(it).latents.shape)
  """
  done = subprocess.run(
    [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=True
  )
  assert done.stdout.strip() == "(2, 2, 1, 1, 1)"
  assert flags.FLAGS.is_parsed()  # in this process: by the tests above


def test_memory_does_not_grow():
  iterator = pipeline.batches(
    Memory([50] * 100_000), frames=10, interval=(1, 1), batch_size=16, seed=0
  )
  for _ in range(20):
    next(iterator)
  tracemalloc.start()
  for _ in range(500):
    next(iterator)
  grown, _ = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert grown < 100_000  # bytes; the batches alone were 320 000, the records 20 000 000


def test_plan_keeps_what_is_long_enough():
  lengths = np.array([8, 9, 10, 0, 17], np.int32)
  assert pipeline.plan(lengths, 1, 9, (1, 1)).tolist() == [1, 2, 4]
  assert pipeline.plan(lengths, 1, 9, (2, 5)).tolist() == [4]
  assert pipeline.plan(lengths, 2, 9, (2, 2)).tolist() == [1, 2, 4]  # stored frames: stride 2
  assert pipeline.plan(lengths, 3, 5, (2, 3)).tolist() == [0, 1, 2, 4]  # 2 is rounded up to 3


def test_no_usable_record_says_why():
  with pytest.raises(InputError, match=r"16 frames at interval 2 need 31 stored frames") as error:
    pipeline.plan(np.array([8, 3, 8, 30], np.int32), 1, 16, (2, 4))
  assert "all 4 records are shorter (1 have 30, 2 have 8, 1 have 3 frames)" in str(error.value)
  with pytest.raises(InputError, match="the split has no records"):
    pipeline.plan(np.array([], np.int32), 1, 16, (1, 1))


@pytest.mark.parametrize("interval", [(1, 1), (3, 3), (5, 5)])
def test_interval_that_is_no_multiple_of_the_stride(interval):
  with pytest.raises(InputError, match=r"no multiple of the stored stride 2.*\(2, 2\)"):
    _take(1, Memory([9], stride=2), interval=interval)


@pytest.mark.parametrize("interval", [(0, 1), (3, 2)])
def test_senseless_interval(interval):
  with pytest.raises(InputError, match=r"1 <= lo <= hi"):
    _take(1, Memory([9]), interval=interval)


def test_batch_that_does_not_divide():
  mesh = jax.make_mesh((len(jax.devices()),), ("data",))
  sharding = NamedSharding(mesh, PartitionSpec("data"))
  batches = pipeline.batches(
    Memory([9]), frames=2, interval=(1, 1), batch_size=len(jax.devices()) + 1, seed=0
  )
  if len(jax.devices()) > 1:
    with pytest.raises(InputError, match="does not divide among the devices"):
      next(pipeline.to_device(batches, sharding))


def test_to_device_keeps_order_and_values():
  mesh = jax.make_mesh((len(jax.devices()),), ("data",))
  sharding = NamedSharding(mesh, PartitionSpec("data"))
  source = Memory(np.arange(5, 30))
  expected = _take(6, source, batch_size=8)
  for prefetch in (0, 3):
    host = iter(_take(6, source, batch_size=8))
    got = list(pipeline.to_device(host, sharding, prefetch))
    assert len(got) == 6
    for batch, reference in zip(got, expected, strict=True):
      assert isinstance(batch.latents, jax.Array) and batch.latents.sharding == sharding
      _same(batch, reference)


def test_to_device_reads_ahead_by_its_prefetch():
  sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  pulled = []

  def count():
    for batch in pipeline.batches(
      Memory([9]), frames=2, interval=(1, 1), batch_size=2, seed=0
    ):
      pulled.append(batch)
      yield batch

  iterator = pipeline.to_device(count(), sharding, prefetch=2)
  for expected in (3, 4, 5):
    next(iterator)
    deadline = time.monotonic() + 10
    while len(pulled) < expected:
      assert time.monotonic() < deadline
      time.sleep(0.001)
    time.sleep(0.05)
    assert len(pulled) == expected
  iterator.close()
  assert "batches to devices" not in [thread.name for thread in threading.enumerate()]


def test_the_wait_for_a_batch_can_be_cut_short():
  """Storage hangs; a batch that comes later is still there."""
  sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  expected, storage = _take(2, Memory([9])), threading.Event()

  def hangs():
    yield expected[0]
    storage.wait()
    yield expected[1]

  iterator = pipeline.to_device(hangs(), sharding)
  assert iterator.wait(lambda: False)
  _same(next(iterator), expected[0])
  asked = []
  assert not iterator.wait(lambda: not asked.append(0) and len(asked) > 1)
  storage.set()
  assert iterator.wait(lambda: False) and iterator.wait(lambda: True)
  _same(next(iterator), expected[1])
  assert list(iterator) == [] == list(iterator)
  assert "batches to devices" not in [thread.name for thread in threading.enumerate()]


def test_to_device_raises_what_went_wrong_in_the_thread():
  sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])

  def broken():
    yield from _take(2, Memory([9]))
    raise InputError("record 7 cannot be read")

  got = []
  with pytest.raises(InputError, match="record 7 cannot be read"):
    for batch in pipeline.to_device(broken(), sharding):
      got.append(batch)
  assert len(got) == 2
