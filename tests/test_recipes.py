"Recipes through their lives: every phase, every pair of settings, stopped and taken up in between."
import itertools
import json
import signal

import pytest
import torch

from dino_nb.checkpoint import load_checkpoint
from dino_nb.data import open_images
from dino_nb.knn import evaluate_knn
from dino_nb.loop import Learner
from dino_nb.settings import CHOICES, RECIPES, TrainConfig, make_config
from dino_nb.shapes import Shapes
from dino_nb.train import main

# 4 steps an epoch: the last layer's freeze ends at 4, the warm-up at 6, the temperature's at 8
LIFE = dict(epochs=3, freeze_last_layer=1, warmup_epochs=1.5, warmup_teacher_temp_epochs=2,
            warmup_teacher_temp=0.03, batch_size=8, log_every=3, knn_every=1, device='cpu')
STOPS = 2, 5, 7, 10  # one in each phase
HEAD = dict(out_dim=32, hidden_dim=32, bottleneck_dim=16)
VIT = dict(backbone='vit_tiny_patch16_224', patch_size=8, embed_dim=32, depth=2, num_heads=2,
           global_size=16, local_size=8, drop_path_rate=0.2)
CONV = dict(backbone='test_resnet', patch_size=None, embed_dim=None, depth=None, num_heads=None,
            global_size=32, local_size=16, drop_path_rate=0.)
RATES = dict(adamw=4e-3, sgd=0.3, lars=10.)
SHAPES = open_images(Shapes(32, size=32))


def neighbours(run):
    found = evaluate_knn(run.teacher.backbone, run.source, run.source, run.config.global_size)
    return dict(knn_teacher=found[20].top1)


class Stopped(Learner):
    "A run that is asked to stop in its step number `end`"
    def views(self):
        for step, views in enumerate(super().views(), self.step + 1):
            if step == self.end: signal.raise_signal(signal.SIGUSR1)
            yield views


def live(config, stops, folder):
    "Log and learner of a run that is stopped and taken up again after each of the stops"
    folder.mkdir()
    for begin, end in zip((0, *stops), (*stops, 12)):
        run = Stopped(config, SHAPES)
        if begin: run.load_state(load_checkpoint(folder/'checkpoint.pt'))
        run.end = end
        rows = run.fit(folder, evaluate=neighbours, report=lambda line: None)
        assert run.step == end
    return rows, run


def leaves(value):
    "The tensors and numbers of a state, in the order of their places"
    if isinstance(value, dict): value = list(value.values())
    if not isinstance(value, (list, tuple)): return [value]
    return [leaf for item in value for leaf in leaves(item)]


def check_life(config, tmp_path):
    "A whole life and the same in legs are equal bit for bit, the weights finite and moved"
    (rows, whole), (again, resumed) = (live(config, stops, tmp_path/name) for name, stops in
                                       (('whole', ()), ('legs', STOPS)))
    a, b = (run.parts() | dict(seconds=0) for run in (whole, resumed))
    for name in a:
        for x, y in zip(leaves(a[name]), leaves(b[name]), strict=True):
            assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y, name
    pace = 'images_per_second', 'waiting'
    for row in rows + again:
        for name in pace: del row[name]
    assert rows == again
    start, last = Learner(config, SHAPES).student.head.last_layer, whole.student.head.last_layer
    for name, param in whole.student.named_parameters(): assert param.isfinite().all(), name
    for name, param in last.named_parameters():
        moved = not torch.equal(param, getattr(start, name))
        assert moved == param.requires_grad, f'{name} was frozen for one epoch only'
    if config.precision == 'float16': return  # its scaler looks for a factor, and leaves steps out
    assert not whole.skipped and [r['step'] for r in rows if 'knn_teacher' in r] == [4, 8]


FACTORS = dict(
    net=('vit', 'conv'), optimizer=CHOICES['optimizer'], target=CHOICES['target'],
    teacher_rule=CHOICES['teacher_rule'], loss=CHOICES['loss'],
    precision=('float32', 'float64', 'bfloat16', 'float16'), accumulate=(1, 2), loss_chunks=(1, 2),
    use_bn=(False, True), norm_last_layer=(True, False), l2_bottleneck=(True, False),
    predictor=(0, 16), recompute=(False, True), clip_grad=(3., 0.))
# what is refused, and half precision for convolutions, whose kernels on CPUs cannot be relied on
FORBIDDEN = [dict(loss='mse', target='sinkhorn'), dict(loss='mse', target='softmax_batch'),
             dict(net='conv', precision='bfloat16'), dict(net='conv', precision='float16')]


def allowed(row): return not any(bad.items() <= row.items() for bad in FORBIDDEN)


