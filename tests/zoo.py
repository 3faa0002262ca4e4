"""A folder of videos as they come: good ones of several sizes, odd ones, and all kinds of bad ones.

Good frames come from the simulated world; files are written by PyAV directly.
"""

from fractions import Fraction
import os
import pathlib

import av
import numpy as np

from videogpt_jax.data import world

FRAMES = 12
SIZES = ((48, 64), (64, 48), (64, 64), (72, 128))
# Odd, but usable: the frames that each leads to.
ODD = {
  "rotated.mp4": FRAMES, "odd size.mp4": FRAMES, "ten bits.mp4": FRAMES, "grey.mkv": FRAMES,
  "alpha.mkv": FRAMES, "two streams.mkv": FRAMES, "uneven.mkv": FRAMES, "größe ☃ 視頻.mp4": FRAMES,
  "deep/linked.mp4": FRAMES,
}
# Unusable: how the reason begins.
BAD = {
  "truncated.mp4": "not a video that can be read", "truncated.mkv": "cut short",
  "zero.mp4": "not a video that can be read", "text.mp4": "not a video that can be read",
  "sound.mp4": "no video stream", "one frame.mp4": "too short", "small.mp4": "too small",
  "long.mp4": "too elongated", "damaged.mp4": "damaged",
}


def frames(seed, size=(64, 64), count=FRAMES):
  """uint8 [count, *size, 3] of the simulated world, tiled where it is too small."""
  settings = world.Settings(size=32, frames=count, radius=(4.0, 6.0))
  pixels = world.simulate(settings, seed).frames
  times = (1, -(-size[0] // 32), -(-size[1] // 32), 1)
  return np.tile(pixels, times)[:, :size[0], :size[1]]


def write(path, pixels, *, codec="libx264", pix_fmt="yuv420p", rotation=0, streams=1, times=None):
  """Writes a video of ten frames a second, or of frames at `times`, ms."""
  with av.open(os.fspath(path), "w") as file:
    made = []
    for _ in range(streams):
      stream = file.add_stream(codec, rate=1000 if times else Fraction(10))
      stream.height, stream.width = pixels.shape[1:3]
      stream.pix_fmt = pix_fmt
      if rotation:
        stream.set_display_rotation(rotation)
      made.append(stream)
    for i, frame in enumerate(pixels):
      for stream in made:
        picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
        if times:
          picture.pts, picture.time_base = times[i], Fraction(1, 1000)
        file.mux(stream.encode(picture))
    for stream in made:
      file.mux(stream.encode())


def _write_sound(path):
  with av.open(os.fspath(path), "w") as file:
    stream = file.add_stream("aac", rate=16000)
    sound = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), "fltp", "mono")
    sound.sample_rate = 16000
    file.mux(stream.encode(sound))
    file.mux(stream.encode())


def make(folder, count):
  """Fills `folder` with `count` videos, the odd and the bad ones among them.

  Returns:
    Frames by the name of every usable video.
  """
  folder = pathlib.Path(folder)
  (folder / "deep" / "er").mkdir(parents=True)
  usable = {}
  for i in range(count - len(ODD) - len(BAD)):
    name = f"{'deep/er/' if i % 5 == 0 else ''}{i:03}.mp4"
    length = FRAMES + i % 4
    write(folder / name, frames(i, SIZES[i % len(SIZES)], length))
    usable[name] = length
  write(folder / "rotated.mp4", frames(1000), rotation=90)
  write(folder / "odd size.mp4", frames(1001, (55, 77)), pix_fmt="yuv444p")
  write(folder / "ten bits.mp4", frames(1002), codec="libx265", pix_fmt="yuv420p10le")
  write(folder / "grey.mkv", frames(1003), codec="ffv1", pix_fmt="gray")
  write(folder / "alpha.mkv", frames(1004), codec="ffv1", pix_fmt="bgra")
  write(folder / "two streams.mkv", frames(1005), streams=2)
  uneven = np.cumsum(np.random.default_rng(0).integers(20, 200, FRAMES)).tolist()
  write(folder / "uneven.mkv", frames(1006), times=uneven)
  write(folder / "größe ☃ 視頻.mp4", frames(1007))
  (folder.parent / "far.mp4").write_bytes((folder / "größe ☃ 視頻.mp4").read_bytes())
  os.symlink(folder.parent / "far.mp4", folder / "deep" / "linked.mp4")
  os.symlink(folder, folder / "deep" / "loop")
  noise = np.random.default_rng(1).integers(0, 256, (40, 64, 64, 3), np.uint8)
  write(folder / "truncated.mkv", noise)
  write(folder / "damaged.mp4", noise)
  write(folder / "truncated.mp4", noise)
  for name, keep in (("truncated.mp4", 0.5), ("truncated.mkv", 0.6)):
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[:int(keep * len(whole))])
  content = bytearray((folder / "damaged.mp4").read_bytes())
  middle = slice(len(content) // 3, len(content) // 2)
  content[middle] = np.random.default_rng(2).bytes(len(content[middle]))
  (folder / "damaged.mp4").write_bytes(content)
  (folder / "zero.mp4").write_bytes(b"")
  (folder / "text.mp4").write_text("no video, whatever its name says\n" * 50)
  _write_sound(folder / "sound.mp4")
  write(folder / "one frame.mp4", frames(1008, count=2)[:1])
  write(folder / "small.mp4", frames(1009, (24, 64)))
  write(folder / "long.mp4", frames(1010, (32, 256)))
  return usable | ODD
