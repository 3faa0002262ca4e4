"""What `inspect` tells of a data set, against figures computed from its records with numpy."""

import builtins
import json
import shutil

import numpy as np
from PIL import Image
import pytest

import tiny_run
from videogpt_jax import codec as codec_lib
from videogpt_jax import config as config_lib
from videogpt_jax import encode
from videogpt_jax import inspect
from videogpt_jax.data import inspection
from videogpt_jax.data import inspection_pictures as pictures
from videogpt_jax.data import store
from videogpt_jax.data import video
from videogpt_jax.data import world
from videogpt_jax.errors import InputError


@pytest.fixture(scope="module")
def films(tmp_path_factory):
  """A data set of mp4 files of two sizes, 10 to 30 frames long, with labels and captions."""
  folder = tmp_path_factory.mktemp("films")
  lines = ["path,label,caption,split"]
  for i in range(7):
    frames = world.simulate(world.Settings(size=32, frames=10 + 4 * i), i).frames
    frames = np.concatenate([frames, frames[:, :, :16]], axis=2)
    if i in (1, 4):
      frames = frames.transpose(0, 2, 1, 3)
    name = f"a_folder_with_a_long_name/film_{i}.mp4"
    (folder / name).parent.mkdir(exist_ok=True)
    video.write_mp4(folder / name, frames, fps=24.0 if i % 2 else 12.0)
    lines.append(f"{name},{'dance' if i < 4 else 'sing'},{'a film' * (i % 2)},"
                 f"{'validation' if i > 4 else 'train'}")
  (folder / "text.mp4").write_text("no video")
  lines += ["text.mp4,sing,,train", "gone.mp4,sing,,train", "lost.mp4,sing,,train"]
  (folder / "list.csv").write_text("\n".join(lines) + "\n")
  c = config_lib.default()
  c.data.videos = str(folder / "list.csv")
  c.data.longest_side, c.data.min_side, c.data.frames = 48, 16, 4
  c.data.stride, c.data.interval = 2, (2, 2)
  c.data.videos_per_shard = 3
  c.codec.block = 2
  return encode.encode(c, out=folder / "set", processes=1)


def _latents(folder, records, splits=("train",), channels=4, dtype="float16", **spec):
  """A data set of an autoencoder's latents that no video was needed for."""
  settings = codec_lib.Vae(block=8, channels=4, scale=0.2, shift=0.5).spec()
  made = store.Spec(channels=channels, dtype=dtype, codec=settings, **spec)
  writer = store.create(folder, made, dict.fromkeys(splits, 1), {"source": "nowhere"})
  for split in splits:
    with writer.shard(split, 0) as shard:
      for i, latents in enumerate(records if split == "train" else ()):
        shard.add(latents, fps=8.0, source=f"video {i}")
      shard.reject("bad.mp4", "too short: 3 frames")
      shard.reject("worse.mp4", "too short: 2 frames")
      shard.reject("worst.mp4", "gone")
  writer.finish()
  return folder


def _random(*shape, seed=0, dtype="float16"):
  return np.random.default_rng(seed).normal(0.5, 5, shape).astype(dtype)


def _records(path, split):
  source = store.open_split(path, split)
  return [source[i] for i in range(len(source))]


def _content(path):
  return {p.name: p.read_bytes() for p in sorted(path.iterdir()) if p.is_file()}


def _assert_printed(text, *lines):
  """Every line stands somewhere in the text, whatever the spaces."""
  words = " ".join(text.split())
  for line in lines:
    assert line in words, f"{line!r} is not in {words}"


@pytest.fixture
def unrendered(monkeypatch):
  """Plots are drawn, but their files left empty: rendering takes most of an inspection's time."""
  monkeypatch.setattr(pictures, "_save", lambda fig, path: path.touch() or path)


# Figures


