"""LPIPS against the distances of its authors' own code, with random backbone weights."""

import pathlib

import numpy as np
import pytest

import torch_files
from videogpt_jax import tensors
from videogpt_jax.data import world
from videogpt_jax.errors import InputError
from videogpt_jax.evaluation import world as benchmark
from videogpt_jax.metrics import lpips

GOLDEN = pathlib.Path(__file__).resolve().parents[1] / "golden" / "lpips"
ALEX = {0: (64, 3, 11, 11), 3: (192, 64, 5, 5), 6: (384, 192, 3, 3), 8: (256, 384, 3, 3),
        10: (256, 256, 3, 3)}
CHANNELS = [3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]
VGG = {i: (CHANNELS[n + 1], CHANNELS[n], 3, 3) for n, i in enumerate(
  (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28))}


def _weights(folder, shapes):
  rng, found = np.random.default_rng(0), {"classifier.6.bias": np.zeros(1000, np.float32)}
  for index, shape in shapes.items():
    kernel = rng.standard_normal(shape) * np.sqrt(2 / np.prod(shape[1:]))
    found[f"features.{index}.weight"] = kernel.astype(np.float32)
    found[f"features.{index}.bias"] = (rng.standard_normal(shape[0]) * 0.1).astype(np.float32)
  torch_files.save(folder / "network.pth", found)
  return str(folder / "network.pth")


def _heads(folder, network):
  with np.load(GOLDEN / "distances.npz") as golden:
    found = {name.removeprefix(f"{network}_"): x.reshape(1, -1, 1, 1)
             for name, x in golden.items() if name.startswith(f"{network}_")}
  torch_files.save(folder / "heads.pth", found)
  return str(folder / "heads.pth")


def _frames():
  rng = np.random.default_rng(1)
  x, y = rng.integers(0, 256, (2, 3, 67, 80, 3), np.uint8)
  y[1] = x[1]
  y[2] = np.clip(x[2].astype(int) + rng.integers(-9, 10, x[2].shape), 0, 255)
  return x, y


@pytest.mark.parametrize(("network", "shapes"), [("alex", ALEX), ("vgg", VGG)])
def test_lpips_golden(network, shapes, tmp_path):
  distance = lpips.Lpips(_weights(tmp_path, shapes), _heads(tmp_path, network), network)
  found = distance(*_frames())
  with np.load(GOLDEN / "distances.npz") as golden:
    np.testing.assert_allclose(found, golden[network], rtol=1e-4, atol=1e-7)
  assert found[1] == 0
  x, y = _frames()
  assert distance(x[None, :2], y[None, :2]).shape == (1, 2)


def test_lpips_channel_weights_in_the_old_format():
  files = tensors.open_folder(str(GOLDEN / "alex.pth"))
  with np.load(GOLDEN / "distances.npz") as golden:
    assert len(files) == 5
    for name, x in files.items():
      np.testing.assert_array_equal(x.reshape(-1), golden[f"alex_{name}"])


def test_lpips_old_format_cut_short(tmp_path):
  data = (GOLDEN / "alex.pth").read_bytes()
  for end in (len(data) - 10, 1300, 200):
    (tmp_path / "cut.pth").write_bytes(data[:end])
    with pytest.raises(InputError, match="damaged"):
      tensors.open_folder(str(tmp_path / "cut.pth"))


def test_lpips_refuses_other_weights_and_frames(tmp_path):
  alex, heads = _weights(tmp_path, ALEX), str(GOLDEN / "alex.pth")
  with pytest.raises(InputError, match="torchvision's state dict"):
    lpips.Lpips(str(tmp_path / "none.pth"), heads)
  with pytest.raises(InputError, match=r"of another network: features.0.weight"):
    lpips.Lpips(alex, heads, "vgg")
  distance = lpips.Lpips(alex, heads)
  x, y = _frames()
  with pytest.raises(InputError, match="of one shape"):
    distance(x, y[:, :40])
  with pytest.raises(InputError, match="32 px"):
    distance(x[:, :16], y[:, :16])


def test_lpips_of_predicted_worlds(tmp_path):
  """Beside the other metrics by frame, of the model and the baselines, if weights are given."""
  files = (_weights(tmp_path, ALEX), str(GOLDEN / "alex.pth"))
  settings = world.Settings(size=32)

  def copy(histories, count, rng):
    return np.repeat(histories[:, -1:], count, axis=1)

  options = benchmark.Options(videos=2, batch_size=2, fit_videos=2, lpips=files)
  found = benchmark.measure(copy, settings, 4, tmp_path / "out", options, {})[0]
  frames = np.stack([world.simulate(settings, world.held_out_seed(i)).frames for i in range(2)])
  expected = lpips.Lpips(*files)(np.repeat(frames[:, 3:4], 4, axis=1), frames[:, 4:])
  np.testing.assert_allclose(found.by_frame("model", "lpips"), expected.mean(0), rtol=1e-5)
  np.testing.assert_array_equal(found.scores["copy_last"].lpips, found.scores["model"].lpips)
  assert found.summary()["lpips"]["constant_velocity"]
  with pytest.raises(InputError, match="at least 32 px a side, got 16x16"):
    benchmark.measure(copy, world.Settings(size=16), 4, tmp_path, options, {})
