"""The published model's names: tensors, settings, and folders of weights, in both directions.

A weights folder holds `model.safetensors` (tensors named and laid out as in the published
checkpoint) and `config.json` (its settings, and under `videogpt_jax` what else is needed
to predict: the codec and the sampling defaults).
"""

from collections.abc import Mapping
import json
import os
from typing import Any

import einops
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from safetensors import numpy as safetensors
from safetensors import SafetensorError

from videogpt_jax import backbone
from videogpt_jax import model
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
_FILES = ("model.safetensors", "config.json")
_POSITION = "pos_embed"  # a constant there and here; written, and left out when read


def to_published(params: Tree, config: model.Config) -> dict[str, np.ndarray]:
  """Our parameter tree as published tensors, `pos_embed` included."""
  tensors = {name: np.ascontiguousarray(x)
             for name, x in _published(jax.tree.map(np.asarray, params), config, np).items()}
  side = config.pos_embed_max_size
  table = model.position_table(config.backbone.hidden_size, side, side, side)
  return {**tensors, _POSITION: table[None]}


def _published(params: Tree, config: model.Config, xp: Any) -> dict[str, Any]:
  """The renaming alone; `xp` is numpy, or jax.numpy to learn the shapes abstractly."""
  tensors = {name: einops.rearrange(_get(params, path), pattern) for name, path, pattern in _OUTER}
  stack = params["backbone"]["layers"]
  for i in range(config.backbone.num_layers):
    at = f"llm.layers.{i}."
    for name, path, pattern in _LAYER:
      tensors[at + name] = einops.rearrange(_get(stack, path)[i], pattern)
    q, kv = (stack["attention"][name][i] for name in ("q", "kv"))
    rows = [einops.rearrange(q, "D H E -> (H E) D"), einops.rearrange(kv, "D k G E -> (k G E) D")]
    tensors[at + _QKV] = xp.concatenate(rows)
  return tensors


def from_published(tensors: Mapping[str, np.ndarray], config: model.Config) -> Tree:
  """Published tensors as our parameter tree, float32.

  Raises:
    InputError: tensors missing, unexpected or of another shape, each by name.
  """
  _check(tensors, config)
  H, G = config.backbone.num_heads, config.backbone.num_kv_heads

  def take(name: str, pattern: str) -> np.ndarray:
    ours, theirs = pattern.split(" -> ")
    sizes = {axis: size for axis, size in {"H": H, "k": 2}.items() if f"({axis} " in theirs}
    return einops.rearrange(np.asarray(tensors[name], np.float32), f"{theirs} -> {ours}", **sizes)

  params: Tree = {}
  for name, path, pattern in _OUTER:
    _set(params, path, take(name, pattern))
  stacks: dict[str, list[np.ndarray]] = {}
  for i in range(config.backbone.num_layers):
    at = f"llm.layers.{i}."
    for name, path, pattern in _LAYER:
      stacks.setdefault(path, []).append(take(at + name, pattern))
    qkv = np.asarray(tensors[at + _QKV], np.float32)
    q, kv = np.split(qkv, [H * config.backbone.head_size])
    stacks.setdefault("attention/q", []).append(einops.rearrange(q, "(H E) D -> D H E", H=H))
    stacks.setdefault("attention/kv", []).append(
        einops.rearrange(kv, "(k G E) D -> D k G E", k=2, G=G))
  for path, arrays in stacks.items():
    _set(params, f"backbone/layers/{path}", np.stack(arrays))
  return params


def _check(tensors: Mapping[str, np.ndarray], config: model.Config) -> None:
  shapes = jax.eval_shape(lambda tree: _published(tree, config, jnp), model.abstract_params(config))
  found, wanted = set(tensors) - {_POSITION}, set(shapes)
  wrong = [f"missing {name}" for name in sorted(wanted - found)]
  wrong += [f"unexpected {name}" for name in sorted(found - wanted)]
  wrong += [f"{name} is {tuple(tensors[name].shape)}, expected {shapes[name].shape}"
            for name in sorted(found & wanted) if tensors[name].shape != shapes[name].shape]
  if wrong:
    more = f" and {len(wrong) - 8} more" if len(wrong) > 8 else ""
    raise InputError(f"these weights do not fit the model: {'; '.join(wrong[:8])}{more}")


def _get(tree: Tree, path: str) -> Any:
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


def save_folder(folder: str, params: Tree, config: model.Config, extra: dict[str, Any],
                dtype: str = "bfloat16") -> None:
  """Writes `model.safetensors` and `config.json`, each under a temporary name first.

  Args:
    folder: created where missing.
    params: parameter tree.
    config: the model it belongs to.
    extra: what else prediction needs (codec, sampling defaults), JSON-able.
    dtype: type of the stored tensors; `pos_embed` is a constant and is left out.
  """
  os.makedirs(folder, exist_ok=True)
  tensors = to_published(params, config)
  del tensors[_POSITION]
  tensors = {name: x.astype(TYPES[dtype]) for name, x in tensors.items()}
  settings = {**published_settings(config), "torch_dtype": dtype, "videogpt_jax": extra}
  weights, settings_file = (os.path.join(folder, name) for name in _FILES)
  safetensors.save_file(tensors, weights + ".tmp")
  with open(settings_file + ".tmp", "w", encoding="utf-8") as file:
    json.dump(settings, file, indent=2)
    file.write("\n")
  for path in (weights, settings_file):
    os.replace(path + ".tmp", path)


def load_folder(folder: str, **numerics: Any) -> tuple[Tree, model.Config, dict[str, Any]]:
  """Parameters (float32), model and extra settings of a weights folder.

  Raises:
    InputError: a file is missing or damaged, or the tensors do not fit the settings.
  """
  weights, settings_file = (os.path.join(folder, name) for name in _FILES)
  try:
    with open(settings_file, encoding="utf-8") as file:
      settings = json.load(file)
    tensors = safetensors.load_file(weights)
  except (OSError, json.JSONDecodeError, SafetensorError) as error:
    raise InputError(f"{folder}: no whole weights folder ({error}); it needs "
                     + " and ".join(_FILES)) from error
  config = model_config(settings, **numerics)
  return from_published(tensors, config), config, settings.get("videogpt_jax", {})


def is_folder(path: str) -> bool:
  """Whether `path` holds exported weights (rather than a training run)."""
  return os.path.exists(os.path.join(path, _FILES[0]))
