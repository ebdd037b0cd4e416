"""Images for training and evaluation: from a data set on disk to pixels on the device.

The seam with the training loop, in the order in which a run uses it (`...` stands for optional arguments):

    from train.data.config import DataConfig
    config.image_processor()                      -> the PoolFormerImageProcessor that evaluation uses and the model
                                                     folder keeps

    from train.data.sources.opening import open_source
    source = open_source(config, config.train_split)     # or config.evaluation_split
    len(source), source.class_names, source[i] -> {"image", "label", "id"}

    from train.data.pipeline import train_batches, evaluation_batches
    with train_batches(config, source, start_step=0, process_index=0, process_count=1) as batches:
        next(batches) -> {"image": uint8 [b, H, W, C], "label": int32 [b], "index": int64 [b]}
        batches.bad_images                        -> {id: reason} of what on_bad_image="skip" replaced so far
    with evaluation_batches(config, source, process_index=0, process_count=1) as batches:
        next(batches) -> the same and "mask": bool [b], False where the batch is only filled up

    from train.data.augment.device import augment_batch, normalize_batch      # the only part that imports jax
    pixels, targets = augment_batch(key, image, label, config, num_classes=n, dtype=jnp.bfloat16)
    pixels = normalize_batch(image, config, dtype)

    from train.data.prepare import PrepareConfig, prepare
    prepare(PrepareConfig(source="folder:PATH", output=FOLDER), on_progress) -> Prepared(folder, images, left_out)

Whatever a person can mend is a ValueError or an OSError with one message that says how.

b is config.batch_size / process_count: this process's consecutive part of the global batch. The batch at step s is a
pure function of (config.seed, s), whatever the number of processes, workers and restarts: its example j is the one at
global position g = s * batch_size + j, which is place g % N of the permutation that belongs to epoch g // N, and its
random transforms are keyed by (seed, g). `train_batches` never ends and starts at any step at once, so the step is the
only thing that a checkpoint has to keep. `evaluation_batches` goes through the split once, in order, with the same
number of batches on every process.

Host work is NumPy and Pillow, in Grain's worker processes, which never import jax (see `worker_process`): keep it
out of everything here but `device_augment`.
"""
