"""Videos of a TFDS data set, by its name: prepared when it is not there, then read as it lies.

    python -m videogpt_jax.encode --config=configs/videos.py --videos=tfds:moving_mnist --out=...

`config.data.videos` is NAME, NAME/CONFIG or either with :VERSION, or a folder that holds a
version's `dataset_info.json`; `config.data.root` is the TFDS data_dir (default: TFDS's own).
Reading needs no TensorFlow, preparing a published set does (moving_mnist, ucf101), and ucf101
also ffmpeg; a folder that was prepared elsewhere may be copied.

The split `train` is trained on. The first of validation, val, valid, dev and test that there is
is held out. Where one of the two is missing, the records that there are get split by a hash
(`config.data.validation_fraction`).
"""

from collections.abc import Iterable, Mapping
import contextlib
import dataclasses
import difflib
import hashlib
import importlib.util
import os
import pathlib
import pkgutil
import re
from typing import Any

from jaxtyping import Int64
import numpy as np
import tensorflow_datasets as tfds

from videogpt_jax.data import clips
from videogpt_jax.data import tfds_records
from videogpt_jax.errors import InputError

_TRAIN = "train"
_HELD_OUT = ("validation", "val", "valid", "dev", "test")
_NAME = re.compile(r"(?P<name>\w+)(/(?P<config>[\w.-]+))?(:(?P<version>\d+\.\d+\.\d+))?")
_INSTALL = "pip install 'videogpt_jax[tfds]'"


@dataclasses.dataclass(frozen=True)
class TfdsVideos:
  """The records of a prepared data set.

  Attributes:
    loader: makes clips of them.
    parts: the TFDS splits in use and how many records each has; rows count through them.
    rows: int64, the records of each split of ours.
    digest: of the files.
    timeout_s: see `clips.Videos`.
  """

  loader: tfds_records.Records
  parts: Mapping[str, int]
  rows: Mapping[str, Int64[np.ndarray, " R"]]
  digest: str
  timeout_s: float

  @property
  def labels(self) -> tuple[str, ...]:
    return self.loader.layout.names

  def count(self, split: str) -> int:
    return len(self.rows[split])

  def item(self, split: str, index: int) -> tfds_records.Item:
    row = int(self.rows[split][index])
    for part, count in self.parts.items():
      if row < count:
        return part, row
      row -= count
    raise IndexError(f"record {index} of {split}")

  def name(self, split: str, index: int) -> str:
    return self.loader.name(self.item(split, index))

  def describe(self) -> dict[str, Any]:
    loader = dataclasses.asdict(self.loader)
    del loader["folder"]  # wherever it lies, the digest names the content
    counts = {split: len(rows) for split, rows in self.rows.items()}
    return {"source": "tfds", "videos": counts, "digest": self.digest, **loader}


def find(name: str, root: str | os.PathLike[str], rules: Mapping[str, Any], fraction: float,
         timeout_s: float) -> TfdsVideos:
  """A TFDS data set by its name or folder; downloads and prepares it first if need be.

  Args:
    name, root: see above.
    rules: arguments of `load.Rules`.
    fraction: of the records to hold out, where the set does not say which.
    timeout_s: see `clips.Videos`.

  Raises:
    InputError: unknown name, or a set that cannot be prepared or holds no videos; says what to do.
  """
  folder = _folder(name, pathlib.Path(root or tfds.core.constants.DATA_DIR).expanduser())
  layout, splits = tfds_records.layout(folder), tfds_records.splits(folder)
  parts, rows = _rows({split: info.num_examples for split, info in splits.items()}, fraction)
  if not parts:
    raise InputError(f"the data set in {folder} has no records; prepare it again")
  digest = hashlib.sha256((folder / tfds_records.FEATURES).read_bytes())
  for part in parts:
    for path in splits[part].filepaths:
      if not path.exists():
        raise InputError(f"{path} is missing; delete {folder}, and the set is prepared again")
      digest.update(f"{path.name} {path.stat().length}\n".encode())
  title = f"{splits[next(iter(parts))].filename_template.dataset_name}/{folder.name}"
  loader = tfds_records.Records(folder=folder, title=title, layout=layout, **rules)
  return TfdsVideos(loader, parts, rows, digest.hexdigest()[:16], timeout_s)


def _rows(counts: Mapping[str, int], fraction: float
          ) -> tuple[dict[str, int], dict[str, Int64[np.ndarray, " R"]]]:
  """The TFDS splits in use with their counts, and the rows of ours."""
  held_out = next((split for split in _HELD_OUT if split in counts), None)
  if _TRAIN in counts:
    used = [_TRAIN, *([held_out] if held_out else [])]
  else:
    used = sorted(counts)
  parts = {split: counts[split] for split in used}
  names = [f"{split}/{index}" for split in used for index in range(counts[split])]
  given = {_TRAIN: "train", held_out: "validation"} if len(used) == 2 and _TRAIN in used else {}
  stated = np.repeat([given.get(split, "") for split in used], list(parts.values()))
  return parts, clips.split_by_name(names, stated.astype(object), fraction)


