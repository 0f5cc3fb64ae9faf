"""How far DINO gets on small photographs in a fixed time of one core: 20-NN after so many seconds
of training, beside raw pixels and the untrained network. Settings are those of dino_train.

    python benchmarks/cifar10.py --data FOLDER --seconds 100 --name sinkhorn --target sinkhorn

Durations of the recipe (warm-ups, the frozen last layer) keep their share of the run. What counts
is processor time, which other programs on the machine disturb less than the clock on the wall.
"""
import argparse
import json
import time
from itertools import islice

import common
import torch

from dino_nb.choice import typed_settings
from dino_nb.data import find_splits
from dino_nb.knn import evaluate_knn, pixel_knn
from dino_nb.learner import build_student, train_step
from dino_nb.loop import Learner
from dino_nb.settings import DURATIONS, RECIPES, make_config
from dino_nb.views import hold_images


def settings_for(images, n_images, recipe, typed):
    "Return settings of a run that sees so many images; durations keep their share of the run."
    asked = RECIPES[recipe] | typed
    config = make_config(recipe, **typed)
    share = images / n_images / config.epochs
    scaled = {name: getattr(config, name) * share for name in DURATIONS[1:] if name in asked}
    return asked | dict.fromkeys(DURATIONS[1:], 0.) | scaled | dict(epochs=images / n_images,
                                                               knn_every=0)


def images_per_second(settings, source, warm=3, steps=12):
    "Return how many images a run trains on in a second of processor time."
    run = Learner(make_config(**settings), source)
    for n, (views, _) in enumerate(islice(run.views(), warm + steps)):
        if n == warm: begin = time.process_time()
        train_step(run, views)
        run.step += 1
    return steps * run.config.batch_size / (time.process_time() - begin)


def knn(backbone, bank, test, config):
    "Return the 20-NN accuracy of a backbone's features."
    return evaluate_knn(backbone, bank, test, config.global_size, config.eval_crop,
                        ks=(20,))[20].top1


def train(settings, source, bank, test):
    "Return what a run of these settings reached."
    run = Learner(make_config(**settings), source)
    run.config.log_every = max(1, run.n_steps // 20)
    wall, cpu = time.time(), time.process_time()
    log = run.fit(report=lambda line: None)
    wall, cpu = time.time() - wall, time.process_time() - cpu
    judged = dict(teacher=run.teacher, student=run.student, init=build_student(run.config))
    scores = {f'knn_{name}': knn(network.backbone, bank, test, run.config)
              for name, network in judged.items()}
    end = log[-1]
    return scores | dict(steps=run.n_steps, epochs=run.config.epochs, cpu_seconds=cpu, seconds=wall,
                         images_per_cpu_second=run.n_steps * run.config.batch_size / cpu,
                         entropy=end['teacher_entropy'], kl=end['kl'], ln_k=end['ln_k'],
                         verdict=end['verdict'])


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data', required=True, help='folder with a train and a test part')
    parser.add_argument('--seconds', type=float, default=100., help='of training, on one core')
    parser.add_argument('--recipe', default='cifar10')
    parser.add_argument('--name', default='', help='what the row is called')
    parser.add_argument('--bank', type=int, default=10000, help='labelled images of k-NN')
    parser.add_argument('--write', action='store_true', help='append to results/cifar10.csv')
    options, words = parser.parse_known_args(argv)
    typed = typed_settings(words)
    torch.set_num_threads(1)
    source, test = find_splits(options.data)
    for images in (source, test): hold_images(images)
    bank = source.subset(torch.arange(0, len(source), max(1, len(source) // options.bank)))
    trial = settings_for(1000 * len(source), len(source), options.recipe, typed)
    speed = images_per_second(trial, source)
    settings = settings_for(options.seconds * speed, len(source), options.recipe, typed)
    found = train(settings, source, bank, test)
    pixels = pixel_knn(bank, test, ks=(20,))[20].top1
    row = dict(name=options.name, settings=json.dumps(typed)) | found | dict(knn_pixels=pixels)
    columns = 'name', 'steps', 'images_per_cpu_second', 'entropy', 'kl', 'verdict'
    common.print_table([row], [*columns, *(name for name in row if name.startswith('knn'))])
    if options.write: common.write_rows('cifar10', [row], common.machine(torch.device('cpu')))


if __name__ == '__main__': main()
