"""Weights from one form into another.

    python -m videogpt_jax.convert --checkpoint=WORKDIR --out=FOLDER
    python -m videogpt_jax.convert --checkpoint=PUBLISHED --out=CHECKPOINT
    python -m videogpt_jax.convert --checkpoint=PHI3 --out=CHECKPOINT --diff_id=32011 ...

A training run (or a checkpoint) becomes a folder of safetensors under the published names,
with all that prediction needs beside them. A folder under the published names (safetensors
or PyTorch files, whole or in shards) becomes a checkpoint to predict with, evaluate or
start training from; so does Phi-3 as released, whose backbone starts a new model. Both ways
go tensor by tensor, so that the memory need not hold the model.
"""

from collections.abc import Iterator, Mapping
import json
import math
import os
import time
from typing import Any

from absl import flags
import numpy as np

from videogpt_jax import cli
from videogpt_jax import config as config_lib
from videogpt_jax import folder as folder_lib
from videogpt_jax import machine
from videogpt_jax import published
from videogpt_jax import weights as weights_lib
from videogpt_jax.errors import InputError

SECTIONS = ("name", "codec", "data", "sample", "world")  # of the run, kept for prediction


def export_folder(path: str, out: str, dtype: str = "", *, position: bool = True) -> None:
  """Writes the EMA weights of a run or a checkpoint as a folder under the published names.

  Args:
    path: workdir of the training run (its newest whole checkpoint is taken), or a checkpoint.
    out: the folder to write; weights in it are replaced.
    dtype: of the stored tensors, a key of `published.TYPES`; by default as in the checkpoint
      (where it mixes types, the wider one).
    position: whether the constant position table is written, as the published code expects.

  Raises:
    InputError: no whole checkpoint there, or the folder cannot be written.
  """
  source = weights_lib.open_source(path)
  extra = {name: value for name, value in source.config.items() if name in SECTIONS}
  extra["data"] = {name: value for name, value in extra["data"].items()
                   if name not in ("path", "videos")}  # where the data lay when it was trained
  extra["codec"] = {name: value for name, value in extra["codec"].items() if name != "path"}
  leaves = _watched(source)
  folder_lib.save(out, lambda name: leaves[name].read(), source.model, extra,
                  dtype or _stored_type(source), position=position)


def import_folder(path: str, out: str, dtype: str = "",
                  special_ids: Mapping[str, int] | None = None) -> None:
  """Writes a folder under the published names, or Phi-3's, as a checkpoint.

  Args:
    path: the folder, see `videogpt_jax.folder`.
    out: the checkpoint to make; nothing may be there yet.
    dtype: of the stored parameters, a key of `published.TYPES`; by default as in the folder.
    special_ids: rows of the marker tokens, see `folder.open_folder`.

  Raises:
    InputError: the folder is damaged or holds another model, or `out` cannot be written.
  """
  from videogpt_jax import streaming  # local: exporting does not need it

  source = weights_lib.open_source(path, special_ids)
  config = config_lib.with_model(config_lib.from_saved(source.config), source.model)
  streaming.write(out, _watched(source), json.loads(config.to_json()),
                  np.dtype(published.TYPES[dtype]) if dtype else None)


def _stored_type(source: weights_lib.Source) -> str:
  """The type of a checkpoint's parameters: the one of all, or float32, which holds any."""
  kinds = {np.dtype(leaf.dtype).name for leaf in source.leaves.values()}
  return kinds.pop() if len(kinds) == 1 else "float32"


class _Watched:
  """A leaf that says now and then how much of all leaves has been read."""

  def __init__(self, leaf: Any, progress: "_Progress") -> None:
    self._leaf, self._progress = leaf, progress

  def __getattr__(self, name: str) -> Any:  # shape, dtype, stacked
    return getattr(self._leaf, name)

  def read(self) -> np.ndarray:
    """The whole parameter."""
    array = self._leaf.read()
    self._progress.add(array.size)
    return array

  def pieces(self) -> Iterator[tuple[Any, np.ndarray]]:
    """The parameter piece by piece."""
    for index, piece in self._leaf.pieces():
      yield index, piece
      self._progress.add(piece.size)


class _Progress:
  """Prints a line every few seconds."""

  def __init__(self, total: int) -> None:
    self._total, self._done = total, 0
    self._began = self._shown = time.monotonic()

  def add(self, parameters: int) -> None:
    """So many more are done."""
    self._done += parameters
    now = time.monotonic()
    if now - self._shown > 5:
      self._shown = now
      left = (now - self._began) * (self._total - self._done) / self._done
      print(f"{self._done / 1e6:,.0f} of {self._total / 1e6:,.0f} million parameters, "
            f"{left:.0f} s left", flush=True)


def _watched(source: weights_lib.Source) -> dict[str, _Watched]:
  progress = _Progress(sum(math.prod(leaf.shape) for leaf in source.leaves.values()))
  return {name: _Watched(leaf, progress) for name, leaf in source.leaves.items()}


def define_flags() -> None:
  """The command's flags."""
  flags.DEFINE_string("checkpoint", "", "Training workdir or checkpoint to export; or folder under "
                      "the published names (or of Phi-3) to import.")
  flags.DEFINE_string("out", "", "Folder to write.")
  flags.DEFINE_enum("dtype", "", ["", *sorted(published.TYPES)], "Type of the stored tensors; "
                    "default: as they are.")
  flags.DEFINE_bool("position", True, "Write the constant position table, as the published code "
                    "expects; nothing here reads it.")
  for marker, text in folder_lib.MARKERS.items():
    flags.DEFINE_integer(f"{marker}_id", None, f"Row of the marker token {text} in the embedding; "
                         "default: as config.json or the tokenizer's files say.", lower_bound=0)


def main() -> None:
  """Reads the flags and converts."""
  f = flags.FLAGS
  if not f.checkpoint or not f.out:
    raise InputError("--checkpoint=FOLDER and --out=FOLDER are needed")
  if os.path.abspath(f.checkpoint) == os.path.abspath(f.out):
    raise InputError("--out is the folder of --checkpoint; choose another")
  began = time.monotonic()
  given = {marker: f[f"{marker}_id"].value for marker in folder_lib.MARKERS}
  ids = {marker: row for marker, row in given.items() if row is not None}
  if folder_lib.is_folder(f.checkpoint):
    import_folder(f.checkpoint, f.out, f.dtype, ids)
    use = f"--checkpoint={f.out}, or --config.checkpoint.init_from={f.out}"
  elif ids:
    raise InputError(f"the marker tokens of {f.checkpoint} are known; leave out "
                     + ", ".join(f"--{marker}_id" for marker in ids))
  else:
    export_folder(f.checkpoint, f.out, f.dtype, position=f.position)
    use = f"--checkpoint={f.out}"
  print(f"wrote {f.out} in {time.monotonic() - began:.0f} s, at most "
        f"{machine.peak_rss_mib():,.0f} MiB of memory; use it with {use}")


if __name__ == "__main__":
  define_flags()
  cli.run(main)
