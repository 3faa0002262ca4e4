"""Settings that several run cards share: published training and fine-tuning, in full and small."""

from ml_collections import ConfigDict

from videogpt_jax import config as config_lib
from videogpt_jax import weights as weights_lib


def paper() -> ConfigDict:
  """The published model and how it was trained: what its four stages have in common.

  Source: the published training and inference scripts; where they say nothing, ours, and
  `docs/fidelity.md` says so.
  """
  c = config_lib.default()
  c.model.hidden_size = 3072  # as Phi-3-mini, arXiv 2404.14219
  c.model.intermediate_size = 8192
  c.model.num_layers = 32
  c.model.num_heads = c.model.num_kv_heads = 32
  c.model.vocab_size = 32_064
  c.model.diff_id = 32_011  # ours: the first rows that Phi-3's own tokenizer leaves unused
  c.model.img_id = 32_012
  c.model.end_img_id = 32_013
  c.model.remat = "attention"  # ours: there is room for it on H100 and v5p
  c.codec.id = "vae"
  c.codec.block = 8
  c.codec.scale = 0.13025
  c.codec.shift = 0.0
  c.codec.moments = True
  c.data.path = "data/pretraining"
  c.data.posterior = "separate"
  c.data.source = "videos"
  c.data.longest_side = 320  # 176x320 of videos of 16:9
  c.data.height = 176
  c.data.width = 320
  c.data.min_bucket = 1000  # ours: every size is compiled for
  c.data.min_side = 128
  c.data.frames = 80
  c.data.interval = (4, 4)
  c.data.workers = 8
  c.train.batch_size = 320
  c.train.ema_decay = 0.9999
  c.train.spike = 10.0  # ours
  c.optimizer.learning_rate = 1e-4
  c.optimizer.warmup_steps = 1000  # 320,000 scheduler steps over 320 processes
  c.optimizer.eps = 1e-5
  c.mesh.data = -1
  c.mesh.fsdp = 8  # ours: a node of GPUs; on TPU a share of the width is whole tiles of memory
  c.checkpoint.keep_best = 1
  c.log.validate_every = 1000
  c.log.videos_every = 5000
  c.sample.history = 8
  c.sample.clip_frames = 24
  c.sample.steps = 50
  c.sample.guidance = 1.5
  return c


def paper_in_small() -> ConfigDict:
  """The same training on the simulated world, for a laptop: a fifth of the frames, 1M parameters.

  One data set of long videos serves all four stages, as in the published training.
  """
  c = config_lib.default()
  c.data.path = "data/stages"
  c.data.source = "world"
  c.data.height = c.data.width = 32
  c.data.train_videos = 4000
  c.data.validation_videos = 256
  c.codec.block = 4
  c.codec.shift = 0.08
  c.codec.scale = 1.0
  c.world.size = 32
  c.world.frames = 32
  c.world.objects = (1, 2)
  c.world.radius = (4.0, 6.0)
  c.world.speed = (0.5, 1.0)
  c.model.hidden_size = 128
  c.model.intermediate_size = 344
  c.model.num_layers = 4
  c.model.num_heads = c.model.num_kv_heads = 4
  c.train.batch_size = 4
  c.train.ema_decay = 0.99
  c.optimizer.learning_rate = 1e-3
  c.optimizer.warmup_steps = 50
  c.log.every = 50
  c.log.validation_batches = 16
  c.log.videos_every = 1000
  c.log.videos = 2
  c.sample.history = 2
  c.sample.clip_frames = 1
  return c


def stage(number: int, variant: str = "") -> ConfigDict:
  """What the run cards of the four stages share.

  Args:
    number: of the stage, 1 to 4.
    variant: "" for the published model; "small" for `paper_in_small`.

  Raises:
    ValueError: another variant.
  """
  if variant not in ("", "small"):
    raise ValueError(f"the stages know the variant :small, not :{variant}")
  c = paper_in_small() if variant else paper()
  c.name = f"stage{number}" + (f"_{variant}" if variant else "")
  if number > 1:
    before = c.name.replace(f"stage{number}", f"stage{number - 1}")
    c.checkpoint.init_from = f"runs/{before}"
  return c


def finetune(variant: str = "") -> ConfigDict:
  """What both ways of fine-tuning on one device share.

  Args:
    variant: "" for the published model on videos of one's own; "small" for the weights that come
      with the package, on a world with more gravity than the one that they know.

  Raises:
    ValueError: another variant.
  """
  if variant not in ("", "small"):
    raise ValueError(f"fine-tuning knows the variant :small, not :{variant}")
  c = _known_world() if variant else paper()
  c.train.batch_size = 8
  c.optimizer.warmup_steps = 50
  c.mesh.data, c.mesh.fsdp = -1, 1
  c.checkpoint.every = 200
  c.log.validate_every = 200
  c.log.validation_batches = 8
  if variant:
    c.data.path = "data/finetune_small"
    c.data.train_videos, c.data.validation_videos = 1000, 64
    c.world.gravity = 0.2
    c.train.steps = 400
    c.log.every = 20
    c.log.videos_every = 400
    c.log.videos = 2
    c.checkpoint.init_from = weights_lib.PRETRAINED
    return c
  c.model.remat = "full"
  c.data.path = "data/finetune"
  c.data.longest_side = 0  # all videos are cut to 176x320: one size, one compilation
  c.data.min_bucket = 1
  c.data.frames = 16
  c.data.interval = (4, 12)
  c.data.workers = 2
  c.train.steps = 2000
  c.log.videos_every = 1000
  c.log.videos = 1
  c.sample.clip_frames = 8
  c.checkpoint.init_from = "runs/published"
  return c


def _known_world() -> ConfigDict:
  """The settings of the weights that come with the package."""
  source = weights_lib.open_source()
  return config_lib.with_model(config_lib.from_saved(source.config), source.model)
