"""Several sizes of frames and several data sets: proportions, independence, one size a batch."""

from collections import Counter
import itertools
from types import SimpleNamespace

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import numpy as np
import pytest

from videogpt_jax.data import pipeline
from videogpt_jax.data import turns
from videogpt_jax.errors import InputError


class Memory:
  """Records in memory; a latent says which data set and record it is of."""

  def __init__(self, name, sizes, lengths=None, stride=1):
    self.fingerprint, self.name = f"set{name}", name
    self.sizes = np.asarray(sizes, np.int32)
    self.lengths = np.asarray(lengths if lengths is not None else [8] * len(sizes), np.int32)
    self.info = SimpleNamespace(stride=stride)

  def __len__(self):
    return len(self.lengths)

  def __getitem__(self, index):
    stamp = np.int32(1000 * self.name + index)
    return {"latents": np.full((self.lengths[index], *self.sizes[index], 1), stamp)}


def _take(count, source, **options):
  defaults = {"frames": 2, "interval": (1, 1), "batch_size": 4, "seed": 0}
  return list(itertools.islice(pipeline.batches(source, **{**defaults, **options}), count))


def _rows(batches):
  return [(batch.latents.shape[2:4], int(row.max()) // 1000, int(row.max()) % 1000)
          for batch in batches for row in batch.latents]


# Turns.


@given(
  shares=st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=20), seed=st.integers(0, 2**31),
  start=st.integers(0, 3 * turns.CYCLE))
@settings(max_examples=50, deadline=None)
def test_turns_keep_the_proportions_and_count_right(shares, seed, start):
  order = turns.fair(shares, (seed,))
  assert sum(order.counts) == turns.CYCLE and min(order.counts) >= 1
  exact = np.asarray(shares) / np.sum(shares) * turns.CYCLE
  raised = exact < 1  # the rare ones, at the expense of the frequent ones
  assert np.all(np.asarray(order.counts)[~raised] <= np.floor(exact[~raised]) + 1)
  if not raised.any():
    assert np.all(np.abs(order.counts - exact) <= 1)
  cycle, places = divmod(start, turns.CYCLE)[0], range(start, start + 50)
  before = Counter({i: cycle * count for i, count in enumerate(order.counts)})
  before.update(order(place)[0] for place in range(cycle * turns.CYCLE, start))
  for place in places:
    choice, count = order(place)
    assert count == before[choice]
    before[choice] += 1


def test_turns_are_random():
  order = turns.fair([1, 1], (0,))
  first, second = ([order(place)[0] for place in range(s, s + turns.CYCLE)]
                   for s in (0, turns.CYCLE))
  assert first != second and sum(first) == sum(second) == turns.CYCLE // 2
  changes = np.count_nonzero(np.diff(first))
  assert abs(changes - turns.CYCLE / 2) < 5 * np.sqrt(turns.CYCLE) / 2


# Sizes.


def test_a_batch_has_one_size_and_sizes_their_share_of_the_steps():
  sizes = [(2, 3)] * 60 + [(3, 2)] * 30 + [(4, 4)] * 10
  batches = _take(turns.CYCLE, Memory(0, sizes), batch_size=2)
  steps = Counter(batch.latents.shape[2:4] for batch in batches)
  assert abs(steps[2, 3] - 0.6 * turns.CYCLE) <= 1 and abs(steps[3, 2] - 0.3 * turns.CYCLE) <= 1
  for size, _, record in _rows(batches):
    assert tuple(sizes[record]) == size
  # Within a size every epoch holds every record once.
  of_size = [record for size, _, record in _rows(batches) if size == (4, 4)]
  for epoch in range(len(of_size) // 10):
    assert sorted(of_size[10 * epoch:10 * epoch + 10]) == list(range(90, 100))


def test_rare_sizes_can_be_left_out():
  source = Memory(0, [(2, 3)] * 9 + [(3, 2)] * 2)
  mixture = pipeline.Mixture((source,), min_bucket=3)
  assert pipeline.buckets(mixture, 2, (1, 1)) == {(2, 3): 1.0}
  assert {size for size, _, _ in _rows(_take(40, mixture))} == {(2, 3)}
  with pytest.raises(InputError, match=r"no size of frames has 10 usable records.* holds 9"):
    _take(1, pipeline.Mixture((source,), min_bucket=10))
  assert mixture.fingerprint != source.fingerprint


# Data sets.


@pytest.mark.parametrize("weights", [(), (1.0, 3.0)])
def test_data_sets_have_their_share_of_the_rows(weights):
  one, two = Memory(1, [(2, 3)] * 10), Memory(2, [(2, 3)] * 20 + [(1, 1)] * 10)
  mixture = pipeline.Mixture((one, two), weights)
  batches = _take(turns.CYCLE, mixture, batch_size=4)
  rows = Counter(name for _, name, _ in _rows(batches))
  share = rows[1] / sum(rows.values())
  assert share == pytest.approx(0.25, abs=2e-3)  # 10 of 40 records, or weight 1 of 4
  small = sum(batch.latents.shape[2:4] == (1, 1) for batch in batches) / len(batches)
  assert small == pytest.approx(0.25, abs=2e-3)  # a third of the second's three quarters
  for batch in batches:
    names = batch.latents[:, 0, 0, 0, 0] // 1000
    np.testing.assert_array_equal(batch.data_set, names - 1)


def test_strides_and_intervals_are_each_data_sets_own():
  one, two = Memory(1, [(1, 1)] * 4, stride=1), Memory(2, [(1, 1)] * 4, stride=2)
  for batch in _take(30, pipeline.Mixture((one, two)), interval=(2, 3)):
    for which, interval in zip(batch.data_set, batch.interval, strict=True):
      assert interval in ((2, 3), (2,))[which]


@pytest.mark.parametrize("hosts", [2, 4])
@pytest.mark.parametrize("start", [0, 1234])
def test_hosts_and_resumes_do_not_change_the_rows(hosts, start):
  sources = (Memory(1, [(2, 3)] * 5 + [(3, 2)] * 3), Memory(2, [(3, 2)] * 7))
  mixture = pipeline.Mixture(sources, (2.0, 1.0))
  whole = _take(start + 6, mixture, batch_size=8)[start:]
  parts = [_take(6, mixture, batch_size=8, start_step=start,
                 rows=range(8)[host * 8 // hosts:(host + 1) * 8 // hosts])
           for host in range(hosts)]
  for step, batch in enumerate(whole):
    for leaf, pieces in zip(batch, zip(*(part[step] for part in parts), strict=True), strict=True):
      np.testing.assert_array_equal(leaf, np.concatenate(pieces))


def test_a_single_data_set_of_one_size_is_read_as_ever():
  """Runs that began before there were mixtures go on with the same rows."""
  source = Memory(3, [(1, 2)] * 11)
  alone, mixed = _take(9, source), _take(9, pipeline.Mixture((source,), (5.0,)))
  assert _rows(alone) == _rows(mixed)
  order = np.random.default_rng((0, 0, 0)).permutation(11)
  assert [record for _, _, record in _rows(alone)[:11]] == order.tolist()


def test_mixtures_that_make_no_sense():
  source = Memory(0, [(1, 1)])
  with pytest.raises(InputError, match="2 weights for 1 data sets"):
    pipeline.Mixture((source,), (1.0, 2.0))
  with pytest.raises(InputError, match="must be positive"):
    pipeline.Mixture((source,), (0.0,))
