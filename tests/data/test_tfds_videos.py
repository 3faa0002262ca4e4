"""Data sets of TFDS: read by name, encoded, and the builder of latents. All without TensorFlow.

TFDS can construct no `Video` feature without it. What it stores of one is what it stores of a
sequence of `Image`, so sets with a `Video` are made here by that, and `features.json` of it.
"""

import io
import json
import pathlib
import pickle
import sys

from absl.testing import flagsaver
import numpy as np
from PIL import Image
import pytest
import tensorflow_datasets as tfds

from videogpt_jax import config as config_lib
from videogpt_jax import encode
from videogpt_jax.data import clips
from videogpt_jax.data import load
from videogpt_jax.data import store
from videogpt_jax.data import tfds_builder
from videogpt_jax.data import tfds_videos
from videogpt_jax.data import video
from videogpt_jax.errors import InputError
import zoo

LABELS = ["walk", "jump"]


def _png(frame):
  file = io.BytesIO()
  Image.fromarray(frame.squeeze()).save(file, "PNG")
  file.seek(0)
  return file


def _actions(seed):
  """uint8 [8 + seed, 32, 40, 3]"""
  return zoo.frames(seed, (32, 40), 8 + seed)


def _digits(seed):
  """uint8 [20, 64, 64, 1]: something grey that moves."""
  frames = np.zeros((20, 64, 64, 1), np.uint8)
  for t in range(20):
    frames[t, (t + seed) % 50:(t + seed) % 50 + 10, 5:15] = 200 + seed
  return frames


class TinyActions(tfds.core.GeneratorBasedBuilder):
  """As ucf101, with a sequence of pictures: train and test, labels; and captions."""

  VERSION = tfds.core.Version("1.0.0")
  COUNTS = {"train": 3, "test": 2}

  def _info(self):
    return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({
      "video": tfds.features.Sequence(tfds.features.Image(shape=(None, None, 3))),
      "label": tfds.features.ClassLabel(names=LABELS),
      "caption": tfds.features.Text(),
    }))

  def _split_generators(self, manager):
    return {split: self._generate_examples(split) for split in self.COUNTS}

  def _generate_examples(self, split):
    for i in range(self.COUNTS[split]):
      seed = i if split == "train" else 10 + i
      frames = [_png(frame) for frame in _actions(seed)]
      yield i, {"video": frames, "label": seed % 2, "caption": f"n {seed}"}


class TinyDigits(tfds.core.GeneratorBasedBuilder):
  """Shaped as moving_mnist: a test split only, 20 grey frames; a tensor of known shape."""

  VERSION = tfds.core.Version("1.0.0")

  def _info(self):
    return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({
      "image_sequence": tfds.features.Tensor(shape=(20, 64, 64, 1), dtype=np.uint8)}))

  def _split_generators(self, manager):
    return {"test": self._generate_examples()}

  def _generate_examples(self):
    for i in range(10):
      yield i, {"image_sequence": _digits(i)}


class TinyVaried(tfds.core.GeneratorBasedBuilder):
  """Compressed tensors of unknown shape and stated rates, some unusable, in nested fields."""

  VERSION = tfds.core.Version("1.0.0")
  SHAPES = [(12, 32, 32, 3), (2, 32, 32, 3), (12, 8, 32, 3), (12, 32, 200, 3), (0, 32, 32, 3)]

  def _info(self):
    return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({
      "depth": tfds.features.Tensor(shape=(None, 4, 4, 1), dtype=np.uint8),
      "scene": {"clip": tfds.features.Tensor(shape=(None, None, None, 3), dtype=np.uint8,
                                             encoding="zlib"),
                "fps": np.float32}}))

  def _split_generators(self, manager):
    return {"train": self._generate_examples()}

  def _generate_examples(self):
    for i, shape in enumerate(self.SHAPES):
      frames = np.broadcast_to(np.arange(shape[0], dtype=np.uint8)[:, None, None, None], shape)
      yield i, {"depth": np.zeros((1, 4, 4, 1), np.uint8),
                "scene": {"clip": np.ascontiguousarray(frames), "fps": 10.0}}


