"""Weights under the published names: out, in, and what is refused."""

import json
import weakref

from flax import traverse_util
import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors import numpy as safetensors
from safetensors import SafetensorError

import golden_videogpt as golden
import tiny_run
import torch_files
from videogpt_jax import checkpoint_files
from videogpt_jax import convert
from videogpt_jax import folder as folder_lib
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


def _load(path):
  """Parameters (float32) and model of a weights folder."""
  found = folder_lib.open_folder(str(path))
  params = {name: leaf.read(np.float32) for name, leaf in found.leaves.items()}
  return traverse_util.unflatten_dict(params, sep="/"), found.model


def _assert_equal(ours, theirs):
  jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize("name", NAMES)
def test_golden_tensors_come_back_bit_equal(tmp_path, name, dtype):
  """In and out again, in the type of the source; `pos_embed` is computed anew."""
  source = {key: x.astype(dtype) for key, x in _tensors(name).items()}
  params, config = _load(_folder(tmp_path, source, _settings(name)))
  again = tmp_path / "again"
  kind = np.dtype(dtype).name
  folder_lib.save(str(again), lambda path: published.leaf(params, path), config, {}, kind)
  written = safetensors.load_file(again / "model.safetensors")
  position = written.pop("pos_embed")
  assert position.shape == (1, config.pos_embed_max_size**2, config.backbone.hidden_size)
  source.pop("pos_embed", None)
  assert set(written) == set(source)
  for key, tensor in source.items():
    assert written[key].dtype == tensor.dtype
    np.testing.assert_array_equal(written[key], tensor)
  _, config_again = _load(again)
  assert config_again == config


def test_golden_weights_load_from_every_kind_of_file(tmp_path):
  settings, tensors = _settings("a"), _tensors("a")
  wanted, _ = _load(_folder(tmp_path, tensors, settings))
  (tmp_path / "model.safetensors").unlink()
  torch_files.save(tmp_path / "pytorch_model.bin", tensors)
  _assert_equal(_load(tmp_path)[0], wanted)
  (tmp_path / "pytorch_model.bin").unlink()
  for number, key in enumerate(tensors):
    torch_files.save(tmp_path / f"part{number}.bin", {key: tensors[key]})
  _assert_equal(_load(tmp_path)[0], wanted)


def test_golden_weights_in_shards(tmp_path):
  config, params = golden.load_model("gqa")
  read = lambda path: published.leaf(params, path)
  folder_lib.save(str(tmp_path), read, config, {}, "float32", shard_bytes=40_000)
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
  _assert_equal(_load(tmp_path)[0], params)
  folder_lib.save(str(tmp_path), read, config, {}, "float32", position=False)
  assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
  _assert_equal(_load(tmp_path)[0], params)


def test_golden_position_table_is_verified(tmp_path):
  settings, tensors = _settings("a"), _tensors("a")
  config = published.model_config(settings)
  table = published.position_tensor(config)
  for right in (table, table.astype(ml_dtypes.bfloat16)):
    _folder(tmp_path, {**tensors, "pos_embed": right}, settings)
    _load(tmp_path)
  other = model.position_table(config.backbone.hidden_size, 2 * config.pos_embed_max_size,
                               config.pos_embed_max_size, config.pos_embed_max_size)[None]
  for wrong, message in ((other, r"pos_embed differs by .* from the sine-cosine table"),
                         (table[:, :-1], r"pos_embed is \(1, \d+, \d+\), expected"),
                         (np.full_like(table, np.nan), "pos_embed differs by nan"),
                         (_last_row_nan(table), "pos_embed differs by nan")):
    _folder(tmp_path, {**tensors, "pos_embed": wrong}, settings)
    with pytest.raises(InputError, match=message):
      _load(tmp_path)


def _last_row_nan(table):
  table = table.copy()
  table[0, -1] = np.nan
  return table


