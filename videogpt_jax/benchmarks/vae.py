"""Frames a second through the autoencoder: `python -m videogpt_jax.benchmarks.vae`.

    python -m videogpt_jax.benchmarks.vae
    python -m videogpt_jax.benchmarks.vae --peers=               # without torch
    python -m videogpt_jax.benchmarks.vae --sizes=256x256 --batch=1

SDXL's architecture with random weights in float32, beside `AutoencoderKL` of diffusers with
the same weights on as many threads. Both take turns in one run, so that their ratios do not
depend on the machine's mood, and must agree before anything is timed. The peer gets the same
frames in parts of `--peer_batches`, and ratios are to the fastest of its ways. The last line
printed is one JSON object.
"""

from collections.abc import Callable
import statistics
import time
from typing import Any

from absl import flags
import jax
import jax.numpy as jnp
import numpy as np

from videogpt_jax import cli
from videogpt_jax import machine
from videogpt_jax import vae
from videogpt_jax.benchmarks import report
from videogpt_jax.errors import InputError

CASES = {
  "full": vae.Config(),
  "tiny": vae.Config(block_channels=(16, 16, 16, 16), layers_per_block=1, norm_groups=4),
}
PEERS = ("diffusers",)
_TOLERANCE = 1e-4  # of the largest value

# Frames `[B, H, W, 3]` to means, latents `[B, h, w, C]` to frames; on the host when they return.
_Way = Callable[[np.ndarray], np.ndarray]


def random_tensors(config: vae.Config, seed: int = 0) -> dict[str, np.ndarray]:
  """Weights under diffusers' names that keep activations near 1."""
  rng = np.random.default_rng(seed)
  tensors = {}
  for name, shape in vae.published_shapes(config).items():
    x = rng.standard_normal(shape, np.float32)
    if len(shape) == 1:
      tensors[name] = 0.1 * x + ("norm" in name and name.endswith("weight"))
    else:
      tensors[name] = x / np.sqrt(np.prod(shape[1:]), dtype=np.float32)
  return tensors


def ours(config: vae.Config, tensors: dict[str, np.ndarray]) -> dict[str, _Way]:
  """`encode` and `decode` of this package."""
  params = jax.tree.map(jnp.asarray, vae.from_published(tensors, config))
  encode = jax.jit(lambda params, x: vae.encode(config, params, x).mean)
  decode = jax.jit(lambda params, z: vae.decode(config, params, z))
  return {"encode": lambda x: np.asarray(encode(params, x)),
          "decode": lambda z: np.asarray(decode(params, z))}


def diffusers(config: vae.Config, tensors: dict[str, np.ndarray], batch: int) -> dict[str, _Way]:
  """The same of diffusers, `batch` frames at a time, on all cores that this process may use.

  Raises:
    InputError: torch or diffusers is not installed.
  """
  try:
    import diffusers
    import torch
  except ImportError as error:
    raise InputError(f"--peers=diffusers: {error}; pip install 'videogpt_jax[bench]', or --peers= "
                     "to measure without") from error
  torch.set_num_threads(machine.usable_cores())
  levels = len(config.block_channels)
  model = diffusers.AutoencoderKL(
    in_channels=config.image_channels, out_channels=config.image_channels,
    down_block_types=["DownEncoderBlock2D"] * levels, up_block_types=["UpDecoderBlock2D"] * levels,
    block_out_channels=config.block_channels, layers_per_block=config.layers_per_block,
    latent_channels=config.latent_channels, norm_num_groups=config.norm_groups)
  model.load_state_dict({name: torch.from_numpy(x) for name, x in tensors.items()})
  model.eval()

  def way(run: Callable[[Any], Any]) -> _Way:
    def call(x: np.ndarray) -> np.ndarray:
      images = torch.from_numpy(x).permute(0, 3, 1, 2).contiguous()
      with torch.inference_mode():
        out = torch.cat([run(part) for part in images.split(batch)])
      return out.permute(0, 2, 3, 1).numpy()

    return call

  return {"encode": way(lambda x: model.encode(x).latent_dist.mean),
          "decode": way(lambda z: model.decode(z).sample)}


