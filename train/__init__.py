"""The program `python -m train`: data, augmentation, optimizer, sharded loop, evaluation."""

from train.data.worker_process import keep_jax_out_of_workers

keep_jax_out_of_workers()
