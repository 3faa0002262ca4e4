"""Continues videos: `python -m videogpt_jax.predict --video=clip.mp4 --frames=24`.

Takes the first frames of a video file, a picture, each file of a folder, or (where none is
given) of a held-out video of the simulated world, and rolls out what comes next, clip after
clip. For each it writes into its folder

    prediction.mp4          given and predicted frames; prediction_1.mp4 and so on for more samples
    side_by_side.mp4, .gif  beside the truth, where it is known, and each other
    contact_sheet.png       some frames of all of them
    prediction.json         settings and timings

Interrupted, it keeps the clips finished so far; the same command goes on from there.
"""

from collections.abc import Callable, Mapping
import contextlib
import dataclasses
import os
import pathlib
from typing import Any

from absl import flags
import jax
import numpy as np

from videogpt_jax import cli
from videogpt_jax import files
from videogpt_jax import finished
from videogpt_jax import machine
from videogpt_jax import results as results_lib
from videogpt_jax import rollout
from videogpt_jax import sampler as sampler_lib
from videogpt_jax import sharding
from videogpt_jax import weights as weights_lib
from videogpt_jax.data import fit as fit_lib
from videogpt_jax.data import given as given_lib
from videogpt_jax.errors import InputError

_INTERRUPTED = 130  # exit status, as a shell gives it after Ctrl-C


@dataclasses.dataclass(frozen=True)
class Request:
  """What to predict of a given video.

  Attributes:
    frames: how many.
    clip_frames: of a clip.
    samples: futures of the same video, with different noise.
    sampler: how a clip is denoised.
    window: what it sees.
    seed: of the noise.
  """

  frames: int
  clip_frames: int
  samples: int
  sampler: sampler_lib.Sampler
  window: rollout.Window
  seed: int


def predict(weights: weights_lib.Weights, given: given_lib.Given, request: Request,
            out: pathlib.Path, *, fps: float | None = None, restart: bool = False,
            stop: Callable[[], bool] = lambda: False) -> dict[str, Any]:
  """Continues one video and writes the files (see the module), with progress on stdout.

  Args:
    weights: the model.
    given: the video.
    request: what is wanted.
    out: folder of the results.
    fps: of the results; None: as given.
    restart: do not go on with what an interrupted call left.
    stop: asked while the device computes: whether to interrupt.

  Returns:
    What `prediction.json` holds.

  Raises:
    InputError: the folder cannot be written, or holds another interrupted prediction.
    KeyboardInterrupt: `stop` said so; the files hold the clips finished so far.
  """
  settings = {"weights": weights.path, "parameters": weights_lib.fingerprint(weights.params),
              "video": given.name, "given": weights_lib.digest(given.frames[:given.history]),
              "dtype": np.dtype(weights.model.backbone.dtype).name, "history": given.history,
              **_plain(request)}
  clips = finished.Clips(out, settings, restart)
  if len(clips):
    print(f"going on in {out} after {len(clips)} finished clips", flush=True)
  lengths = rollout.clip_lengths(request.frames, request.clip_frames)
  progress = results_lib.Progress(lengths, request.samples, len(clips))
  with contextlib.closing(results_lib.Results(
      out, given, request.frames, request.samples, fps or given.fps)) as results:
    for index, clip in enumerate(weights.stream(
        np.repeat(given.frames[None, :given.history], request.samples, axis=0), request.frames,
        clip_frames=request.clip_frames, sampler=request.sampler, window=request.window,
        rng=jax.random.key(request.seed), finished=clips, stop=stop)):
      if index >= len(clips):
        clips.append(clip.latents)
        progress.clip()
      results.append(clip.frames)
  clips.remove()
  report = {**settings, "fps": fps or given.fps, "timings": progress.timings(),
            "device": jax.devices()[0].device_kind, "devices": weights.mesh.size
            if weights.mesh else 1, "jax": jax.__version__}
  results.write_report(report)
  return report


def _plain(request: Request) -> dict[str, Any]:
  return {**dataclasses.asdict(request), "sampler": dataclasses.asdict(request.sampler),
          "window": dataclasses.asdict(request.window)}



# The command ------------------------------------------------------------------------------


