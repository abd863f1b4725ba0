"""Pseudo-labels of two processes, of which the second takes its time to load the model.

    python label_in_two_processes.py MODEL PHOTOS OUTPUT

A program of its own, because forking, which spares the processes their imports, wants a process without threads.
"""

import sys
import time

from accelerate import PartialState, debug_launcher

from ifseg_hf.data.crops import load_training_dataset
from ifseg_hf.training import pseudo_labels


def label(model: str, photos: str, output: str) -> None:
    assert PartialState(cpu=True).num_processes == 2
    load = pseudo_labels.load_segmenter

    def load_late(*args):
        time.sleep(3 * PartialState().process_index)
        return load(*args)

    pseudo_labels.load_segmenter = load_late
    pseudo_labels.write_pseudo_labels(model, load_training_dataset(photos), output, cpu=True)


if __name__ == "__main__":
    debug_launcher(label, tuple(sys.argv[1:]), num_processes=2)
