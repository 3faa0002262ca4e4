"""The command that continues videos: what it writes, and what it refuses."""

import errno
import itertools
import json
import re
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
from PIL import Image
import pytest
from safetensors import numpy as safetensors

import tiny_run
from videogpt_jax import finished as finished_lib
from videogpt_jax import predict
from videogpt_jax import results
from videogpt_jax import rollout
from videogpt_jax import weights as weights_lib
from videogpt_jax.data import given
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
  Image.fromarray(frames[0]).save(folder / "picture.png")
  several = folder / "several"
  several.mkdir()
  shutil.copy(folder / "good.mp4", several / "first.mp4")
  shutil.copy(folder / "picture.png", several / "second.png")
  (several / "broken.mp4").write_text("I am no video.\n" * 100)
  (folder / "none").mkdir()
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
  other = folder / "llama"
  other.mkdir()
  (other / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 8}))
  safetensors.save_file({"model.embed_tokens.weight": np.zeros((4, 8), np.float32)},
                        other / "model.safetensors")
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
SAMPLES = ("--checkpoint={run} --video={videos}/good.mp4 --out={out}/samples --frames=5 "
           "--samples=2 --method=multistep --guidance=1.5 --guidance_decay=1 "
           "--guidance_range=0,0.8 --window_mode=rolling --history_noise=0.05 --fps=4")
PICTURE = "--checkpoint={run} --video={videos}/picture.png --out={out}/picture --frames=2"
FOLDER = "--checkpoint={run} --video={videos}/several --out={out}/several --frames=2"
MESH = ("--checkpoint={run} --video={videos}/good.mp4 --out={out}/mesh --frames=3 --cpu_devices=2 "
        "--mesh=tensor=2")
WRITES = (FILE, AGAIN, OTHER, WORLD, WIDE, SAMPLES, PICTURE, FOLDER, MESH)


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
  assert re.match(r"clip 1/2 \| 2/3 frames \| [\d.]+ frames/s \| eta \d+s\nclip 2/2 \| 3/3 ", out)
  assert "predicted 2 clips in " in out
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


def test_several_futures_and_every_setting_of_the_window(said, videos):
  folder, answers = said
  status, out, errors = answers[SAMPLES]
  assert (status, errors) == (0, "")
  assert {path.name for path in (folder / "samples").iterdir()} == {
    "prediction.mp4", "prediction_1.mp4", "side_by_side.mp4", "side_by_side.gif",
    "contact_sheet.png", "prediction.json"}  # and no finished clips any more
  both = [video.read(folder / "samples" / name) for name in ("prediction.mp4", "prediction_1.mp4")]
  assert all(x.frames.shape == (7, 16, 16, 3) and x.fps == 4.0 for x in both)
  first, second = (x.frames.astype(int) for x in both)
  assert np.abs(first[:2] - second[:2]).mean() < 6 and (first[2:] != second[2:]).any()
  beside = video.read(folder / "samples" / "side_by_side.mp4").frames
  assert len(beside) == 7 and beside.shape[2] >= 3 * 128  # truth and two predictions
  with Image.open(folder / "samples" / "contact_sheet.png") as sheet:
    assert sheet.width > 7 * 64 and sheet.height > 3 * 64
  report = json.loads((folder / "samples" / "prediction.json").read_text())
  assert (report["samples"], report["frames"], report["fps"]) == (2, 5, 4.0)
  assert report["sampler"] == {
    "steps": 2, "guidance": 1.5, "shift": 1.0, "method": "multistep", "guidance_decay": 1.0,
    "guidance_range": [0.0, 0.8]}
  assert report["window"] == {
    "frames": 4, "mode": "rolling", "history_noise": 0.05, "redraw": False}
  assert report["timings"]["clips"] == 3 and report["timings"]["frames_per_s"] > 0


def test_a_picture_is_a_history_of_one_frame(said):
  folder, answers = said
  status, out, errors = answers[PICTURE]
  assert (status, errors) == (0, "")
  assert "a picture is a history of one frame" in out
  assert video.read(folder / "picture" / "prediction.mp4").frames.shape == (3, 16, 16, 3)


def test_a_folder_is_predicted_file_by_file(said):
  folder, answers = said
  status, out, errors = answers[FOLDER]
  assert (status, errors) == (0, "")
  assert "[1/3]" in out and "not usable" in out and "1 of 3 files could not be used" in out
  assert {path.name for path in (folder / "several").iterdir()} == {"first", "second"}
  for name, length in (("first", 4), ("second", 3)):
    assert len(video.read(folder / "several" / name / "prediction.mp4").frames) == length


