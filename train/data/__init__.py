"""Images for training and evaluation, from a data set on disk to pixels on the device.

What the training loop uses, in the order of a run (`...` stands for optional arguments):

    config.image_processor()                  -> the PoolFormerImageProcessor for evaluation, saved with the model
    source = open_source(config, config.train_split)     # or config.evaluation_split
    len(source), source.class_names, source[i] -> {"image", "label", "id"}

    with train_batches(config, source, start_step=0, process_index=0, process_count=1) as batches:
        next(batches) -> {"image": uint8 [b, H, W, C], "label": int32 [b], "index": int64 [b]}
        batches.bad_images                    -> {id: reason} for images that on_bad_image="skip" replaced so far
    with evaluation_batches(config, source, process_index=0, process_count=1) as batches:
        next(batches) -> the same and "mask": bool [b], False for rows that only fill up the batch

    pixels, targets = augment_batch(key, image, label, config, num_classes=n, dtype=jnp.bfloat16)
    pixels = normalize_batch(image, config, dtype)

    prepare_data(PrepareConfig(source="folder:PATH", output=FOLDER), on_progress) -> Prepared

b is config.batch_size / process_count: this process's consecutive part of the global batch. The batch at step s is a
pure function of (config.seed, s), for any number of processes, workers and restarts: example j has the global position
g = s * batch_size + j, which is place g % N of the permutation of epoch g // N, and its random transforms are keyed by
(seed, g). `train_batches` never ends and starts at any step at once, so a checkpoint keeps the step and nothing else.
`evaluation_batches` reads the split once, in order, with the same number of batches on every process.

Workers use NumPy and Pillow and never import jax; only `augment.device` does. Names are imported when first used.
Errors that a user can fix are PoolFormerErrors.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