def measure(config: vae.Config, height: int, width: int, batch: int, rounds: int,
            ways: dict[str, dict[str, _Way]]) -> dict[str, Any]:
  """Times all ways at one size, in turns after a round that compiles and compares.

  Raises:
    InputError: the sides do not divide into latent cells.
    RuntimeError: somebody computes another function than ours.
  """
  if height % config.downsample or width % config.downsample:
    raise InputError(f"--sizes: {height}x{width} px do not divide into cells of "
                     f"{config.downsample} px")
  rng = np.random.default_rng(1)
  cells = height // config.downsample, width // config.downsample
  inputs = {
    "encode": rng.uniform(-1, 1, (batch, height, width, 3)).astype(np.float32),
    "decode": rng.standard_normal((batch, *cells, config.latent_channels), np.float32)}
  figures: dict[str, Any] = {name: {} for name in ways}
  for what, x in inputs.items():
    began = time.perf_counter()
    expected = ways["ours"][what](x)
    figures["ours"][f"{what}_first_call_seconds"] = time.perf_counter() - began
    for name in ways.keys() - {"ours"}:
      error = float(np.abs(ways[name][what](x) - expected).max() / np.abs(expected).max())
      if not error < _TOLERANCE:
        raise RuntimeError(f"{what} of {name} differs from ours by {error:.2g} of the largest "
                           "value; not measured")
      figures[name][f"{what}_difference_from_ours"] = error
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
      for name, way in ways.items():
        began = time.perf_counter()
        way[what](x)
        seconds[name].append(time.perf_counter() - began)
    for name, times in seconds.items():
      figures[name] |= {f"{what}_frames_per_second": batch / statistics.median(times),
                        f"{what}_fastest_frames_per_second": batch / min(times)}
    for kind in ("", "_fastest"):
      key = f"{what}{kind}_frames_per_second"
      peers = [figures[name][key] for name in ways if name != "ours"]
      if peers:
        figures[f"{what}{kind}_ratio"] = figures["ours"][key] / max(peers)
  return figures


def _parsed(sizes: list[str]) -> list[tuple[int, int]]:
  try:
    return [(int(height), int(width)) for height, width in (size.split("x") for size in sizes)]
  except ValueError as error:
    raise InputError(f"--sizes={','.join(sizes)}: give HEIGHTxWIDTH, as 64x96,176x320") from error


def _batches(numbers: list[str]) -> list[int]:
  if not numbers or not all(number.isdecimal() and int(number) for number in numbers):
    raise InputError(f"--peer_batches={','.join(numbers)}: give numbers of frames, as 1,8")
  return [int(number) for number in numbers]


def main() -> None:
  """Reads the flags and measures."""
  f = flags.FLAGS
  sizes = _parsed(f.sizes)
  if unknown := set(f.peers) - set(PEERS):
    raise InputError(f"--peers={','.join(sorted(unknown))}: known is {', '.join(PEERS)}")
  config = CASES[f.case]
  tensors = random_tensors(config)
  ways = {"ours": ours(config, tensors)}
  if f.peers:
    for batch in sorted({min(batch, f.batch) for batch in _batches(f.peer_batches)}):
      ways[f"diffusers_by_{batch}"] = diffusers(config, tensors, batch)
  result: dict[str, Any] = {
    "benchmark": "vae", "case": f.case, "device": jax.devices()[0].device_kind,
    "threads": machine.usable_cores(), "jax": jax.__version__, "dtype": "float32",
    "batch": f.batch, "rounds": f.rounds, "product_gflops_per_s": machine.product_rate() / 1e9}
  if f.peers:
    import diffusers as peer
    import torch
    result |= {"torch": torch.__version__, "diffusers": peer.__version__}
  result["sizes"] = {}
  for height, width in sizes:
    figures = measure(config, height, width, f.batch, f.rounds, ways)
    result["sizes"][f"{height}x{width}"] = figures
    print(f"{height}x{width}, frames a second", flush=True)
    for name in ways:
      print(f"  {name:<20}" + "".join(
        f"{what} {figures[name][f'{what}_frames_per_second']:8.3f}   "
        for what in ("encode", "decode")), flush=True)
  kind = result["device"].replace(" ", "_").lower()
  report.finish(result, f.out, f"vae_{f.case}_{kind}.json")


if __name__ == "__main__":
  flags.DEFINE_enum("case", "full", list(CASES), "The autoencoder: SDXL's, or one for tests.")
  flags.DEFINE_list("sizes", ["64x96", "176x320"], "Heights and widths of the frames, px.")
  flags.DEFINE_integer("batch", 8, "Frames in a call, as the codec has them.", lower_bound=1)
  flags.DEFINE_integer("rounds", 3, "Timed calls of each.", lower_bound=1)
  flags.DEFINE_list("peers", list(PEERS), "Whom to measure beside ours; empty for nobody.")
  flags.DEFINE_list("peer_batches", ["1", "8"], "Frames that the peer gets at a time.")
  flags.DEFINE_string("out", "-", "Result file; empty: in benchmarks/results; - for none.")
  cli.run(main)