class TinyTexts(tfds.core.GeneratorBasedBuilder):
  """No videos."""

  VERSION = tfds.core.Version("1.0.0")

  def _info(self):
    return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({
      "text": tfds.features.Text(), "photo": tfds.features.Image()}))

  def _split_generators(self, manager):
    return {"train": self._generate_examples()}

  def _generate_examples(self):
    yield 0, {"text": "hello", "photo": _png(np.zeros((4, 4, 3), np.uint8))}


class Unreachable(tfds.core.GeneratorBasedBuilder):
  """Its download fails as one does without a network."""

  VERSION = tfds.core.Version("1.0.0")

  def _info(self):
    return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({
      "text": tfds.features.Text()}))

  def _split_generators(self, manager):
    raise ConnectionError("Failed to resolve 'example.org'")

  def _generate_examples(self):
    yield 0, {}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
  return tmp_path_factory.mktemp("tfds")


def _config(name, root, frames=4):
  c = config_lib.default()
  c.data.source, c.data.videos, c.data.root = "tfds", name, str(root)
  c.data.height = c.data.width = 32
  c.data.frames = frames
  c.codec.block = 4
  return c


def _clip(videos, split, index):
  loader = pickle.loads(pickle.dumps(videos.loader))
  (clip,) = loader(videos.item(split, index), lambda: None)
  return clip


def _as_video(folder, key, shape):
  """Makes the description of a set say `Video`, as TFDS writes it."""
  path = folder / "features.json"
  content = json.loads(path.read_text())
  content["featuresDict"]["features"][key] = {
    "pythonClassName": "tensorflow_datasets.core.features.video_feature.Video",
    "video": {"dtype": "uint8", "encodingFormat": "png",
              "shape": {"dimensions": [str(size) for size in shape]}}}
  path.write_text(json.dumps(content))


def test_a_set_is_prepared_and_its_frames_labels_and_splits_are_read(root):
  for _ in range(2):  # prepared, then found
    videos = clips.find(_config("tiny_actions", root))
    assert [videos.count(split) for split in clips.SPLITS] == [3, 2]
  assert videos.labels == tuple(LABELS)
  seen = set()
  for split in clips.SPLITS:
    for index in range(videos.count(split)):
      clip = _clip(videos, split, index)
      seed = int(clip.caption.removeprefix("n "))
      assert (seed >= 10) == (split == "validation")
      np.testing.assert_array_equal(clip.frames, video.resize_and_crop(_actions(seed), 32, 32))
      assert (clip.label, clip.fps) == (seed % 2, 25)
      assert clip.source == videos.name(split, index)
      seen.add(clip.source)
  assert seen == {f"tiny_actions/1.0.0/train/{i}" for i in range(3)} | {
    f"tiny_actions/1.0.0/test/{i}" for i in range(2)}


def test_a_video_feature_needs_no_tensorflow(root):
  folder = pathlib.Path(clips.find(_config("tiny_actions:1.0.0", root)).loader.folder)
  before = clips.find(_config(str(folder), ""))
  _as_video(folder, "video", (-1, 32, 40, 3))
  after = clips.find(_config(str(folder), ""))
  assert before.loader.layout == after.loader.layout
  assert len(_clip(after, "train", 0).frames) >= 8
  assert "tensorflow" not in sys.modules


def test_the_only_split_is_divided_by_a_hash_and_grey_becomes_colour(root):
  c = _config("tiny_digits", root)
  c.data.height = c.data.width = 64
  c.data.validation_fraction = 0.3
  videos = clips.find(c)
  items = {split: {videos.item(split, i) for i in range(videos.count(split))}
           for split in clips.SPLITS}
  assert items["train"] and items["validation"] and not items["train"] & items["validation"]
  assert items["train"] | items["validation"] == {("test", i) for i in range(10)}
  assert videos.labels == ()
  for split in clips.SPLITS:
    for i in range(videos.count(split)):
      clip = _clip(videos, split, i)
      seed = int(clip.frames.max()) - 200  # TFDS shuffles
      np.testing.assert_array_equal(clip.frames, np.repeat(_digits(seed), 3, axis=-1))
      assert clip.label == load.NO_LABEL


def test_a_split_for_training_only_is_divided_too(root):
  c = _config("tiny_varied", root)
  c.data.validation_fraction = 0.3
  videos = clips.find(c)
  assert videos.count("train") + videos.count("validation") == len(TinyVaried.SHAPES)
  assert videos.count("train") and videos.count("validation")


