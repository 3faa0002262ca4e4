"""How rollouts drift: both windows on the physics world, by clip, beside the simulator.

    python -m videogpt_jax.benchmarks.drift --clips=100 --videos=8

Clips are short beside the window: a clip that replaces the whole history would make both windows
the same. Held-out videos are continued far beyond what the model was trained on. Positions can no
longer be right after some bounces; objects should still be there. Measured for each clip:

    found        share of the objects that the detector finds (truth: those that it finds there)
    brightness   mean difference from the background, of 255
    mse          of pixels / 255, against the simulator's own continuation

The last line printed is one JSON object; with --plot a picture is written.
"""

from typing import Any

from absl import flags
import jax
import numpy as np

from videogpt_jax import cli
from videogpt_jax import rollout
from videogpt_jax import sampler as sampler_lib
from videogpt_jax import weights as weights_lib
from videogpt_jax.benchmarks import report
from videogpt_jax.errors import InputError


def measure(weights: weights_lib.Weights, videos: int, clips: int, size: int, window: int,
            sampler: sampler_lib.Sampler) -> dict[str, Any]:
  """Both windows on the same videos with the same noise; see the module."""
  try:
    from videogpt_jax.data import world
    from videogpt_jax.metrics import world as detector
  except ImportError as error:
    raise InputError(f"{error.name} is missing: pip install 'videogpt_jax[demo]'") from error
  history = weights.config["sample"]["history"]
  settings = world.Settings(**{**weights.config["world"], "frames": history + clips * size})
  truth = [world.simulate(settings, world.held_out_seed(i)) for i in range(videos)]
  frames = np.stack([x.frames for x in truth])

  def figures(predicted: np.ndarray) -> dict[str, list[float]]:
    """By clip, of frames [V, n, S, S, 3]."""
    found = np.stack([detector.detect(p, x.objects)[1].mean(1)
                      for p, x in zip(predicted, truth, strict=True)])
    light = np.abs(predicted - np.array(world.BACKGROUND, np.float32)).mean((2, 3, 4))
    error = np.square((predicted - frames[:, history:].astype(np.float32)) / 255).mean((2, 3, 4))
    by_clip = lambda x: [round(float(v), 5) for v in x.mean(0).reshape(clips, size).mean(1)]
    return {"found": by_clip(found), "brightness": by_clip(light), "mse": by_clip(error)}

  table = {"truth": figures(frames[:, history:])}
  for mode in rollout.MODES:
    predicted = []
    for clip in weights.stream(
        frames[:, :history], clips * size, clip_frames=size, sampler=sampler,
        window=rollout.Window(window, mode), rng=jax.random.key(0)):
      predicted.append(clip.frames)
      if len(predicted) % 10 == 0:
        print(f"{mode}: clip {len(predicted)}/{clips}", flush=True)
    table[mode] = figures(np.concatenate(predicted, axis=1))
  return {"benchmark": "drift", "model": weights.config.get("name", ""),
          "device": jax.devices()[0].device_kind, "videos": videos,
          "clips": clips, "clip_frames": size, "window": window, "history": history,
          "steps": sampler.steps, "shift": sampler.shift, "method": sampler.method,
          "by_clip": table}


def plot(result: dict[str, Any], path: str) -> None:
  """Draws the three figures by clip."""
  from matplotlib import figure

  fig = figure.Figure(figsize=(11, 3.4), layout="constrained")
  titles = {"found": "objects found", "brightness": "brightness above the background, of 255",
            "mse": "MSE against the simulator"}
  for axes, (name, title) in zip(fig.subplots(1, 3), titles.items(), strict=True):
    for mode, figures in result["by_clip"].items():
      if mode != "truth" or name != "mse":
        axes.plot(range(1, result["clips"] + 1), figures[name], label=mode,
                  color={"truth": "0.5"}.get(mode))
    axes.set(title=title, xlabel=f"clip, of {result['clip_frames']} frames", ylim=(0, None))
    axes.grid(True, alpha=0.3)
    axes.legend()
  fig.savefig(path, dpi=110)


def main() -> None:
  """Reads the flags and measures."""
  f = flags.FLAGS
  weights = weights_lib.load(f.checkpoint)
  sampler = sampler_lib.Sampler(f.steps, shift=f.shift, method=f.method)
  result = measure(weights, f.videos, f.clips, f.clip_frames, f.window, sampler)
  for mode, figures in result["by_clip"].items():
    every = max(1, f.clips // 10)
    print(f"  {mode:<10} found " + " ".join(f"{x:.2f}" for x in figures["found"][::every]))
  if f.plot:
    plot(result, f.plot)
    print(f"wrote {f.plot}")
  report.finish(result, f.out, f"drift_{result['model']}.json")


def define_flags() -> None:
  """The command's flags."""
  flags.DEFINE_string("checkpoint", "", "Weights trained on the simulated world; default: those "
                      "that come with the package.")
  flags.DEFINE_integer("videos", 8, "Held-out videos.", lower_bound=1)
  flags.DEFINE_integer("clips", 100, "Clips that each is continued by.", lower_bound=1)
  flags.DEFINE_integer("clip_frames", 2, "Frames of a clip.", lower_bound=1)
  flags.DEFINE_integer("window", 6, "Frames of the window.", lower_bound=2)
  flags.DEFINE_integer("steps", 10, "Steps of the sampler.", lower_bound=1)
  flags.DEFINE_float("shift", 1.0, "Of the sampling times: at 1 the published schedule.")
  flags.DEFINE_enum("method", "multistep", sampler_lib.METHODS, "Method of the sampler.")
  flags.DEFINE_string("plot", "", "Picture to write.")
  flags.DEFINE_string("out", "-", "Result file; empty: in benchmarks/results; - for none.")


if __name__ == "__main__":
  define_flags()
  cli.run(main)
