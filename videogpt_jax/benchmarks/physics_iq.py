"""How fast Physics-IQ is scored: beside decoding the same videos, and over processes.

    python -m videogpt_jax.benchmarks.physics_iq

Videos are made first: a still picture with moving shapes, H.264; without the noise of a camera they
are the cheapest to decode, which is the hardest to keep up with. Measured are

    decode_s, score_s   processor time for one video in one thread: reading its frames as OpenCV
                        does, and all that scoring adds (masks, resizing); for a view that of its
                        three videos and of comparing them
    scaling             views a second over 1, 2, ... processes, their start included; and the
                        processor time of a view, which stays the same where processes do not stand
                        in each other's way, however busy the machine is with other work

The takes have --height x --width px, the generated video what a model makes of it. The last line
printed is one JSON object, with the load of the machine before it began.
"""

from collections.abc import Callable
import os
import pathlib
import tempfile
import time
from typing import Any

from absl import flags
import cv2
import numpy as np

from videogpt_jax import cli
from videogpt_jax import machine
from videogpt_jax.benchmarks import report
from videogpt_jax.data import video
from videogpt_jax.errors import InputError
from videogpt_jax.metrics.physics_iq import measures
from videogpt_jax.metrics.physics_iq import work
from videogpt_jax.metrics.physics_iq.files import Clip
from videogpt_jax.metrics.physics_iq.protocol import Protocol

_CASES = 198  # views of the whole data set
_GENERATED = (176, 320)  # px, of the published model


