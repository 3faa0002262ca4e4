"""The command that continues videos: what it writes, and what it refuses."""

import json
import shutil
import subprocess
import sys

import jax
import numpy as np
from PIL import Image
import pytest

import tiny_run
from videogpt_jax import predict
from videogpt_jax import weights as weights_lib
from videogpt_jax.data import video
from videogpt_jax.data import world
from videogpt_jax.errors import InputError

# Many command lines in one process that has imported everything; each gets a fork of it.
_FORKS = """
import json, os, sys
from videogpt_jax import checkpoint, cli, config, predict
from videogpt_jax.data import world

for number, argv in enumerate(json.load(sys.stdin)):
  child = os.fork()
  if not child:
    for stream, name in ((1, "out"), (2, "err")):
      file = os.open(f"{sys.argv[1]}/{number}.{name}", os.O_WRONLY | os.O_CREAT)
      os.dup2(file, stream)
    sys.argv = ["predict", *argv]
    predict.define_flags()
    cli.run(predict.main)
  with open(f"{sys.argv[1]}/{number}.code", "w") as file:
    file.write(str(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])))
"""


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
  """A folder of inputs: a held-out video of the tiny world as a file, and unusable ones."""
  folder = tmp_path_factory.mktemp("videos")
  frames = world.simulate(_settings(), world.held_out_seed(3)).frames
  video.write_mp4(folder / "good.mp4", frames, fps=8.0, lossless=True)
  video.write_mp4(folder / "wide.mp4", np.repeat(frames, 3, axis=2).repeat(2, axis=1), fps=5.0)
  video.write_mp4(folder / "short.mp4", frames[:1], fps=8.0)
  (folder / "text.mp4").write_text("I am no video.\n" * 100)
  whole = (folder / "good.mp4").read_bytes()
  (folder / "cut.mp4").write_bytes(whole[:len(whole) // 2])
  return folder


def _settings():
  return world.Settings(**tiny_run.config("").world)


@pytest.fixture(scope="module")
def said(finished, videos, tmp_path_factory):
  """What the command says to every command line of these tests: (status, stdout, stderr)."""
  folder = tmp_path_factory.mktemp("said")
  (folder / "file").write_text("")
  fill = {"run": finished.workdir, "videos": videos, "out": folder}
  lines = [[part.format(**fill) for part in line.split()] for line in (*WRITES, *REFUSED)]
  subprocess.run([sys.executable, "-c", _FORKS, str(folder)], input=json.dumps(lines), text=True,
                 check=True, timeout=300)
  read = lambda number, kind: (folder / f"{number}.{kind}").read_text()
  return folder, {line: (int(read(n, "code")), read(n, "out"), read(n, "err"))
                  for n, line in enumerate((*WRITES, *REFUSED))}


FILE = "--checkpoint={run} --video={videos}/good.mp4 --out={out}/file_out --frames=3"
AGAIN = "--checkpoint={run} --video={videos}/good.mp4 --out={out}/again --frames=3"
OTHER = "--checkpoint={run} --video={videos}/good.mp4 --out={out}/other --frames=3 --seed=1"
WORLD = "--checkpoint={run} --sample=3 --out={out}/world --frames=7"
WIDE = ("--checkpoint={run} --video={videos}/wide.mp4 --out={out}/wide --frames=2 --history=3 "
        "--clip_frames=1 --steps=1 --guidance=2 --window=3")
WRITES = (FILE, AGAIN, OTHER, WORLD, WIDE)


def _written(folder):
  """Prediction as frames, and the size of the side-by-side GIF."""
  with Image.open(folder / "side_by_side.gif") as picture:
    return video.read(folder / "prediction.mp4"), (picture.n_frames, picture.size)


def test_continues_a_video_file(said, videos, finished):
  folder, answers = said
  status, out, errors = answers[FILE]
  assert (status, errors) == (0, "")
  assert f"wrote {folder}/file_out/prediction.mp4" in out
  assert f"wrote {folder}/file_out/side_by_side.gif" in out
  assert out.startswith("predicted 3 frames in ")
  prediction, (count, (width, height)) = _written(folder / "file_out")
  assert prediction.frames.shape == (5, 16, 16, 3)  # 2 of history and 3 new ones
  assert prediction.fps == 8.0
  truth = video.read(videos / "good.mp4").frames
  model = weights_lib.load(str(finished.workdir))
  new = model.continue_video(truth[None, :2], 3, rng=jax.random.key(0))[0]
  expected = np.concatenate([truth[:2], new]).astype(int)
  assert np.abs(prediction.frames - expected).mean((1, 2, 3)).max() < 6  # H.264 has losses
  assert np.abs(expected[2:] - truth[2:5]).mean() > 12  # the truth would not pass for them
  assert count == 5
  assert width >= 2 * 128
  assert height >= 128


def test_the_seed_alone_decides_the_future(said):
  folder, answers = said
  assert answers[AGAIN][0] == answers[OTHER][0] == 0
  first, again, other = (_written(folder / name)[0].frames for name in
                         ("file_out", "again", "other"))
  np.testing.assert_array_equal(first, again)
  assert (first[2:] != other[2:]).any()


def test_continues_a_held_out_video_of_the_world_beyond_its_end(said, videos):
  folder, answers = said
  assert answers[WORLD][0] == 0, answers[WORLD][2]
  prediction, (count, _) = _written(folder / "world")
  assert prediction.frames.shape == (9, 16, 16, 3)  # the truth has 6 frames
  assert count == 9
  truth = video.read(videos / "good.mp4").frames[:2].astype(int)
  assert np.abs(prediction.frames[:2] - truth).mean() < 6  # it is the held-out video of seed 3


def test_every_setting_of_the_sampler_and_another_frame_size(said):
  folder, answers = said
  status, out, errors = answers[WIDE]
  assert (status, errors) == (0, "")
  assert "wide.mp4: 48x32 px resized and cropped to 16x16 as in training" in out
  prediction, _ = _written(folder / "wide")
  assert prediction.frames.shape == (5, 16, 16, 3)
  assert prediction.fps == 5.0


REFUSED = {
  "--checkpoint={run} --video={videos}/text.mp4": "error: {videos}/text.mp4: not a video",
  "--checkpoint={run} --video={videos}/cut.mp4": "error: {videos}/cut.mp4: not a video",
  "--checkpoint={run} --video={videos}/none.mp4": "error: {videos}/none.mp4: not a video",
  "--checkpoint={run} --video={videos}/short.mp4 --out={out}/x":
    "{videos}/short.mp4 has 1 frames, --history needs 2",
  "--checkpoint={run} --history=7": "--history=7 is longer than the world's 6 frames",
  "--checkpoint={run} --clip_frames=4": "--clip_frames=4 leaves no history in a window of 4 frames",
  "--checkpoint={run} --clip_frames=5 --window=3": "leaves no history in a window of 3 frames",
  "--checkpoint={run} --steps=0": "--steps must be at least 1, got 0",
  "--checkpoint={run} --history=0": "--history must be at least 1, got 0",
  "--checkpoint={run} --frames=0": "flag --frames=0",
  "--checkpoint={run} --out={out}/file/folder": "cannot write to --out={out}/file/folder",
  "--checkpoint={out}": "no checkpoint in {out}",
  "--checkpoint={out}/nothing": "no weights at {out}/nothing",
}


@pytest.mark.parametrize("line", REFUSED)
def test_bad_input_is_refused_in_one_line(said, finished, videos, line):
  folder, answers = said
  status, out, errors = answers[line]
  assert status == 2, errors
  assert errors.startswith("error: ")
  assert REFUSED[line].format(run=finished.workdir, videos=videos, out=folder) in errors
  assert len(errors.splitlines()) == 1
  assert "wrote" not in out


@pytest.mark.parametrize(("interval", "stride", "shortest"), [
  ((4, 12), 1, 4), ((1, 4), 2, 2), ((3, 8), 2, 4), ((4, 4), 4, 4)])
def test_frames_are_taken_at_the_shortest_interval(finished, interval, stride, shortest):
  weights = weights_lib.load(str(finished.workdir))
  weights.config["data"] |= {"interval": interval, "stride": stride}
  assert predict.shortest_interval(weights) == shortest


def test_a_model_of_real_videos_needs_a_video(finished, tmp_path):
  weights = weights_lib.load(str(finished.workdir))
  weights.config["data"]["source"] = "videos"
  with pytest.raises(InputError, match=r"--video is missing.*not trained on the simulated world"):
    predict.history_from_world(weights, 0)


def test_weights_that_say_nothing_of_videos_are_refused(tmp_path):
  """A folder in the published format alone holds no codec and no frame size."""
  shutil.copytree(weights_lib.PRETRAINED, tmp_path, dirs_exist_ok=True)
  settings = json.loads((tmp_path / "config.json").read_text())
  del settings["videogpt_jax"]["codec"], settings["videogpt_jax"]["data"]
  (tmp_path / "config.json").write_text(json.dumps(settings))
  with pytest.raises(InputError, match="lacks codec, data; export them with"):
    weights_lib.load(str(tmp_path))


def test_a_damaged_checkpoint_is_told_and_the_one_before_taken(finished, tmp_path):
  shutil.copytree(finished.workdir / "checkpoints", tmp_path / "checkpoints")
  newest = tmp_path / "checkpoints" / "24"
  data = max((path for path in newest.rglob("*") if path.is_file()), key=lambda p: p.stat().st_size)
  data.write_bytes(data.read_bytes()[:-100])
  weights = weights_lib.load(str(tmp_path))
  before = weights_lib.load(str(tmp_path / "checkpoints" / "21"))
  jax.tree.map(np.testing.assert_array_equal, weights.params, before.params)
  with pytest.raises(InputError, match="24 is damaged"):
    weights_lib.load(str(newest))
