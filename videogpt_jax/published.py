"""The published model's names: tensors, settings, and folders of weights, in both directions.

A weights folder holds tensors named and laid out as in the published checkpoint (in any of
the files that `videogpt_jax.tensors` reads) and `config.json`: the model's settings, and
under `videogpt_jax` what else is needed to predict (the codec and the sampling defaults).
"""

from collections.abc import Callable, Iterator, Mapping
import functools
import itertools
import json
import math
import os
import re
from typing import Any

import einops
import jax
import ml_dtypes
import numpy as np
from safetensors import numpy as safetensors

from videogpt_jax import backbone
from videogpt_jax import model
from videogpt_jax import tensors as tensor_files
from videogpt_jax.errors import InputError

Tree = dict[str, Any]
_TEMPORARY = ".tmp"
TYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


# Names and layouts ------------------------------------------------------------------------
#
# Every entry: published name, path in our tree, einops pattern from ours to theirs.

_OUTER = (
    ("llm.embed_tokens.weight", "embed_tokens", "V D -> V D"),
    ("llm.norm.weight", "backbone/norm/weight", "D -> D"),
    ("x_embedder.proj.weight", "x_embedder/kernel", "p q C D -> D C p q"),
    ("x_embedder.proj.bias", "x_embedder/bias", "D -> D"),
    ("input_x_embedder.proj.weight", "input_x_embedder/kernel", "p q C D -> D C p q"),
    ("input_x_embedder.proj.bias", "input_x_embedder/bias", "D -> D"),
    ("time_token.mlp.0.weight", "time_token/in_kernel", "i o -> o i"),
    ("time_token.mlp.0.bias", "time_token/in_bias", "o -> o"),
    ("time_token.mlp.2.weight", "time_token/out_kernel", "i o -> o i"),
    ("time_token.mlp.2.bias", "time_token/out_bias", "o -> o"),
    ("t_embedder.mlp.0.weight", "t_embedder/in_kernel", "i o -> o i"),
    ("t_embedder.mlp.0.bias", "t_embedder/in_bias", "o -> o"),
    ("t_embedder.mlp.2.weight", "t_embedder/out_kernel", "i o -> o i"),
    ("t_embedder.mlp.2.bias", "t_embedder/out_bias", "o -> o"),
    ("final_layer.adaLN_modulation.1.weight", "final_layer/modulation_kernel", "i k o -> (k o) i"),
    ("final_layer.adaLN_modulation.1.bias", "final_layer/modulation_bias", "k o -> (k o)"),
    ("final_layer.linear.weight", "final_layer/kernel", "i o -> o i"),
    ("final_layer.linear.bias", "final_layer/bias", "o -> o"),
)
_LAYER = (
    ("input_layernorm.weight", "attention_norm/weight", "D -> D"),
    ("post_attention_layernorm.weight", "mlp_norm/weight", "D -> D"),
    ("self_attn.o_proj.weight", "attention/o", "H E D -> D (H E)"),
    ("mlp.gate_up_proj.weight", "mlp/gate_up", "D k F -> (k F) D"),
    ("mlp.down_proj.weight", "mlp/down", "F D -> D F"),
)
_QKV = "self_attn.qkv_proj.weight"  # rows: all queries, all keys, all values
_QKV_LEAVES = ("attention/q", "attention/kv")
_STACK = "backbone/layers/"
_POSITION = "pos_embed"  # a constant there and here: compared when read, written on request


def to_published(params: Tree, config: model.Config) -> dict[str, np.ndarray]:
  """Our parameter tree as published tensors, without the constant `pos_embed`."""
  return dict(publish(lambda path: np.asarray(leaf(params, path)), config))