def test_figures_of_the_world(tiny_data, tmp_path, capsys):
  before = _content(tiny_data)
  found = inspect.inspect(tiny_data, tmp_path / "out")
  assert _content(tiny_data) == before
  assert json.loads((tmp_path / "out" / "inspection.json").read_text()) == found
  assert sorted(found["splits"]) == ["train", "validation"]
  assert found["origin"] == store.origin(tiny_data)
  assert (found["dtype"], found["stride"], found["channels"], found["format"]) == (
    "uint8", 1, 48, store.metadata(tiny_data)["format"])
  assert found["rejected"] == {"videos": 0, "kinds": {}}
  for split, count in (("train", 24), ("validation", 8)):
    records, figures = _records(tiny_data, split), found["splits"][split]
    on_disk = sum(p.stat().st_size for p in tiny_data.glob(f"*{split}.array_record*"))
    assert (figures["records"], figures["frames"], figures["shards"]) == (count, 6 * count, 1)
    assert figures["hours"] == pytest.approx(6 * count / records[0]["fps"] / 3600)
    assert (figures["bytes"], figures["bytes_per_frame"]) == (on_disk, on_disk / (6 * count))
    assert figures["bytes_in_memory"] == 6 * count * 16 * 16 * 3
    assert figures["lengths"] == {"min": 6, "median": 6.0, "mean": 6.0, "max": 6}
    assert figures["long_enough"] == {"16": 0, "48": 0, "80": 0}
    assert figures["buckets"] == [{"height": 16, "width": 16, "h": 4, "w": 4, "records": count,
                                   "frames": 6 * count, "share": 1.0}]
    assert figures["captions"] == count
    by_label = np.bincount([record["label"] for record in records])
    assert figures["labels"]["labelled"] == count
    assert figures["labels"]["records"] == {str(i): n for i, n in enumerate(by_label) if n}
    most = list(figures["labels"]["records"].values())
    assert most == sorted(most, reverse=True)
    stored = np.concatenate([record["latents"].reshape(-1, 48) for record in records])
    stored = stored.astype(float)
    latents = figures["latents"]
    assert (latents["values"], latents["non_finite"]) == (stored.size, 0)
    for name in ("mean", "std", "min", "max"):
      np.testing.assert_allclose(latents[name], getattr(stored, name)(0), rtol=1e-9)
    seen = (stored / 255 - 0.5) * 2
    for name in ("mean", "std", "min", "max"):
      np.testing.assert_allclose(figures["model_sees"][name], getattr(seen, name)(), rtol=1e-5)
    assert figures["model_sees"]["scale_for_std_1"] == pytest.approx(2 / seen.std(), rel=1e-5)
  text = capsys.readouterr().out
  red = np.concatenate([x["latents"].reshape(-1, 48) for x in _records(tiny_data, "train")])
  _assert_printed(text, "made of world, 24 train, 8 validation", "records 24 in 1 shard",
                  "lengths all 6 frames", "stride 1: every source frame",
                  f"red {red[:, ::3].mean():.3f} {red[:, ::3].std():.3f}", "videos none")


