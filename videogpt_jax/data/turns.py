"""Whose turn it is: an endless sequence of choices in fixed proportions, at random places."""

from collections.abc import Sequence
import dataclasses
import functools

import numpy as np

CYCLE = 4096  # places after which the proportions are exact again


@dataclasses.dataclass(frozen=True)
class Turns:
  """Choices 0..n-1 in cycles of `CYCLE` places, each a permutation drawn from (key, cycle).

  In every cycle choice i stands `counts[i]` times. Any place is found without those before
  it, so that whoever reads the sequence may begin anywhere.

  Attributes:
    counts: of each choice in a cycle.
    key: seeds of the permutations.
  """

  counts: tuple[int, ...]
  key: tuple[int, ...]

  def __call__(self, place: int) -> tuple[int, int]:
    """The choice at a place, and how often the same one stands before it."""
    if len(self.counts) == 1:
      return 0, place
    cycle, within = divmod(place, CYCLE)
    choices, before = _cycle(self.counts, self.key, cycle)
    choice = int(choices[within])
    return choice, cycle * self.counts[choice] + int(before[within])


def fair(shares: Sequence[float], key: tuple[int, ...]) -> Turns:
  """Turns in proportion to `shares` (positive), but none less than once a cycle."""
  exact = np.asarray(shares, np.float64) / np.sum(shares) * CYCLE
  counts = np.maximum(np.floor(exact).astype(int), 1)
  while (left := CYCLE - counts.sum()) > 0:  # to those that lack most
    order = np.argsort(counts - exact, kind="stable")[:left]
    counts[order] += 1
  while (over := counts.sum() - CYCLE) > 0:  # from those that have most too much
    most = np.argsort(exact - counts, kind="stable")
    counts[most[counts[most] > 1][:over]] -= 1
  return Turns(tuple(int(count) for count in counts), key)


@functools.lru_cache(maxsize=64)
def _cycle(counts: tuple[int, ...], key: tuple[int, ...], cycle: int
           ) -> tuple[np.ndarray, np.ndarray]:
  """The choices of a cycle, and how often each stood before in it."""
  rng = np.random.default_rng((*key, cycle))
  choices = rng.permutation(np.repeat(np.arange(len(counts)), counts))
  before = np.empty(CYCLE, np.int64)
  for choice, count in enumerate(counts):
    before[choices == choice] = np.arange(count)
  return choices, before
