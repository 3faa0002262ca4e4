"""Continues a video: `python -m videogpt_jax.predict --video=clip.mp4 --frames=24`.

Takes the first frames of a video file, or of a held-out video of the simulated world
where none is given, and rolls out what comes next, clip after clip. Writes the whole
video as mp4 and, beside the truth where there is one, as GIF.
"""

import os
import pathlib
import time

from absl import flags
import jax
import numpy as np

from videogpt_jax import cli
from videogpt_jax import rollout
from videogpt_jax import weights as weights_lib
from videogpt_jax.data import video
from videogpt_jax.errors import InputError


def history_from_file(path: str, weights: weights_lib.Weights, history: int, interval: int
                      ) -> tuple[np.ndarray, float]:
  """Every `interval`-th frame of a video file at the model's resolution, and their rate.

  Returns:
    Frames uint8 [T, H, W, 3], and how many of them make a second.

  Raises:
    InputError: the file cannot be read, or is shorter than the history.
  """
  try:
    clip = video.read(path, stride=interval)
  except video.VideoError as error:
    raise InputError(f"{path}: {error}") from error
  if len(clip.frames) < history:
    taken = f" at an interval of {interval}" if interval > 1 else ""
    raise InputError(f"{path} has {len(clip.frames)} frames{taken}, --history needs {history}")
  height, width = weights.frame_size
  if clip.frames.shape[1:3] != (height, width):
    print(f"{path}: {clip.frames.shape[2]}x{clip.frames.shape[1]} px resized and cropped to "
          f"{width}x{height} as in training")
  return video.resize_and_crop(clip.frames, height, width), clip.fps


