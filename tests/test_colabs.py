"""The notebook is committed clean, runs from top to bottom, and shows what it says."""

import ast
import base64
import importlib.util
import io
import itertools
import json
import pathlib
import re

from IPython.core.inputtransformer2 import TransformerManager
import nbclient
import nbformat
import numpy as np
from PIL import Image
import pytest

from videogpt_jax import checkpoint_files
from videogpt_jax import config as config_lib
from videogpt_jax import folder as folder_lib
from videogpt_jax import weights
from videogpt_jax.data import world

NOTEBOOK = pathlib.Path(__file__).parents[1] / "colabs" / "quickstart.ipynb"
STEPS, HISTORY, FRAMES = 12, 4, 8
SHIPPED = [""] if folder_lib.is_folder(weights.PRETRAINED) else []
SETTINGS = {
  "VIDEOS": 48,
  "STEPS": STEPS,
  "BATCH_SIZE": 4,
  "WORKDIR": "run",
  "CHECKPOINTS": [*SHIPPED, "run"],  # the run's own last, which the last cell takes
}
# The trained parameters on the very first batch, with the noise that the fresh ones had there.
PROBE = """
import json

batch = next(pipeline.to_device(
  pipeline.batches(source, frames=config.data.frames, interval=config.data.interval,
                   batch_size=BATCH_SIZE, seed=config.seed),
  sharding.rows(mesh)))
first_step = jax.device_put(np.int32(0), state.step.sharding)
with sharding.use(mesh):
  _, metrics = train_step(state.replace(step=first_step), batch.latents)
again = float(metrics["loss_sum"] / metrics["loss_count"])
with open("probe", "w") as file:
  losses = [float(x) for x in losses]
  json.dump({"losses": losses, "again": again, "picture": picture.tolist()}, file)
"""


def read():
  return nbformat.read(NOTEBOOK, as_version=4)


def cell(notebook, name):
  return next(c for c in notebook.cells if c.id == name)


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
  """The notebook with all its outputs, and the folder it ran in."""
  folder = tmp_path_factory.mktemp("notebook")
  notebook = read()
  place = [c.id for c in notebook.cells].index("settings") + 1
  replaced = "\n".join(f"{name} = {value!r}" for name, value in SETTINGS.items())
  notebook.cells.insert(place, nbformat.v4.new_code_cell(replaced))
  notebook.cells.append(nbformat.v4.new_code_cell(PROBE))
  client = nbclient.NotebookClient(
    notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(folder)}})
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("IPYTHONDIR", str(folder / "ipython"))  # without the user's own settings
    patch.delenv("MPLBACKEND", raising=False)
    # Compiling takes longest here, so let it take half.
    patch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")
    client.execute()
  return notebook, folder


def gifs(shown):
  """The videos that a cell plays, each uint8 [T, H, W, 3]."""
  pages = "".join(o.data.get("text/html", "") for o in shown.outputs if "data" in o)
  videos = []
  for data in re.findall(r"data:image/gif;base64,([^\"]+)", pages):
    picture = Image.open(io.BytesIO(base64.b64decode(data)))
    frames = []
    for t in range(picture.n_frames):
      picture.seek(t)
      frames.append(np.asarray(picture.convert("RGB")))
    videos.append(np.stack(frames))
  return videos


def printed(shown):
  return "".join(o.text for o in shown.outputs if o.output_type == "stream")


# As committed -----------------------------------------------------------------------------


def test_is_committed_clean():
  notebook = read()
  nbformat.validate(notebook)
  assert set(notebook.metadata) == {"kernelspec", "language_info"}
  assert notebook.metadata.kernelspec.name == "python3"
  for one in notebook.cells:
    assert set(one.metadata) <= {"tags"}
    if one.cell_type == "code":
      assert not one.outputs, one.id
      assert one.execution_count is None, one.id


def test_cells_are_short_and_introduced():
  for before, one in itertools.pairwise(read().cells):
    if one.cell_type == "code":
      assert before.cell_type == "markdown", f"nothing is said before {one.id}"
      assert len(one.source.splitlines()) <= 32, one.id
    assert max(map(len, one.source.splitlines())) <= 100, one.id


def test_settings_come_first_and_are_all_that_a_run_replaces():
  first = next(c for c in read().cells if c.cell_type == "code")
  assert first.metadata.tags == ["parameters"]
  assigned = [target.id for line in ast.parse(first.source).body for target in line.targets]
  assert set(SETTINGS) <= set(assigned)


# The install cell -------------------------------------------------------------------------


class Shell:
  """Notes what a notebook would ask of IPython, with the notebook's variables put in."""

  def __init__(self, variables):
    self.variables = variables
    self.asked = []

  def system(self, command):
    self.asked.append(command.format(**self.variables))

  def run_line_magic(self, name, line):
    self.asked.append(f"%{name} {line}".format(**self.variables))


def install(repo):
  """What the install cell does for this REPO."""
  variables = {"REPO": repo, "EXTRAS": "demo"}
  shell = Shell(variables)
  source = TransformerManager().transform_cell(cell(read(), "install").source)
  exec(source, {**variables, "get_ipython": lambda: shell})
  return shell.asked


