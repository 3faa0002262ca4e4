"""Pictures of a latent data set: plots of its lengths and latents, contact sheets of records."""

from collections.abc import Iterator, Sequence
import io
import pathlib
from typing import Any

import jax.numpy as jnp
from jaxtyping import Float, Shaped, UInt8
import numpy as np

from videogpt_jax import codec as codec_lib
from videogpt_jax import files
from videogpt_jax.data import inspection
from videogpt_jax.data import store
from videogpt_jax.data import video
from videogpt_jax.errors import InputError

_COLUMNS = 8  # frames of a contact sheet's row
_ENLARGED, _LARGEST = 160, 192  # px; about so large small frames are shown, and at most
_NAME = 30  # characters of a source's name in a contact sheet
_PEAK = 2  # times 1 / std, a density from which its axis is logarithmic; the normal's is 0.4
_BINS = 40  # few enough to hold several of the values that bfloat16 knows
_COLOURS = {"red": "tab:red", "green": "tab:green", "blue": "tab:blue"}


def _figure(width: float, height: float) -> Any:
  try:
    from matplotlib import figure  # an extra: figures in words do without it
  except ImportError as error:
    raise InputError("no plots: they need matplotlib; pip install 'videogpt_jax[demo]'") from error
  return figure.Figure(figsize=(width, height), layout="constrained")


def _save(fig: Any, path: pathlib.Path) -> pathlib.Path:
  buffer = io.BytesIO()
  fig.savefig(buffer, format="png", dpi=120)
  files.replace(path, buffer.getvalue())
  return path


def plot_lengths(sources: Sequence[store.Source], path: pathlib.Path) -> pathlib.Path:
  """Draws how many records there are of which length, a panel a split.

  Raises:
    InputError: matplotlib is missing, or the file cannot be written.
  """
  fig = _figure(8, 0.8 + 2.2 * len(sources))
  panels = fig.subplots(len(sources), 1, sharex=True, squeeze=False)[:, 0]
  edges, wide = _length_edges(np.concatenate([source.lengths for source in sources]))
  right = 1.08 * max(edges[-1], min(inspection.FRAMES))
  for panel, source in zip(panels, sources, strict=True):
    panel.hist(source.lengths, edges, color="tab:blue", edgecolor="white", linewidth=0.5)
    panel.set(ylabel="records", xscale="log" if wide else "linear")
    panel.set_title(f"{source.split} ({len(source)})", loc="left", fontsize=10)
    panel.yaxis.get_major_locator().set_params(integer=True)
    panel.spines[["top", "right"]].set_visible(False)
    for frames in inspection.FRAMES:
      if frames < right and (frames > edges[0] or not wide):
        panel.axvline(frames, color="tab:orange", linestyle="--", linewidth=1)
        panel.annotate(str(frames), (frames, 1), (2, -10), color="tab:orange", fontsize=8,
                       xycoords=("data", "axes fraction"), textcoords="offset points")
  panels[-1].set_xlabel("stored frames of a record (dashed: lengths of samples)")
  if wide:
    panels[-1].xaxis.set_major_formatter("{x:g}")
  else:
    panels[-1].set_xlim(0, right)
  return _save(fig, path)


