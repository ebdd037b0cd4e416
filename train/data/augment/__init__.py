"""Random changes to training images: single images on the host (Pillow), whole batches on the device (jax)."""
