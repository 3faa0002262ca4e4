"""Folders of weights under the published names: found, read and written.

Such a folder holds tensors in any of the files that `videogpt_jax.tensors` reads, and
`config.json`: the model's settings and, if it was written here, under `videogpt_jax` what
else is needed to predict (the codec and the sampling defaults). The published checkpoint
is such a folder, with a tokenizer that knows the marker tokens; so is Phi-3 as released,
which becomes the start of a new model.
"""

from collections.abc import Callable, Iterator, Mapping
import contextlib
import dataclasses
import itertools
import json
import math
import os
import re
import tempfile
from typing import Any

import numpy as np
from safetensors import numpy as safetensors
from safetensors import SafetensorError

from videogpt_jax import errors
from videogpt_jax import model
from videogpt_jax import phi3
from videogpt_jax import published
from videogpt_jax import tensors as tensor_files
from videogpt_jax.errors import InputError

_SETTINGS = "config.json"
_EXTRA = "videogpt_jax"
_SHARD_BYTES = 1 << 30  # a shard lies in memory twice while it is written
# Marker tokens: our name, and what the published tokenizer calls it.
MARKERS = {"diff": "<|diffusion|>", "img": "<img>", "end_img": "</img>"}


@dataclasses.dataclass(frozen=True)
class Folder:
  """A weights folder, opened; no parameter is read yet.

  Attributes:
    path: where it is.
    model: its settings.
    leaves: its parameters, by path in our tree.
    extra: what else it says about prediction; empty if it was not written here.
    is_new: whether the folder is Phi-3, so that all but the backbone is freshly drawn.
  """

  path: str
  model: model.Config
  leaves: dict[str, published.Leaf]
  extra: dict[str, Any]
  is_new: bool


def is_folder(path: str) -> bool:
  """Whether `path` holds weights under published names (rather than a training run)."""
  return os.path.exists(os.path.join(path, _SETTINGS))


def open_folder(path: str, special_ids: Mapping[str, int] | None = None, seed: int = 0) -> Folder:
  """Settings and tensors of a weights folder.

  Args:
    path: the folder.
    special_ids: rows of `embed_tokens` by marker, keys of `MARKERS`; by default those of
      `config.json`, else of the tokenizer's files.
    seed: of what Phi-3 does not have.

  Raises:
    InputError: a file is missing or damaged, the marker tokens are unknown, or the tensors
      do not fit the settings.
  """
  settings = _read_settings(path)
  tensors = tensor_files.open_folder(path)
  is_new = phi3.is_release(tensors)
  if not is_new and not any("x_embedder" in name for name in tensors):
    kind = settings.get("model_type") or "unknown architecture"
    raise InputError(f"{path} holds another model ({kind}): none of its {len(tensors)} tensors is "
                     "Video-GPT's x_embedder")
  settings["special_ids"] = _marker_ids(path, settings, special_ids or {})
  config = published.model_config(settings)
  if is_new:
    tensors = phi3.complete(tensors, config, seed)
  leaves = published.leaves(tensors, config)
  return Folder(path, config, leaves, settings.get(_EXTRA, {}), is_new)


def _read_settings(path: str) -> dict[str, Any]:
  try:
    with open(os.path.join(path, _SETTINGS), encoding="utf-8") as file:
      return dict(json.load(file))
  except (OSError, ValueError, TypeError) as error:
    raise InputError(f"{path}: no whole weights folder; {_SETTINGS}: {error}") from error


# Marker tokens ----------------------------------------------------------------------------


def _tokenizer_ids(path: str) -> dict[str, int]:
  """The marker tokens that the tokenizer's files know, in any of the forms they come in."""
  by_text: dict[str, int] = {}
  for file, entries in (("tokenizer.json", _of_tokenizer), ("tokenizer_config.json", _of_config),
                        ("added_tokens.json", lambda content: content.items())):
    name = os.path.join(path, file)
    if not os.path.exists(name):
      continue
    try:
      with open(name, encoding="utf-8") as opened:
        by_text.update((text, int(row)) for text, row in entries(json.load(opened)))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
      raise InputError(f"{name} is damaged or no tokenizer file: {error!r}") from error
  return {marker: by_text[text] for marker, text in MARKERS.items() if text in by_text}


def _of_tokenizer(content: dict[str, Any]) -> Iterator[tuple[str, int]]:
  return ((token["content"], token["id"]) for token in content["added_tokens"])


def _of_config(content: dict[str, Any]) -> Iterator[tuple[str, int]]:
  added = content.get("added_tokens_decoder", {})
  return ((token["content"], row) for row, token in added.items())