def _folder(name: str, root: pathlib.Path) -> pathlib.Path:
  """The folder of the version that is meant, which is prepared now if it is not there."""
  direct = pathlib.Path(name).expanduser()
  if (direct / tfds_records.INFO).exists():
    return direct
  if not (match := _NAME.fullmatch(name)):
    raise InputError(f"{name!r} names no TFDS data set; give NAME, NAME/CONFIG or either with "
                     ":VERSION, or a folder with dataset_info.json")
  return _prepared(root / match["name"], match["config"], match["version"]) or _prepare(
    match["name"], name, root)


def _prepared(base: pathlib.Path, config: str | None, version: str | None) -> pathlib.Path | None:
  """The newest version of a set, or the one that is asked for, if it is there.

  Looked for here, and not by `tfds.builder`, which needs TensorFlow for sets with a `Video`.
  """
  if not base.is_dir():
    return None
  if config:
    return _version(base / config, version)
  if found := _version(base, version):
    return found
  inner = [place for place in sorted(base.iterdir()) if place.is_dir()]
  found_in = [folder for place in inner if (folder := _version(place, version))]
  if len(found_in) > 1:
    names = ", ".join(f"{base.name}/{folder.parent.name}" for folder in found_in)
    raise InputError(f"{base} holds several configurations; name one: {names}")
  return found_in[0] if found_in else None


def _version(place: pathlib.Path, version: str | None) -> pathlib.Path | None:
  there = [info.parent for info in place.glob(f"*/{tfds_records.INFO}")
           if re.fullmatch(r"\d+\.\d+\.\d+", info.parent.name)]
  if version:
    there = [folder for folder in there if folder.name == version]
  return max(there, key=lambda folder: tuple(map(int, folder.name.split("."))), default=None)


def _prepare(short: str, name: str, root: pathlib.Path) -> pathlib.Path:
  """Downloads a set and writes its records."""
  _leave_accelerators_to_jax()
  try:
    builder = tfds.builder(name, data_dir=str(root), file_format="array_record", try_gcs=False)
    builder.download_and_prepare()
  except tfds.core.registered.DatasetNotFoundError as error:
    raise InputError(_unknown(short, root)) from error
  except ModuleNotFoundError as error:
    raise InputError(
      f"{name} is not in {root}, and to prepare it {error.name} is needed: {_INSTALL} "
      "(or prepare it elsewhere and copy the folder; reading needs neither)") from error
  except Exception as error:  # of a builder that is not ours: there is no telling which kind
    reason = (str(error).strip().splitlines() or [""])[0]
    raise InputError(
      f"cannot prepare the TFDS data set {name} in {root}: {type(error).__name__}: {reason}\n"
      f"{_advice(error, name, root)}") from error
  return pathlib.Path(builder.data_dir)


def _unknown(short: str, root: pathlib.Path) -> str:
  without_tensorflow = not importlib.util.find_spec("tensorflow")
  if without_tensorflow and short in _video_modules():
    return (f"{short} is not in {root}, and to prepare it TensorFlow is needed: {_INSTALL} "
            "(or prepare it elsewhere and copy the folder; reading needs neither)")
  known = {*tfds.list_builders(with_community_datasets=False), *_video_modules()}
  close = difflib.get_close_matches(short, sorted(known), n=3)
  return (f"TFDS knows no data set {short!r}, and {root} holds none of that name"
          + (f"; did you mean {' or '.join(close)}?" if close else "")
          + (f" Most sets are known only with TensorFlow: {_INSTALL}" if without_tensorflow else "")
          )


def _video_modules() -> Iterable[str]:
  """Sets of videos that TFDS brings along; without TensorFlow it does not list them itself."""
  place = pathlib.Path(tfds.__file__).parent / "video"
  names = {module.name for module in pkgutil.iter_modules([str(place)])}
  return {name for name in names if not name.endswith("_test")} - {"moving_sequence"}


def _advice(error: BaseException, name: str, root: pathlib.Path) -> str:
  text = str(error).lower()
  if "ffmpeg" in text:
    return "install ffmpeg (such as: apt-get install ffmpeg), then run the same command again"
  if "manual" in text:
    return f"put the files that it asks for into {root / 'downloads' / 'manual'}"
  if isinstance(error, ConnectionError) or "connect" in text or "resolve" in text or "url" in text:
    return ("is there a network? Prepare the set where there is one, by\n"
            f"  python -c \"import tensorflow_datasets as t; t.builder('{name}', "
            "file_format='array_record').download_and_prepare()\"\n"
            f"and copy its folder to {root}")
  return "free space, or choose another folder by data.root, then run the same command again"


def _leave_accelerators_to_jax() -> None:
  """TensorFlow, which some sets are prepared with, would take all of their memory."""
  with contextlib.suppress(ImportError, RuntimeError):
    import tensorflow

    tensorflow.config.set_visible_devices([], "GPU")
