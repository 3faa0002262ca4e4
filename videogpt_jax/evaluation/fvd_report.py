"""What FVD found, beside what others published."""

from collections.abc import Mapping
import dataclasses
import statistics as statistics_lib
from typing import Any

from videogpt_jax.evaluation import frame_scores
from videogpt_jax.evaluation import fvd_features
from videogpt_jax.evaluation import fvd_videos
from videogpt_jax.evaluation import report as report_lib
from videogpt_jax.metrics import frechet
from videogpt_jax.metrics import fvd

REAL = "real"  # name of the set of real videos


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


def published(protocol: fvd.Protocol, changed: Mapping[str, Any]) -> tuple[str, list[Published]]:
  """A protocol's name with all that differs from it, and what compares: if that is nothing.

  Args:
    protocol: as it was followed.
    changed: what else distances depend on, where it is not what the reference implementation does.
  """
  title = protocol.name if protocol.name == fvd.OWN else protocol.named(changed)
  if changed or fvd.PROTOCOLS.get(protocol.name) != protocol:
    return title, []
  return title, [x for x in PUBLISHED if protocol.name.startswith(x.protocol)]


def report(features: fvd_features.Features, protocol: fvd.Protocol, real: fvd_videos.Videos,
           made: Mapping[str, fvd_videos.Videos], *, predicted: bool, covariance: str,
           changed: Mapping[str, Any], settings: Mapping[str, Any]) -> report_lib.Report:
  """The report of sets whose features are finished.

  Args:
    features: of all sets, those of the real videos under the name `REAL`.
    protocol: that was followed.
    real: the real videos.
    made: the videos that each other set is made of, by its name.
    predicted: whether those are the real ones, continued.
    covariance: see `frechet`.
    changed: see `published`.
    settings: how it was measured.
  """
  truth, rejected = features.merged(REAL, real)
  counts, distances = {}, {}
  for name, videos in made.items():
    statistics, _ = features.merged(name, videos)
    counts[name] = statistics.count
    distances[name] = frechet.distance(truth, statistics, covariance)
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
  title, known = published(protocol, changed)
  others = list(range(len(rows), len(rows) + len(known)))
  rows += [[x.model, x.fvd, None, x.source] for x in known]
  about = (f"{protocol.frames} frames, {protocol.history} of them given; "
           f"{truth.kind['layer']} of I3D, resize {truth.kind['resize']}, covariance {covariance}. "
           + ("Before the changes: " if ", changed: " in title else "") + f"{protocol.known_from}"
           + (f"; {protocol.unknown}." if protocol.unknown else "."))
  table = report_lib.Table(f"FVD, protocol {title}", ["set", "FVD", "videos", "source"],
                           rows, " ".join([about, *notes]), others)
  compared = {name.replace("_", " "): features.compared(name, videos)
              for name, videos in made.items()} if predicted else {}
  sets = (REAL, *made)
  shown = [report_lib.VideoRow(
    real.names[row], {name: features.shown(name, row) for name in sets},
    frame_scores.of_video(compared, row), 0.0, protocol.history)
    for row in range(min(fvd_features.SHOWN, len(real.items)))
    if all(features.shown(name, row).exists() for name in sets)]
  summary: dict[str, Any] = {"fvd": mean, "fvd_deviation": deviation, "fvd_by_set": distances,
             "videos": truth.count, "rejected": len(rejected), "caution": " ".join(notes)}
  tables, plots = [table], []
  if compared:
    tables += frame_scores.tables(compared, _compared_note(protocol, truth.count))
    plots = frame_scores.plots(compared)
    summary["frames"] = {name: {key: float(values.mean()) for key, values in means.by_frame.items()}
                         for name, means in compared.items()}
  return report_lib.Report("FVD", {**settings, **truth.kind}, tables, plots, shown, summary)


def _compared_note(protocol: fvd.Protocol, videos: int) -> str:
  size = f"{protocol.size[0]}x{protocol.size[1]} px" if protocol.size else "the model's size"
  return (f"{videos} videos, frames of {size}, {protocol.history} given, "
          f"{protocol.frames - protocol.history} predicted")


def _caution(truth: frechet.Statistics, counts: dict[str, int]) -> str:
  fewest = dataclasses.replace(truth, count=min(truth.count, *counts.values()))
  return frechet.caution(truth, fewest)
