"""Video files: what is read is what was written, and bad files are refused with the reason."""

import errno
from fractions import Fraction
import io
import os
import pickle
import subprocess
import sys
import wave

import av
import numpy as np
from PIL import Image
import pytest

from videogpt_jax.data import fit
from videogpt_jax.data import video
from videogpt_jax.errors import InputError


def _moving(count=12, height=48, width=64):
  """A bright square over a smooth coloured background."""
  y, x = np.mgrid[:height, :width]
  background = np.stack([60 + x, 40 + 2 * y, 90 + (x + y) // 2], axis=-1).astype(np.uint8)
  frames = np.repeat(background[None], count, axis=0)
  for t in range(count):
    frames[t, 8:20, 2 * t : 2 * t + 12] = (240, 230, 60)
  return frames


def _psnr(a, b):
  return 10 * np.log10(255**2 / max(1e-9, np.mean((a.astype(float) - b) ** 2)))


def _encode(path, frames, *, movflags="", rotation=0, codec="libx264rgb", pix_fmt="rgb24"):
  """Written by PyAV directly: a key frame every 12th, lossless by default."""
  with av.open(os.fspath(path), "w", options={"movflags": movflags} if movflags else {}) as file:
    stream = file.add_stream(codec, rate=Fraction(10), options={"crf": "0", "g": "12"})
    stream.height, stream.width = frames.shape[1:3]
    stream.pix_fmt = pix_fmt
    if rotation:
      stream.set_display_rotation(rotation)
    for frame in frames:
      file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
    file.mux(stream.encode())


# Reading.


def test_lossless_files_return_the_same_bytes(tmp_path):
  frames = _moving()
  video.write_mp4(tmp_path / "a.mp4", frames, 12.5, lossless=True)
  clip = video.read(tmp_path / "a.mp4")
  assert clip.frames.dtype == np.uint8
  assert np.array_equal(clip.frames, frames)
  assert clip.fps == 12.5
  assert os.listdir(tmp_path) == ["a.mp4"]


def test_stride_and_limit_keep_the_stated_frames(tmp_path):
  frames = _moving(count=11)
  _encode(tmp_path / "a.mp4", frames)
  clip = video.read(tmp_path / "a.mp4", stride=3)
  assert np.array_equal(clip.frames, frames[::3])
  assert clip.fps == pytest.approx(10 / 3)
  clip = video.read(tmp_path / "a.mp4", stride=2, max_frames=4)
  assert np.array_equal(clip.frames, frames[:8:2])
  clip = video.read(tmp_path / "a.mp4", max_frames=100)
  assert np.array_equal(clip.frames, frames)


def test_a_transform_sees_the_kept_frames_one_by_one_and_may_refuse(tmp_path):
  frames = _moving(count=9)
  _encode(tmp_path / "a.mp4", frames)
  seen = []

  def halve(frame):
    seen.append(frame.copy())
    return frame[::2, ::2]

  clip = video.read(tmp_path / "a.mp4", stride=2, transform=halve)
  assert np.array_equal(seen, frames[::2])
  assert np.array_equal(clip.frames, frames[::2, ::2, ::2])

  def refuse(frame):
    raise InputError("too small")

  with pytest.raises(InputError, match="too small"):
    video.read(tmp_path / "a.mp4", transform=refuse)


@pytest.mark.parametrize(("rotation", "turns"), [(90, 1), (180, 2), (-90, 3)])
def test_a_phones_rotation_is_applied(tmp_path, rotation, turns):
  frames = _moving(count=3)
  _encode(tmp_path / "a.mp4", frames, rotation=rotation)
  expected = np.rot90(frames, turns, axes=(1, 2))  # counter-clockwise, as the container says
  assert np.array_equal(video.read(tmp_path / "a.mp4").frames, expected)


def test_a_clip_trimmed_without_recoding_is_whole(tmp_path):
  """As `ffmpeg -ss 0.5 -c copy`: hidden frames before the start, which the header counts."""
  frames = _moving(count=24)
  _encode(tmp_path / "a.mp4", frames)
  options = {"avoid_negative_ts": "disabled"}
  with (
    av.open(os.fspath(tmp_path / "a.mp4")) as source,
    av.open(os.fspath(tmp_path / "b.mp4"), "w", options=options) as target,
  ):
    stream = source.streams.video[0]
    copy = target.add_stream_from_template(stream)
    shift = int(Fraction(5, 10) / stream.time_base)
    for packet in source.demux(stream):
      if packet.dts is not None:
        packet.pts, packet.dts = packet.pts - shift, packet.dts - shift
        packet.stream = copy
        target.mux(packet)
  with av.open(os.fspath(tmp_path / "b.mp4")) as file:
    assert file.streams.video[0].frames == 24
  assert np.array_equal(video.read(tmp_path / "b.mp4").frames, frames[5:])


@pytest.mark.parametrize(
  ("name", "codec"), [("a.mkv", "libx264"), ("a.avi", "mpeg4"), ("a.webm", "libvpx-vp9")]
)
def test_other_containers(tmp_path, name, codec):
  frames = _moving()
  _encode(tmp_path / name, frames, codec=codec, pix_fmt="yuv420p")
  clip = video.read(tmp_path / name)
  assert clip.frames.shape == frames.shape
  assert clip.fps == 10
  assert _psnr(clip.frames, frames) > 25


def test_camera_clips(camera_clips):
  clip = video.read(camera_clips[1], stride=50)  # 250 frames of 640 x 272 px at 25 per second
  assert clip.frames.shape == (5, 272, 640, 3)
  assert clip.fps == pytest.approx(0.5, rel=0.01)
  assert clip.frames.std() > 20


# Refusals.


def _refusal(path):
  with pytest.raises(video.VideoError) as caught:
    video.read(path)
  return str(caught.value)


def test_files_that_are_no_video_are_refused(tmp_path):
  (tmp_path / "text.mp4").write_text("not a video, but long enough to be looked at\n" * 50)
  assert "not a video" in _refusal(tmp_path / "text.mp4")
  (tmp_path / "empty.mp4").write_bytes(b"")
  assert "not a video" in _refusal(tmp_path / "empty.mp4")
  assert "No such file" in _refusal(tmp_path / "missing.mp4")
  with wave.open(str(tmp_path / "sound.wav"), "wb") as sound:
    sound.setparams((1, 2, 8000, 0, "NONE", ""))
    sound.writeframes(bytes(16000))
  assert _refusal(tmp_path / "sound.wav") == "no video stream"
  with av.open(os.fspath(tmp_path / "none.mp4"), "w", options={"movflags": "empty_moov"}) as file:
    stream = file.add_stream("libx264", rate=Fraction(10))
    stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
    file.start_encoding()
  assert _refusal(tmp_path / "none.mp4") == "no frames"


@pytest.mark.parametrize("part", [0.3, 0.6, 0.9, 0.98])
@pytest.mark.parametrize("movflags", ["", "faststart", "frag_keyframe+empty_moov"])
def test_truncated_mp4_is_refused(tmp_path, part, movflags):
  _encode(tmp_path / "a.mp4", _moving(count=30), movflags=movflags)
  assert len(video.read(tmp_path / "a.mp4").frames) == 30
  whole = (tmp_path / "a.mp4").read_bytes()
  (tmp_path / "a.mp4").write_bytes(whole[: int(part * len(whole))])
  reason = _refusal(tmp_path / "a.mp4")
  assert any(word in reason for word in ("cut short", "damaged", "not a video"))


@pytest.mark.parametrize(
  ("name", "codec", "movflags"), [("a.mp4", "libx264", "faststart"), ("a.avi", "mpeg4", "")]
)
def test_a_file_that_ends_between_two_frames_is_refused(tmp_path, name, codec, movflags):
  """Nothing that is left is damaged; only the header or index tells."""
  path = tmp_path / name
  _encode(path, _moving(count=30), movflags=movflags, codec=codec, pix_fmt="yuv420p")
  with av.open(os.fspath(path)) as file:
    starts = sorted(packet.pos for packet in file.demux(video=0) if packet.pos is not None)
  os.truncate(path, starts[20])
  assert _refusal(path).startswith("cut short")


def test_damage_inside_a_file_is_refused(tmp_path):
  _encode(tmp_path / "a.mp4", _moving(count=30), codec="libx264", pix_fmt="yuv420p")
  whole = bytearray((tmp_path / "a.mp4").read_bytes())
  for start, length in ((len(whole) // 2, 20), (len(whole) // 3, len(whole) // 4)):
    damaged = whole.copy()
    damaged[start : start + length] = bytes(length)
    (tmp_path / "b.mp4").write_bytes(damaged)
    assert "damaged" in _refusal(tmp_path / "b.mp4")


def test_refusals_pass_between_processes(tmp_path):
  error = video.VideoError("no video stream")
  copy = pickle.loads(pickle.dumps(error))
  assert type(copy) is video.VideoError and str(copy) == str(error)
  assert issubclass(video.VideoError, InputError)


def test_finding_videos(tmp_path):
  for name in ("b.mp4", "a.MKV", "notes.txt", "deep/er/c.webm", "x.mp4.txt"):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
  (tmp_path / "folder.mp4").mkdir()
  found = [path.relative_to(tmp_path).as_posix() for path in video.find_videos(tmp_path)]
  assert found == ["a.MKV", "b.mp4", "deep/er/c.webm"]
  (tmp_path / "empty").mkdir()
  with pytest.raises(InputError, match=r"no video files in .*empty"):
    video.find_videos(tmp_path / "empty")
  for missing in ("nowhere", "notes.txt"):
    with pytest.raises(InputError, match=missing):
      video.find_videos(tmp_path / missing)


def test_links_are_followed_and_loops_of_links_do_no_harm(tmp_path):
  folder, elsewhere = tmp_path / "videos", tmp_path / "elsewhere"
  (folder / "a").mkdir(parents=True)
  elsewhere.mkdir()
  (elsewhere / "far.mp4").touch()
  (folder / "a" / "near.mp4").touch()
  os.symlink(elsewhere, folder / "linked")
  os.symlink(folder, folder / "a" / "loop")
  os.symlink("self.mp4", folder / "self.mp4")
  found = [path.relative_to(folder).as_posix() for path in video.find_videos(folder)]
  assert found == ["a/near.mp4", "linked/far.mp4"]


def test_parts_of_a_video(tmp_path):
  frames = _moving(count=40)
  _encode(tmp_path / "a.mp4", frames)  # ten frames a second, a key frame every twelfth
  for start, end in ((0.0, 1.0), (0.5, 2.0), (1.2, 1.3), (2.7, None), (None, 0.4)):
    part = video.read(tmp_path / "a.mp4", start=start, end=end)
    first, last = round(10 * (start or 0)), 40 if end is None else round(10 * end)
    np.testing.assert_array_equal(part.frames, frames[first:last])
  with pytest.raises(video.VideoError, match="no frames after 5 s"):
    video.read(tmp_path / "a.mp4", start=5.0)


def _uneven(path, frames, times):
  """A video whose frames come at `times`, ms."""
  with av.open(os.fspath(path), "w") as file:
    stream = file.add_stream("libx264rgb", rate=1000, options={"crf": "0"})
    stream.height, stream.width = frames.shape[1:3]
    stream.pix_fmt, stream.time_base = "rgb24", Fraction(1, 1000)
    for frame, time in zip(frames, times, strict=True):
      picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
      picture.pts, picture.time_base = time, Fraction(1, 1000)
      file.mux(stream.encode(picture))
    file.mux(stream.encode())


def test_frames_that_come_unevenly_are_taken_as_they_are_or_by_their_times(tmp_path):
  frames = _moving(count=8)
  times = [0, 100, 110, 120, 400, 500, 900, 1000]
  _uneven(tmp_path / "a.mkv", frames, times)
  whole = video.read(tmp_path / "a.mkv")
  np.testing.assert_array_equal(whole.frames, frames)
  assert whole.fps == pytest.approx(7.0)  # whatever the header says: seven steps a second
  taken = video.read(tmp_path / "a.mkv", fps=10.0)
  assert taken.fps == 10.0
  shown = [max(i for i, time in enumerate(times) if time <= 100 * k) for k in range(11)]
  np.testing.assert_array_equal(taken.frames[:11], frames[shown])
  assert len(taken.frames) - 11 <= 2  # how long the last one is shown is a guess
  half = video.read(tmp_path / "a.mkv", fps=10.0, stride=2)
  np.testing.assert_array_equal(half.frames, taken.frames[::2])
  assert half.fps == 5.0


@pytest.mark.parametrize(("pix_fmt", "codec", "suffix"), [
  ("yuv420p10le", "libx265", "mp4"), ("gray", "ffv1", "mkv"), ("bgra", "ffv1", "mkv"),
  ("yuv444p", "libx264", "mp4"),
])
def test_ten_bits_grey_and_alpha(tmp_path, pix_fmt, codec, suffix):
  frames = _moving()
  if pix_fmt == "gray":
    frames = np.repeat(frames[..., :1], 3, axis=-1)
  _encode(tmp_path / f"a.{suffix}", frames, codec=codec, pix_fmt=pix_fmt)
  read = video.read(tmp_path / f"a.{suffix}").frames
  assert read.shape == frames.shape and _psnr(read, frames) > 30


def test_the_first_stream_that_moves_is_read(tmp_path):
  frames = _moving()
  with av.open(str(tmp_path / "two.mkv"), "w") as file:
    streams = [file.add_stream("libx264rgb", rate=Fraction(10), options={"crf": "0"})
               for _ in range(2)]
    for stream in streams:
      stream.height, stream.width, stream.pix_fmt = 48, 64, "rgb24"
    for frame in frames:
      for stream, pixels in zip(streams, (frame, 255 - frame), strict=True):
        file.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
    for stream in streams:
      file.mux(stream.encode())
  np.testing.assert_array_equal(video.read(tmp_path / "two.mkv").frames, frames)


@pytest.mark.parametrize("part", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("name", ["a.mkv", "a.webm"])
def test_a_matroska_file_that_ends_early_is_refused(tmp_path, name, part):
  codec = ("libx264rgb", "rgb24") if name == "a.mkv" else ("libvpx-vp9", "yuv420p")
  rng = np.random.default_rng(0)
  frames = rng.integers(0, 256, (60, 24, 32, 3), dtype=np.uint8).repeat(2, 1).repeat(2, 2)
  _encode(tmp_path / name, frames, codec=codec[0], pix_fmt=codec[1])
  assert len(video.read(tmp_path / name).frames) == 60
  whole = (tmp_path / name).read_bytes()
  (tmp_path / name).write_bytes(whole[:int(part * len(whole))])
  with pytest.raises(video.VideoError, match=r"cut short: ends after|damaged"):
    video.read(tmp_path / name)


# Writing.


def test_written_mp4_plays_everywhere_and_looks_the_same(tmp_path):
  frames = _moving()
  video.write_mp4(tmp_path / "a.mp4", frames, 8.0)
  with av.open(os.fspath(tmp_path / "a.mp4")) as file:
    context = file.streams.video[0].codec_context
    assert (context.name, context.pix_fmt) == ("h264", "yuv420p")
  assert _psnr(video.read(tmp_path / "a.mp4").frames, frames) > 32


_WRITE = """
import os, sys
import numpy as np
from videogpt_jax.data import video

if sys.argv[1] == "one core" and hasattr(os, "sched_setaffinity"):
  os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
noise = np.random.default_rng(0).integers(0, 256, (176 // 8, 320 // 8, 3), np.uint8)
still = np.kron(noise, np.ones((8, 8, 1), np.uint8))
video.write_mp4(sys.argv[2], np.stack([np.roll(still, t, 1) for t in range(4)]), 8.0)
"""


def test_the_same_frames_make_the_same_file(tmp_path):
  """On any number of cores, and whatever the memory held before that the encoder gets."""
  files = []
  for cores, fill in (("all cores", "1"), ("all cores", "85"), ("one core", "170")):
    files.append(tmp_path / f"{fill}.mp4")
    subprocess.run([sys.executable, "-c", _WRITE, cores, str(files[-1])], check=True,
                   env={**os.environ, "MALLOC_PERTURB_": fill})  # glibc: fills what it allocates
  assert len({file.read_bytes() for file in files}) == 1


def test_odd_sizes_are_extended_by_a_pixel(tmp_path):
  frames = _moving(height=33, width=45)
  video.write_mp4(tmp_path / "a.mp4", frames, 8.0, lossless=True)
  written = video.read(tmp_path / "a.mp4").frames
  assert written.shape == (12, 34, 46, 3)
  assert np.array_equal(written[:, :33, :45], frames)
  assert np.array_equal(written[:, 33, :45], frames[:, 32])


@pytest.mark.parametrize("write", [video.write_mp4, video.write_gif])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, write):
  path = tmp_path / "a.out"
  path.write_bytes(b"old")

  def full_disk(source, target):
    assert os.path.getsize(source) > 100  # all was written beside the old file
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  with monkeypatch.context() as patch:
    patch.setattr(os, "replace", full_disk)
    with pytest.raises(InputError, match=r"a\.out: No space left"):
      write(path, _moving(), 8.0)
  assert path.read_bytes() == b"old"
  assert os.listdir(tmp_path) == ["a.out"]
  with pytest.raises(InputError, match=r"cannot write .*nowhere"):
    write(tmp_path / "nowhere" / "b.out", _moving(), 8.0)


def _gif_frames(file):
  with Image.open(file) as picture:
    for index in range(picture.n_frames):
      picture.seek(index)
      yield np.asarray(picture.convert("RGB")), picture.info["duration"]


def test_gif_shows_the_frames_for_the_right_time(tmp_path):
  frames = _moving()
  video.write_gif(tmp_path / "a.gif", frames, 8.0, scale=2)
  shown, durations = zip(*_gif_frames(tmp_path / "a.gif"), strict=True)
  assert len(shown) == 12
  assert shown[0].shape == (96, 128, 3)
  assert _psnr(np.array(shown)[:, ::2, ::2], frames) > 30
  assert np.array_equal(np.array(shown)[:, 1::2, 1::2], np.array(shown)[:, ::2, ::2])
  assert sum(durations) == pytest.approx(12 * 1000 / 8, abs=12 * 10)
  with Image.open(tmp_path / "a.gif") as picture:
    assert picture.info["loop"] == 0


def test_gif_colours_do_not_flicker_and_go_to_open_files_too():
  """What does not move has the same colour in every frame."""
  frames = _moving()
  buffer = io.BytesIO()
  video.write_gif(buffer, frames, 8.0)
  buffer.seek(0)
  shown = np.array([frame for frame, _ in _gif_frames(buffer)])
  assert np.all(shown[:, 24:] == shown[:1, 24:])


def test_gif_of_a_still_video_lasts_as_long(tmp_path):
  frames = np.repeat(_moving(count=1), 10, axis=0)
  video.write_gif(tmp_path / "a.gif", frames, 10.0)
  assert sum(duration for _, duration in _gif_frames(tmp_path / "a.gif")) == 1000


# Pictures.


def test_shrinking_averages_areas_by_halves():
  frames = np.random.default_rng(0).integers(0, 256, (2, 48, 48, 3), dtype=np.uint8)
  expected = frames.reshape(2, 12, 4, 12, 4, 3).mean((2, 4))
  assert np.abs(video.resize_and_crop(frames, 12, 12) - expected).max() <= 2  # rounded twice


@pytest.mark.parametrize("size", [(90, 160), (720, 1280), (480, 360), (1080, 500)])
def test_the_longest_side_as_published(size):
  """Halve by areas, then bicubic to the longest side, then cut to multiples: step by step."""
  height, width = size
  frame = np.random.default_rng(1).integers(0, 256, (height // 8, width // 8, 3), np.uint8)
  frame = np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC))
  picture = Image.fromarray(frame)
  while min(picture.width, picture.height) >= 640:
    picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
  scale = 320 / max(picture.size)
  picture = picture.resize(tuple(round(x * scale) for x in picture.size), Image.Resampling.BICUBIC)
  expected = np.asarray(picture)
  cut_h, cut_w = expected.shape[0] % 16, expected.shape[1] % 16
  expected = expected[cut_h // 2:expected.shape[0] - (cut_h - cut_h // 2),
                      cut_w // 2:expected.shape[1] - (cut_w - cut_w // 2)]
  out = fit.Fit(longest_side=320, multiple=16)(frame)
  assert max(out.shape) == 320 and not any(side % 16 for side in out.shape[:2])
  np.testing.assert_array_equal(out, expected)


def test_the_size_with_the_nearest_proportions_is_taken():
  sizes = fit.of({"buckets": "176x320, 240x320,320x320,320x176"}, 8, 2)
  for given, taken in (((720, 1280), (176, 320)), ((480, 640), (240, 320)), ((99, 100), (320, 320)),
                       ((1920, 1080), (320, 176)), ((100, 10_000), (176, 320))):
    assert sizes.size(*given) == taken and sizes.holds(taken)
  assert not sizes.holds((64, 64))


@pytest.mark.parametrize(("data", "message"), [
  ({"buckets": "176*320"}, "HEIGHTxWIDTH"),
  ({"buckets": "180x320"}, "180x320 px do not divide into latent cells of 8 px and patches"),
  ({"height": 64, "width": 60}, "64x60 px do not divide"),
  ({"longest_side": 330}, "longest_side must be a multiple of 16 px"),
  ({"longest_side": 320, "buckets": "176x320"}, "exclude each other"),
])
def test_sizes_that_are_none(data, message):
  with pytest.raises(InputError, match=message):
    fit.of(data, 8, 2)


def test_cropping_keeps_the_centre_and_the_proportions():
  frames = np.zeros((1, 40, 100, 3), np.uint8)
  frames[:, :, 30:70] = 200  # exactly the square in the middle
  assert np.all(video.resize_and_crop(frames, 20, 20) == 200)
  tall = frames.swapaxes(1, 2)
  assert np.all(video.resize_and_crop(tall, 20, 20) == 200)
  wide = video.resize_and_crop(frames, 20, 40)
  assert np.all(wide[:, :, 13:27] == 200) and np.all(wide[:, :, [0, 39]] == 0)


def test_enlarging_and_keeping_the_size():
  frames = _moving(count=2)
  assert np.array_equal(video.resize_and_crop(frames, 48, 64), frames)
  larger = video.resize_and_crop(frames, 96, 128)
  assert larger.shape == (2, 96, 128, 3)
  assert _psnr(video.resize_and_crop(larger, 48, 64), frames) > 30
  assert np.array_equal(video.enlarge(frames, 3)[:, 1::3, 2::3], frames)


def _find(picture, part):
  """(row, column) of every place where `part` stands in `picture`."""
  windows = np.lib.stride_tricks.sliding_window_view(picture, part.shape)
  return np.argwhere(np.all(windows[:, :, 0] == part, axis=(2, 3, 4)))


def test_side_by_side_shows_every_video_whole_and_marks_what_is_predicted():
  rng = np.random.default_rng(0)
  truth, model = rng.integers(0, 200, (2, 6, 10, 12, 3), dtype=np.uint8)
  picture = video.side_by_side({"truth": truth, "a model": model}, 2, history=4)
  plain = video.side_by_side({"truth": truth, "a model": model}, 2)
  assert len(picture) == 6
  places = []
  for t in range(6):
    (left,), (right,) = (_find(picture[t], video.enlarge(v, 2)[t]) for v in (truth, model))
    assert left[0] == right[0] and left[1] + 24 < right[1]
    places.append((*left, *right))
  assert len(set(places)) == 1  # nothing jumps
  row, column = places[0][:2]
  around = picture[:, row - 1, column : column + 24]
  assert np.all(around[:4] == plain[:4, row - 1, column : column + 24])
  assert np.all(around[4:] == around[4, 0]) and np.any(around[4] != around[0])
  # The titles are written above the columns.
  assert picture[0, :row - 2, : places[0][3]].min() < 128
  assert picture[0, :row - 2, places[0][3] - 2 :].min() < 128


def test_contact_sheet_has_a_row_a_video_and_a_column_a_frame():
  videos = np.random.default_rng(0).integers(1, 255, (2, 3, 8, 8, 3), dtype=np.uint8)
  sheet = video.contact_sheet({"truth": videos[0], "a model": videos[1]}, ["0", "1", "2"], 2)
  corners = np.array([[_find(sheet, video.enlarge(v, 2)[t])[0] for t in range(3)] for v in videos])
  assert np.all(np.diff(corners[..., 0], axis=0) > 0) and np.all(np.diff(corners[..., 0]) == 0)
  assert np.all(np.diff(corners[..., 1]) > 0) and np.all(np.diff(corners[..., 1], axis=0) == 0)
  first = corners[0, 0]
  titles = sheet[:first[0], first[1]:], sheet[first[0]:, :first[1]]
  assert all(part.min() < 128 for part in titles)


def test_a_video_written_in_pieces_is_the_same_file(tmp_path):
  frames = np.random.default_rng(0).integers(0, 255, (7, 15, 18, 3), dtype=np.uint8)
  video.write_mp4(tmp_path / "whole.mp4", frames, 5.0)
  with video.Mp4Writer(tmp_path / "pieces.mp4", 5.0) as writer:
    for piece in np.array_split(frames, 3):
      assert not (tmp_path / "pieces.mp4").exists()
      writer.append(piece)
  assert (tmp_path / "pieces.mp4").read_bytes() == (tmp_path / "whole.mp4").read_bytes()
  with video.Mp4Writer(tmp_path / "nothing.mp4", 5.0):
    pass
  assert {path.name for path in tmp_path.iterdir()} == {"whole.mp4", "pieces.mp4"}


def test_pictures_are_turned_upright(tmp_path):
  pixels = np.random.default_rng(0).integers(0, 255, (8, 12, 3), dtype=np.uint8)
  exif = Image.Exif()
  exif[0x0112] = 6  # orientation: the camera was turned by a quarter
  Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
  np.testing.assert_array_equal(video.read_picture(tmp_path / "a.png")[0], np.rot90(pixels, -1))
  (tmp_path / "b.png").write_text("no picture")
  with pytest.raises(video.VideoError, match="not a picture"):
    video.read_picture(tmp_path / "b.png")
