"""The autoencoder against the numbers of diffusers; `VIDEOGPT_GOLDEN_VAE` names other ones."""

import dataclasses
import json
import os
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import numpy as safetensors

from videogpt_jax import codec as codec_lib
from videogpt_jax import config as config_lib
from videogpt_jax import objective as objective_lib
from videogpt_jax import step as step_lib
from videogpt_jax import tiling
from videogpt_jax import vae
from videogpt_jax.errors import InputError

FOLDER = pathlib.Path(os.environ.get("VIDEOGPT_GOLDEN_VAE",
                                     pathlib.Path(__file__).parent / "golden" / "vae"))
WEIGHTS = FOLDER / "diffusion_pytorch_model.safetensors"
CASES = sorted(path.stem for path in FOLDER.glob("io_*.npz"))


@pytest.fixture(scope="module")
def loaded():
  return vae.load(str(FOLDER))


@pytest.fixture(scope="module")
def manifest():
  return json.loads((FOLDER / "sdxl_vae_manifest.json").read_text())


def _case(name):
  with np.load(FOLDER / f"{name}.npz") as file:
    return dict(file)


@pytest.mark.parametrize("name", CASES)
def test_golden_vae_moments_and_latents(loaded, name):
  config, params = loaded
  case = _case(name)
  posterior = vae.encode(config, params, case["image"])
  near = lambda ours, theirs: np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)
  near(posterior.mean, case["mean"])
  near(posterior.log_variance, np.clip(case["logvar_raw"], -30, 20))
  if "noise" in case:
    near(config.scale * posterior.mean, case["latent_mean_scaled"])
    near(config.scale * posterior.at(case["noise"]), case["latent_sample_scaled"])


@pytest.mark.parametrize("name", [name for name in CASES if "dec_image" in _case(name)])
def test_golden_vae_decoded_images(loaded, name):
  config, params = loaded
  case = _case(name)
  for latent, image in (("dec_latent_scaled", "dec_image"), ("latent_mean_scaled", "recon_image")):
    decoded = vae.decode(config, params, case[latent] / config.scale)
    np.testing.assert_allclose(decoded, case[image], rtol=0, atol=2e-4)


def test_golden_vae_in_bfloat16_is_near(loaded):
  """8 bits of mantissa through some thirty convolutions; the parameters stay float32."""
  config, params = loaded
  case = _case(next(name for name in CASES if "dec_image" in _case(name)))
  half, _ = vae.load(str(FOLDER), jnp.bfloat16)
  decoded = vae.decode(half, params, case["dec_latent_scaled"] / config.scale)
  assert decoded.dtype == jnp.float32
  error = np.abs(decoded - case["dec_image"]).max() / np.abs(case["dec_image"]).max()
  assert 1e-4 < error < 0.05


def test_vae_samples_have_the_moments_of_the_posterior():
  mean, log_variance = jnp.full((1, 64, 64, 4), .5), jnp.full((1, 64, 64, 4), 2 * np.log(.3))
  posterior = vae.Posterior.from_moments(jnp.concatenate([mean, log_variance], -1))
  draws = posterior.sample(jax.random.key(0))
  assert abs(float(draws.mean()) - .5) < 5 * .3 / 128
  assert abs(float(draws.std()) - .3) < 5 * .3 / 128 / np.sqrt(2)


def test_vae_of_full_size_has_the_published_tensors(manifest):
  for name in ("config_published", "config_as_expanded_by_diffusers"):
    config = vae.config_from_settings(manifest[name])
    assert config == vae.Config()
  shapes = vae.published_shapes(config)
  assert shapes == {name: tuple(shape) for name, shape in manifest["state_dict"].items()}
  assert len(shapes) == 248
  assert sum(int(np.prod(shape)) for shape in shapes.values()) == 83_653_863


def test_vae_golden_weights_load_under_older_names(loaded, manifest):
  config, params = loaded
  tensors = {}
  for name, tensor in safetensors.load_file(WEIGHTS).items():
    for new, old in manifest["legacy_attention_key_map"].items():
      name = name.replace(f".{new}.", f".{old}.")
    tensors[name] = tensor
  assert any(name.endswith("mid_block.attentions.0.proj_attn.weight") for name in tensors)
  jax.tree.map(np.testing.assert_array_equal, vae.from_published(tensors, config), params)


def _folder(tmp_path, tensors=None, **settings):
  """A copy of the golden folder with changed settings and tensors."""
  known = json.loads((FOLDER / "config.json").read_text())
  known = {k: v for k, v in {**known, **settings}.items() if v != "absent"}
  (tmp_path / "config.json").write_text(json.dumps(known))
  if tensors is None:
    shutil.copy(WEIGHTS, tmp_path)
  else:
    safetensors.save_file(tensors, tmp_path / WEIGHTS.name)
  return str(tmp_path)


