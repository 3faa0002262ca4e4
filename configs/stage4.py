"""Stage 4 of 4 of the published pretraining: 80 frames.

    python -m videogpt_jax.main --config=configs/stage4.py --workdir=runs/stage4

What comes before and after, and on how many devices: configs/stage1.py. On one H200 (141 GB) it
fits with a smaller batch, or the same one in 320 microbatches:

    python -m videogpt_jax.main --config=configs/stage4.py --workdir=runs/stage4 \
        --config.mesh.fsdp=1 --config.train.batch_size=8 --config.train.accumulation=8
"""

from videogpt_jax import presets


def get_config(variant: str = ""):
  c = presets.stage(4, variant)
  if variant:
    c.data.frames = 16
    c.data.interval = (1, 2)
    c.train.steps = 1000
  else:
    c.data.frames = 80
    c.data.interval = (4, 12)
    c.train.steps = 9_000
    c.train.accumulation = 5  # on 64 devices: one video at a time
  return c