def _marker_ids(path: str, settings: Mapping[str, Any], given: Mapping[str, int]
                ) -> dict[str, int]:
  """Rows of the markers: those given, else those of `config.json`, else the tokenizer's."""
  ids = dict(settings.get("special_ids") or {}) | dict(given)
  if not all(marker in ids for marker in MARKERS):
    ids = _tokenizer_ids(path) | ids
  missing = [f"{MARKERS[marker]} (--{marker}_id)" for marker in MARKERS if marker not in ids]
  if missing:
    raise InputError(
        f"{path}: neither config.json (special_ids) nor the tokenizer's files (tokenizer.json, "
        f"tokenizer_config.json, added_tokens.json) know the marker tokens {', '.join(missing)}; "
        "put the tokenizer's files there or give the rows of the embedding by these flags")
  rows = settings.get("vocab_size")
  for marker, text in MARKERS.items():
    if not isinstance(ids[marker], int) or (isinstance(rows, int) and not 0 <= ids[marker] < rows):
      raise InputError(f"{path}: the marker {text} is row {ids[marker]} of an embedding of {rows} "
                       "rows")
  if len({ids[marker] for marker in MARKERS}) < len(MARKERS):
    raise InputError(f"{path}: two marker tokens share a row of the embedding: "
                     f"{ {marker: ids[marker] for marker in MARKERS} }")
  return ids


# Writing ----------------------------------------------------------------------------------


def save(path: str, read: Callable[[str], np.ndarray], config: model.Config,
         extra: dict[str, Any], dtype: str = "bfloat16", *, position: bool = True,
         shard_bytes: int = _SHARD_BYTES) -> None:
  """Writes `config.json` and `model.safetensors` (or shards of it and their index).

  Files are written aside and moved to their place when all are whole.

  Args:
    path: created where missing; other weights in it are replaced.
    read: gives the parameter at a path of our tree; see `published.publish`.
    config: the model it belongs to.
    extra: what else prediction needs (codec, sampling defaults), JSON-able.
    dtype: type of the stored tensors, a key of `published.TYPES`.
    position: whether the constant `pos_embed` is written too, as published.
    shard_bytes: most bytes of a file, if one tensor does not take more.

  Raises:
    InputError: the folder cannot be written; what stood there before is still there.
  """
  stream = published.publish(read, config)
  expected = published.shapes(config)
  if position:
    last = ((name, published.position_tensor(config)) for name in [published.POSITION])
    stream = itertools.chain(stream, last)  # lazily: it is large
    expected[published.POSITION] = (1, config.pos_embed_max_size**2, config.backbone.hidden_size)
  kind = np.dtype(published.TYPES[dtype])
  shards = _split({name: math.prod(shape) * kind.itemsize for name, shape in expected.items()},
                  shard_bytes)
  files = {("model.safetensors" if len(shards) == 1
            else f"model-{number:05d}-of-{len(shards):05d}.safetensors"): names
           for number, names in enumerate(shards, 1)}
  settings = {**published.published_settings(config), "torch_dtype": dtype, _EXTRA: extra}
  texts: dict[str, Any] = {_SETTINGS: settings}
  if len(shards) > 1:
    texts["model.safetensors.index.json"] = {
        "metadata": {"total_size": sum(math.prod(x) for x in expected.values()) * kind.itemsize},
        "weight_map": {name: file for file, names in files.items() for name in names}}
  try:
    os.makedirs(path, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=path) as partial:
      for file, names in files.items():
        tensors = {}
        for name in names:
          _, x = next(stream)
          tensors[name] = np.ascontiguousarray(x, kind)
          del x  # a view of a whole stack, which must go before the next stack is read
        safetensors.save_file(tensors, os.path.join(partial, file))
        del tensors
      for file, content in texts.items():
        with open(os.path.join(partial, file), "w", encoding="utf-8") as opened:
          json.dump(content, opened, indent=2)
          opened.write("\n")
      _replace(path, partial, [*files, *reversed(texts)])
  except (OSError, SafetensorError) as error:
    message = f"cannot write weights to {path}: {error}"
    if isinstance(error, OSError):
      raise errors.refused(message, error) from error
    raise InputError(message) from error


def _split(sizes: dict[str, int], most: int) -> list[list[str]]:
  """Names in order, in runs of at most `most` bytes."""
  runs: list[list[str]] = []
  room = 0
  for name, size in sizes.items():
    if not runs or size > room:
      runs.append([])
      room = most
    runs[-1].append(name)
    room -= size
  return runs


def _replace(path: str, partial: str, files: list[str]) -> None:
  """Moves whole files in and removes weights that stood there before.

  The settings go first and come last: without them a folder holds no weights, so that old
  and new ones are never taken for one set, wherever this ends.
  """
  with contextlib.suppress(FileNotFoundError):
    os.remove(os.path.join(path, _SETTINGS))
  for old in os.listdir(path):
    if re.fullmatch(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?", old):
      os.remove(os.path.join(path, old))
  for file in files:
    os.replace(os.path.join(partial, file), os.path.join(path, file))