@pytest.mark.parametrize(("settings", "message"), [
  ({"act_fn": "relu"}, "act_fn is 'relu', only 'silu' is known"),
  ({"down_block_types": ["AttnDownEncoderBlock2D"]}, "has 'AttnDownEncoderBlock2D', only"),
  ({"mid_block_add_attention": False}, "mid_block_add_attention is False"),
  ({"shift_factor": 0.1}, "shift_factor is 0.1"),
  ({"norm_num_groups": "absent"}, "config.json lacks 'norm_num_groups'"),
  ({"layers_per_block": 1}, r"unexpected decoder\.up_blocks\.0\.resnets\.\d+\.conv1\.bias"),
  ({"latent_channels": 24}, r"post_quant_conv\.weight is .*, expected \(24, 24, 1, 1\)"),
])
def test_vae_of_another_kind_is_refused(tmp_path, settings, message):
  with pytest.raises(InputError, match=message):
    vae.load(_folder(tmp_path, **settings))


def test_vae_tensors_that_do_not_fit_are_named(tmp_path):
  tensors = safetensors.load_file(WEIGHTS)
  del tensors["encoder.conv_in.bias"]
  tensors["decoder.extra.weight"] = np.zeros(3, np.float32)
  tensors["decoder.conv_out.bias"] = np.zeros(5, np.float32)
  with pytest.raises(InputError, match="missing encoder.conv_in.bias; unexpected decoder.extra."
                                       r"weight; decoder.conv_out.bias is \(5,\), expected \(3,\)"):
    vae.load(_folder(tmp_path, tensors))


def test_vae_folders_that_are_not_whole_are_refused(tmp_path, monkeypatch):
  with pytest.raises(InputError, match=r"no folder .*nowhere; give the path of one"):
    vae.load(str(tmp_path / "nowhere"))
  with pytest.raises(InputError, match=r"no whole autoencoder .* needs config.json and"):
    vae.load(str(tmp_path))
  folder = _folder(tmp_path)
  weights = tmp_path / WEIGHTS.name
  weights.write_bytes(weights.read_bytes()[:-1000])
  with pytest.raises(InputError, match=r"no whole autoencoder"):
    vae.load(folder)
  monkeypatch.setenv("HF_HUB_OFFLINE", "1")
  with pytest.raises(InputError, match=r"no folder some/vae; give the path .*(hub|fetch it)"):
    vae.load("some/vae")


def test_vae_codec_stores_means_and_gives_frames_back(loaded):
  """Frames in, frames out, against the functions themselves; batches of any size."""
  config, params = loaded
  codec = codec_lib.Vae(path=str(FOLDER), block=config.downsample, channels=config.latent_channels,
                        scale=config.scale)
  frames = np.random.default_rng(0).integers(0, 256, (3, 3, 16, 24, 3), np.uint8)
  stored = codec.encode(frames)
  assert stored.shape == (3, 3, 16 // config.downsample, 24 // config.downsample,
                          config.latent_channels)
  assert stored.dtype == codec.dtype == np.float16
  mean = vae.encode(config, params, frames[1].astype(np.float32) / 127.5 - 1).mean
  np.testing.assert_allclose(stored[1], mean, rtol=1e-3, atol=1e-3)
  seen = codec.normalize(stored)
  np.testing.assert_allclose(seen[1], config.scale * mean, rtol=1e-3, atol=1e-3)
  np.testing.assert_allclose(codec.denormalize(seen), stored, atol=1e-2)
  image = np.asarray(vae.decode(config, params, stored[1].astype(np.float32)))
  expected = np.clip((image + 1) * 127.5, 0, 255)
  decoded = codec.decode(stored)
  assert decoded.shape == frames.shape
  assert decoded.dtype == np.uint8
  assert np.abs(decoded[1] - expected).max() <= 0.51
  assert codec_lib.from_spec({**codec.spec(), "path": str(FOLDER)}) == codec
  assert "path" not in codec.spec()