def write_video(path: pathlib.Path, height: int, width: int, protocol: Protocol, seed: int
                ) -> None:
  """A still picture, before which three shapes move."""
  rng = np.random.default_rng(seed)
  coarse = rng.integers(30, 220, (max(height // 8, 2), max(width // 8, 2), 3), dtype=np.uint8)
  still = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
  shapes = [(rng.uniform(0.1, 0.9, 2), rng.uniform(-0.01, 0.01, 2), rng.integers(0, 255, 3))
            for _ in range(3)]
  with video.Mp4Writer(path, protocol.fps) as writer:
    for t in range(protocol.prediction_frames):
      frame = still.copy()
      for start, speed, colour in shapes:
        x, y = (start + t * speed) * (width, height)
        cv2.circle(frame, (int(x), int(y)), height // 12, [int(c) for c in colour], -1)
      writer.append(frame[None])


def measure(view: work.View, repeats: int) -> dict[str, Any]:
  """Seconds for each video of a view, in one thread; the best of some, one after the other."""
  cv2.setNumThreads(1)
  clips = {"take": view.first, "generated": view.generated}
  to = _reduced_size(view.first)
  decode: dict[str, list[float]] = {name: [] for name in clips}
  whole: dict[str, list[float]] = {name: [] for name in clips}
  compare = []
  for _ in range(repeats):
    for name, clip in clips.items():
      decode[name].append(_processor_s(_decode, clip))
      whole[name].append(_processor_s(work.reduce, clip, None, to))
    parts = [work.reduce(clip, None, to) for clip in (view.first, view.second, view.generated)]
    compare.append(_processor_s(measures.compare, *parts))
  seconds = {name: (min(decode[name]), min(whole[name])) for name in clips}
  seconds["view"] = (2 * seconds["take"][0] + seconds["generated"][0],
                     2 * seconds["take"][1] + seconds["generated"][1] + min(compare))
  return {name: {"decode_s": round(read, 4), "score_s": round(every - read, 4),
                 "score_over_decode": round(every / read - 1, 3)}
          for name, (read, every) in seconds.items()}


def scaling(view: work.View, views: int, processes: list[int]) -> list[dict[str, Any]]:
  """The same view again and again, shared among processes."""
  rows = []
  for count in processes:
    began = time.perf_counter()
    used = list(work.over(_score, [view] * views, count))
    seconds = time.perf_counter() - began
    rows.append({"processes": count, "seconds": round(seconds, 2),
                 "views_per_s": round(views / seconds, 3),
                 "processor_s_per_view": round(sum(used) / views, 2),
                 "whole_set_s": round(_CASES * seconds / views, 1)})
    rows[-1]["speedup"] = round(rows[0]["seconds"] / rows[-1]["seconds"], 2)
    print(f"{count} processes: {rows[-1]['views_per_s']:.3f} views/s, "
          f"speed-up {rows[-1]['speedup']:.2f}, "
          f"{rows[-1]['processor_s_per_view']:.2f} s of a processor per view", flush=True)
  return rows


def _reduced_size(clip: Clip) -> tuple[int, int]:
  frames = work.reduce(clip, None, None).frames
  return frames.shape[1], frames.shape[2]


def _decode(clip: Clip) -> None:
  for _ in work.read(clip):
    pass


def _score(view: work.View) -> float:
  """Scores a view; seconds of a processor that it took."""
  return _processor_s(work.score, view)


def _processor_s(function: Callable[..., Any], *arguments: Any) -> float:
  began = time.process_time()  # of all threads, and whatever else the machine does
  function(*arguments)
  return time.process_time() - began


def define_flags() -> None:
  """The command's flags."""
  flags.DEFINE_integer("height", 2160, "Of the takes, px.", lower_bound=16)
  flags.DEFINE_integer("width", 3840, "Of the takes, px.", lower_bound=16)
  flags.DEFINE_integer("fps", 8, "Frames a second.")
  flags.DEFINE_integer("views", 8, "Scored for every number of processes.", lower_bound=1)
  flags.DEFINE_list("processes", [], "Numbers of processes; default: 1, 2, 4, ... the cores.")
  flags.DEFINE_integer("repeats", 3, "Of the times in one thread; the best counts.", lower_bound=1)
  flags.DEFINE_string("out", "", "JSON file; default: in benchmarks/results; - for none.")


def main() -> None:
  """Reads the flags and measures."""
  f = flags.FLAGS
  cores = machine.usable_cores()
  try:
    processes = [int(x) for x in f.processes] or sorted(
      {min(2**i, cores) for i in range(cores.bit_length() + 1)})
  except ValueError as error:
    raise InputError(f"--processes are whole numbers: {error}") from error
  if f.height % 2 or f.width % 2:
    raise InputError("--height and --width must be even")
  protocol, load = Protocol(f.fps), os.getloadavg()[0]
  frames = protocol.prediction_frames
  with tempfile.TemporaryDirectory() as folder:
    sizes = {"first": (f.height, f.width), "second": (f.height, f.width), "generated": _GENERATED}
    clips = {}
    for seed, (name, size) in enumerate(sizes.items()):
      path = pathlib.Path(folder) / f"{name}.mp4"
      write_video(path, *size, protocol, seed // 2)
      clips[name] = Clip(path, protocol.fps, frames, frames)
      print(f"wrote {name}: {size[0]}x{size[1]} px, {path.stat().st_size / 1e6:.1f} MB", flush=True)
    view = work.View(clips["first"], clips["second"], clips["generated"])
    single = measure(view, f.repeats)
    for name, row in single.items():
      print(f"{name:<9} decode {row['decode_s']:.3f} s, score {row['score_s']:.3f} s "
            f"({row['score_over_decode']:.2f} of decoding)", flush=True)
    rows = scaling(view, f.views, processes)
    megabytes = clips["first"].path.stat().st_size / 1e6
  result = {"benchmark": "physics_iq", "device": f"{cores} CPU cores",
            "take": [f.height, f.width], "generated": list(_GENERATED), "frames": frames,
            "take_mb": round(megabytes, 1), "opencv": cv2.__version__, "one_thread": single,
            "views": f.views, "scaling": rows, "load_before": round(load, 2)}
  report.finish(result, f.out, "physics_iq_cpu.json")


if __name__ == "__main__":
  os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing is computed by jax
  define_flags()
  cli.run(main)
