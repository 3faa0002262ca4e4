"""Physics-IQ's folders and names, and what is refused before any work."""

import shutil

import av
import numpy as np
import pytest

from videogpt_jax.data import video
from videogpt_jax.errors import InputError
from videogpt_jax.metrics.physics_iq import files
from videogpt_jax.metrics.physics_iq import protocol as protocol_lib
from videogpt_jax.metrics.physics_iq import work
from videogpt_jax.metrics.physics_iq.protocol import Protocol

PROTOCOL = Protocol(fps=8, conditioning_s=0.5, prediction_s=1.0, scenarios=1)
NAME = "trimmed-falling-block"


def _video(path, frames=8, fps=8, size=(16, 24)):
  path.parent.mkdir(parents=True, exist_ok=True)
  shades = np.arange(frames, dtype=np.uint8)[:, None, None, None] * 8
  video.write_mp4(path, np.broadcast_to(shades, (frames, *size, 3)), fps, lossless=True)


def _clip(number, view, take, kind="testing-videos", fps=8):
  return f"{number:04d}_{kind}_{fps}FPS_perspective-{view}_take-{take}_{NAME}.mp4"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  root = tmp_path_factory.mktemp("physics_iq")
  for place, view in enumerate(protocol_lib.VIEWS):
    for take in (1, 2):
      _video(root / "split-videos/testing/8FPS" / _clip(place + 1 + 3 * (take - 1), view, take))
    _video(root / "split-videos/conditioning/8FPS"
           / _clip(place + 1, view, 1, "conditioning-videos"), frames=6)
    _video(root / "generated" / f"{place + 1:04d}_perspective-{view}_{NAME}.mp4")
  return root


@pytest.fixture
def root(made, tmp_path):
  return shutil.copytree(made, tmp_path / "physics-IQ-benchmark")


def _check(root, protocol=PROTOCOL):
  dataset = files.find(root, protocol)
  files.check_real(dataset, conditioning=True)
  return files.check_generated(files.generated(root / "generated", dataset.cases), protocol)


def test_finds_what_is_there(root):
  assert _check(root) == (16, 24)
  dataset = files.find(root.parent, PROTOCOL)  # the folder above will do
  assert [case.generated for case in dataset.cases] == [
    f"000{i + 1}_perspective-{view}_{NAME}.mp4" for i, view in enumerate(protocol_lib.VIEWS)]
  assert [case.second for case in dataset.cases] == [4, 5, 6]
  given = dataset.conditioning(dataset.cases[0])
  shades = [int(frame.mean()) for frame in work.read(given)]
  assert shades == [16, 24, 32, 40]  # the last of six frames: they end at the switch


def test_readme_spellings_and_other_rates(root):
  split = root / "split-videos"
  for kind in ("testing", "conditioning"):
    (split / kind).rename(split / f"{kind}-videos")
  assert _check(root) == (16, 24)
  shutil.rmtree(split / "conditioning-videos")
  with pytest.raises(InputError, match=r"nothing to give a model.*full-videos/take-1/8FPS"):
    _check(root)
  for path in list((split / "testing-videos/8FPS").iterdir()):
    _video(split / "testing-videos/30FPS" / path.name.replace("8FPS", "30FPS"), 30, 30)
  for i, view in enumerate(protocol_lib.VIEWS):
    _video(root / "full-videos/take-1/30FPS" / _clip(i + 1, view, 1, "full-videos", 30), 45, 30)
  shutil.rmtree(split / "testing-videos/8FPS")
  _check(root)
  dataset = files.find(root, PROTOCOL)
  clip = dataset.testing(dataset.cases[0], take=2)
  shades = [int(frame.mean()) for frame in work.read(clip)]
  assert len(shades) == 8 and shades[0] == 0 and shades[-1] == 29 * 8  # both ends are kept
  given = [int(frame.mean()) for frame in work.read(dataset.conditioning(dataset.cases[0]))]
  assert len(given) == 4 and given[-1] == 14 * 8  # 0.5 s at 30 frames a second


def test_masks_of_the_data_set_are_found(root):
  dataset = files.find(root, PROTOCOL)
  case = dataset.cases[1]
  assert dataset.mask(case, 2) is None
  path = root / "video-masks/real/8FPS" / _clip(5, "center", 2, "video-masks")
  _video(path)
  assert dataset.mask(case, 2) == path


def _lacks_view(root):
  (root / "split-videos/testing/8FPS" / _clip(6, "right", 2)).unlink()


def _short_real(root):
  _video(root / "split-videos/testing/8FPS" / _clip(2, "center", 1), frames=5)


