"""The passes of `fused` as Pallas kernels, where XLA cannot fuse them: all four on TPUs, the MLP's two on NVIDIA GPUs.

On a TPU XLA fuses each branch's forward pass into one operation. Its backward passes it cannot: they return a map,
gradients of matrices and sums over images at once, so it computes the hidden layer and the windows once for each of
them, and writes the hidden layer's gradient in between. A kernel computes everything while a tile is in VMEM, reads
the maps once, and writes one. Maps are held position by position, [h, w, batch, channels]: that is how XLA lays
convolutions out on a TPU, so nothing is copied on the way in; numbers that belong to an image broadcast over positions;
and a window slides over axes that no register spans. `lanes` fills the registers where there are 64 channels.

Every file here but `devices` is for one of the two, and says so by its name. For a GPU see `gpu`.

The kernels compute what `fused` computes, for the exact GELU and bfloat16 maps: on TPUs with 128 MiB of VMEM (v5e, v6e)
of a multiple of 16 images on each device, for windows of 3 x 3 and as far as VMEM holds an MLP's weights and their
gradients; on GPUs (Ampere and newer) of a multiple of 64 positions. Everything else takes `fused`'s own way. They have
gradients, and no gradients of gradients.
"""

from poolformer_jax.network.fused.kernels.choice import (
    GPU_ROWS,
    POOL_SIZE,
    TPU_IMAGES,
    GpuKernels,
    Kernels,
    Pass,
    TpuKernels,
    kernels_for,
)

__all__ = ["GPU_ROWS", "POOL_SIZE", "TPU_IMAGES", "GpuKernels", "Kernels", "Pass", "TpuKernels", "kernels_for"]
