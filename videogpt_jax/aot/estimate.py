"""An estimate of a train step's time: a roofline of arithmetic, memory and exchanges.

Each of the three is the work over the data sheet's rate times a share of it that programs
attain. They overlap, nobody knows how far before the program has run: so there is a shortest
time (the slowest of the three hides the others) and a longest (nothing is hidden).
"""

from collections.abc import Sequence
import dataclasses

from videogpt_jax import flops
from videogpt_jax import machine
from videogpt_jax.aot import chips
from videogpt_jax.aot import facts as facts_lib
from videogpt_jax.aot import hlo

# Shares of the data sheets' rates. Products: 770 to 800 of 989 TFLOP/s were measured on an H200
# for large ones, those of a model are smaller. Attention: FlashAttention-2 and Triton reach 370
# and 395 of 989 on an H100 (arXiv 2407.08608). Memory and links: ours.
PRODUCTS = 0.7
ATTENTION = 0.4
MEMORY = 0.8
LINKS = 0.7

# Products over visible pairs: forward 2; backward 4 needed, but kernels compute scores again,
# once (TPU: one pass) or twice (GPU: one pass for dq, one for dk and dv, each with dP).
_BACKWARD = {"tpu": 5, "gpu": 7, "xla": 5, "reference": 4}


@dataclasses.dataclass(frozen=True)
class Estimate:
  """Seconds of a step.

  Attributes:
    compute: arithmetic, recomputation included.
    memory: reading and writing the devices' memory.
    exchange: collectives.
    mfu: from the longest time to the shortest, of needed work.
    flops: that a device carries out.
  """

  compute: float
  memory: float
  exchange: float
  mfu: tuple[float, float]
  flops: float

  @property
  def shortest(self) -> float:
    """All overlapped."""
    return max(self.compute, self.memory, self.exchange)

  @property
  def longest(self) -> float:
    """Nothing overlapped."""
    return self.compute + self.memory + self.exchange


def of(facts: facts_lib.Facts, chip: chips.Chip) -> Estimate | None:
  """The estimate; None for devices without a data sheet or a program that does not fit."""
  peak = machine.data_sheet_flops(facts.device)
  if peak is None or not chip.bandwidth or facts.traffic is None:
    return None
  devices = len(facts.places)
  dense, pairs = executed(facts.cost, facts.remat, facts.attention)
  compute = (dense / PRODUCTS + pairs / ATTENTION) / devices / peak
  memory = facts.traffic.bytes / chip.bandwidth / MEMORY
  exchange = sum(each.count * each.sent / _rate(each, facts.places, chip)
                 for each in facts.traffic.collectives) / LINKS
  rate = facts.cost.total / devices / peak
  times = compute + memory + exchange, max(compute, memory, exchange)
  return Estimate(compute, memory, exchange, (rate / times[0], rate / times[1]),
                  (dense + pairs) / devices)


def executed(cost: flops.Cost, remat: str, attention: str) -> tuple[float, float]:
  """FLOPs in products with weights and over visible pairs, what is computed again included.

  Args:
    cost: needed work.
    remat: what the backward pass computes again, see `videogpt_jax.backbone`.
    attention: the implementation.
  """
  again = remat in ("attention", "full", "offload")
  # All tokens are computed, also those that nobody needs.
  dense = (cost.dense + again * cost.forward) * cost.sequence / cost.tokens
  forward = cost.attention / 3 * (1 if remat in ("none", "attention") else 2)
  return dense, forward + cost.attention / 3 * _BACKWARD[attention] / 2


def _rate(each: hlo.Collective, places: Sequence[tuple[int, ...]], chip: chips.Chip) -> float:
  """Bytes/s that a device sends in such a collective, where it is slowest."""
  return min(_group_rate([places[member] for member in group], places, chip)
             for group in each.groups)


def _group_rate(group: Sequence[tuple[int, ...]], places: Sequence[tuple[int, ...]],
                chip: chips.Chip) -> float:
  outer = {place[0] for place in group}  # slices, or nodes
  if len(outer) == 1:
    if not chip.axes:
      return chip.links
    # All links of the axes that the group spans: two of an axis that is a ring, else one.
    lengths = [len(set(along)) for along in zip(*(place[1:] for place in places), strict=True)]
    spanned = [len(set(along)) > 1 for along in zip(*(place[1:] for place in group), strict=True)]
    links = sum(2 if length >= chip.wraps else 1
                for length, used in zip(lengths, spanned, strict=True) if used)
    return chip.links * links / (2 * chip.axes)
  # A ring crosses to another node once for each that it visits: its neighbours there share
  # their network cards.
  return min(chip.links, chip.network * len(group) / len(outer))