def test_several_parts_are_held_out_only_once():
  counts = {"train": 4, "validation": 3, "test": 2, "unlabeled": 9}
  parts, rows = tfds_videos._rows(counts, 0.5)
  assert parts == {"train": 4, "validation": 3}
  assert rows["train"].tolist() == [0, 1, 2, 3] and rows["validation"].tolist() == [4, 5, 6]


@pytest.mark.parametrize("fps,stride,limit,wanted,rate", [
  (0, 1, 0, list(range(12)), 10), (0, 3, 0, [0, 3, 6, 9], 10), (5, 1, 0, list(range(0, 12, 2)), 5),
  (20, 1, 5, [0, 0, 1, 1, 2], 20), (4, 2, 0, [0, 5, 10], 4)])
def test_frames_are_taken_by_rate_and_stride(root, fps, stride, limit, wanted, rate):
  c = _config("tiny_varied", root, frames=2)
  c.data.fps, c.data.stride, c.data.max_frames = float(fps), stride, limit
  c.data.interval = (stride, stride)
  loader = clips.find(c).loader
  (clip,) = loader(("train", _varied(loader)[TinyVaried.SHAPES[0]]), lambda: None)
  assert clip.frames[:, 0, 0, 0].tolist() == wanted
  assert clip.fps == rate


def _varied(loader):
  """Record of every shape: TFDS shuffles them."""
  split = loader.folder
  source = tfds.builder_from_directory(split).as_data_source("train")
  return {source[i]["scene"]["clip"].shape: i for i in range(len(source))}


def test_data_fps_is_the_rate_where_none_is_stated(root):
  c = _config("tiny_digits", root)
  c.data.fps = 12.0
  clip = _clip(clips.find(c), "train", 0)
  assert clip.fps == 12 and len(clip.frames) == 20


def test_unusable_records_are_listed_with_the_reason(root, tmp_path):
  c = _config("tiny_varied", root)
  c.data.validation_fraction = 0.0
  out = encode.encode(c, out=tmp_path / "set", processes=2)
  numbers = _varied(clips.find(c).loader)
  lines = (out / store.REJECTED).read_text().splitlines()
  reasons = {line["source"]: line["reason"] for line in map(json.loads, lines)}
  wanted = ("too short: 2 frames", "too small: 32x8 px", "too elongated: 200x32 px", "no frames")
  assert len(reasons) == len(wanted)
  for shape, begin in zip(TinyVaried.SHAPES[1:], wanted, strict=True):
    assert reasons[f"tiny_varied/1.0.0/train/{numbers[shape]}"].startswith(begin)
  assert store.open_split(out, "train").lengths.tolist() == [12]


def test_a_damaged_picture_costs_its_record(root, monkeypatch):
  videos = clips.find(_config("tiny_actions", root))
  monkeypatch.setattr(type(videos.loader), "_frames", lambda self, features: [b"no picture"] * 9)
  with pytest.raises(InputError, match="damaged: frame 1"):
    _clip(videos, "train", 0)


def test_encode_writes_the_same_latents_however_many_processes(root, tmp_path):
  made = [encode.encode(_config("tiny_actions", root), out=tmp_path / str(n), processes=n)
          for n in (1, 2)]
  content = [{p.name: p.read_bytes() for p in sorted(path.iterdir())} for path in made]
  assert content[0] == content[1]
  train = store.open_split(made[0], "train")
  assert train.info.labels == tuple(LABELS)
  records = [train[i] for i in range(len(train))]
  assert [r["caption"] for r in records] == [f"n {len(r['latents']) - 8}" for r in records]
  assert store.origin(made[0])["source"] == "tfds"


@pytest.fixture
def flags_of_encode():
  """The command's flags, gone after the test: --config is required of whoever parses flags."""
  before = flagsaver.save_flag_values()
  encode._define_flags()
  yield
  flagsaver.restore_flag_values(before)
  assert "config" not in encode.flags.FLAGS


