"""tf.data as the TPU reference models use it: only the cropped part of a JPEG is decoded. Run by input_pipeline.py.

    python tensorflow_data.py FOLDER BATCH [--antialias]

Answers every line N on the standard input with "done" after N batches. `tf.image.resize` has no antialiasing unless
it is asked for, unlike Pillow's filters; both are measured.
"""

import json
import sys
from pathlib import Path

import tensorflow as tf


def make_dataset(folder: Path, batch: int, antialias: bool) -> tf.data.Dataset:
    """Decodes, crops, resizes with a random filter, and flips."""
    files = sorted(str(file) for file in folder.glob("*/*.jpg"))

    def load(file: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        data = tf.io.read_file(file)
        shape = tf.io.extract_jpeg_shape(data)
        begin, size, _ = tf.image.sample_distorted_bounding_box(
            shape,
            bounding_boxes=tf.zeros([1, 0, 4]),
            min_object_covered=0.0,
            aspect_ratio_range=(3 / 4, 4 / 3),
            area_range=(0.08, 1.0),
            max_attempts=10,
            use_image_if_no_bounding_boxes=True,
        )
        window = tf.stack([begin[0], begin[1], size[0], size[1]])
        image = tf.io.decode_and_crop_jpeg(data, window, channels=3)
        image = tf.cond(
            tf.random.uniform([]) < 0.5,
            lambda: tf.image.resize(image, [224, 224], "bilinear", antialias=antialias),
            lambda: tf.image.resize(image, [224, 224], "bicubic", antialias=antialias),
        )
        image = tf.image.random_flip_left_right(image)
        return tf.saturate_cast(tf.round(image), tf.uint8), tf.constant(0)

    options = tf.data.Options()
    options.threading.private_threadpool_size = 1
    options.threading.max_intra_op_parallelism = 1
    dataset = tf.data.Dataset.from_tensor_slices(files).shuffle(len(files)).repeat()
    dataset = dataset.map(load, num_parallel_calls=1).batch(batch).prefetch(2)
    return dataset.with_options(options)


def main() -> None:
    """Serves batches on request."""
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    batches = make_dataset(Path(sys.argv[1]), int(sys.argv[2]), "--antialias" in sys.argv).as_numpy_iterator()
    next(batches)[0].copy()
    print(json.dumps({"tensorflow": tf.__version__}), flush=True)
    for line in sys.stdin:
        for _ in range(int(line)):
            next(batches)[0].copy()
        print("done", flush=True)


if __name__ == "__main__":
    main()
