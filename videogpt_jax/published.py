"""The published model's names and layouts: tensors and settings, in both directions."""

from collections.abc import Callable, Iterator, Mapping
import dataclasses
import functools
from typing import Any

import einops
from flax import traverse_util
import jax
import ml_dtypes
import numpy as np

from videogpt_jax import backbone
from videogpt_jax import model
from videogpt_jax import tensors as tensor_files
from videogpt_jax.errors import InputError

Tree = dict[str, Any]
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
POSITION = "pos_embed"  # a constant there and here: compared when read, written on request


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
    del stack  # before the next one is read
  q, kv = (read(_STACK + path) for path in _QKV_LEAVES)
  for i in layers:
    rows = [einops.rearrange(q[i], "D H E -> (H E) D"),
            einops.rearrange(kv[i], "D k G E -> (k G E) D")]
    yield f"llm.layers.{i}.{_QKV}", einops.pack(rows, "* D")[0]


def position_tensor(config: model.Config) -> np.ndarray:
  """`pos_embed` as published, float32 [1, G * G, D]."""
  side = config.pos_embed_max_size
  return model.position_table(config.backbone.hidden_size, side, side, side)[None]


@dataclasses.dataclass(frozen=True)
class Leaf:
  """A parameter of ours that is still in its files.

  Attributes:
    shape: of the whole parameter.
    dtype: that holds all its tensors without loss.
    parts: read it: the whole, or the layers of a stack one after the other.
    stacked: whether `parts` are layers.
  """

  shape: tuple[int, ...]
  dtype: np.dtype
  parts: tuple[Callable[[], np.ndarray], ...]
  stacked: bool

  def pieces(self) -> Iterator[tuple[Any, np.ndarray]]:
    """(index into the parameter, what stands there), one piece at a time."""
    for i, read in enumerate(self.parts):
      yield (i if self.stacked else ...), read().astype(self.dtype, copy=False)

  def read(self, dtype: Any = None) -> np.ndarray:
    """The whole parameter, filled piece by piece."""
    out = np.empty(self.shape, dtype or self.dtype)
    for index, piece in self.pieces():
      out[index] = piece
    return out


def from_published(tensors: Mapping[str, np.ndarray], config: model.Config) -> Tree:
  """Published tensors as our parameter tree, float32.

  Raises:
    InputError: see `leaves`.
  """
  found = leaves(tensor_files.in_memory(tensors), config)
  return traverse_util.unflatten_dict(
      {path: leaf.read(np.float32) for path, leaf in found.items()}, sep="/")


def leaves(tensors: tensor_files.TensorFiles, config: model.Config) -> dict[str, Leaf]:
  """Our parameters by path, none of them read yet.

  Raises:
    InputError: tensors missing, unexpected, of another shape or of a type that is none of
      `TYPES`, each by name; or another `pos_embed` than the one computed here.
  """
  _check(tensors, config)
  H, G = config.backbone.num_heads, config.backbone.num_kv_heads
  wanted = traverse_util.flatten_dict(model.abstract_params(config), sep="/")
  found: dict[str, Leaf] = {}

  def add(path: str, names: list[str], convert: Callable[[np.ndarray], np.ndarray],
          stacked: bool) -> None:
    read = lambda name: convert(tensors[name])
    kinds = {tensors.entries[name].dtype for name in names}
    kind = kinds.pop() if len(kinds) == 1 else np.dtype(np.float32)
    parts = tuple(functools.partial(read, name) for name in names)
    found[path] = Leaf(tuple(wanted[path].shape), kind, parts, stacked)

  def arrange(pattern: str) -> Callable[[np.ndarray], np.ndarray]:
    ours, theirs = pattern.split(" -> ")
    sizes = {axis: size for axis, size in {"H": H, "k": 2}.items() if f"({axis} " in theirs}
    return lambda x: einops.rearrange(x, f"{theirs} -> {ours}", **sizes)

  layers = lambda name: [f"llm.layers.{i}.{name}" for i in range(config.backbone.num_layers)]
  for name, path, pattern in _OUTER:
    add(path, [name], arrange(pattern), stacked=False)
  for name, path, pattern in _LAYER:
    add(_STACK + path, layers(name), arrange(pattern), stacked=True)
  rows = H * config.backbone.head_size
  q, kv = _QKV_LEAVES
  add(_STACK + q, layers(_QKV),
      lambda x: einops.rearrange(x[:rows], "(H E) D -> D H E", H=H), stacked=True)
  add(_STACK + kv, layers(_QKV),
      lambda x: einops.rearrange(x[rows:], "(k G E) D -> D k G E", k=2, G=G), stacked=True)
  return found


