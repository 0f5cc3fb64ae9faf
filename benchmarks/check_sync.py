"""Prove on a CUDA machine that a training step outside of the logging interval never waits for the
device: some steps under torch.cuda.set_sync_debug_mode('error').

    python benchmarks/check_sync.py
"""
import sys

import torch

from dino_nb.core import default_dtype
from dino_nb.data import ImageSource
from dino_nb.dist import init_dist
from dino_nb.learner import Learner, train_step
from dino_nb.settings import make_config


def steps_without_waiting(n=3):
    "Take n steps, views and all, and return n; the first one that waits is an error."
    images = torch.randint(256, (256, 3, 48, 48), dtype=torch.uint8)
    source = ImageSource(images, [str(i) for i in range(len(images))])
    run = Learner(make_config('tiny', freeze_last_layer=0), source, init_dist('cuda'))
    stream = run.views()  # made on the device, one batch ahead, in a stream of their own

    def step():
        train_step(run, next(stream)[0])
        run.step += 1

    for _ in range(3): step()  # kernels are loaded and memory is taken before the check
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode('error')
    try:
        for _ in range(n): step()
    finally: torch.cuda.set_sync_debug_mode('default')
    return n


def main():
    if not torch.cuda.is_available():
        sys.exit('There is no CUDA device here; this check needs one.')
    n = steps_without_waiting()
    print(f'{n} steps in {default_dtype(torch.device("cuda"))} on {torch.cuda.get_device_name()}, '
          'views made on the device: they never waited for the device.')


if __name__ == '__main__': main()