def publish(read: Callable[[str], Any], config: model.Config) -> Iterator[tuple[str, Any]]:
  """Published tensors one after the other, all that come from one of our leaves together.

  Args:
    read: gives the parameter at a path; asked once for each, so that it may read a file.
    config: the model.
  """
  for name, path, pattern in _OUTER:
    yield name, einops.rearrange(read(path), pattern)
  layers = range(config.backbone.num_layers)
  for name, path, pattern in _LAYER:
    stack = read(_STACK + path)
    for i in layers:
      yield f"llm.layers.{i}.{name}", einops.rearrange(stack[i], pattern)
  q, kv = (read(_STACK + path) for path in _QKV_LEAVES)
  for i in layers:
    rows = [einops.rearrange(q[i], "D H E -> (H E) D"),
            einops.rearrange(kv[i], "D k G E -> (k G E) D")]
    yield f"llm.layers.{i}.{_QKV}", einops.pack(rows, "* D")[0]


def position_tensor(config: model.Config) -> np.ndarray:
  """`pos_embed` as published, float32 [1, G * G, D]."""
  side = config.pos_embed_max_size
  return model.position_table(config.backbone.hidden_size, side, side, side)[None]


def from_published(tensors: Mapping[str, np.ndarray], config: model.Config) -> Tree:
  """Published tensors as our parameter tree, float32.

  Raises:
    InputError: tensors missing, unexpected or of another shape, each by name; or another
      `pos_embed` than the one computed here.
  """
  params: Tree = {}
  for path, array in adopt(tensors, config):
    _set(params, path, array.astype(np.float32))
  return params


