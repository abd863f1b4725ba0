"""Gradients of several processes."""

import torch
from torch import distributed, multiprocessing

from ifseg_hf.nano.stages import average_gradients, processes


def _average(rank, file):
    distributed.init_process_group("gloo", init_method=file, rank=rank, world_size=2)
    assert processes() == (rank, 2)
    parameters = [
        torch.nn.Parameter(torch.zeros(2)),
        torch.nn.Parameter(torch.zeros(1, 3)),
        torch.nn.Parameter(torch.zeros(1)),
    ]
    parameters[0].grad, parameters[1].grad = torch.full((2,), float(rank)), torch.full((1, 3), 2.0 * rank)
    average_gradients(parameters)
    assert parameters[0].grad.tolist() == [0.5, 0.5]
    assert parameters[1].grad.tolist() == [[1, 1, 1]]
    assert parameters[2].grad is None


def test_gradients_are_averaged_over_processes(tmp_path):
    multiprocessing.spawn(_average, ((tmp_path / "rendezvous").as_uri(),), nprocs=2)
