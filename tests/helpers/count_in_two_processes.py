"""Counts the pixels of five images, in two processes and in one.

    python count_in_two_processes.py FOLDER

writes the confusion matrices 0.npy, 1.npy (of the two processes) and alone.npy. A separate program: forking, which
saves the imports of each process, needs a process without threads.
"""

import sys

import numpy as np
from accelerate import Accelerator, debug_launcher

from ifseg_hf.evaluation.metrics import MeanIoU

BATCHES = [[0, 1], [2, 3], [4]]


def count(batches: list[list[int]], many: bool) -> MeanIoU:
    metric = MeanIoU(171)
    for batch in batches:
        maps = [np.random.default_rng(image).integers(0, 171, (2, 20 + image, 30 - image)) for image in batch]
        predictions, references = zip(*maps, strict=True)
        references = [np.where(reference % 10 == 3, -100, reference) for reference in references]
        metric.add_batch(predictions=predictions, references=references)
    metric.confusion_matrix += 2**53 + 1 if many else 0  # odd numbers that a float64 cannot hold
    return metric


def count_a_share(folder: str) -> None:
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    metric = count(BATCHES[accelerator.process_index :: 2], many=accelerator.is_main_process)
    metric.reduce(accelerator)
    np.save(f"{folder}/{accelerator.process_index}.npy", metric.confusion_matrix)


if __name__ == "__main__":
    np.save(f"{sys.argv[1]}/alone.npy", count(BATCHES, many=True).confusion_matrix)
    debug_launcher(count_a_share, (sys.argv[1],), num_processes=2)