@pytest.mark.parametrize(("damage", "message"), [
  (lambda t, s: t.update({"llm.norm.weight": t["llm.norm.weight"].astype(np.float64)}),
   "llm.norm.weight is of type float64, known are float32, bfloat16, float16"),
  (lambda t, s: s.update(hidden_size="x"), "hidden_size must be a positive whole number, got 'x'"),
  (lambda t, s: s.update(num_attention_heads=0), "num_attention_heads must be a positive whole"),
  (lambda t, s: s.update(patch_size=2.5), "patch_size must be a positive whole number, got 2.5"),
  (lambda t, s: s.update(num_hidden_layers=None), "config.json lacks 'num_hidden_layers'"),
  (lambda t, s: s.update(rms_norm_eps="1e-5"), "rms_norm_eps must be a positive number"),
  (lambda t, s: s.update(hidden_size=30, num_attention_heads=4, num_key_value_heads=4),
   "hidden_size 30 is not divisible by num_heads 4"),
  (lambda t, s: s.update(rope_scaling=[1]), "rope_scaling cannot be read"),
  (lambda t, s: s.update(rope_scaling={"type": "su", "long_factor": [1.0]}),
   "rope_long_factor has 1 numbers; half a head's size"),
  (lambda t, s: s["special_ids"].update(img="7"), "the marker <img> is row 7 of an embedding"),
  (lambda t, s: t.pop("llm.norm.weight"), "missing llm.norm.weight"),
  (lambda t, s: t.update(extra=np.zeros(2, np.float32)), "unexpected extra"),
  (lambda t, s: t.update({"llm.norm.weight": np.zeros(3, np.float32)}),
   r"llm\.norm\.weight is \(3,\), expected \(\d+,\)"),
  (lambda t, s: s.pop("hidden_size"), "config.json lacks 'hidden_size'"),
  (lambda t, s: s.pop("special_ids"),
   r"know the marker tokens <\|diffusion\|> \(--diff_id\), <img> \(--img_id\)"),
  (lambda t, s: s["special_ids"].pop("img"), r"the marker tokens <img> \(--img_id\)"),
  (lambda t, s: s["special_ids"].update(img=s["vocab_size"]), r"the marker <img> is row \d+ of"),
  (lambda t, s: s["special_ids"].update(img=s["special_ids"]["diff"]), "share a row"),
  (lambda t, s: s.update(rope_scaling={"type": "yarn"}), "asks for rope_scaling 'yarn'"),
])
def test_golden_weights_that_do_not_fit_are_refused(tmp_path, damage, message):
  tensors, settings = _tensors("a"), _settings("a")
  damage(tensors, settings)
  with pytest.raises(InputError, match=message):
    _load(_folder(tmp_path, tensors, settings))


# Import -----------------------------------------------------------------------------------


def _bits(tensors):
  """Tensors that compare bit by bit, whatever their type."""
  return {name: (x.dtype.name, x.tobytes()) for name, x in tensors.items()}


FORMS = {
  "safetensors": lambda path, t: safetensors.save_file(t, path / "model.safetensors"),
  "bin": lambda path, t: torch_files.save(path / "pytorch_model.bin", t),
  "pt": lambda path, t: torch_files.save(path / "model.pt", t),
  "shards": lambda path, t: _shards(path, t, safetensors.save_file, "model-{}.safetensors"),
  "bin shards": lambda path, t: _shards(path, t, lambda x, file: torch_files.save(file, x),
                                        "pytorch_model-{}.bin"),
  # as the published training code saves: a folder of the file's name, inside `transformer`
  "bin folder": lambda path, t: _shards(path / "transformer" / "pytorch_model.bin", t,
                                        lambda x, file: torch_files.save(file, x), "{}.bin"),
}


def _shards(path, tensors, save, name):
  path.mkdir(parents=True, exist_ok=True)
  for number in range(3):
    save({key: tensors[key] for key in list(tensors)[number::3]}, path / name.format(number))


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", NAMES)
def test_golden_weights_go_round_bit_equal(tmp_path, name, form, dtype):
  """A published folder becomes a checkpoint, and that again a published folder."""
  source = {key: x.astype(dtype) for key, x in _tensors(name).items()}
  table = published.position_tensor(published.model_config(_settings(name))).astype(dtype)
  source["pos_embed"] = table
  inside = tmp_path / "published"
  inside.mkdir()
  (inside / "config.json").write_text(json.dumps(_settings(name)))
  FORMS[form](inside, source)
  convert.import_folder(str(inside), str(tmp_path / "checkpoint"))
  convert.export_folder(str(tmp_path / "checkpoint"), str(tmp_path / "again"))
  assert _bits(safetensors.load_file(tmp_path / "again" / "model.safetensors")) == _bits(source)
  again, given = (folder_lib.open_folder(str(tmp_path / path)).model
                  for path in ("again", "published"))
  assert again == given


def test_golden_import_predicts_as_the_folder_does(tmp_path):
  """Through the checkpoint and directly: the same parameters, model and settings."""
  inside = tmp_path / "published"
  inside.mkdir()
  _folder(inside, _tensors("gqa"), _settings("gqa"))
  convert.import_folder(str(inside), str(tmp_path / "checkpoint"))
  direct, through = (weights_lib.load(str(tmp_path / path)) for path in ("published", "checkpoint"))
  _assert_equal(through.params, direct.params)
  assert through.model == direct.model
  assert through.codec == direct.codec
  assert through.config["sample"] == direct.config["sample"]
  assert (through.config["sample"]["guidance"], through.config["data"]["interval"][0]) == (1.5, 4)


