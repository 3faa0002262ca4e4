"""Fine-tunes the published model on videos of your own, on one GPU of 80 GB: all parameters.

    python -m videogpt_jax.encode --config=configs/finetune_full.py --videos=FOLDER --vae=SDXL_VAE
    python -m videogpt_jax.main --config=configs/finetune_full.py --workdir=runs/finetune_full \
        --config.checkpoint.init_from=PUBLISHED
    python -m videogpt_jax.predict --checkpoint=runs/finetune_full --vae=SDXL_VAE \
        --video=FOLDER/clip.mp4
    python -m videogpt_jax.convert --checkpoint=runs/finetune_full --out=weights/finetuned \
        --dtype=bfloat16

PUBLISHED is the folder of the published weights, or a checkpoint made of it. What AdamW and an
averaged copy would add to the parameters, 45 GB, is left out: Adafactor keeps a factored second
moment, and the first one in bfloat16.

The same on the weights that come with the package, in minutes on a laptop:

    python -m videogpt_jax.encode --config=configs/finetune_full.py:small
    python -m videogpt_jax.main --config=configs/finetune_full.py:small --workdir=runs/full_small
    python -m videogpt_jax.evaluate --checkpoint=runs/full_small
"""

from videogpt_jax import presets


def get_config(variant: str = ""):
  c = presets.finetune(variant)
  c.name = "finetune_full" + (f"_{variant}" if variant else "")
  c.train.ema_decay = 0.0
  c.train.accumulation = 1 if variant else 8  # one video at a time
  c.optimizer.name = "adafactor"
  c.optimizer.moments = "bfloat16"
  c.optimizer.learning_rate = 3e-4 if variant else 1e-5
  return c