def test_figures_of_films_of_two_sizes(films, tmp_path, capsys):
  found = inspect.inspect(films, tmp_path)
  assert found["rejected"] == {"videos": 3, "kinds": {"missing": 2,
                                                      "not a video that can be read": 1}}
  train, held_out = found["splits"]["train"], found["splits"]["validation"]
  assert (train["records"], train["shards"], held_out["records"]) == (5, 3, 2)
  assert train["lengths"] == {"min": 5, "median": 9.0, "mean": 9.0, "max": 13}
  assert held_out["lengths"] == {"min": 15, "median": 16.0, "mean": 16.0, "max": 17}
  assert held_out["long_enough"] == {"16": 1, "48": 0, "80": 0}
  assert train["buckets"] == [
    {"height": 32, "width": 48, "h": 16, "w": 24, "records": 3, "frames": 5 + 9 + 11,
     "share": 3 / 5},
    {"height": 48, "width": 32, "h": 24, "w": 16, "records": 2, "frames": 7 + 13,
     "share": 2 / 5},
  ]
  seconds = sum(2 * len(r["latents"]) / r["fps"] for r in _records(films, "train"))
  assert seconds == pytest.approx(2 * ((5 + 9 + 13) / 12 + (7 + 11) / 24))
  assert train["hours"] == pytest.approx(seconds / 3600)
  assert train["fps"] == {"min": 12.0, "median": 12.0, "mean": 16.8, "max": 24.0}
  assert train["labels"] == {"classes": 2, "labelled": 5, "records": {"dance": 4, "sing": 1}}
  assert (train["captions"], held_out["captions"]) == (2, 1)
  text = capsys.readouterr().out
  digest = store.origin(films)["digest"]
  _assert_printed(text, f"made of videos, 8 train, 2 validation; digest of the list {digest}",
                  "stride 2: one of 2 source frames", "labels 2 classes in 5 of 5: dance (4), "
                  "sing (1)", 'captions 2 of 5, as "a film"', "32x48 16x24 3 60.0% 25",
                  "48x32 24x16 2 40.0% 20", "2 missing, as gone.mp4",
                  f"video {seconds:.1f} seconds (12, 12 to 24 source frames/s)",
                  "for 16 frames 1 (50.0%)")
  assert not [line for line in text.splitlines() if len(line) > 100 and "wrote" not in line]


def test_a_sample_stands_for_many_records(films, tmp_path, capsys, monkeypatch, unrendered):
  monkeypatch.setattr(inspection, "_SAMPLE", 3)
  found = inspect.inspect(films, tmp_path, splits=["train"], seed=1)["splits"]["train"]
  text = capsys.readouterr().out
  assert (found["records"], found["sampled_records"]) == (5, 3)
  assert sum(found["labels"]["records"].values()) == found["labels"]["labelled"] == 3
  sampled = lambda: inspection.Sample(store.open_split(films, "train"), codec_lib.Pixels(2),
                                      1).records
  chosen = sampled()
  records = [_records(films, "train")[i] for i in chosen]
  frames = sum(len(r["latents"]) for r in records)
  seconds = sum(2 * len(r["latents"]) / r["fps"] for r in records)
  assert found["hours"] == pytest.approx(seconds / frames * 45 / 3600)
  mean = np.concatenate([r["latents"].reshape(-1, 12) for r in records]).mean(0)
  np.testing.assert_allclose(found["latents"]["mean"], mean)
  _assert_printed(text, "of 3 sampled", "video about", "latents of 3 records")
  monkeypatch.setattr(inspection, "_SAMPLE_BYTES", 1)
  assert len(sampled()) == 3
  monkeypatch.setattr(inspection, "_FEWEST", 2)
  assert len(sampled()) == 2


def test_the_seed_decides_everything(films, tmp_path, unrendered):
  for name, seed in (("one", 3), ("two", 3), ("other", 4)):
    inspect.inspect(films, tmp_path / name, records=2, seed=seed)
  one, two, other = (_content(tmp_path / name) for name in ("one", "two", "other"))
  assert one == two
  sheets = [name for name in one if name.startswith("contact_sheet")]
  assert any(one[name] != other.get(name) for name in sheets)


def test_statistics_in_pieces_are_those_of_all():
  rng = np.random.default_rng(0)
  values = rng.normal(1000, 1, (1000, 3)) * (1, 10, 0)
  values[5, 1] = np.nan
  pieces = inspection.Statistics(3)
  for start in range(0, 1000, 37):
    pieces.add(values[start:start + 37])
  figures = pieces.to_json()
  for name, expected in (("mean", np.nanmean), ("std", np.nanstd), ("min", np.nanmin),
                         ("max", np.nanmax)):
    np.testing.assert_allclose(figures[name], expected(values, axis=0), rtol=1e-9)
  assert pieces.non_finite == 1
  grouped = pieces.grouped({"first": np.array([0, 1]), "last": np.array([2])}).to_json()
  np.testing.assert_allclose(grouped["std"], [np.nanstd(values[:, :2]), 0], rtol=1e-9)
  none = inspection.Statistics(1)
  none.add(np.array([[np.inf]]))
  assert none.to_json() == {"mean": [None], "std": [None], "min": [None], "max": [None]}


