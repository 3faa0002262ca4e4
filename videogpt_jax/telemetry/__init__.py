"""What a run says about itself: metrics on disk, one line a log point, where its time went.

Everything here runs on the host. Of a run of several processes the first alone writes; the
others hold a writer that writes nothing, so that all of them run the same loop.
"""

from videogpt_jax.telemetry.goodput import Account
from videogpt_jax.telemetry.plots import plot_held_out
from videogpt_jax.telemetry.plots import plot_losses
from videogpt_jax.telemetry.progress import duration
from videogpt_jax.telemetry.progress import Progress
from videogpt_jax.telemetry.records import METRICS_FILE
from videogpt_jax.telemetry.records import read_metrics
from videogpt_jax.telemetry.writer import open_writer
from videogpt_jax.telemetry.writer import Silent
from videogpt_jax.telemetry.writer import Writer

__all__ = ["METRICS_FILE", "Account", "Progress", "Silent", "Writer", "duration", "open_writer",
           "plot_held_out", "plot_losses", "read_metrics"]
