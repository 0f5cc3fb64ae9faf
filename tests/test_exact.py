"""How many processes share a step changes nothing that it computes, beyond the order of its sums.

Reordering a sum of n numbers changes it by n roundings at most, relative to their size. A gradient
here is a sum over 16 images, 4 views and up to 25 tokens, some 2,000 numbers: 2,000 roundings of
1e-16 in double precision, 1e-7 in single precision. Seen: 4e-16 and 2e-7. Any error (a sum in place
of a mean, a part left out, a center of one's own images) changes a gradient by a tenth or more.
"""
import multiprocessing
import os
import socket

import pytest
import torch

from dino_nb.data import open_images
from dino_nb.dist import close_dist, init_dist
from dino_nb.learner import Learner, train_step
from dino_nb.settings import make_config
from dino_nb.shapes import Shapes
from dino_nb.split import CAN_SPLIT, gather_state

BOUND = dict(float64=1e-12, float32=1e-4)
FORK = multiprocessing.get_context('forkserver')  # processes that need not import torch again
FORK.set_forkserver_preload(['dino_nb.learner', 'torch._dynamo'])


def step_of(rank, size, port, settings, path):
    "Take the fourth step of a run as one of its processes; the first one writes what it computed"
    place = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=size, LOCAL_WORLD_SIZE=size,
                 MASTER_ADDR='localhost', MASTER_PORT=port, OMP_NUM_THREADS=1)
    os.environ.update({name: str(value) for name, value in place.items()})
    world = init_dist('cpu')
    config = make_config(depth=2, batch_size=16, freeze_last_layer=0, **settings)
    run = Learner(config, open_images(Shapes(64, size=40)), world)
    run.step = 3
    train_step(run, next(iter(run.views()))[0])
    found = gather_state({name: param.grad for name, param in run.student.named_parameters()
                          if param.requires_grad})
    if rank == 0: torch.save((found, dict(run.loss_fn.state_dict())), path)
    close_dist()


def one_step(size, settings, path):
    "Gradients and center of one step that so many processes shared"
    with socket.create_server(('localhost', 0)) as free: port = free.getsockname()[1]
    ranks = [FORK.Process(target=step_of, args=(rank, size, port, settings, path))
             for rank in range(size)]
    for rank in ranks: rank.start()
    for rank in ranks: rank.join(120); rank.kill()
    assert [rank.exitcode for rank in ranks] == [0] * size
    return torch.load(path)


def apart(one, other):
    "The largest difference of the gradients and of the center, each relative to its largest value"
    def of(part, whole):
        assert part.keys() == whole.keys()
        far = [(part[name] - whole[name]).abs().max().item() for name in whole]
        return max(far) / max(value.abs().max().item() for value in whole.values())
    def moved(state): return any(value.any() for value in state.values())  # a center may be unused
    return [of(part, whole) for whole, part in zip(one, other) if moved(whole) or moved(part)]


MORE = [(2, {}), (4, {}), (1, dict(accumulate=4)), (2, dict(accumulate=2)),
        (2, dict(accumulate=2, recompute=True, fsdp=CAN_SPLIT))]


@pytest.mark.parametrize('precision', BOUND)
@pytest.mark.parametrize('target', ['center', 'sinkhorn', 'softmax_batch'])
def test_the_number_of_processes_changes_no_gradient(target, precision, tmp_path):
    settings = dict(target=target, precision=precision)
    alone = one_step(1, settings, tmp_path/'alone')
    for size, more in MORE:
        if target != 'center' and 'accumulate' in more: continue  # they balance each part by itself
        shared = one_step(size, settings | more, tmp_path/'shared')
        assert max(apart(alone, shared)) < BOUND[precision], (size, more)
    wrong = apart(alone, one_step(1, settings | dict(seed=1), tmp_path/'wrong'))
    assert min(wrong) > 0.1  # the measure tells other images apart