# Pictures


def _tile(sheet, row, column, rows, columns, size):
  """A frame of a contact sheet: they stand at its right, 1 px of black around each."""
  height, width = size[0] + 2, size[1] + 2
  top = sheet.shape[0] - (rows - row) * height + 1
  left = sheet.shape[1] - (columns - column) * width + 1
  return sheet[top:top + size[0], left:left + size[1]]


def test_contact_sheets_show_the_records(films, tmp_path, unrendered):
  found = inspect.inspect(films, tmp_path, splits=["train"], records=4)
  assert found["files"] == ["lengths.png", "latents.png", "contact_sheet_32x48.png",
                            "contact_sheet_48x32.png"]
  pixels = codec_lib.from_spec(found["codec"])
  scale = 3  # 48 px to about 160
  for size, columns in (((32, 48), 8), ((48, 32), 8)):
    sheet = np.asarray(Image.open(tmp_path / f"contact_sheet_{size[0]}x{size[1]}.png"))
    known = [r["latents"] for r in _records(films, "train")
             if r["latents"].shape[1] * 2 == size[0]]
    shown = [pixels.decode(latents) for latents in known]
    matched = 0
    for row in range(2):
      tiles = [_tile(sheet, row, i, 2, columns, (size[0] * scale, size[1] * scale))
               for i in range(columns)]
      for frames in shown:
        places = np.rint(np.linspace(0, len(frames) - 1, columns)).astype(int)
        expected = frames[places].repeat(scale, axis=1).repeat(scale, axis=2)
        matched += np.array_equal(expected, tiles)
    assert matched == 2


def test_one_size_one_sheet_and_records_as_wanted(tiny_data, tmp_path, unrendered):
  found = inspect.inspect(tiny_data, tmp_path / "some", records=3)
  assert found["files"] == ["lengths.png", "latents.png", "contact_sheet.png"]
  sheet = np.asarray(Image.open(tmp_path / "some" / "contact_sheet.png"))
  assert sheet.shape[0] == 16 + 3 * 162  # a line of titles, 10 px a pixel
  found = inspect.inspect(tiny_data, tmp_path / "none", records=0)
  assert found["files"] == ["lengths.png", "latents.png"]
  assert not (tmp_path / "none" / "contact_sheet.png").exists()


def test_large_frames_are_shrunk(tmp_path):
  frames = pictures._fitted(np.full((2, 300, 600, 3), 7, np.uint8))
  assert frames.shape == (2, 96, 192, 3) and (frames == 7).all()


def test_sizes_take_turns(films):
  sources = [store.open_split(films, split) for split in store.splits(films)]
  shown = pictures._shown(sources, 3, seed=0)
  assert {size: [one.split for one, _ in rows] for size, rows in shown.items()} == {
    (16, 24): ["train", "validation"], (24, 16): ["train"]}
  every = pictures._shown(sources, 100, seed=0)
  assert {size: [number for _, number in rows] for size, rows in every.items()} == {
    (16, 24): [0, 2, 3, 0, 1], (24, 16): [1, 4]}


def test_long_names_keep_their_end():
  assert pictures._shortened("short.mp4") == "short.mp4"
  name = pictures._shortened("folder/" * 10 + "end.mp4")
  assert name.startswith("...") and name.endswith("/end.mp4") and len(name) == pictures._NAME


def test_without_matplotlib_there_are_no_plots(tiny_data, tmp_path, capsys, monkeypatch):
  imported = builtins.__import__

  def refuse(name, *args, **kwargs):
    if name.startswith("matplotlib"):
      raise ImportError(name)
    return imported(name, *args, **kwargs)

  monkeypatch.setattr(builtins, "__import__", refuse)
  found = inspect.inspect(tiny_data, tmp_path)
  assert found["files"] == ["contact_sheet.png"]
  assert "warning: no plots: they need matplotlib; pip install" in capsys.readouterr().err


