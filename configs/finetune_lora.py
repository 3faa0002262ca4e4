"""Fine-tunes the published model on videos of your own, on one GPU of 24 GB: adapters (LoRA).

    python -m videogpt_jax.encode --config=configs/finetune_lora.py --videos=FOLDER --vae=SDXL_VAE
    python -m videogpt_jax.main --config=configs/finetune_lora.py --workdir=runs/finetune_lora \
        --config.checkpoint.init_from=PUBLISHED
    python -m videogpt_jax.predict --checkpoint=runs/finetune_lora --vae=SDXL_VAE \
        --video=FOLDER/clip.mp4
    python -m videogpt_jax.convert --checkpoint=runs/finetune_lora --out=weights/finetuned \
        --dtype=bfloat16

PUBLISHED is the folder of the published weights, or a checkpoint made of it. It must stay where
it is: checkpoints hold the adapters alone (26.7 million parameters of 3.8 billion). `convert`
merges them into a folder that needs nothing else.

The same on the weights that come with the package, in minutes on a laptop:

    python -m videogpt_jax.encode --config=configs/finetune_lora.py:small
    python -m videogpt_jax.main --config=configs/finetune_lora.py:small --workdir=runs/lora_small
    python -m videogpt_jax.evaluate --checkpoint=runs/lora_small
    python -m videogpt_jax.convert --checkpoint=runs/lora_small --out=weights/lora_small
"""

from videogpt_jax import presets


def get_config(variant: str = ""):
  c = presets.finetune(variant)
  c.name = "finetune_lora" + (f"_{variant}" if variant else "")
  c.lora.rank = 16
  c.lora.alpha = 16.0
  c.train.ema_decay = 0.99
  c.train.accumulation = 1 if variant else 8  # one video at a time
  c.optimizer.learning_rate = 2e-3 if variant else 2e-4
  c.optimizer.weight_decay = 0.0
  return c