def test_the_command_takes_a_name(monkeypatch, flags_of_encode):
  seen = []
  monkeypatch.setattr(encode, "encode", lambda config, **_: seen.append(config.data))
  c = config_lib.default()
  with flagsaver.flagsaver(config=c, videos="tfds:ucf101/ucf101_1", out="nowhere"):
    encode.main()
  assert (seen[0].source, seen[0].videos) == ("tfds", "ucf101/ucf101_1")


def test_the_builder_encodes_and_reads(root, tmp_path):
  c = _config("tiny_actions", root)
  builder = tfds_builder.VideogptLatents(config="folder", settings=c, data_dir=tmp_path)
  for _ in range(2):  # encoded, then found; also in another process
    builder.download_and_prepare()
    source = builder.as_data_source("train")
    assert len(source) == 3 and source[0]["latents"].shape[1:] == (8, 8, 48)
    builder = pickle.loads(pickle.dumps(builder))
  assert len(store.open_split(builder.data_path, "validation")) == 2
  assert set(tfds_builder.VideogptLatents.builder_configs) == {"folder", "moving_mnist", "ucf101"}
  c.data.max_frames = 5
  other = tfds_builder.VideogptLatents(config="folder", settings=c, data_dir=tmp_path)
  with pytest.raises(InputError, match="other settings"):
    other.download_and_prepare()


def test_the_builder_of_a_users_folder(tmp_path):
  (tmp_path / "videos").mkdir()
  for i in range(3):
    zoo.write(tmp_path / "videos" / f"{i}.mp4", zoo.frames(i))
  c = config_lib.default()
  c.data.videos, c.data.frames, c.codec.block = str(tmp_path / "videos"), 4, 4
  builder = tfds_builder.VideogptLatents(settings=c, data_dir=tmp_path / "out")
  builder.download_and_prepare()
  assert len(builder.as_data_source("train")) == 2
  assert builder.data_path == tmp_path / "out" / "videogpt" / "folder" / store.VERSION


@pytest.mark.parametrize("name,reason", [
  ("tiny_action", "did you mean tiny_actions"),
  ("moving_mnit", "moving_mnist"),
  ("tiny_texts", "has no video"),
  ("tiny/texts/more", "names no TFDS data set"),
  ("tiny_actions:9.9.9", "cannot prepare"),
  ("unreachable", "is there a network"),
])
def test_names_that_lead_to_no_videos(root, name, reason):
  with pytest.raises(InputError, match=reason):
    clips.find(_config(name, root))


@pytest.mark.parametrize("name", ["moving_mnist", "ucf101/ucf101_1_256"])
def test_published_sets_say_what_they_need(tmp_path, name, monkeypatch):
  monkeypatch.setitem(sys.modules, "tensorflow", None)
  monkeypatch.setattr(tfds_videos.importlib.util, "find_spec", lambda name: None)
  with pytest.raises(InputError, match=r"pip install .*\[tfds\]"):
    clips.find(_config(name, tmp_path))


def test_a_set_in_other_files_is_refused(root, tmp_path):
  folder = tmp_path / "moving_mnist" / "1.0.0"
  folder.mkdir(parents=True)
  source = clips.find(_config("tiny_digits", root)).loader.folder
  (folder / "features.json").write_bytes((source / "features.json").read_bytes())
  info = json.loads((source / "dataset_info.json").read_text())
  (folder / "dataset_info.json").write_text(json.dumps({**info, "fileFormat": "tfrecord"}))
  with pytest.raises(InputError, match=r"prepared as tfrecord.*set data.root"):
    clips.find(_config("moving_mnist", tmp_path))


def test_of_several_configurations_one_must_be_named(tmp_path):
  for config, version in (("a", "1.0.0"), ("a", "10.0.0"), ("a", "2.0.0"), ("b", "1.0.0")):
    (tmp_path / "set" / config / version).mkdir(parents=True)
    (tmp_path / "set" / config / version / "dataset_info.json").write_text("{}")
  with pytest.raises(InputError, match="name one: set/a, set/b"):
    tfds_videos._prepared(tmp_path / "set", None, None)
  assert tfds_videos._prepared(tmp_path / "set", "a", None).name == "10.0.0"
  assert tfds_videos._prepared(tmp_path / "set", "a", "2.0.0").name == "2.0.0"
  assert tfds_videos._prepared(tmp_path / "set", "a", "3.0.0") is None
