"""tf.data, in graph mode with its own tuning of threads: rows shuffled and batched, then one function a batch."""

import os
from collections.abc import Iterator
from typing import Any

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import tensorflow as tf

from benchmarks.contestants.common import Opened, Task, pad, pad_and_flip


def version() -> str:
    """Of the package."""
    return f"tensorflow {tf.__version__}"


def open_loader(task: Task, *, crop: str) -> Opened:
    """Crops and flips as `rows`, `boxes` or `image`.

    rows: a gather of rows and then of columns from padded and flipped copies of all images, compiled by XLA;
    boxes: its one kernel that takes a box for each image; image: image by image, before batching.
    """
    images, targets = task.images(), tf.constant(task.labels())
    count, height, width, channels = images.shape
    high, wide, shifts = height + 2 * task.crop, width + 2 * task.crop, 2 * task.crop + 1
    size = task.batch_size
    factor = 1 / tf.tile(tf.constant(task.std), [height * width])
    offset = -tf.tile(tf.constant(task.mean), [height * width]) * factor

    def scale(cut: Any) -> Any:
        flat = tf.reshape(tf.cast(cut, tf.float32), [-1, height * width * channels])
        return tf.reshape(flat * factor + offset, [-1, height, width, channels])

    def draw(*shape: int, below: int) -> Any:
        return tf.random.uniform(shape, 0, below, tf.int32)

    if crop == "rows":
        both = tf.constant(pad_and_flip(images, task.crop).reshape(-1, wide * channels))

        @tf.function(jit_compile=True)
        def batch(rows: Any) -> tuple[Any, Any]:
            chosen = tf.cast(rows, tf.int32) + count * draw(size, below=2)
            y, x = draw(size, 1, below=shifts), draw(size, 1, below=shifts)
            lines = tf.gather(both, tf.reshape(chosen[:, None] * high + y + tf.range(height), [-1]))
            pixels = tf.reshape(lines, [size, height, wide, channels])
            return scale(tf.gather(pixels, x + tf.range(width), axis=2, batch_dims=1)), tf.gather(targets, rows)

    else:
        padded = tf.constant(pad(images, task.crop))

        def batch(rows: Any) -> tuple[Any, Any]:
            y, x = (tf.cast(draw(size, below=shifts), tf.float32) for _ in range(2))
            top, bottom = y / (high - 1), (y + height - 1) / (high - 1)
            left, right = x / (wide - 1), (x + width - 1) / (wide - 1)
            flip = tf.random.uniform([size]) < 0.5
            boxes = tf.stack([top, tf.where(flip, right, left), bottom, tf.where(flip, left, right)], 1)
            cut = tf.image.crop_and_resize(tf.gather(padded, rows), boxes, tf.range(size), [height, width], "nearest")
            return scale(cut), tf.gather(targets, rows)

        def image(row: Any) -> tuple[Any, Any]:
            cut = tf.image.random_crop(tf.gather(padded, row), [height, width, channels])
            return tf.image.random_flip_left_right(cut), tf.gather(targets, row)

    rows = tf.data.Dataset.range(count).shuffle(count)
    options = {"num_parallel_calls": tf.data.AUTOTUNE, "deterministic": False}
    if crop == "image":
        made = rows.map(image, **options).batch(size, drop_remainder=True)
        made = made.map(lambda cut, labels: (scale(cut), labels), **options)
    else:
        made = rows.batch(size, drop_remainder=True).map(batch, **options)
    made = made.prefetch(tf.data.AUTOTUNE)

    def epoch() -> Iterator[tuple[Any, Any]]:
        for cut, labels in made.as_numpy_iterator():
            yield cut.transpose(0, 3, 1, 2), labels

    return Opened(epoch=epoch, settle=4)