def define_flags() -> None:
  """The command's flags; those left unset take the default of the model's own run."""
  flags.DEFINE_string("video", "", "Video or picture file to continue, or a folder of them; "
                      "default: a held-out video of the world.")
  flags.DEFINE_integer("sample", 0, "Which held-out video, without --video.", lower_bound=0)
  flags.DEFINE_string("checkpoint", "", "Training workdir or weights folder; default: the weights "
                      "that come with the package.")
  flags.DEFINE_string("vae", "", "Folder (or hub name) of the autoencoder, for weights on its "
                      "latents.")
  flags.DEFINE_string("out", "runs/prediction", "Folder for the results.")
  flags.DEFINE_bool("restart", False, "Forget what an interrupted prediction left in --out.")
  flags.DEFINE_integer("frames", 12, "Frames to predict, any number.", lower_bound=1)
  flags.DEFINE_integer("samples", 1, "Futures of each video, with different noise.", lower_bound=1)
  flags.DEFINE_integer("seed", 0, "Of the noise: another seed, other futures.")
  flags.DEFINE_integer("history", None, "Frames given.")
  flags.DEFINE_integer("interval", None, "Every how many frames of --video one is taken.")
  flags.DEFINE_float("fps", None, "Frames a second of the results; default: as --video, at the "
                     "interval.")
  flags.DEFINE_integer("clip_frames", None, "Frames denoised at once.")
  flags.DEFINE_integer("steps", None, "Steps of the sampler.")
  flags.DEFINE_enum("method", None, sampler_lib.METHODS, "Of the sampler: euler (published), or "
                    "second order: heun (two predictions a step), multistep (one).")
  flags.DEFINE_float("shift", None, "Of the sampling times; below 1 more steps are near the data: "
                     "rather the mean of all futures than one of them.")
  flags.DEFINE_float("guidance", None, "Weight of the history; 1 is none beyond the model's own.")
  flags.DEFINE_float("guidance_decay", None, "d; the weight at time t is 1 + (guidance - 1) "
                     "(1 - t)^d.")
  flags.DEFINE_list("guidance_range", None, "Times LO,HI between which there is guidance; 0 is "
                    "noise, 1 the data.")
  flags.DEFINE_integer("window", None, "Most frames in a sequence.")
  flags.DEFINE_enum("window_mode", None, rollout.MODES, "When frames leave the window: recompute "
                    "(published) encodes the kept ones anew; rolling keeps them as they are, at "
                    "the same cost for ever.")
  flags.DEFINE_float("history_noise", None, "n; generated clips become history as "
                     "(1 - n) x + n noise.")
  flags.DEFINE_bool("redraw_noise", None, "This noise on all of the history, anew for every clip "
                    "(published).")
  flags.DEFINE_enum("dtype", "auto", ["auto", "float32", "bfloat16"], "Compute type; auto: "
                    "bfloat16 on accelerators.")
  flags.DEFINE_list("mesh", None, "How devices share the work, such as tensor=4,sequence=2 (axes "
                    f"{', '.join(sharding.AXES)}); default: samples, then heads, over all.")
  flags.DEFINE_integer("cpu_devices", 0, "On CPU: devices that the cores are shared among; 2 is "
                       "faster for larger models.", lower_bound=0)


def main() -> None:
  """Reads the flags and predicts."""
  f = flags.FLAGS
  if f.cpu_devices:
    machine.split_cpu(f.cpu_devices)
  machine.free_after_compiling()
  source = weights_lib.open_source(f.checkpoint)
  request = _request(f, source.config)
  interval = f.interval or given_lib.shortest_interval(source.config["data"])
  for name, value in (("history", f.history), ("interval", f.interval), ("fps", f.fps)):
    if value is not None and not value > 0:
      raise InputError(f"--{name} must be positive, got {value}")
  found = given_lib.find(f.video) if f.video else [pathlib.Path()]
  outs = given_lib.folders(f.out, found)
  files.make_folder(f.out, "--out")
  default_history = source.config["sample"]["history"]

  def read(path: pathlib.Path) -> given_lib.Given:
    if not f.video:
      return given_lib.of_world(source.config, f.sample, f.history or default_history)
    data = source.config["data"]
    fit = fit_lib.of(data, source.config["codec"]["block"], source.model.patch_size)
    return given_lib.read(path, fit=fit, history=f.history,
                          default_history=default_history, following=f.frames, interval=interval)

  if len(found) == 1:
    first = read(found[0])  # what is wrong with it is told before anything large is loaded
  weights = weights_lib.load(source, dtype=f.dtype, vae=f.vae, mesh=_mesh(f.mesh, request, source))
  weights.codec.prepare()
  if len(found) == 1:
    _one(weights, first, request, outs[0])
    return
  refused = []
  for number, (path, out) in enumerate(zip(found, outs, strict=True), start=1):
    print(f"[{number}/{len(found)}] {path}", flush=True)
    try:
      item = read(path)
    except InputError as error:
      print(f"not usable: {error}", flush=True)
      refused.append(path)
      continue
    _one(weights, item, request, out)
  if refused:
    print(f"{len(refused)} of {len(found)} files could not be used")
  if len(refused) == len(found):
    raise InputError(f"none of the {len(found)} files in {f.video} could be used")


