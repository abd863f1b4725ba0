"""Pseudo-labels of two processes, of which the second is late.

    python label_in_two_processes.py MODEL IMAGES OUTPUT

A separate program: forking, which saves the imports of each process, needs a process without threads.
"""

import sys
import time

from accelerate import PartialState, debug_launcher

from ifseg_hf.data.crops import load_training_dataset
from ifseg_hf.training import pseudo_labels


def label(model: str, images: str, output: str) -> None:
    assert PartialState(cpu=True).num_processes == 2
    begin = pseudo_labels.begin

    def begin_late(*arguments):
        complete = begin(*arguments)
        time.sleep(3 * PartialState().process_index)
        return complete

    pseudo_labels.begin = begin_late
    pseudo_labels.write_pseudo_labels(model, load_training_dataset(images), output, cpu=True)


if __name__ == "__main__":
    debug_launcher(label, tuple(sys.argv[1:]), num_processes=2)