def test_devices_share_the_work(said):
  """Two devices, heads shared, give what one gives."""
  folder, answers = said
  status, out, errors = answers[MESH]
  assert (status, errors) == (0, "")
  assert json.loads((folder / "mesh" / "prediction.json").read_text())["devices"] == 2
  one, two = (_written(folder / name)[0].frames.astype(int) for name in ("file_out", "mesh"))
  assert np.abs(one - two).max() <= 8  # H.264 may amplify a rounded pixel


REFUSED = {
  "--checkpoint={run} --video={videos}/text.mp4": "error: {videos}/text.mp4: not a video",
  "--checkpoint={run} --video={videos}/cut.mp4": "error: {videos}/cut.mp4: not a video",
  "--checkpoint={run} --video={videos}/none.mp4": "error: {videos}/none.mp4: no such file",
  "--checkpoint={run} --video={videos}/short.mp4 --out={out}/x":
    "{videos}/short.mp4 has 1 frames, --history needs 2",
  "--checkpoint={run} --history=7": "--history=7 is longer than the world's 6 frames",
  "--checkpoint={run} --clip_frames=4": "--clip_frames=4 leaves no history in a window of 4 frames",
  "--checkpoint={run} --clip_frames=5 --window=3": "leaves no history in a window of 3 frames",
  "--checkpoint={run} --steps=0": "--steps must be at least 1, got 0",
  "--checkpoint={run} --history=0": "--history must be positive, got 0",
  "--checkpoint={run} --video={videos}/none": "no videos or pictures in {videos}/none",
  "--checkpoint={run} --video={videos}/picture.png --history=2 --out={out}/x":
    "{videos}/picture.png has 1 frames, --history needs 2",
  "--checkpoint={run} --fps=0": "--fps must be positive, got 0",
  "--checkpoint={run} --shift=0": "--shift must be positive, got 0",
  "--checkpoint={run} --clip_frames=0": "--clip_frames must be at least 1, got 0",
  "--checkpoint={run} --history_noise=1": "--history_noise must be in [0, 1), got 1",
  "--checkpoint={run} --guidance_range=a,b": "--guidance_range must be two numbers LO,HI, got a,b",
  "--checkpoint={run} --guidance_range=0.8,0.2": "--guidance_range must be two times",
  "--checkpoint={run} --window_mode=rolling --redraw_noise": "--redraw_noise works only where",
  "--checkpoint={run} --window_mode=sliding": "flag --window_mode=sliding",
  "--checkpoint={run} --mesh=tensors=2": "--mesh: 'tensors=2' is not AXIS=SIZE",
  "--checkpoint={run} --mesh=tensor=2": "a mesh of slice=1 x data=1 x fsdp=1 x sequence=1 x "
    "tensor=2 needs 2 devices, there are 1",
  "--checkpoint={run} --frames=0": "flag --frames=0",
  "--checkpoint={run} --out={out}/file/folder": "cannot write to --out={out}/file/folder",
  "--checkpoint={out}": "no checkpoint in {out}",
  "--checkpoint={out}/llama": "{out}/llama holds another model (llama): none of its 1 tensors",
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
  assert given.shortest_interval(weights.config["data"]) == shortest


def test_a_model_of_real_videos_needs_a_video(finished, tmp_path):
  weights = weights_lib.load(str(finished.workdir))
  weights.config["data"]["source"] = "videos"
  with pytest.raises(InputError, match=r"--video is missing.*not trained on the simulated world"):
    given.of_world(weights.config, 0, 2)


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


# Interrupted --------------------------------------------------------------------------------


def _request(**kwargs):
  arguments = {"frames": 8, "clip_frames": 2, "samples": 2, "seed": 3,
               "sampler": rollout.Sampler(2), "window": rollout.Window(4, "rolling", 0.1)}
  return predict.Request(**{**arguments, **kwargs})


def _given():
  frames = world.simulate(_settings(), world.held_out_seed(3)).frames
  return given.Given("world", frames, 2, 8.0)


@pytest.mark.parametrize("mode", rollout.MODES)
def test_an_interrupted_prediction_goes_on_as_if_nothing_had_happened(
    finished, tmp_path, monkeypatch, capsys, mode):
  """The videos of both are the same file; in between, those of the finished clips are there."""
  weights = weights_lib.load(str(finished.workdir))
  request = _request(window=rollout.Window(4, mode, 0.1))
  predict.predict(weights, _given(), request, tmp_path / "whole")
  lines, clip = itertools.count(1), results.Progress.clip

  def interrupted(self):
    return clip(self) if next(lines) < 3 else signal.raise_signal(signal.SIGINT)

  # A shell's background job ignores Ctrl-C from the start, and the tests may be one.
  handler = signal.signal(signal.SIGINT, signal.default_int_handler)
  with monkeypatch.context() as patch:
    patch.setattr(results.Progress, "clip", interrupted)
    (tmp_path / "broken").mkdir()
    for name in ("prediction.json", "prediction_2.mp4", "side_by_side.gif", "mine.mp4"):
      (tmp_path / "broken" / name).touch()  # of another prediction, whose videos go
    with pytest.raises(KeyboardInterrupt):
      predict.predict(weights, _given(), request, tmp_path / "broken")
  signal.signal(signal.SIGINT, handler)
  part = video.read(tmp_path / "broken" / "prediction.mp4").frames
  assert len(part) == 2 + 2 * 2  # shown are the clips before the interrupt, kept one more
  assert sorted(path.name for path in (tmp_path / "broken").iterdir() if path.is_file()) == [
    "contact_sheet.png", "mine.mp4", "prediction.mp4", "prediction_1.mp4", "side_by_side.gif",
    "side_by_side.mp4"]
  assert (tmp_path / "broken" / "side_by_side.gif").stat().st_size
  with pytest.raises(InputError, match=r"other settings: seed 3 \(now 4\).*--restart"):
    predict.predict(weights, _given(), _request(window=request.window, seed=4),
                    tmp_path / "broken")
  capsys.readouterr()
  report = predict.predict(weights, _given(), request, tmp_path / "broken")
  assert "after 3 finished clips" in capsys.readouterr().out
  assert report["timings"]["clips"] == 1
  for name in ("prediction.mp4", "prediction_1.mp4", "side_by_side.mp4", "contact_sheet.png"):
    assert (tmp_path / "broken" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
  assert not (tmp_path / "broken" / "clips").exists()


def test_restart_forgets_what_was_begun(tmp_path):
  finished_lib.Clips(tmp_path, {"seed": 1}).append(np.zeros((1, 2)))
  assert len(finished_lib.Clips(tmp_path, {"seed": 1})) == 1
  assert len(finished_lib.Clips(tmp_path, {"seed": 2}, restart=True)) == 0
  assert len(finished_lib.Clips(tmp_path, {"seed": 2})) == 0


def test_a_full_disk_leaves_the_finished_clips_whole(tmp_path, monkeypatch):
  clips = finished_lib.Clips(tmp_path, {})
  clips.append(np.ones((2, 3)))

  def full(file, array):
    file.write(b"half")
    raise OSError(errno.ENOSPC, "No space left on device")

  monkeypatch.setattr(np, "save", full)
  with pytest.raises(InputError, match=r"No space left .* finished so far are safe"):
    clips.append(np.ones((2, 3)))
  again = finished_lib.Clips(tmp_path, {})
  assert len(again) == 1
  np.testing.assert_array_equal(again[0], np.ones((2, 3)))
  assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize(("number", "status"), [
  (signal.SIGINT, 130), (signal.SIGTERM, 130), (signal.SIGKILL, -signal.SIGKILL)])
def test_signals(finished, tmp_path, number, status):
  """Ctrl-C and SIGTERM end the command with a word; nothing that was finished is lost."""
  command = [sys.executable, "-m", "videogpt_jax.predict", f"--checkpoint={finished.workdir}",
             f"--out={tmp_path}/out", "--frames=100000", "--window_mode=rolling"]
  process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
  while not (line := process.stdout.readline()).startswith("clip 3/"):
    assert line, process.stderr.read()
  process.send_signal(number)
  try:
    out, errors = process.communicate(timeout=120)
  finally:
    process.kill()
  assert process.returncode == status, errors
  assert errors == ""
  kept = sorted((tmp_path / "out" / "clips").glob("*.npy"))
  assert len(kept) >= 3
  assert all(np.load(path).shape == (1, 2, 4, 4, 48) for path in kept)
  if number != signal.SIGKILL:
    assert "the same command goes on from there" in out
    assert len(video.read(tmp_path / "out" / "prediction.mp4").frames) >= 2 + 2 * 2