def pairwise(factors):
    "Rows of settings in which every allowed pair of values occurs; each row takes what adds most"
    pairs = [dict(a) | dict(b) for x, y in itertools.combinations(factors, 2)
             for a in [[(x, v)] for v in factors[x]] for b in [[(y, w)] for w in factors[y]]]
    missing, rows = [pair for pair in pairs if allowed(pair)], []
    while missing:
        row = dict(missing[0])
        for name in [name for name in factors if name not in row]:
            fitting = [row | {name: value} for value in factors[name]]
            gain = lambda wider: sum(pair.items() <= wider.items() for pair in missing)
            row = max(filter(allowed, fitting), key=gain)
        rows.append(row)
        missing = [pair for pair in missing if not pair.items() <= row.items()]
    return rows


ROWS = pairwise(FACTORS)


@pytest.mark.parametrize('row', ROWS, ids=lambda row: '-'.join(map(str, row.values())))
def test_every_pair_of_settings_lives_to_its_end(row, tmp_path):
    settings = {name: value for name, value in row.items() if name != 'net'}
    network = CONV if row['net'] == 'conv' else VIT
    check_life(make_config('tiny', **LIFE | HEAD | network | settings,
                           lr=RATES[row['optimizer']] * 32), tmp_path)


def shrunk(name):
    "A shipped recipe with few steps and a small network; its other settings are its own"
    recipe = TrainConfig(**RECIPES[name])
    life = LIFE | dict(warmup_teacher_temp=recipe.warmup_teacher_temp)
    if not recipe.warmup_teacher_temp_epochs: life['warmup_teacher_temp_epochs'] = 0
    patch = recipe.patch_size or 16
    life |= dict(n_local=min(2, recipe.n_local))
    vit = dict(embed_dim=48, depth=1, num_heads=3, global_size=2 * patch, local_size=patch)
    small = dict(resnet50='resnet10t', cifar10_gpu='test_resnet')
    conv = dict(backbone=small.get(name, recipe.backbone), global_size=32, local_size=16)
    return life | HEAD | (vit if recipe.backbone.startswith('vit') else conv)


@pytest.mark.parametrize('name', RECIPES)
def test_a_shipped_recipe_lives_through_all_its_phases(name, tmp_path):
    check_life(make_config(name, **shrunk(name)), tmp_path)


def words(settings):
    "Settings as a user types them"
    return [word for name, value in settings.items()
            for word in (f'--{name.replace("_", "-")}', str(value))]


@pytest.mark.parametrize('name', RECIPES)
def test_a_shipped_recipe_ends_with_its_results(name, images, tmp_path):
    settings = shrunk(name) | dict(epochs=1.5, batch_size=16, workers=0)
    settings['warmup_teacher_temp_epochs'] = min(1.5, settings['warmup_teacher_temp_epochs'])
    settings['backbone'] = RECIPES[name].get('backbone', TrainConfig.backbone)
    if name == 'resnet50': settings['n_local'] = 1
    if name == 'cifar10_gpu': settings['global_size'] = 16
    main(['--recipe', name, '--data', str(images), '--out', str(tmp_path/'run'), *words(settings)])
    summary = json.loads((tmp_path/'run'/'summary.json').read_text())
    assert summary['steps'] == 8 and summary['skipped'] == 0
    assert set(summary['knn_teacher']) == {'10', '20', '100', '200'}
    figures = {path.name for path in (tmp_path/'run').glob('*.png')}
    vit = TrainConfig(**RECIPES[name]).backbone.startswith('vit')
    assert figures == {'views.png', 'curves.png'} | ({'attention.png'} if vit else set())


REFUSED = [
    (dict(loss='mse', target='sinkhorn'), 'which kind mse cannot compare'),
    (dict(loss='mse', target='softmax_batch'), 'which kind mse cannot compare'),
    (dict(fsdp=True, optimizer='sgd'), 'fsdp does not work with sgd'),
    (dict(fsdp=True, optimizer='lars'), 'fsdp does not work with lars'),
    (dict(target='sinkhorn', accumulate=8), 'one at a time'),
    (dict(target='softmax_batch', accumulate=8), 'one at a time'),
    (dict(use_bn=True, accumulate=8), 'one at a time'),
    (dict(optimizer='lamb'), 'which is not known'),
    (dict(freeze_last_layer=4), 'less than freeze_last_layer'),
    (dict(warmup_teacher_temp_epochs=4), 'less than warmup_teacher_temp_epochs')]


@pytest.mark.parametrize('settings,sentence', REFUSED, ids=lambda x: str(x)[:40])
def test_what_cannot_be_combined_is_refused_at_the_start(settings, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        Learner(make_config('tiny', **LIFE | HEAD | VIT | settings), SHAPES)
    assert '\n' not in str(caught.value) and len(str(caught.value)) < 250
