"""Block sizes: a small table, a line for each device kind, that `--tune` writes.

`python -m videogpt_jax.benchmarks.attention --tune` measures on the device it runs on and
puts the fastest sizes into block_sizes.json, under the implementation, the device kind and
the head size. A device that has no line of its own takes the implementation's default.
"""

from collections.abc import Sequence
import json
import os
import pathlib

import jax

from videogpt_jax.attention import xla

LANES = 128  # kernels' blocks are multiples of it
TABLE = pathlib.Path(__file__).parent / "block_sizes.json"


def block_sizes(
    implementation: str, length_q: int, length_k: int, frame_tokens: int, head_size: int
) -> tuple[int, int]:
  """Tokens of a block of queries and of one of keys.

  Args:
    implementation: "xla", "tpu" or "gpu".
    length_q: queries of a sample.
    length_k: keys of a sample.
    frame_tokens: S, tokens of a frame block.
    head_size: E.
  """
  lines = json.loads(TABLE.read_text())[implementation]
  kind = jax.devices()[0].device_kind
  names = (f"{kind}/{head_size}", kind, f"default/{head_size}", "default")
  entry = next(lines[name] for name in names if name in lines)
  return fitted(implementation, entry, length_q, length_k, frame_tokens)


def fitted(implementation: str, entry: Sequence[int], length_q: int, length_k: int,
           frame_tokens: int) -> tuple[int, int]:
  """What an entry of the table means for a problem, see `block_sizes`.

  A kernel's entry is the two sizes; that of "xla" the tokens and the most frames of a block
  of either: where frames are small, clips that end inside a block waste more than the
  fewer turns of the loop save. A block is no longer than its sequence needs.
  """
  if implementation == "xla":
    block = lambda length: xla.block_size(length, frame_tokens, *entry)
    return block(length_q), block(length_k)
  block_q, block_k = (min(size, -(-length // LANES) * LANES)
                      for size, length in zip(entry, (length_q, length_k), strict=True))
  return block_q, block_k


def write(implementation: str, device_kind: str, head_size: int, entry: Sequence[int]) -> None:
  """Puts an entry, as in `fitted`, into the table, whole or not at all."""
  table = json.loads(TABLE.read_text())
  table[implementation][f"{device_kind}/{head_size}"] = list(entry)
  lines = ",\n".join(f'  {json.dumps(name)}: {json.dumps(rows)}' for name, rows in table.items())
  temporary = TABLE.with_suffix(".tmp")
  temporary.write_text(f"{{\n{lines}\n}}\n")
  os.replace(temporary, TABLE)