def test_golden_import_in_another_type(tmp_path):
  inside = tmp_path / "published"
  inside.mkdir()
  _folder(inside, _tensors("a"), _settings("a"))
  convert.import_folder(str(inside), str(tmp_path / "checkpoint"), "bfloat16")
  leaves = weights_lib.open_source(str(tmp_path / "checkpoint")).leaves
  assert {leaf.dtype.name for leaf in leaves.values()} == {"bfloat16"}
  wanted, _ = _load(inside)
  _assert_equal(traverse_util.unflatten_dict({k: x.read() for k, x in leaves.items()}, sep="/"),
                jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16), wanted))


TOKENIZERS = {
  "tokenizer.json": lambda ids: {"added_tokens": [
    {"id": row, "content": text, "special": True} for text, row in ids.items()]},
  "tokenizer_config.json": lambda ids: {"added_tokens_decoder": {
    str(row): {"content": text} for text, row in ids.items()}},
  "added_tokens.json": lambda ids: ids,
}


@pytest.mark.parametrize("file", TOKENIZERS)
def test_golden_markers_come_from_the_tokenizer(tmp_path, file):
  settings = _settings("a")
  ids = settings.pop("special_ids")
  texts = {"<|diffusion|>": ids["diff"], "<img>": ids["img"], "</img>": ids["end_img"], "<s>": 1}
  path = _folder(tmp_path, _tensors("a"), settings)
  (tmp_path / file).write_text(json.dumps(TOKENIZERS[file](texts)))
  found = folder_lib.open_folder(path).model
  assert (found.diff_id, found.img_id, found.end_img_id) == (
    ids["diff"], ids["img"], ids["end_img"])
  assert folder_lib.open_folder(path, {"img": 7}).model.img_id == 7  # a flag comes first
  (tmp_path / file).write_text("{")
  with pytest.raises(InputError, match=f"{file} is damaged"):
    folder_lib.open_folder(path)
  assert folder_lib.open_folder(path, {"diff": 5, "img": 6, "end_img": 7}).model.diff_id == 5


def test_golden_layers_of_mixed_types_lose_nothing(tmp_path):
  """One layer in bfloat16, the others in float32: the stack is float32."""
  tensors = _tensors("gqa")
  tensors["llm.layers.0.mlp.down_proj.weight"] = (
    tensors["llm.layers.0.mlp.down_proj.weight"].astype(ml_dtypes.bfloat16))
  _folder(tmp_path, tensors, _settings("gqa"))
  params, _ = _load(tmp_path)
  down = params["backbone"]["layers"]["mlp"]["down"]
  for i in range(len(down)):
    theirs = tensors[f"llm.layers.{i}.mlp.down_proj.weight"].astype(np.float32)
    np.testing.assert_array_equal(down[i], theirs.T)


def test_golden_import_holds_one_piece_at_a_time(tmp_path, monkeypatch):
  """While a piece is written, those before it are gone; none is read ahead."""
  alive = []
  pieces = published.Leaf.pieces

  def watched(leaf):
    for index, piece in pieces(leaf):
      own = piece.copy()
      alive.append(weakref.ref(own))
      assert sum(ref() is not None for ref in alive) <= 3  # this one, and those being written
      yield index, own
      del own, piece

  monkeypatch.setattr(published.Leaf, "pieces", watched)
  inside = tmp_path / "published"
  inside.mkdir()
  convert.import_folder(_folder(inside, _tensors("gqa"), _settings("gqa")), str(tmp_path / "out"))
  assert len(alive) > 20


def test_golden_import_that_fails_halfway_leaves_nothing(tmp_path, monkeypatch):
  """A disk that fills up while parameters are written."""
  pieces = published.Leaf.pieces

  def full(leaf):
    if leaf.stacked:
      raise OSError(28, "No space left on device")
    return pieces(leaf)

  monkeypatch.setattr(published.Leaf, "pieces", full)
  inside = tmp_path / "published"
  inside.mkdir()
  path = _folder(inside, _tensors("a"), _settings("a"))
  with pytest.raises(InputError, match=r"cannot write the checkpoint .*No space left"):
    convert.import_folder(path, str(tmp_path / "out"))
  assert [entry.name for entry in tmp_path.iterdir()] == ["published"]


def test_export_that_fails_halfway_keeps_what_was_there(finished, tmp_path, monkeypatch):
  convert.export_folder(str(finished.workdir), str(tmp_path), "float32")
  before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

  def full(*_):
    raise SafetensorError("I/O error: No space left on device (os error 28)")

  monkeypatch.setattr(folder_lib.safetensors, "save_file", full)
  with pytest.raises(InputError, match=r"cannot write weights to .*No space left"):
    convert.export_folder(str(finished.workdir), str(tmp_path), "bfloat16")
  assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_golden_import_refuses_an_occupied_place_and_leaves_nothing(tmp_path):
  inside = tmp_path / "published"
  inside.mkdir()
  _folder(inside, _tensors("a"), _settings("a"))
  (tmp_path / "out").mkdir()
  (tmp_path / "out" / "mine").write_text("")
  with pytest.raises(InputError, match="out exists already"):
    convert.import_folder(str(inside), str(tmp_path / "out"))
  (tmp_path / "file").write_text("")
  with pytest.raises(InputError, match="cannot write the checkpoint"):
    convert.import_folder(str(inside), str(tmp_path / "file" / "out"))
  assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "out", "published"]