def test_install_does_nothing_where_the_package_is():
  assert install("https://example.org/repo.git") == []


def test_install_clones_and_installs(monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  clone, pip = install("https://example.org/repo.git")
  assert clone.startswith("git clone ")
  assert '"https://example.org/repo.git"' in clone
  folder = clone.split()[-1]
  assert pip.startswith("%pip install ")
  assert f'"./{folder}[demo]"' in pip


def test_install_asks_for_the_repository(monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(AssertionError, match="set REPO in the first cell"):
    install("")


# Executed ---------------------------------------------------------------------------------


def test_plays_the_world(executed):
  shown = cell(executed[0], "world")
  (video,) = gifs(shown)
  assert len(video) == FRAMES
  settings = world.Settings(**config_lib.default().world)
  for i in range(4):
    sample = world.simulate(settings, world.train_seed(i))
    assert f"video {i}: {sample.caption}" in printed(shown)
    pixels = np.split(video[0], 4, axis=1)[i].reshape(-1, 3).astype(int)
    for item in sample.objects:  # the palette of a GIF may be off by a little
      assert np.abs(pixels - item.rgb).max(-1).min() <= 8


def test_draws_the_mask_that_it_describes(executed):
  """Every pair of tokens decided anew from the words above the picture."""
  clip_of = [0, 1, 1, 2, 2, 2]
  noisy_kinds, clean_kinds = ["start", "time", *["patch"] * 4], ["start", *["patch"] * 4, "end"]
  in_order = {"start": 0, "time": 1, "patch": 2, "end": 3}
  tokens = [("clean", f, kind) for f in range(6) if clip_of[f] < 2 for kind in clean_kinds]
  tokens += [("noisy", f, kind) for f in range(6) for kind in noisy_kinds]

  def level(query, key):
    (stream_q, frame_q, kind_q), (stream_k, frame_k, kind_k) = query, key
    clip_q, clip_k = clip_of[frame_q], clip_of[frame_k]
    ordered = in_order[kind_k] <= in_order[kind_q]
    if stream_q != stream_k:
      return 1 if stream_q == "noisy" and clip_k < clip_q else 0
    if frame_q == frame_k:
      return 3 if ordered else 0
    if stream_q == "clean":
      return 2 if frame_k < frame_q else 0
    return 2 if clip_q == clip_k and ordered else 0

  picture = json.loads((executed[1] / "probe").read_text())["picture"]
  np.testing.assert_array_equal(picture, [[level(q, k) for k in tokens] for q in tokens])
  assert any("image/png" in o.get("data", {}) for o in cell(executed[0], "mask").outputs)


def test_trains_and_saves(executed):
  notebook, folder = executed
  probe = json.loads((folder / "probe").read_text())
  assert len(probe["losses"]) == STEPS
  assert probe["again"] < 0.97 * probe["losses"][0]
  (curve,) = [o for o in cell(notebook, "train").outputs if "data" in o]
  drawn = np.asarray(Image.open(io.BytesIO(base64.b64decode(curve.data["image/png"]))).convert("L"))
  assert drawn.std() > 0
  _, config = checkpoint_files.load_params(folder / "run" / checkpoint_files.FOLDER / str(STEPS))
  assert config["name"] == "quickstart"


def test_plays_the_prediction_beside_the_truth(executed):
  videos = gifs(cell(executed[0], "watch"))
  assert len(videos) == len(SETTINGS["CHECKPOINTS"])
  columns = np.split(videos[-1][:, 20:-10], 4, axis=2)  # inside: no titles, which differ
  assert len(videos[-1]) == FRAMES
  for truth, prediction in zip(columns[::2], columns[1::2], strict=True):
    given = slice(None, HISTORY)
    np.testing.assert_array_equal(truth[given], prediction[given])
    for t in range(HISTORY, FRAMES):
      assert np.any(truth[t] != prediction[t])


def test_scores_are_those_of_the_videos(executed):
  lines = printed(cell(executed[0], "error")).splitlines()
  own = lines[lines.index("run"):]
  settings = world.Settings(**config_lib.default().world)
  truth = np.stack([world.simulate(settings, world.held_out_seed(i)).frames for i in range(4)])
  truth = truth / 255.0
  still = np.square(truth[:, HISTORY:] - truth[:, HISTORY - 1:HISTORY]).mean((0, 2, 3, 4))
  shown = {line.split("  ")[1]: [float(x) for x in line.split()[-4:]] for line in own[1:3]}
  np.testing.assert_allclose(shown["still world"], still, atol=6e-5)
  assert all(0 < x < 1 for x in shown["model"])


def test_shows_several_futures(executed):
  (video,) = gifs(cell(executed[0], "futures"))
  futures = np.split(video[:, 20:-10], 4, axis=2)[1:]
  for one, other in ((0, 1), (1, 2), (0, 2)):
    np.testing.assert_array_equal(futures[one][:HISTORY], futures[other][:HISTORY])
    assert np.any(futures[one][-1] != futures[other][-1])