def shortest_interval(weights: weights_lib.Weights) -> int:
  """The shortest interval between frames in training, in source frames."""
  data = weights.config["data"]
  (lo, _), stride = data.get("interval", (1, 1)), data.get("stride", 1)
  return -(-lo // stride) * stride


def history_from_world(weights: weights_lib.Weights, index: int) -> tuple[np.ndarray, float]:
  """A held-out video of the world the model was trained on, and its fps.

  Raises:
    InputError: the model knows no simulated world, or pymunk is missing.
  """
  try:
    from videogpt_jax.data import world
  except ImportError as error:
    raise InputError(f"--video is missing, and the simulated world needs {error.name}: "
                     "pip install 'videogpt_jax[demo]'") from error
  if weights.config["data"].get("source", "world") != "world":
    raise InputError("--video is missing (the model was not trained on the simulated world)")
  settings = world.Settings(**weights.config["world"])
  return world.simulate(settings, world.held_out_seed(index)).frames, settings.fps


def predict(weights: weights_lib.Weights, frames: np.ndarray, *, history: int, num_frames: int,
            clip_frames: int, sampler: rollout.Sampler, window: int, seed: int) -> np.ndarray:
  """History and prediction as one video, uint8 [history + num_frames, H, W, 3]."""
  began = time.perf_counter()
  new = weights.continue_video(
    frames[None, :history], num_frames, clip_frames=clip_frames, sampler=sampler, window=window,
    rng=jax.random.key(seed))
  seconds = time.perf_counter() - began
  print(f"predicted {num_frames} frames in {seconds:.1f} s "
        f"({num_frames / seconds:.2f} frames/s, compilation included)")
  return np.concatenate([frames[:history], new[0]])


def write(frames: np.ndarray, truth: np.ndarray, history: int, fps: float, out: pathlib.Path
          ) -> list[pathlib.Path]:
  """Writes prediction.mp4 and side_by_side.gif; the truth may be shorter than the prediction."""
  out.mkdir(parents=True, exist_ok=True)
  paths = [out / "prediction.mp4", out / "side_by_side.gif"]
  video.write_mp4(paths[0], frames, fps)
  columns = {"prediction": frames}
  if len(truth) > history:
    rest = np.zeros((max(0, len(frames) - len(truth)), *truth.shape[1:]), np.uint8)
    columns = {"truth": np.concatenate([truth[:len(frames)], rest]), **columns}
  scale = max(1, 128 // frames.shape[1])
  video.write_gif(paths[1], video.side_by_side(columns, scale=scale, history=history), fps)
  return paths


def define_flags() -> None:
  """The command's flags; those left at -1 take the default of the model's own run."""
  flags.DEFINE_string("video", "", "Video file to continue; default: a held-out video of the "
                      "world.")
  flags.DEFINE_integer("sample", 0, "Which held-out video, without --video.", lower_bound=0)
  flags.DEFINE_string("checkpoint", "", "Training workdir or weights folder; default: the weights "
                      "that come with the package.")
  flags.DEFINE_string("out", "runs/prediction", "Folder for the results.")
  flags.DEFINE_integer("frames", 12, "Frames to predict, any number.", lower_bound=1)
  flags.DEFINE_integer("history", -1, "Frames given.")
  flags.DEFINE_integer("clip_frames", -1, "Frames denoised at once.")
  flags.DEFINE_integer("steps", -1, "Euler steps.")
  flags.DEFINE_float("guidance", -1.0, "Weight of the history; 1 is none beyond the model's own.")
  flags.DEFINE_integer("interval", -1, "Every how many frames of --video one is taken.")
  flags.DEFINE_string("vae", "", "Folder (or hub name) of the autoencoder, for weights on its "
                      "latents.")
  flags.DEFINE_float("shift", -1.0, "Of the sampling times; below 1 more steps are near the data: "
                     "rather the mean of all futures than one of them.")
  flags.DEFINE_float("history_noise", -1.0, "Noise on the history from the second clip on.")
  flags.DEFINE_integer("window", -1, "Most frames in a sequence.")
  flags.DEFINE_integer("seed", 0, "Of the noise: another seed, another future.")


def main() -> None:
  """Reads the flags and predicts."""
  f = flags.FLAGS
  weights = weights_lib.load(f.checkpoint, vae=f.vae)
  sample = weights.config["sample"]
  chosen = lambda value, default: default if value == -1 else value
  history = chosen(f.history, sample["history"])
  clip_frames = chosen(f.clip_frames, sample["clip_frames"])
  window = chosen(f.window, sample["window"] or weights.config["data"]["frames"])
  interval = chosen(f.interval, shortest_interval(weights))
  sampler = rollout.Sampler(
    chosen(f.steps, sample["steps"]), chosen(f.guidance, sample["guidance"]),
    chosen(f.shift, sample["shift"]), chosen(f.history_noise, sample.get("history_noise", 0.0)))
  if not 0 <= sampler.history_noise < 1:
    raise InputError(f"--history_noise must be in [0, 1), got {sampler.history_noise}")
  if not sampler.shift > 0:
    raise InputError(f"--shift must be positive, got {sampler.shift}")
  for name, value in (("history", history), ("clip_frames", clip_frames),
                      ("steps", sampler.steps), ("interval", interval)):
    if value < 1:
      raise InputError(f"--{name} must be at least 1, got {value}")
  if clip_frames >= window:
    raise InputError(f"--clip_frames={clip_frames} leaves no history in a window of {window} "
                     "frames")
  try:
    os.makedirs(f.out, exist_ok=True)
  except OSError as error:
    raise InputError(f"cannot write to --out={f.out}: {error}") from error
  weights.codec.prepare()
  if f.video:
    truth, fps = history_from_file(f.video, weights, history, interval)
  else:
    truth, fps = history_from_world(weights, f.sample)
    if len(truth) < history:
      raise InputError(f"--history={history} is longer than the world's {len(truth)} frames")
  frames = predict(weights, truth, history=history, num_frames=f.frames, clip_frames=clip_frames,
                   sampler=sampler, window=window, seed=f.seed)
  for path in write(frames, truth, history, fps, pathlib.Path(f.out)):
    print(f"wrote {path}")


if __name__ == "__main__":
  define_flags()
  cli.run(main)
