"""The simulated physics world at 64x64: 2 to 4 objects that fall, bounce and collide.

    python -m videogpt_jax.encode --config=configs/world.py

The weights that come with the package were trained in three stages: few frames, all frames, and
on with Muon:

    python -m videogpt_jax.main --config=configs/world.py --workdir=runs/world_short \
        --config.data.frames=8 --config.sample.clip_frames=4 \
        --config.train.steps=9000 --config.optimizer.cooldown_steps=0
    python -m videogpt_jax.main --config=configs/world.py --workdir=runs/world \
        --config.checkpoint.init_from=runs/world_short
    python -m videogpt_jax.main --config=configs/world.py --workdir=runs/world_muon \
        --config.checkpoint.init_from=runs/world --config.optimizer.name=muon \
        --config.train.steps=6000 --config.optimizer.cooldown_steps=3000 --config.seed=1
    python -m videogpt_jax.evaluate --checkpoint=runs/world_muon

About 40 minutes each on two CPU cores. Four frames given and four to predict are learnt faster
than four and twelve; small batches (4) beat larger ones at the same cost; 1,200 steps of Muon
lower the held-out loss where as many of AdamW do not. What to expect:
videogpt_jax/pretrained/world/README.md.
"""

from videogpt_jax import config as config_lib


def get_config():
  c = config_lib.default()
  c.name = "world"
  c.data.path = "data/world"
  c.data.source = "world"
  c.data.height = c.data.width = 64
  c.data.frames = 16
  c.data.train_videos = 20_000
  c.data.validation_videos = 256
  c.codec.block = 8  # with patches of 2x2 cells, a frame is 16 patches of 16x16 px
  c.codec.shift = 0.08  # about the background
  c.codec.scale = 1.0

  c.world.size = 64
  c.world.frames = 16
  c.world.objects = (2, 4)
  c.world.radius = (4.0, 8.0)
  c.world.speed = (1.1, 1.9)
  c.world.gravity = 0.05
  c.world.elasticity = (0.95,)

  c.model.hidden_size = 192
  c.model.intermediate_size = 512
  c.model.num_layers = 6
  c.model.num_heads = c.model.num_kv_heads = 4

  c.clips.partition = "continuation"
  c.clips.beta = 0.98
  c.sample.history = 4
  c.sample.clip_frames = 12
  c.sample.shift = 0.01  # nearly all steps near the data: the mean of the futures, not one of them
  c.train.steps = 6500
  c.train.batch_size = 4
  c.train.ema_decay = 0.999
  c.optimizer.learning_rate = 1.5e-3
  c.optimizer.warmup_steps = 100
  c.optimizer.cooldown_steps = 3500
  return c