# Latents of an autoencoder


def test_without_an_autoencoder_all_else_is_told(tmp_path, capsys):
  records = [_random(length, 4, 6, 4, seed=length) for length in (16, 20, 90)]
  data = _latents(tmp_path / "data", records)
  for vae, reason in (("", "give --vae=DIR"), (str(tmp_path / "nowhere"), "no folder")):
    found = inspect.inspect(data, tmp_path / "out", vae=vae)
    printed = capsys.readouterr()
    assert [line for line in printed.out.splitlines() if "no contact sheet" in line and
            reason in line] and not printed.err
    assert found["files"] == ["lengths.png", "latents.png"]
    figures = found["splits"]["train"]
    assert figures["long_enough"] == {"16": 3, "48": 1, "80": 1}
    assert figures["buckets"][0]["height"] == 32
    assert figures["labels"] == {"classes": 0, "labelled": 0, "records": {}}
    values = np.concatenate([r.reshape(-1, 4) for r in records]).astype(float)
    np.testing.assert_allclose(figures["latents"]["std"], values.std(0))
    seen = (values - 0.5) * 0.2
    np.testing.assert_allclose(figures["model_sees"]["channels"]["mean"], seen.mean(0), atol=1e-6)
    assert figures["model_sees"]["scale_for_std_1"] == pytest.approx(0.2 / seen.std(), rel=1e-4)
    assert found["rejected"] == {"videos": 3, "kinds": {"too short": 2, "gone": 1}}
    _assert_printed(printed.out, "labels none of 3", "captions none of 3",
                    "for 16 frames 3 (100%), for 48 frames 1 (33.3%)", "channel 3",
                    "2 too short, as bad.mp4", "1 gone, as worst.mp4")


def test_of_a_posterior_the_means_are_shown(tmp_path, capsys, monkeypatch):
  def decode(codec, latents):  # in the autoencoder's stead, which takes long to compile
    assert codec.path == "some-vae"
    frames = np.clip(latents[..., 1:].astype(float) * 10 + 100, 0, 255).astype(np.uint8)
    return frames.repeat(8, axis=1).repeat(8, axis=2)

  monkeypatch.setattr(codec_lib.Vae, "prepare", lambda codec: None)
  monkeypatch.setattr(codec_lib.Vae, "decode", decode)
  records = [_random(9, 3, 4, 8, dtype="bfloat16", seed=i) for i in range(2)]
  data = _latents(tmp_path / "data", records, channels=8, dtype="bfloat16", moments=True)
  found = inspect.inspect(data, tmp_path / "out", vae="some-vae")
  assert found["moments"] and found["files"][-1] == "contact_sheet.png"
  assert len(found["splits"]["train"]["latents"]["mean"]) == 8
  assert len(found["splits"]["train"]["model_sees"]["channels"]["mean"]) == 4
  seen = (np.stack(records)[..., :4].astype(float) - 0.5) * 0.2
  assert found["splits"]["train"]["model_sees"]["std"] == pytest.approx(seen.std(), rel=1e-5)
  codec = codec_lib.Vae(scale=0.2, shift=0.5, path="some-vae", moments=True)
  frames = codec.decode(records[1][[0, 1, 2, 3, 5, 6, 7, 8]][..., :4])
  sheet = np.asarray(Image.open(tmp_path / "out" / "contact_sheet.png"))
  tiles = [_tile(sheet, 1, i, 2, 8, (24 * 5, 32 * 5)) for i in range(8)]
  np.testing.assert_array_equal(tiles, frames.repeat(5, axis=1).repeat(5, axis=2))
  _assert_printed(capsys.readouterr().out, "log-variance 3",
                  "stored bfloat16, 4 means and 4 log-variances of a posterior")