def adopt(
    tensors: Mapping[str, np.ndarray], config: model.Config
) -> Iterator[tuple[str, np.ndarray]]:
  """Our leaves, path and array, one after the other, in the type of the tensors.

  Only one leaf is held at a time. Raises `InputError` as `from_published` does.
  """
  _check(tensors, config)
  H, G = config.backbone.num_heads, config.backbone.num_kv_heads

  def arrange(x: np.ndarray, pattern: str) -> np.ndarray:
    ours, theirs = pattern.split(" -> ")
    sizes = {axis: size for axis, size in {"H": H, "k": 2}.items() if f"({axis} " in theirs}
    return einops.rearrange(x, f"{theirs} -> {ours}", **sizes)

  def stack(name: str, convert: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Filled layer by layer: a list of them beside their stack would be twice the memory."""
    first = convert(tensors[f"llm.layers.0.{name}"])
    out = np.empty((config.backbone.num_layers, *first.shape), first.dtype)
    out[0] = first
    for i in range(1, len(out)):
      out[i] = convert(tensors[f"llm.layers.{i}.{name}"])
    return out

  for name, path, pattern in _OUTER:
    yield path, np.ascontiguousarray(arrange(tensors[name], pattern))
  for name, path, pattern in _LAYER:
    yield _STACK + path, stack(name, functools.partial(arrange, pattern=pattern))
  rows = H * config.backbone.head_size
  q, kv = _QKV_LEAVES
  yield _STACK + q, stack(
      _QKV, lambda x: einops.rearrange(x[:rows], "(H E) D -> D H E", H=H))
  yield _STACK + kv, stack(
      _QKV, lambda x: einops.rearrange(x[rows:], "(k G E) D -> D k G E", k=2, G=G))


def _check(tensors: Mapping[str, np.ndarray], config: model.Config) -> None:
  expected = shapes(config)
  have = tensors.shapes if isinstance(tensors, tensor_files.TensorFiles) else {
      name: tuple(x.shape) for name, x in tensors.items()}
  found, wanted = set(have) - {_POSITION}, set(expected)
  wrong = [f"missing {name}" for name in sorted(wanted - found)]
  wrong += [f"unexpected {name}" for name in sorted(found - wanted)]
  wrong += [f"{name} is {have[name]}, expected {expected[name]}"
            for name in sorted(found & wanted) if have[name] != expected[name]]
  if wrong:
    more = f" and {len(wrong) - 8} more" if len(wrong) > 8 else ""
    raise InputError(f"these weights do not fit the model: {'; '.join(wrong[:8])}{more}")
  if _POSITION in have:
    _check_position(tensors[_POSITION], config)


def _check_position(theirs: np.ndarray, config: model.Config) -> None:
  """The table is computed here, never read: the one they trained with must be the same."""
  ours = position_tensor(config)
  if theirs.shape != ours.shape:
    raise InputError(f"{_POSITION} is {theirs.shape}, expected {ours.shape}: "
                     "pos_embed_max_size or hidden_size of config.json is another")
  resolution = 4 * float(ml_dtypes.finfo(theirs.dtype).eps)  # of sines and cosines
  error = max(float(np.abs(a.astype(np.float32) - b).max())
              for a, b in zip(np.array_split(theirs[0], 16), np.array_split(ours[0], 16),
                              strict=True))
  if not error <= max(resolution, 1e-4):
    raise InputError(f"{_POSITION} differs by {error:.2g} from the sine-cosine table that this "
                     "model computes; weights trained with another table cannot be used")


def shapes(config: model.Config) -> dict[str, tuple[int, ...]]:
  """The published tensors' shapes by name, in the order of `publish`, without `pos_embed`."""
  names: list[str] = []

  def arrays(tree: Tree) -> list[Any]:  # a list: jax sorts dictionaries
    pairs = list(publish(lambda path: leaf(tree, path), config))
    names.extend(name for name, _ in pairs)
    return [x for _, x in pairs]

  abstract = jax.eval_shape(arrays, model.abstract_params(config))
  return {name: tuple(x.shape) for name, x in zip(names, abstract, strict=True)}


def leaf(tree: Tree, path: str) -> Any:
  """The entry of a nested dictionary at a path `a/b/c`."""
  for key in path.split("/"):
    tree = tree[key]
  return tree


def _set(tree: Tree, path: str, value: Any) -> None:
  *parents, leaf = path.split("/")
  for key in parents:
    tree = tree.setdefault(key, {})
  tree[leaf] = value


# Settings ---------------------------------------------------------------------------------


def published_settings(config: model.Config) -> dict[str, Any]:
  """A model's settings under the names of the published `config.json`."""
  b = config.backbone
  return {
      "hidden_size": b.hidden_size, "intermediate_size": b.intermediate_size,
      "num_hidden_layers": b.num_layers, "num_attention_heads": b.num_heads,
      "num_key_value_heads": b.num_kv_heads, "vocab_size": config.vocab_size,
      "rms_norm_eps": b.rms_norm_eps, "rope_theta": b.rope_theta,
      "max_position_embeddings": b.max_position_embeddings, "rope_scaling": _rope_scaling(b),
      "patch_size": config.patch_size, "in_channels": config.channels,
      "pos_embed_max_size": config.pos_embed_max_size,
      "special_ids": {"diff": config.diff_id, "img": config.img_id, "end_img": config.end_img_id},
  }


def model_config(settings: Mapping[str, Any], **numerics: Any) -> model.Config:
  """The model that published settings describe; `numerics` go to `backbone.Config`.

  Raises:
    InputError: a setting is missing.
  """
  try:
    ids = settings["special_ids"]
    return model.Config(
        backbone=backbone.Config(
            hidden_size=settings["hidden_size"], intermediate_size=settings["intermediate_size"],
            num_layers=settings["num_hidden_layers"], num_heads=settings["num_attention_heads"],
            num_kv_heads=settings["num_key_value_heads"], rms_norm_eps=settings["rms_norm_eps"],
            rope_theta=settings["rope_theta"],
            rope_long_factor=_long_factor(settings.get("rope_scaling")),
            max_position_embeddings=settings.get("max_position_embeddings", 4096), **numerics),
        channels=settings["in_channels"], patch_size=settings["patch_size"],
        vocab_size=settings["vocab_size"], img_id=ids["img"], end_img_id=ids["end_img"],
        diff_id=ids["diff"], pos_embed_max_size=settings["pos_embed_max_size"])
  except KeyError as error:
    raise InputError(f"config.json lacks {error}") from error


def _rope_scaling(config: backbone.Config) -> dict[str, Any] | None:
  """Longrope's factors, those for short sequences being the long ones, as is done here."""
  if not config.rope_long_factor:
    return None
  factors = list(config.rope_long_factor)
  return {"type": "longrope", "short_factor": factors, "long_factor": factors}


def _long_factor(rope_scaling: Mapping[str, Any] | None) -> tuple[float, ...]:
  if not rope_scaling:
    return ()
  kind = rope_scaling.get("type", rope_scaling.get("rope_type"))
  if kind not in ("longrope", "su"):
    raise InputError(f"config.json asks for rope_scaling {kind!r}; known: longrope, su, none")
  return tuple(float(factor) for factor in rope_scaling["long_factor"])


# Folders ----------------------------------------------------------------------------------

_SETTINGS = "config.json"
_SHARD_BYTES = 2 << 30


def save_folder(folder: str, read: Callable[[str], np.ndarray], config: model.Config,
                extra: dict[str, Any], dtype: str = "bfloat16", *, position: bool = True,
                shard_bytes: int = _SHARD_BYTES) -> None:
  """Writes `config.json` and `model.safetensors` (or shards of it and their index).

  Every file is written under a temporary name; the real names appear when all are whole.

  Args:
    folder: created where missing; other weights in it are replaced.
    read: gives the parameter at a path of our tree; see `publish`.
    config: the model it belongs to.
    extra: what else prediction needs (codec, sampling defaults), JSON-able.
    dtype: type of the stored tensors, a key of `TYPES`.
    position: whether the constant `pos_embed` is written too, as published.
    shard_bytes: most bytes of a file, if one tensor does not take more.
  """
  os.makedirs(folder, exist_ok=True)
  stream = publish(read, config)
  expected = shapes(config)
  if position:
    last = ((name, position_tensor(config)) for name in [_POSITION])  # lazily: it is large
    stream = itertools.chain(stream, last)
    expected[_POSITION] = (1, config.pos_embed_max_size**2, config.backbone.hidden_size)
  kind = np.dtype(TYPES[dtype])
  shards = _split({name: math.prod(shape) * kind.itemsize for name, shape in expected.items()},
                  shard_bytes)
  files: dict[str, list[str]] = {}
  for number, names in enumerate(shards, 1):
    file = ("model.safetensors" if len(shards) == 1
            else f"model-{number:05d}-of-{len(shards):05d}.safetensors")
    tensors = {name: np.ascontiguousarray(x.astype(kind))
               for name, x in itertools.islice(stream, len(names))}
    safetensors.save_file(tensors, os.path.join(folder, file + _TEMPORARY))
    files[file] = names
  texts = {_SETTINGS: {**published_settings(config), "torch_dtype": dtype, "videogpt_jax": extra}}
  if len(shards) > 1:
    texts["model.safetensors.index.json"] = {
        "metadata": {"total_size": sum(math.prod(x) for x in expected.values()) * kind.itemsize},
        "weight_map": {name: file for file, names in files.items() for name in names}}
  for file, content in texts.items():
    with open(os.path.join(folder, file + _TEMPORARY), "w", encoding="utf-8") as opened:
      json.dump(content, opened, indent=2)
      opened.write("\n")
  _replace(folder, [*files, *texts])


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


def _replace(folder: str, files: list[str]) -> None:
  """Gives the temporary files their names, and removes weights that stood there before."""
  for file in files:
    os.replace(os.path.join(folder, file + _TEMPORARY), os.path.join(folder, file))
  for old in os.listdir(folder):
    if re.fullmatch(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?", old) and old not in files:
      os.remove(os.path.join(folder, old))


def read_settings(folder: str) -> dict[str, Any]:
  """The `config.json` of a weights folder. Raises `InputError` if there is none."""
  try:
    with open(os.path.join(folder, _SETTINGS), encoding="utf-8") as file:
      return dict(json.load(file))
  except (OSError, ValueError, TypeError) as error:
    raise InputError(f"{folder}: no whole weights folder; {_SETTINGS}: {error}") from error


def load_folder(folder: str, **numerics: Any) -> tuple[Tree, model.Config, dict[str, Any]]:
  """Parameters (float32), model and extra settings of a weights folder.

  Raises:
    InputError: a file is missing or damaged, or the tensors do not fit the settings.
  """
  settings = read_settings(folder)
  config = model_config(settings, **numerics)
  params = from_published(tensor_files.open_folder(folder), config)
  return params, config, settings.get("videogpt_jax", {})


def is_folder(path: str) -> bool:
  """Whether `path` holds exported weights (rather than a training run)."""
  return os.path.exists(os.path.join(path, _SETTINGS))