def _slow_real(root):
  _video(root / "split-videos/testing/8FPS" / _clip(2, "center", 1), frames=8, fps=6)


def _other_take_size(root):
  _video(root / "split-videos/testing/8FPS" / _clip(5, "center", 2), size=(16, 32))


def _short_given(root):
  _video(root / "split-videos/conditioning/8FPS" / _clip(3, "right", 1, "conditioning-videos"),
         frames=3)


def _twice(root):
  path = root / "split-videos/testing/8FPS"
  (path / _clip(6, "right", 2)).rename(path / _clip(5, "right", 2))


def _odd_name(root):
  (root / "split-videos/testing/8FPS/movie.mp4").touch()


def _generated(root, number=2):
  return next((root / "generated").glob(f"{number:04d}*"))


def _lacks_generated(root):
  _generated(root).unlink()


def _long_generated(root):
  _video(_generated(root), frames=12)


def _fast_generated(root):
  _video(_generated(root), frames=30, fps=30)


def _odd_generated(root):
  with av.open(str(_generated(root)), "w") as container:  # our own writer makes sizes even
    stream = container.add_stream("libx264rgb", rate=8)
    stream.width, stream.height, stream.pix_fmt = 23, 15, "rgb24"
    for _ in range(8):
      frame = av.VideoFrame.from_ndarray(np.zeros((15, 23, 3), np.uint8), format="rgb24")
      container.mux(stream.encode(frame))
    container.mux(stream.encode())


def _mixed_generated(root):
  _video(_generated(root), size=(32, 48))


def _wrong_generated(root):
  _generated(root).rename(root / "generated" / f"0002_perspective-left_{NAME}.mp4")


def _numberless(root):
  _generated(root).rename(root / "generated" / "second.mp4")


def _other_file(root):
  (root / "generated" / "notes.txt").touch()


def _no_video(root):
  _generated(root).write_bytes(b"not a video")


@pytest.mark.parametrize(("damage", "message"), [
  (_lacks_view, "lacks 1 videos: trimmed-falling-block, perspective-right, take-2"),
  (_short_real, r"0002_.* lasts 0.625 s, 1 s are needed"),
  (_slow_real, r"0002_.* has 6 frames a second, not 8"),
  (_other_take_size, r"takes of a view have different sizes.*0002_.*0005_"),
  (_short_given, r"0003_conditioning.* lasts 0.375 s, 0.5 s are needed"),
  (_twice, "the number 0005 begins the names of several"),
  (_odd_name, "movie.mp4 has no name of a testing video"),
  (_lacks_generated, f"2 of 3 generated videos; missing: 0002_perspective-center_{NAME}.mp4"),
  (_long_generated, r"0002_.* lasts 1.500 s, not 1 s"),
  (_fast_generated, r"0002_.* has 30 frames a second, not 8"),
  (_odd_generated, r"0002_.* is 15x23 px: .*odd"),
  (_mixed_generated, r"different sizes: 16x24 px, .*; 32x48 px"),
  (_wrong_generated, r"says left view .* but 0002 is 0002_perspective-center"),
  (_numberless, "names of generated videos begin with one of the numbers 0001_ to 0003_"),
  (_other_file, "nothing else; remove notes.txt"),
  (_no_video, "0002_.*not a video"),
])
def test_what_is_wrong_is_said(root, damage, message):
  damage(root)
  with pytest.raises(InputError, match=message):
    _check(root)


def test_wrong_folders_and_protocols(root, tmp_path):
  with pytest.raises(InputError, match=r"no folder .*nowhere"):
    files.find(tmp_path / "nowhere", PROTOCOL)
  with pytest.raises(InputError, match="holds no Physics-IQ"):
    files.find(root / "generated", PROTOCOL)
  with pytest.raises(InputError, match="holds 1 scenarios, not 66"):
    files.find(root, Protocol())
  with pytest.raises(InputError, match=r"no testing videos; looked for .*16FPS.*30FPS"):
    files.find(root, Protocol(fps=16))
  with pytest.raises(InputError, match=r"no folder .*generated videos"):
    files.generated(root / "missing", files.find(root, PROTOCOL).cases)
  with pytest.raises(InputError, match="8, 16, 24, 30 frames a second, not of 25"):
    Protocol(fps=25)
  with pytest.raises(InputError, match=r"conditioning_s of 0.3 .* are 2.4 frames"):
    Protocol(conditioning_s=0.3)


def test_a_video_that_ends_early_is_refused(root):
  path = _generated(root)
  with pytest.raises(InputError, match="8 frames can be decoded, 12 are needed"):
    list(work.read(files.Clip(path, 8, 12, 12)))
