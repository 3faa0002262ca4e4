"""Kinds of chips: what a compiler and an estimate need to know of them.

Sources: TPUs from https://cloud.google.com/tpu/docs (system architecture of v5e, v5p and v6e);
GPUs from NVIDIA's data sheets of H100 SXM, H200 SXM and L4, nodes of eight as in DGX H100 (a
400 Gbit/s network card for each GPU), and for L4 a network card of 100 Gbit/s a node's GPU
(ours: there is no such standard node). Peak rates: `videogpt_jax.machine`.
"""

import dataclasses

_GB = 10**9
_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
  """A kind of chip.

  Attributes:
    name: of it in topologies, and of a GPU's file in gpus/.
    platform: "tpu", "cuda" or "cpu".
    attention: what attention="auto" is on it in bfloat16 with long sequences.
    memory: bytes of a device.
    bandwidth: of that memory, bytes/s.
    links: bytes/s that a chip sends over all links to its neighbours: along all axes of a TPU's
      torus, or by NVLink (L4: PCIe) inside of a node.
    network: bytes/s that a chip sends to other nodes or slices.
    axes: of the torus; 0 for GPUs.
    wraps: chips from which on an axis of a slice closes to a ring; a shorter one has a link less.
  """

  name: str
  platform: str
  attention: str
  memory: float = 0
  bandwidth: float = 0
  links: float = 0
  network: float = 0
  axes: int = 0
  wraps: int = 0

  @property
  def backend(self) -> str:
    """What `jax.default_backend()` says on it."""
    return {"cuda": "gpu"}.get(self.platform, self.platform)


CHIPS = {chip.name: chip for chip in (
  Chip("v5e", "tpu", "tpu", 16 * _GIB, 819 * _GB, 200 * _GB, 3.1 * _GB, axes=2, wraps=16),
  Chip("v5p", "tpu", "tpu", 95 * _GIB, 2765 * _GB, 600 * _GB, 6.25 * _GB, axes=3, wraps=4),
  Chip("v6e", "tpu", "tpu", 32 * _GIB, 1640 * _GB, 400 * _GB, 12.5 * _GB, axes=2, wraps=16),
  Chip("h100", "cuda", "gpu", 84_942_979_072, 3352 * _GB, 450 * _GB, 50 * _GB),
  Chip("h200", "cuda", "gpu", 150_754_820_096, 4800 * _GB, 450 * _GB, 50 * _GB),
  Chip("l4", "cuda", "xla", 24_152_899_584, 300 * _GB, 32 * _GB, 12.5 * _GB),  # it has no wgmma
  Chip("cpu", "cpu", "xla"),
)}