def test_values_that_are_not_finite_are_told(tmp_path, capsys, unrendered):
  records = [_random(8, 2, 2, 4, seed=i) for i in range(3)]
  records[1][3, 0, 1, 2] = np.inf
  records[1][3, 1, 1, 2] = np.nan
  found = inspect.inspect(_latents(tmp_path / "data", records), tmp_path / "out")
  latents = found["splits"]["train"]["latents"]
  assert (latents["non_finite"], latents["non_finite_records"]) == (2, [1])
  values = np.concatenate([r.reshape(-1, 4) for r in records]).astype(float)
  expected = np.nanmax(np.where(np.isinf(values), np.nan, values), axis=0)
  np.testing.assert_allclose(latents["max"], expected)
  printed = capsys.readouterr()
  assert "2 not finite" in printed.out
  assert "warning: 2 stored values of split 'train' are not finite, in 1 record (1)" in printed.err
  json.loads((tmp_path / "out" / "inspection.json").read_text(), parse_constant=pytest.fail)


def test_a_split_without_records(tmp_path, capsys, unrendered):
  data = _latents(tmp_path / "data", [_random(4, 2, 2, 4)], splits=("train", "validation"))
  empty = inspect.inspect(data, tmp_path / "out")["splits"]["validation"]
  assert (empty["records"], empty["hours"], empty["buckets"]) == (0, None, [])
  assert "records      0 in 1 shard" in capsys.readouterr().out
  alone = inspect.inspect(data, tmp_path / "alone", splits=["validation"])
  assert alone["files"] == []
  json.loads((tmp_path / "alone" / "inspection.json").read_text(), parse_constant=pytest.fail)


# The command


def test_command(films, tmp_path):
  data = shutil.copytree(films, tmp_path / "mine")
  done = tiny_run.run("inspect", f"--data={data}", "--split=validation", cwd=tmp_path)
  assert done.returncode == 0, done.stderr
  out = tmp_path / "runs" / "inspect" / "mine"
  assert {p.name for p in out.iterdir()} == {"inspection.json", "lengths.png", "latents.png",
                                             "contact_sheet.png"}
  assert "\nvalidation\n" in done.stdout and "\ntrain\n" not in done.stdout
  assert "wrote runs/inspect/mine/contact_sheet.png" in done.stdout
  assert "warning" not in done.stderr and "Traceback" not in done.stderr
  assert _content(data) == _content(films)


def test_errors(films, tmp_path):
  with pytest.raises(InputError, match=r"no latent data set at .*nowhere"):
    inspect.inspect(tmp_path / "nowhere", tmp_path / "out")
  with pytest.raises(InputError, match="has no split 'test', only train, validation"):
    inspect.inspect(films, tmp_path / "out", splits=["test"])
  with pytest.raises(InputError, match=r"--vae=x: this data set holds pixels"):
    inspect.inspect(films, tmp_path / "out", vae="x")
  assert not (tmp_path / "out").exists()
  with pytest.raises(InputError, match="lies in the data set"):
    inspect.inspect(films, films / "inspection")
  (tmp_path / "file").write_text("")
  with pytest.raises(InputError, match="cannot write to --out="):
    inspect.inspect(films, tmp_path / "file" / "out")
  half = shutil.copytree(films, tmp_path / "half")
  (half / "rejected.jsonl").write_text("{")
  with pytest.raises(InputError, match=r"rejected.jsonl is damaged"):
    inspect.inspect(half, tmp_path / "out")
  (half / "dataset_info.json").unlink()
  with pytest.raises(InputError, match="unfinished"):
    inspect.inspect(half, tmp_path / "out")


def test_a_file_that_cannot_be_written(films, tmp_path):
  (tmp_path / "lengths.png").mkdir()
  (tmp_path / "inspection.json").mkdir()
  with pytest.raises(InputError, match="cannot write"):
    inspect.inspect(films, tmp_path)