def _length_edges(lengths: Shaped[np.ndarray, " n"]) -> tuple[Float[np.ndarray, " e"], bool]:
  """Edges of bins, and whether lengths differ so much that they grow by a factor."""
  low, high = int(lengths.min()), int(lengths.max())
  if high > 30 * max(float(np.median(lengths)), 1):
    return np.geomspace(max(low, 1) - 0.5, high + 0.5, 41), True
  width = -(-(high - low + 1) // 60)
  return np.arange(low, high + 1 + width, width) - 0.5, False


def plot_latents(kept: Float[np.ndarray, "n c"], codec: codec_lib.Codec,
                 groups: inspection.Groups, path: pathlib.Path) -> pathlib.Path:
  """Draws the distribution of every group as it is stored and as the model sees it.

  Of a posterior these are the means.

  Raises:
    InputError: as `plot_lengths`.
  """
  groups = {name: group for name, group in groups.items() if group[0] < codec.channels}
  fig = _figure(9, 3.6)
  stored, seen = fig.subplots(1, 2)
  edges = _value_edges(kept[:, :codec.channels], codec)
  _draw_latents(stored, kept, groups, edges)
  stored.set(title="stored", xlabel="value", ylabel="density")
  edges = np.asarray(codec.normalize(jnp.asarray(edges[:, None])))[:, 0]
  _draw_latents(seen, inspection.normalized(codec, kept), groups, edges)
  x = np.linspace(min(edges[0], -3), max(edges[-1], 3), 200)
  seen.plot(x, np.exp(-x**2 / 2) / np.sqrt(2 * np.pi), "--", color="0.3", linewidth=1,
            label="normal")
  seen.set(title="as the model sees it", xlabel="value")
  fig.legend(*seen.get_legend_handles_labels(), loc="outside right upper", fontsize=8,
             frameon=False)
  return _save(fig, path)


def _value_edges(values: Float[np.ndarray, "n c"], codec: codec_lib.Codec
                 ) -> Float[np.ndarray, " e"]:
  """Edges of bins that hold nearly all values; those of bytes hold as many bytes each."""
  if codec.dtype == np.uint8:
    return np.arange(0, 257, 4) - 0.5
  finite = values[np.isfinite(values)]
  low, high = np.percentile(finite, (0.05, 99.95)) if len(finite) else (-1.0, 1.0)
  return np.linspace(low - 1e-3, high + 1e-3, _BINS + 1)


def _draw_latents(panel: Any, values: Float[np.ndarray, "n c"], groups: inspection.Groups,
                  edges: Float[np.ndarray, " e"]) -> None:
  from matplotlib import colormaps

  for number, (name, group) in enumerate(groups.items()):
    column = values[:, group]
    column = column[np.isfinite(column)]
    density = np.histogram(column, edges)[0] / (max(len(column), 1) * np.diff(edges))
    colour = _COLOURS.get(name) or colormaps["turbo"](number / len(groups))
    panel.stairs(density, edges, label=name, color=colour, linewidth=1.2)
    if len(column) and density.max() * column.std() > _PEAK:
      panel.set_yscale("log")
  panel.grid(True, alpha=0.3)
  panel.spines[["top", "right"]].set_visible(False)


def contact_sheets(sources: Sequence[store.Source], codec: codec_lib.Codec, records: int,
                   seed: int, out: pathlib.Path) -> Iterator[pathlib.Path]:
  """Writes a sheet for every size, of so many records in all; yields the files."""
  sizes = {size for source in sources for size in source.buckets()}
  for (h, w), rows in _shown(sources, records, seed).items():
    columns = min(_COLUMNS, max(int(source.lengths[number]) for source, number in rows))
    places = np.linspace(0, 1, columns)
    pictures = {}
    for source, number in rows:
      record = source[number]
      latents = record["latents"]
      chosen = latents[np.rint(places * (len(latents) - 1)).astype(int)]
      frames = codec.decode(chosen[..., :codec.channels])  # of a posterior, the means
      pictures[f"{source.split} {number}: {_shortened(record['source'])}"] = _fitted(frames)
    titles = ["first", *(f"{100 * place:.0f}%" for place in places[1:-1]), "last"][:columns]
    scale = max(1, round(_ENLARGED / max(next(iter(pictures.values())).shape[1:3])))
    suffix = f"_{h * codec.downsample}x{w * codec.downsample}" if len(sizes) > 1 else ""
    path = out / f"contact_sheet{suffix}.png"
    video.write_picture(path, video.contact_sheet(pictures, titles, scale))
    yield path


def _shown(sources: Sequence[store.Source], records: int, seed: int
           ) -> dict[tuple[int, int], list[tuple[store.Source, int]]]:
  """The records of the contact sheets, by size (h, w).

  The sizes of all splits take turns, those with most records first.
  """
  waiting = []
  for source in sources:
    order = inspection.generator(seed, source.split).permutation(len(source))
    order = order[source.lengths[order] > 0]
    for size in source.buckets():
      here = order[(source.sizes[order] == size).all(axis=1)].tolist()
      waiting.append((size, source, here))
  waiting.sort(key=lambda group: -len(group[2]))
  turns = [(turn, size, source, number) for size, source, here in waiting
           for turn, number in enumerate(here[:records])]
  taken: dict[tuple[int, int], list[tuple[store.Source, int]]] = {}
  for _, size, source, number in sorted(turns, key=lambda one: one[0])[:records]:
    taken.setdefault(size, []).append((source, number))
  place = lambda one: (sources.index(one[0]), one[1])
  return {size: sorted(rows, key=place) for size, rows in sorted(taken.items())}


def _fitted(frames: UInt8[np.ndarray, "n H W 3"]) -> UInt8[np.ndarray, "n h w 3"]:
  """Frames that are too large for a sheet shrunk, in proportion."""
  height, width = frames.shape[1:3]
  factor = min(1.0, _LARGEST / max(height, width))
  return video.resize_and_crop(frames, max(1, round(height * factor)),
                               max(1, round(width * factor)))


def _shortened(name: str) -> str:
  """The end of a name, which tells more than its beginning."""
  return name if len(name) <= _NAME else f"...{name[3 - _NAME:]}"