def test_the_benchmark_finds_both_ways_exact():
  result = tiny_run.run("benchmarks.convert", "--variant=small")
  assert result.returncode == 0, result.stderr
  said = json.loads(result.stdout.splitlines()[-1])
  assert said["bit_equal"] is True
  assert said["parameters"] == 998_208
  assert min(said["import_peak_rss_mib"], said["export_peak_rss_mib"]) > 50


# Phi-3 ------------------------------------------------------------------------------------


def _phi3(tmp_path):
  """A golden model's backbone, dressed as Phi-3 is released."""
  tensors = {"model." + name.removeprefix("llm."): x for name, x in _tensors("a").items()
             if name.startswith("llm.")}
  tensors["lm_head.weight"] = np.ones_like(tensors["model.embed_tokens.weight"])
  known = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
           "num_key_value_heads", "vocab_size", "rms_norm_eps", "rope_theta")
  settings = {name: _settings("a")[name] for name in known}
  settings |= {"architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "rope_scaling": None}
  return _folder(tmp_path, tensors, settings)


MARKER_IDS = {"diff": 5, "img": 6, "end_img": 7}


def test_golden_phi3_becomes_the_backbone_of_a_new_model(tmp_path):
  path = _phi3(tmp_path)
  convert.import_folder(path, str(tmp_path / "start"), special_ids=MARKER_IDS)
  source = weights_lib.open_source(str(tmp_path / "start"))
  params = weights_lib.parameters(source, lambda name, x: x)
  original, config = _load(_folder_of("a", tmp_path / "golden"))
  _assert_equal(params["backbone"], original["backbone"])
  _assert_equal(params["embed_tokens"], original["embed_tokens"])
  assert (source.model.img_id, source.model.channels) == (6, 4)
  assert source.model.pos_embed_max_size == 192
  # the rest as the published training code initialises it
  zero = [params["x_embedder"], params["final_layer"],
          *(params[part][bias] for part in ("time_token", "t_embedder")
            for bias in ("in_bias", "out_bias")), params["input_x_embedder"]["bias"]]
  assert all(not np.any(x) for x in jax.tree.leaves(zero))
  kernel = params["input_x_embedder"]["kernel"]
  D = config.backbone.hidden_size
  bound = np.sqrt(6 / (D + kernel.size // D))
  assert 0.9 * bound < np.abs(kernel).max() <= bound
  np.testing.assert_allclose(kernel.std(), bound / np.sqrt(3), rtol=0.1)
  for part in ("time_token", "t_embedder"):
    np.testing.assert_allclose(params[part]["in_kernel"].std(), 0.02, rtol=0.05)
    np.testing.assert_allclose(params[part]["out_kernel"].std(), 0.02, rtol=0.1)
  assert np.any(params["time_token"]["in_kernel"] != params["t_embedder"]["in_kernel"])
  again = weights_lib.parameters(weights_lib.open_source(path, MARKER_IDS), lambda name, x: x)
  _assert_equal(again, params)  # drawn the same


def _folder_of(name, path):
  path.mkdir()
  return _folder(path, _tensors(name), _settings(name))


def test_golden_phi3_without_marker_rows_is_refused(tmp_path):
  with pytest.raises(InputError, match="know the marker tokens"):
    convert.import_folder(_phi3(tmp_path), str(tmp_path / "start"))


# Export -----------------------------------------------------------------------------------


def test_a_run_is_exported_and_predicts_the_same(finished, tmp_path):
  convert.export_folder(str(finished.workdir), str(tmp_path / "out"), "float32")
  trained, _ = checkpoint_files.load_params(finished.workdir)
  exported = weights_lib.load(str(tmp_path / "out"))
  _assert_equal(exported.params, trained)
  run = weights_lib.load(str(finished.workdir))
  assert exported.codec == run.codec
  history = np.zeros((1, 2, run.config["data"]["height"], run.config["data"]["width"], 3), np.uint8)
  future = lambda w: w.continue_video(history, 2, rng=jax.random.key(0))
  np.testing.assert_array_equal(future(exported), future(run))


def test_export_to_a_file_or_from_nothing_is_refused(finished, tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(InputError, match="cannot write weights to"):
    convert.export_folder(str(finished.workdir), str(tmp_path / "file" / "out"))
  with pytest.raises(InputError, match="no checkpoint in"):
    convert.export_folder(str(tmp_path), str(tmp_path / "out"))
