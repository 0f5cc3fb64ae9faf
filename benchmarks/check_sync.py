"""Prove on a CUDA machine that a training step outside of the logging interval never waits for the
device: one step under torch.cuda.set_sync_debug_mode('error').

    python benchmarks/check_sync.py
"""
import sys

import torch

from dino_nb.augment import crop_views_batched, sample_views
from dino_nb.core import default_dtype
from dino_nb.data import ImageSource
from dino_nb.learner import Learner, train_step
from dino_nb.photometric import photometric_views
from dino_nb.settings import make_config


def main():
    if not torch.cuda.is_available():
        sys.exit('There is no CUDA device here; this check needs one.')
    images = torch.randint(256, (256, 3, 48, 48), dtype=torch.uint8)
    config = make_config('tiny', batch_size=32)
    run = Learner(config, ImageSource(images, [str(i) for i in range(len(images))]))
    images = images.to(run.device)

    def step():
        index = list(range(config.batch_size))
        params = sample_views(config, config.seed, 0, index, [images.shape[-2:]] * len(index))
        views = photometric_views(crop_views_batched(images[:len(index)], params, config), params)
        train_step(run, views)
        run.step += 1

    for _ in range(3): step()  # kernels are loaded and memory is taken before the check
    torch.cuda.set_sync_debug_mode('error')
    try: step()
    finally: torch.cuda.set_sync_debug_mode('default')
    print(f'One step in {default_dtype(run.device)} on {torch.cuda.get_device_name()}, views made '
          'on the device: it never waited for the device.')


if __name__ == '__main__': main()