def _one(weights: weights_lib.Weights, item: given_lib.Given, request: Request, out: pathlib.Path
         ) -> None:
  """Predicts one video; Ctrl-C and SIGTERM end the process with what is finished on disk."""
  f = flags.FLAGS
  for note in item.notes:
    print(note, flush=True)
  try:
    with cli.stop_signal() as stop:
      report = predict(weights, item, request, out, fps=f.fps, restart=f.restart,
                       stop=stop.is_set)
  except KeyboardInterrupt:
    print(f"interrupted; the clips finished so far are in {out}, and the same command goes on "
          "from there", flush=True)
    os._exit(_INTERRUPTED)  # jax would finish what it computes before the process may end
  timings = report["timings"]
  if timings["clips"]:
    print(f"predicted {timings['clips']} clips in {timings['seconds']:.1f} s "
          f"({timings['frames_per_s']:.2f} frames/s)")
  for name in sorted(path.name for path in out.iterdir() if path.is_file()):
    print(f"wrote {out / name}")


def _request(f: flags.FlagValues, config: Mapping[str, Any]) -> Request:
  """The flags over the defaults of the weights' configuration.

  Raises:
    InputError: settings that make no sense.
  """
  given = lambda names: {name: value for name in names if (value := getattr(f, name)) is not None}
  sampler = dataclasses.replace(weights_lib.default_sampler(config), **given(
    ("steps", "method", "shift", "guidance", "guidance_decay")))
  if f.guidance_range is not None:
    try:
      lo, hi = map(float, f.guidance_range)
    except ValueError as error:
      raise InputError(f"--guidance_range must be two numbers LO,HI, got "
                       f"{','.join(f.guidance_range)}") from error
    sampler = dataclasses.replace(sampler, guidance_range=(lo, hi))
  renamed = {"window": "frames", "window_mode": "mode", "history_noise": "history_noise",
             "redraw_noise": "redraw"}
  window = dataclasses.replace(weights_lib.default_window(config), **{
    renamed[name]: value for name, value in given(renamed).items()})
  clip_frames = config["sample"]["clip_frames"] if f.clip_frames is None else f.clip_frames
  if (problem := sampler_lib.problem(sampler) or rollout.problem(window)):
    raise InputError(f"--{problem}")
  if clip_frames < 1:
    raise InputError(f"--clip_frames must be at least 1, got {clip_frames}")
  if window.frames and clip_frames >= window.frames:
    raise InputError(f"--clip_frames={clip_frames} leaves no history in a window of "
                     f"{window.frames} frames")
  return Request(f.frames, clip_frames, f.samples, sampler, window, f.seed)


def _mesh(wanted: list[str] | None, request: Request, source: weights_lib.Source
          ) -> jax.sharding.Mesh | None:
  """The mesh of --mesh, or as many of the devices as can help."""
  stack = source.model.backbone
  if wanted is None:
    mesh = sharding.prediction_mesh(request.samples, stack.num_heads, stack.num_kv_heads)
    return mesh if mesh.size > 1 else None
  sizes = dict.fromkeys(sharding.AXES, 1)
  for part in wanted:
    axis, _, size = part.partition("=")
    if axis not in sizes or not size.isdecimal() or not int(size):
      raise InputError(f"--mesh: {part!r} is not AXIS=SIZE with an axis of "
                       f"{', '.join(sharding.AXES)}")
    sizes[axis] = int(size)
  mesh = sharding.make_mesh(sizes)
  shards = mesh.shape["tensor"] * mesh.shape["sequence"]
  if stack.num_heads % shards or stack.num_kv_heads % mesh.shape["tensor"]:
    raise InputError(f"--mesh: {stack.num_heads} heads ({stack.num_kv_heads} of keys) cannot be "
                     f"shared among {shards} devices of tensor and sequence")
  return mesh


if __name__ == "__main__":
  define_flags()
  cli.run(main, computes=True)
