"""The main job: a physics world small enough to learn on two laptop cores, in minutes.

    python -m videogpt_jax.encode --config=configs/tiny.py
    python -m videogpt_jax.main --config=configs/tiny.py --workdir=runs/tiny
    python -m videogpt_jax.evaluate --checkpoint=runs/tiny

or all three by `make demo`.
"""

from videogpt_jax import config as config_lib


def get_config():
  c = config_lib.default()
  c.name = "tiny"
  c.data.path = "data/tiny"
  c.data.source = "world"
  c.data.height = c.data.width = 32
  c.data.frames = 8
  c.data.train_videos = 6000
  c.data.validation_videos = 256
  c.codec.block = 4  # with patches of 2x2 cells, a frame is 16 patches of 8x8 px
  c.codec.shift = 0.08  # about the background
  c.codec.scale = 1.0

  c.world.size = 32
  c.world.frames = 8
  c.world.objects = (1, 2)
  c.world.radius = (4.0, 6.0)
  c.world.speed = (1.0, 2.0)

  c.model.hidden_size = 128
  c.model.intermediate_size = 344
  c.model.num_layers = 4
  c.model.num_heads = c.model.num_kv_heads = 4

  c.sample.clip_frames = 1
  c.train.steps = 2000
  c.train.batch_size = 4  # more and smaller steps learn faster here than fewer and larger ones
  c.train.ema_decay = 0.99
  c.optimizer.learning_rate = 2e-3
  c.optimizer.warmup_steps = 50
  c.optimizer.cooldown_steps = 800
  c.checkpoint.every = 500
  c.log.every = 50
  c.log.validate_every = 500
  c.log.videos_every = 1000
  c.log.videos = 2
  return c
