"""Real videos and an autoencoder: encode, train, predict; published weights as they come."""

import json
import pathlib
import shutil

import ml_dtypes
import numpy as np
import pytest

import tiny_run
from videogpt_jax import checkpoint_files
from videogpt_jax.data import pipeline
from videogpt_jax.data import store
from videogpt_jax.data import video
from videogpt_jax.data import world

GOLDEN = pathlib.Path(__file__).parent / "golden"
VAE = GOLDEN / "vae"


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
  """A folder with videos of 96x64 px, and some of 64x96."""
  folder = tmp_path_factory.mktemp("clips")
  settings = world.Settings(size=64, frames=12)
  for seed in range(8):
    frames = world.simulate(settings, seed).frames
    wide = np.concatenate([frames, frames[:, :, :32]], axis=2)
    video.write_mp4(folder / f"{seed}.mp4", wide, fps=24.0)
    if seed < 6:
      video.write_mp4(folder / f"tall{seed}.mp4", wide.swapaxes(1, 2), fps=24.0)
  return folder


@pytest.fixture(scope="module")
def trained(clip, tmp_path_factory):
  """A run on latents of the golden autoencoder: its workdir, configuration and messages."""
  folder = tmp_path_factory.mktemp("vae_run")
  c = tiny_run.config(folder / "data")
  c.data.source = "videos"
  c.data.buckets = "32x48,48x32"
  c.data.posterior = "separate"
  c.data.validation_fraction = 0.3
  c.codec.id, c.codec.block, c.codec.scale, c.codec.shift = "vae", 8, 0.13025, 0.0
  c.codec.path = str(folder / "nowhere")
  c.codec.moments, c.codec.precision = True, "bfloat16"
  c.train.steps = 6  # of which some are of either size
  c.train.batch_size = 2
  file = tiny_run.config_file(c, folder / "config.py")
  wrong = tiny_run.run("encode", f"--config={file}", f"--videos={clip}")
  right = tiny_run.run("encode", f"--config={file}", f"--videos={clip}", f"--vae={VAE}")
  assert right.returncode == 0, right.stderr
  blind = tiny_run.run("main", f"--config={file}", f"--workdir={folder / 'blind'}")
  seeing = tiny_run.run("main", f"--config={file}", f"--workdir={folder / 'seeing'}",
                        f"--config.codec.path={VAE}")
  return folder, {"wrong": wrong, "right": right, "blind": blind, "seeing": seeing}


def test_encoding_needs_the_autoencoder_and_says_so_at_once(trained):
  _, results = trained
  assert results["wrong"].returncode == 2
  assert "error: no folder" in results["wrong"].stderr
  assert "nowhere" in results["wrong"].stderr


def test_vae_training_goes_on_without_videos_where_there_is_none(trained):
  folder, results = trained
  for name in ("blind", "seeing"):
    assert results[name].returncode == 0, results[name].stderr
  assert "no videos will be shown: no folder" in results["blind"].stderr
  assert "no videos" not in results["seeing"].stderr
  assert not list((folder / "blind").rglob("*.gif"))
  assert list((folder / "seeing").rglob("*.gif"))
  tiny_run.assert_same_state(folder / "blind", folder / "seeing")


def test_both_sizes_are_stored_and_trained_on(trained):
  folder, results = trained
  source = store.open_split(folder / "data", "train")
  assert set(source.buckets()) == {(4, 6), (6, 4)}
  assert source.info.moments and source[0]["latents"].dtype == ml_dtypes.bfloat16
  assert source[0]["latents"].shape[-1] == 8
  assert "encode expects about 168 frames" in results["right"].stdout
  batches = pipeline.batches(source, frames=4, interval=(1, 1), batch_size=2, seed=0)
  taken = {next(batches).latents.shape[2:4] for _ in range(6)}
  assert taken == {(4, 6), (6, 4)}


def test_posteriors_that_were_not_stored_are_refused(trained, clip, tmp_path):
  folder, _ = trained
  file = folder / "config.py"
  means = tiny_run.run("encode", f"--config={file}", f"--videos={clip}", f"--vae={VAE}",
                       f"--out={tmp_path / 'means'}", "--config.codec.moments=False")
  assert means.returncode == 0, means.stderr
  result = tiny_run.run("main", f"--config={file}", f"--workdir={tmp_path / 'run'}",
                        f"--config.data.path={tmp_path / 'means'}")
  assert result.returncode == 2
  assert "holds means alone" in result.stderr and "codec.moments=True" in result.stderr