def _check(tensors: tensor_files.TensorFiles, config: model.Config) -> None:
  expected = shapes(config)
  have = tensors.entries
  found, wanted = set(have) - {POSITION}, set(expected)
  wrong = [f"missing {name}" for name in sorted(wanted - found)]
  wrong += [f"unexpected {name}" for name in sorted(found - wanted)]
  wrong += [f"{name} is {have[name].shape}, expected {expected[name]}"
            for name in sorted(found & wanted) if have[name].shape != expected[name]]
  wrong += [f"{name} is of type {have[name].dtype}, known are {', '.join(TYPES)}"
            for name in sorted(found & wanted) if have[name].dtype.name not in TYPES]
  if wrong:
    more = f" and {len(wrong) - 8} more" if len(wrong) > 8 else ""
    raise InputError(f"these weights do not fit the model: {'; '.join(wrong[:8])}{more}")
  if POSITION in have:
    _check_position(tensors[POSITION], config)


def _check_position(theirs: np.ndarray, config: model.Config) -> None:
  """The table is computed here, never read: the one they trained with must be the same."""
  ours = position_tensor(config)
  if theirs.shape != ours.shape:
    raise InputError(f"{POSITION} is {theirs.shape}, expected {ours.shape}: "
                     "pos_embed_max_size or hidden_size of config.json is another")
  resolution = 4 * float(ml_dtypes.finfo(theirs.dtype).eps)  # of sines and cosines
  parts = zip(np.array_split(theirs[0], 16), np.array_split(ours[0], 16), strict=True)
  error = np.max([np.abs(a.astype(np.float32) - b).max() for a, b in parts])  # keeps a NaN
  if not error <= max(resolution, 1e-4):
    raise InputError(f"{POSITION} differs by {error:.2g} from the sine-cosine table that this "
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


def model_config(settings: Mapping[str, Any]) -> model.Config:
  """The model that published settings describe.

  What a `config.json` of Phi-3 does not hold is as in the published code: patches of 2x2
  cells, 4 channels, a position table of side 192.

  Raises:
    InputError: a setting is missing.
  """
  whole = lambda name, standard=None: _number(settings, name, standard, int)
  real = lambda name: float(_number(settings, name, None, (int, float)))
  heads = whole("num_attention_heads")
  stack = backbone.Config(
      hidden_size=whole("hidden_size"), intermediate_size=whole("intermediate_size"),
      num_layers=whole("num_hidden_layers"), num_heads=heads,
      num_kv_heads=whole("num_key_value_heads", heads), rms_norm_eps=real("rms_norm_eps"),
      rope_theta=real("rope_theta"), rope_long_factor=_long_factor(settings.get("rope_scaling")),
      max_position_embeddings=whole("max_position_embeddings", 4096))
  if (problem := backbone.problem(stack)):
    raise InputError(f"config.json: {problem}")
  ids = settings["special_ids"]
  return model.Config(
      backbone=stack, channels=whole("in_channels", 4), patch_size=whole("patch_size", 2),
      vocab_size=whole("vocab_size"), img_id=ids["img"], end_img_id=ids["end_img"],
      diff_id=ids["diff"], pos_embed_max_size=whole("pos_embed_max_size", 192))


def _number(settings: Mapping[str, Any], name: str, standard: Any, kind: Any) -> Any:
  """A positive number of `config.json`, or the standard one where it is left out or null."""
  value = settings.get(name)
  value = standard if value is None else value
  if value is None:
    raise InputError(f"config.json lacks {name!r}")
  if isinstance(value, bool) or not isinstance(value, kind) or not value > 0:
    wanted = "whole number" if kind is int else "number"
    raise InputError(f"config.json: {name} must be a positive {wanted}, got {value!r}")
  return value


def _rope_scaling(config: backbone.Config) -> dict[str, Any] | None:
  """Longrope's factors, those for short sequences being the long ones, as is done here."""
  if not config.rope_long_factor:
    return None
  factors = list(config.rope_long_factor)
  return {"type": "longrope", "short_factor": factors, "long_factor": factors}


def _long_factor(rope_scaling: Any) -> tuple[float, ...]:
  if not rope_scaling:
    return ()
  try:
    kind = rope_scaling.get("type", rope_scaling.get("rope_type"))
    if kind not in ("longrope", "su"):
      raise InputError(f"config.json asks for rope_scaling {kind!r}; known: longrope, su, none")
    return tuple(float(factor) for factor in rope_scaling["long_factor"])
  except (AttributeError, KeyError, TypeError, ValueError) as error:
    raise InputError(f"config.json: rope_scaling cannot be read ({error!r})") from error
