"""tf.data as the TPU reference models use it: it decodes only the crop of a JPEG. Started by input_pipeline.py.

    python tensorflow_data.py FOLDER BATCH [--antialias] [--own-crops]

Reads a number N per line from stdin, makes N batches, and answers "done".

Unlike Pillow's filters, `tf.image.resize` does not antialias by default; --antialias turns it on. The crops are drawn
beforehand from the distribution that PyTorch's pipelines and ours use. With --own-crops TensorFlow's sampler draws
them; it draws the height uniformly instead of the area, so its crops are smaller.
"""

import json
import sys
from pathlib import Path

import numpy as np
import tensorflow as tf
from crops import crop_window


def make_dataset(folder: Path, batch: int, antialias: bool, own_crops: bool) -> tf.data.Dataset:
    """Decodes, crops, resizes with a random filter, and flips."""
    files = sorted(str(file) for file in folder.glob("*/*.jpg"))
    windows = np.array([crop_window(*jpeg_size(file)) for file in files], np.int32)

    def load(file: tf.Tensor, window: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        data = tf.io.read_file(file)
        if own_crops:
            window = tensorflow_window(data)
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
    dataset = tf.data.Dataset.from_tensor_slices((files, windows)).shuffle(len(files)).repeat()
    dataset = dataset.map(load, num_parallel_calls=1).batch(batch).prefetch(2)
    return dataset.with_options(options)


def jpeg_size(file: str) -> tuple[int, int]:
    """Width and height in pixels."""
    height, width, _ = tf.io.extract_jpeg_shape(tf.io.read_file(file)).numpy()
    return int(width), int(height)


def tensorflow_window(data: tf.Tensor) -> tf.Tensor:
    """Top, left, height and width from TensorFlow's sampler."""
    begin, size, _ = tf.image.sample_distorted_bounding_box(
        tf.io.extract_jpeg_shape(data),
        bounding_boxes=tf.zeros([1, 0, 4]),
        min_object_covered=0.0,
        aspect_ratio_range=(3 / 4, 4 / 3),
        area_range=(0.08, 1.0),
        max_attempts=10,
        use_image_if_no_bounding_boxes=True,
    )
    return tf.stack([begin[0], begin[1], size[0], size[1]])


def main() -> None:
    """Makes batches until stdin ends."""
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    options = ("--antialias" in sys.argv, "--own-crops" in sys.argv)
    batches = make_dataset(Path(sys.argv[1]), int(sys.argv[2]), *options).as_numpy_iterator()
    next(batches)[0].copy()
    print(json.dumps({"tensorflow": tf.__version__}), flush=True)
    for line in sys.stdin:
        for _ in range(int(line)):
            next(batches)[0].copy()
        print("done", flush=True)


if __name__ == "__main__":
    main()
