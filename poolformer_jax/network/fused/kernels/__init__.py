"""The passes of `fused` as Pallas kernels, where XLA cannot fuse them: all four on TPUs, the MLP's two on NVIDIA GPUs.

XLA fuses each branch's forward pass into one operation on a TPU, but not its backward pass, which returns a map,
gradients of matrices and sums over images at once. XLA computes the hidden layer and the pooling windows once for each
of them, and writes the hidden layer's gradient in between. A kernel computes everything while a tile is in VMEM, reads
the maps once, and writes one. TPU kernels take maps as [h, w, batch, channels], which is XLA's layout for convolutions
on a TPU. So XLA copies nothing before a kernel, numbers of an image broadcast over positions, and a window slides over
axes that are not in a register. `tpu_layout` fills the registers where there are 64 channels. `gpu` describes the
kernels for GPUs. Files named `tpu*` and `gpu*` are for these devices.

The kernels compute what `fused` computes, for the exact GELU and bfloat16 maps. On TPUs with 128 MiB of VMEM (v5e,
v6e) they take a multiple of 16 images per device, windows of 3 x 3, and MLPs whose weights and gradients fit into VMEM;
on GPUs (Ampere and newer) a multiple of 64 positions. XLA computes everything else. Kernels have gradients, but no
gradients of gradients.

`base` holds the interface and its constants, `choice` the two implementations and the devices that they are for,
`verification` the comparison with XLA that decides whether a program uses them, on the inputs of `pass_inputs`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