def test_stored_moments_are_sampled_on_the_device(loaded):
  """The golden samples, from moments that went through float16."""
  config, _ = loaded
  codec = codec_lib.Vae(path=str(FOLDER), block=config.downsample, channels=config.latent_channels,
                        scale=config.scale, moments=True)
  case = _case(next(name for name in CASES if "noise" in _case(name)))
  stored = np.concatenate([case["mean"], case["logvar"]], axis=-1).astype(np.float16)
  tolerance = {"rtol": 2e-3, "atol": 2e-3 * config.scale}
  np.testing.assert_allclose(codec.sample(stored, case["noise"]), case["latent_sample_scaled"],
                             **tolerance)
  np.testing.assert_allclose(codec.normalize(stored), case["latent_mean_scaled"], **tolerance)
  frames = np.random.default_rng(0).integers(0, 256, (2, 16, 24, 3), np.uint8)
  posterior = vae.encode(config, loaded[1], frames.astype(np.float32) / 127.5 - 1)
  expected = np.concatenate([posterior.mean, posterior.log_variance], axis=-1)
  np.testing.assert_allclose(codec.encode(frames), expected, rtol=1e-3, atol=1e-3)
  with pytest.raises(ValueError, match="4 channels are no posterior"):
    codec.sample(stored[..., :4], case["noise"])


def test_large_frames_go_by_tiles(loaded):
  config, params = loaded
  codec = codec_lib.Vae(path=str(FOLDER), block=config.downsample, channels=config.latent_channels,
                        scale=config.scale, tile=64)
  frames = np.random.default_rng(0).integers(0, 256, (2, 48, 160, 3), np.uint8)
  expected = tiling.encode(config, params, frames.astype(np.float32) / 127.5 - 1, 64).mean
  np.testing.assert_allclose(codec.encode(frames), expected, rtol=2e-3, atol=2e-3)
  whole = dataclasses.replace(codec, tile=0)
  assert np.abs(codec.encode(frames) - whole.encode(frames)).max() > 0.01
  assert codec.decode(codec.encode(frames)).shape == frames.shape
  with pytest.raises(InputError, match=r"codec.tile must be a multiple of 32 px.*got 40"):
    dataclasses.replace(codec, tile=40)


def _recipe(posterior, **codec):
  c = config_lib.default()
  c.data.posterior = posterior
  c.codec.id, c.codec.block, c.codec.scale, c.codec.shift = "vae", 8, 0.5, 1.0
  return dataclasses.replace(config_lib.recipe(c), **codec)


def test_copies_of_a_frame_are_one_draw_or_two():
  rng = np.random.default_rng(0)
  mean = rng.normal(size=(6, 8, 4, 4, 4))
  log_variance = np.full_like(mean, 2 * np.log(0.25))
  stored = jnp.asarray(np.concatenate([mean, log_variance], axis=-1), jnp.float16)
  keys = objective_lib.row_keys(0, jnp.int32(3), 6)
  seen = {name: step_lib.seen_latents(_recipe(name), keys, stored) for name in step_lib.POSTERIORS}
  normalized = (mean - 1.0) * 0.5
  np.testing.assert_allclose(seen["mean"][0], normalized, atol=2e-3)
  for name in ("mean", "sample"):
    np.testing.assert_array_equal(*seen[name])
  noise = [(np.asarray(copy) - normalized) / (0.25 * 0.5) for copy in seen["separate"]]
  for x in noise:
    assert abs(x.mean()) < 0.05 and abs(x.std() - 1) < 0.05
  assert abs(np.corrcoef(noise[0].ravel(), noise[1].ravel())[0, 1]) < 0.05
  np.testing.assert_array_equal(seen["sample"][0], seen["separate"][0])
  # A row's draw is its own, in whichever part of the batch it stands.
  alone = step_lib.seen_latents(_recipe("separate"), keys[4:], stored[4:])
  for part, whole in zip(alone, seen["separate"], strict=True):
    np.testing.assert_array_equal(part, whole[4:])


def test_clean_copies_go_to_the_history_and_others_to_the_target():
  rng = jax.random.split(jax.random.key(0), 2)
  latents, clean = jnp.ones((2, 6, 1, 1, 1)), 5 * jnp.ones((2, 6, 1, 1, 1))
  for objective in (objective_lib.fixed((2, 1, 3), beta=1.0),
                    objective_lib.continuation(2, beta=1.0)):
    draw, _ = objective(rng, latents, clean)
    assert np.all(draw.target == 1) and np.all(draw.clean == 5)


def test_vae_codec_refuses_what_does_not_fit(loaded):
  config, _ = loaded
  codec = codec_lib.Vae(path=str(FOLDER))
  with pytest.raises(InputError, match="20x16 px do not divide into latent cells of 8 px"):
    codec.encode(np.zeros((20, 16, 3), np.uint8))
  other = codec_lib.Vae(path=str(FOLDER), block=config.downsample, channels=24)
  with pytest.raises(InputError, match=r"with \d+ channels; .*config\.codec\.channels 24"):
    other.decode(np.zeros((1, 2, 2, 24)))
  with pytest.raises(InputError, match="no folder /nowhere; give the path"):
    codec_lib.Vae(path="/nowhere").encode(np.zeros((1, 16, 16, 3), np.uint8))