def test_a_video_is_predicted_at_the_size_most_like_it(trained, clip, tmp_path):
  folder, _ = trained
  result = tiny_run.run("predict", f"--checkpoint={folder / 'blind'}", f"--vae={VAE}",
                        f"--video={clip / 'tall1.mp4'}", f"--out={tmp_path}", "--frames=2")
  assert result.returncode == 0, result.stderr
  assert "64x96 px resized and cropped to 32x48 as in training" in result.stdout
  assert video.read(tmp_path / "prediction.mp4").frames.shape == (4, 48, 32, 3)


def test_vae_run_predicts_a_video(trained, clip, tmp_path):
  folder, _ = trained
  arguments = [f"--checkpoint={folder / 'blind'}", f"--video={clip / '0.mp4'}",
               f"--out={tmp_path}", "--frames=3"]
  refused = tiny_run.run("predict", *arguments)
  assert refused.returncode == 2
  assert "nowhere" in refused.stderr
  result = tiny_run.run("predict", *arguments, f"--vae={VAE}")
  assert result.returncode == 0, result.stderr
  assert video.read(tmp_path / "prediction.mp4").frames.shape == (5, 32, 48, 3)


@pytest.fixture(scope="module")
def published_folder(tmp_path_factory):
  """A tiny model as the published one comes: weights, tokenizer, autoencoder; nothing of ours."""
  folder = tmp_path_factory.mktemp("published")
  settings = json.loads((GOLDEN / "videogpt" / "model_a_config.json").read_text())
  ids = settings.pop("special_ids")
  tokens = {"<|diffusion|>": ids["diff"], "<img>": ids["img"], "</img>": ids["end_img"]}
  (folder / "config.json").write_text(json.dumps(settings))
  (folder / "tokenizer.json").write_text(json.dumps(
    {"added_tokens": [{"content": text, "id": row} for text, row in tokens.items()]}))
  shutil.copy(GOLDEN / "videogpt" / "model_a.safetensors", folder / "model.safetensors")
  shutil.copytree(VAE, folder / "vae")
  return folder


def test_vae_and_published_weights_predict_as_they_come(published_folder, clip, tmp_path):
  """By the command alone, directly and through a checkpoint: the same video, pixel for pixel."""
  imported = tiny_run.run("convert", f"--checkpoint={published_folder.name}",
                          f"--out={tmp_path / 'checkpoint'}", cwd=published_folder.parent)
  assert imported.returncode == 0, imported.stderr
  assert f"init_from={tmp_path / 'checkpoint'}" in imported.stdout
  videos = []
  for path in (published_folder, tmp_path / "checkpoint"):
    result = tiny_run.run("predict", f"--checkpoint={path}", f"--video={clip / '0.mp4'}",
                          f"--out={tmp_path / 'out'}", "--frames=2", "--history=2", "--steps=2",
                          "--clip_frames=1")
    assert result.returncode == 0, result.stderr
    videos.append(video.read(tmp_path / "out" / "prediction.mp4"))
  assert videos[0].frames.shape == (4, 208, 320, 3)  # the longest side, proportions kept
  assert videos[0].fps == pytest.approx(6.0)  # every 4th frame of 24 a second
  np.testing.assert_array_equal(videos[0].frames, videos[1].frames)


def test_export_by_the_command_is_what_was_imported(published_folder, tmp_path):
  for source, out in ((published_folder, "checkpoint"), (tmp_path / "checkpoint", "again")):
    result = tiny_run.run("convert", f"--checkpoint={source}", f"--out={tmp_path / out}",
                          "--noposition")
    assert result.returncode == 0, result.stderr
  ours = checkpoint_files.load_params(tmp_path / "checkpoint")[0]
  assert ours["embed_tokens"].shape[1] == ours["backbone"]["norm"]["weight"].size
  result = tiny_run.run("convert", f"--checkpoint={tmp_path / 'again'}",
                        f"--out={tmp_path / 'checkpoint'}")
  assert result.returncode == 2
  assert "exists already" in result.stderr
  result = tiny_run.run("convert", f"--checkpoint={tmp_path / 'checkpoint'}",
                        f"--out={tmp_path / 'more'}", "--img_id=3")
  assert "leave out --img_id" in result.stderr
