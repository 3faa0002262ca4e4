"""Weights under the published names: out, in, and what is refused."""

import json

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors import numpy as safetensors

import golden_videogpt as golden
import torch_files
from videogpt_jax import checkpoint
from videogpt_jax import convert
from videogpt_jax import model
from videogpt_jax import published
from videogpt_jax import weights as weights_lib
from videogpt_jax.errors import InputError

NAMES = [name for name in ("a", "gqa", "longrope")
         if (golden.FOLDER / f"model_{name}_config.json").exists()]


def _tensors(name):
  return safetensors.load_file(golden.FOLDER / f"model_{name}.safetensors")


def _settings(name):
  return json.loads((golden.FOLDER / f"model_{name}_config.json").read_text())


def _folder(path, tensors, settings):
  (path / "config.json").write_text(json.dumps(settings))
  safetensors.save_file(tensors, path / "model.safetensors")
  return str(path)


def _assert_equal(ours, theirs):
  jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize("name", NAMES)
def test_golden_tensors_come_back_bit_equal(tmp_path, name, dtype):
  """In and out again, in the type of the source; `pos_embed` is computed anew."""
  source = {key: x.astype(dtype) for key, x in _tensors(name).items()}
  params, config, _ = published.load_folder(_folder(tmp_path, source, _settings(name)))
  again = tmp_path / "again"
  kind = np.dtype(dtype).name
  published.save_folder(str(again), lambda path: published.leaf(params, path), config, {}, kind)
  written = safetensors.load_file(again / "model.safetensors")
  position = written.pop("pos_embed")
  assert position.shape == (1, config.pos_embed_max_size**2, config.backbone.hidden_size)
  source.pop("pos_embed", None)
  assert set(written) == set(source)
  for key, tensor in source.items():
    assert written[key].dtype == tensor.dtype
    np.testing.assert_array_equal(written[key], tensor)
  _, config_again, _ = published.load_folder(str(again))
  assert config_again == config


def test_golden_weights_load_from_every_kind_of_file(tmp_path):
  settings, tensors = _settings("a"), _tensors("a")
  wanted, _, _ = published.load_folder(_folder(tmp_path, tensors, settings))
  (tmp_path / "model.safetensors").unlink()
  torch_files.save(tmp_path / "pytorch_model.bin", tensors)
  _assert_equal(published.load_folder(str(tmp_path))[0], wanted)
  (tmp_path / "pytorch_model.bin").unlink()
  for number, key in enumerate(tensors):
    torch_files.save(tmp_path / f"part{number}.bin", {key: tensors[key]})
  _assert_equal(published.load_folder(str(tmp_path))[0], wanted)


def test_golden_weights_in_shards(tmp_path):
  config, params = golden.load_model("gqa")
  read = lambda path: published.leaf(params, path)
  published.save_folder(str(tmp_path), read, config, {}, "float32", shard_bytes=40_000)
  files = sorted(path.name for path in tmp_path.iterdir())
  shards = [name for name in files if name.endswith(".safetensors")]
  assert len(shards) > 3
  assert files == sorted([*shards, "config.json", "model.safetensors.index.json"])
  index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
  sizes = {}
  for name in shards:
    held = safetensors.load_file(tmp_path / name)
    sizes[name] = sum(x.nbytes for x in held.values())
    assert sizes[name] <= 40_000 or len(held) == 1
    assert set(held) == {key for key, file in index["weight_map"].items() if file == name}
  assert index["metadata"]["total_size"] == sum(sizes.values())
  _assert_equal(published.load_folder(str(tmp_path))[0], params)
  published.save_folder(str(tmp_path), read, config, {}, "float32", position=False)
  assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
  _assert_equal(published.load_folder(str(tmp_path))[0], params)


def test_golden_position_table_is_verified(tmp_path):
  settings, tensors = _settings("a"), _tensors("a")
  config = published.model_config(settings)
  table = published.position_tensor(config)
  for right in (table, table.astype(ml_dtypes.bfloat16)):
    _folder(tmp_path, {**tensors, "pos_embed": right}, settings)
    published.load_folder(str(tmp_path))
  other = model.position_table(config.backbone.hidden_size, 2 * config.pos_embed_max_size,
                               config.pos_embed_max_size, config.pos_embed_max_size)[None]
  for wrong, message in ((other, r"pos_embed differs by .* from the sine-cosine table"),
                         (table[:, :-1], r"pos_embed is \(1, \d+, \d+\), expected"),
                         (np.full_like(table, np.nan), "pos_embed differs by nan")):
    _folder(tmp_path, {**tensors, "pos_embed": wrong}, settings)
    with pytest.raises(InputError, match=message):
      published.load_folder(str(tmp_path))


@pytest.mark.parametrize(("damage", "message"), [
  (lambda t, s: t.pop("llm.norm.weight"), "missing llm.norm.weight"),
  (lambda t, s: t.update(extra=np.zeros(2, np.float32)), "unexpected extra"),
  (lambda t, s: t.update({"llm.norm.weight": np.zeros(3, np.float32)}),
   r"llm\.norm\.weight is \(3,\), expected \(\d+,\)"),
  (lambda t, s: s.pop("hidden_size"), "config.json lacks 'hidden_size'"),
  (lambda t, s: s.pop("special_ids"), "config.json lacks 'special_ids'"),
  (lambda t, s: s.update(rope_scaling={"type": "yarn"}), "asks for rope_scaling 'yarn'"),
])
def test_golden_weights_that_do_not_fit_are_refused(tmp_path, damage, message):
  tensors, settings = _tensors("a"), _settings("a")
  damage(tensors, settings)
  with pytest.raises(InputError, match=message):
    published.load_folder(_folder(tmp_path, tensors, settings))


def test_a_run_is_exported_and_predicts_the_same(finished, tmp_path):
  convert.export(str(finished.workdir), str(tmp_path / "out"), "float32")
  trained, _ = checkpoint.load_params(finished.workdir)
  exported = weights_lib.load(str(tmp_path / "out"))
  _assert_equal(exported.params, trained)
  run = weights_lib.load(str(finished.workdir))
  assert exported.codec == run.codec
  history = np.zeros((1, 2, *run.frame_size, 3), np.uint8)
  future = lambda w: w.continue_video(history, 2, rng=jax.random.key(0))
  np.testing.assert_array_equal(future(exported), future(run))


def test_export_to_a_file_or_from_nothing_is_refused(finished, tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(InputError, match="cannot write weights to"):
    convert.export(str(finished.workdir), str(tmp_path / "file" / "out"))
  with pytest.raises(InputError, match="no checkpoint in"):
    convert.export(str(tmp_path), str(tmp_path / "out"))
