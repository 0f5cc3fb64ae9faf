"Stages of gpu.py that prove: the same numbers on the device as on a CPU; runs that survive."
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict
from functools import cache
from itertools import islice

import torch
from gpu import HERE, LeftOut

from dino_nb.augment import ViewSettings, crop_views_batched, sample_views
from dino_nb.core import generator
from dino_nb.data import ImageSource
from dino_nb.dist import World
from dino_nb.features import evaluation_mode
from dino_nb.knn import knn_accuracy, knn_search
from dino_nb.learner import Learner, train_step
from dino_nb.photometric import IMAGENET_STD, photometric_views
from dino_nb.settings import make_config

CPU = torch.device('cpu')


def pictures(n=64, size=48):
    "Return smooth random images (n, 3, size, size) uint8."
    noise = torch.rand(n, 3, 7, 7, generator=generator(0, 'gpu pictures'))
    large = torch.nn.functional.interpolate(noise, (size, size), mode='bicubic').clamp(0, 1)
    return (255 * large).to(torch.uint8)


def small_run(device, toy, **settings):
    "Return a small run on a device, at its second step, where the learning rate is not 0."
    sizes = dict(batch_size=32, n_local=4, out_dim=1024)
    if toy: sizes = dict(batch_size=4, out_dim=64, embed_dim=48, depth=1, num_heads=2)
    config = make_config('tiny', **sizes | dict(freeze_last_layer=0, compile=False) | settings)
    images = pictures()
    run = Learner(config, ImageSource(images, [str(i) for i in range(len(images))]),
                  World(device=torch.device(device)))
    run.step = 1
    return run


def some_views(run, epoch=0):
    "Return views of the first images, made on the CPU, where the run computes."
    images = pictures()[:run.config.batch_size]
    sizes = [images.shape[2:]] * len(images)
    params = sample_views(run.config, 0, epoch, range(len(images)), sizes)
    views = photometric_views(crop_views_batched(images, params, run.config), params)
    dtype = torch.float64 if run.dtype == torch.float64 else torch.float32
    return [group.to(run.device, dtype) for group in views]


def after_a_step(run):
    "Return loss, gradients, center and both networks after one step, on the CPU in float64."
    loss = train_step(run, some_views(run), measure=True)['loss']
    found = {'loss': loss, 'center': run.loss_fn.center.center}
    found |= {f'gradient {n}': p.grad for n, p in run.student.named_parameters()
              if p.grad is not None}
    for name, network in (('teacher', run.teacher), ('student', run.student)):
        found |= {f'{name} {n}': p for n, p in network.named_parameters()}
    return {name: value.detach().cpu().double() for name, value in found.items()}


def apart(found, truth):
    "Return the relative difference of loss, center, gradients (the worst) and both networks."
    if found.keys() != truth.keys(): raise AssertionError('other parameters have gradients')
    off = {name: ((found[name] - value).norm(), value.norm()) for name, value in truth.items()}
    kinds, worst = defaultdict(list), {}
    for name, pair in off.items(): kinds[name.split()[0]].append(pair)
    for kind, pairs in kinds.items():
        if kind == 'gradient':
            worst[kind] = max((d / v.clamp(min=1e-30)).item() for d, v in pairs)
            continue
        off, whole = (sum(part**2 for part in parts) for parts in zip(*pairs))
        worst[kind] = (off / whole).sqrt().item()
    return worst


def right(args):
    "Yield the checks of the step, the views and k-NN against the CPU."
    device, toy = torch.device(args.device), args.toy
    torch.backends.cudnn.allow_tf32 = False  # float32 is meant to be float32 here

    @cache
    def truth(): return after_a_step(small_run(CPU, toy, precision='float64'))

    def same_step(precision, allowed):
        run = small_run(device, toy, precision=precision)
        run.scaler = torch.amp.GradScaler(device.type, 2.**10, enabled=precision == 'float16')
        worst = apart(after_a_step(run), truth())
        return worst | dict(ok=max(worst.values()) <= allowed and not run.flags[-1])

    yield 'step, float64', lambda: same_step('float64', 1e-9)
    yield 'step, float32', lambda: same_step('float32', 1e-4)
    yield 'step, bfloat16', lambda: same_step('bfloat16', 0.1)
    yield 'step, float16 with scaler', lambda: same_step('float16', 0.05)
    for precision in ('float16', 'bfloat16'):
        yield f'not finite, {precision}', lambda: left_out(device, toy, precision)
    yield 'color', lambda: same_color(device, toy)
    yield 'crops', lambda: same_crops(device)
    yield 'k-NN', lambda: same_neighbours(device, toy)
    yield 'k-NN with ties, k above N', lambda: same_neighbours(device, toy, copies=3, n=60)
    yield 'views made ahead', lambda: same_stream(device, toy)


def compiled(args):
    "Yield the checks that compile first, which takes a minute of a slow core."
    torch.backends.cudnn.allow_tf32 = False
    yield 'compiled', lambda: same_compiled(torch.device(args.device), args.toy)
    yield 'no waiting in a step', lambda: never_waits(args)


def left_out(device, toy, precision):
    "A step whose gradients are not finite changes no weight; the next one does."
    run = small_run(device, toy, precision=precision)
    before = [p.detach().clone() for p in run.student.parameters()]
    views, scale = some_views(run), run.scaler.get_scale()
    spoiled = [views[0].clone(), *views[1:]]
    spoiled[0][0] = torch.inf
    train_step(run, spoiled)
    unchanged = all(torch.equal(a, b) for a, b in zip(before, run.student.parameters()))
    lowered = run.scaler.get_scale() / scale
    for _ in range(20):  # until the scaler has found a factor
        train_step(run, views)
        if not run.flags[-1]: break
    changed = any(not torch.equal(a, b) for a, b in zip(before, run.student.parameters()))
    flags = [bool(flag) for flag in run.flags]
    return dict(flags=str(flags), scale_after=lowered,
                ok=unchanged and changed and flags[0] and not flags[-1])


def same_color(device, toy):
    "Colors differ by no more than one level of 255."
    settings = ViewSettings(**dict(global_size=64, local_size=32) if toy else {}, n_local=4,
                            blur_prob=(1., 0.5, 0.5), solarize_prob=(0.5, 0.5, 0.5))
    n = 8 if toy else 32
    images = pictures(n, 96)
    params = sample_views(settings, 0, 0, range(n), [(96, 96)] * n)
    crops = crop_views_batched(images, params, settings)
    std = torch.tensor(IMAGENET_STD).view(3, 1, 1)
    there = photometric_views([group.to(device) for group in crops], params)
    worst = max(((a.cpu() - b) * std).abs().max().item()
                for a, b in zip(there, photometric_views(crops, params)))
    return dict(levels=255 * worst, ok=255 * worst <= 1.01)


def same_crops(device):
    "Crops differ by no more than one level, and rarely."
    settings, images = ViewSettings(global_size=64, local_size=32), pictures(32, 96)
    params = sample_views(settings, 0, 0, range(32), [(96, 96)] * 32)
    pairs = zip(crop_views_batched(images.to(device), params, settings),
                crop_views_batched(images, params, settings))
    off = torch.cat([(a.cpu().int() - b.int()).abs().flatten() for a, b in pairs])
    return dict(levels=off.max().item(), share=(off > 0).double().mean().item(),
                ok=off.max() <= 1)


def same_neighbours(device, toy, copies=1, n=2000):
    "Neighbours and accuracy on the device are those of float64 on the CPU."
    n = min(n, 300) if toy else n
    def features(name, n):
        labels = torch.randint(10, (n,), generator=generator(0, name))
        centers = torch.randn(10, 64, generator=generator(0, 'centers'))
        return centers[labels] + 2 * torch.randn(n, 64, generator=generator(1, name)), labels
    (bank, labels), (test, wanted) = features('bank', n), features('test', 500)
    bank, labels, k = bank.repeat(copies, 1), labels.repeat(copies), 200
    found, rows = (t.cpu() for t in knn_search(bank.to(device), test.to(device), k, 'torch'))
    unit = [t.double() / t.double().norm(dim=1, keepdim=True) for t in (bank, test)]
    cosines = unit[1] @ unit[0].T
    exact = cosines.topk(min(k, len(bank))).values
    value = (found - exact).abs().max().item()
    named = (cosines.gather(1, rows) - exact).abs().max().item()
    twice = any(len(row.unique()) < len(row) for row in rows)
    there = knn_accuracy(bank.to(device), labels, test.to(device), wanted, backend='torch')
    here = knn_accuracy(bank, labels, test, wanted, backend='torch')
    accuracy = max(abs(there[k].top1 - here[k].top1) for k in here)
    return dict(cosines=value, rows=named, accuracy=accuracy, neighbours=rows.shape[1],
                ok=value < 1e-5 and named < 1e-5 and not twice and accuracy <= 1 / len(test))


def same_stream(device, toy):
    "Views that are made ahead, beside training, are those that are made when asked."
    run, worst = small_run(device, toy, precision='float32'), 0.
    busy = torch.randn(2048, 2048, device=device) if not toy else torch.randn(64, 64)
    for step, (views, _) in enumerate(islice(run.views(), 12), run.step):
        for _ in range(20): busy = (busy @ busy).clamp(-1, 1)
        got = [group.clone() for group in views]
        epochs, rows = zip(*run.sampler.batch(step))
        params = sample_views(run.config, run.config.seed, epochs, rows, [(48, 48)] * len(rows))
        images = run.source.images[list(rows)]
        wanted = photometric_views(crop_views_batched(images, params, run.config), params)
        share = [((a.cpu() - b).abs() > 0.1).double().mean().item() for a, b in zip(got, wanted)]
        worst = max(worst, *share)
    return dict(wrong_pixels=worst, ok=worst < 1e-3)


def same_compiled(device, toy):
    "Compiled networks give the same step; their number of graphs does not grow."
    if toy: raise LeftOut('compiled on cards only, where it is the default')
    from torch._dynamo.utils import counters
    plain = after_a_step(small_run(device, toy, precision='float32'))
    begin = time.monotonic()
    run = small_run(device, toy, precision='float32', compile=True)
    worst = apart(after_a_step(run), plain)
    seconds, graphs = time.monotonic() - begin, counters['stats']['unique_graphs']
    for epoch in range(1, 4): train_step(run, some_views(run, epoch))
    with evaluation_mode(run.teacher.backbone):
        for n in (3, 5, 7): run.teacher.backbone(some_views(run)[0][:n])
    more = counters['stats']['unique_graphs'] - graphs
    return worst | dict(graphs=graphs, more=more, compile_seconds=seconds,
                        ok=max(worst.values()) < 1e-3 and not more)


def never_waits(args):
    if args.toy: raise LeftOut('only a card can be waited for')
    import check_sync
    return dict(steps=check_sync.steps_without_waiting())


# Whole runs, in processes of their own -------------------------------------------------------

CODE = '''
import sys, torch
sys.argv[0] = 'dino_train'
{before}
from dino_nb.train import main
main()
'''
DETERMINISTIC = 'torch.use_deterministic_algorithms(True)'
NO_MEMORY = '''
from dino_nb import loop
step = loop.train_step
def limited(run, *args):
    if run.step == 25:
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(1e-5)
    return step(run, *args)
loop.train_step = limited
'''


class Job:
    "A run of dino_train in a folder."
    def __init__(self, args, name, before='', words=(), launcher=()):
        self.args, self.name, self.folder = args, name, args.scratch/'runs'/name
        self.before, self.words, self.launcher, self.said = before, words, launcher, ''

    def start(self):
        begin = ['-c', CODE.format(before=self.before)]
        if self.launcher: begin = [*self.launcher, str(HERE.parent/'dino_nb'/'train.py')]
        command = [sys.executable, *begin, *common_words(self.args), '--out', str(self.folder),
                   *self.words]
        paths = [str(HERE.parent), *filter(None, [os.environ.get('PYTHONPATH')])]
        env = os.environ | dict(PYTHONPATH=os.pathsep.join(paths), OMP_NUM_THREADS='1',
                                CUBLAS_WORKSPACE_CONFIG=':4096:8')
        self.process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True,
                                        stderr=subprocess.STDOUT)
        return self

    def wait(self):
        self.said += self.process.communicate()[0]
        return self.process.returncode

    def finish(self):
        "Wait for an end without an error."
        if self.wait(): raise AssertionError(f'{self.name}: {self.said[-1500:]}')
        return self

    def kill_at(self, step):
        "Kill the run once its log names a step."
        while self.process.poll() is None:
            if last_step(self.folder) >= step: self.process.send_signal(signal.SIGKILL); break
            time.sleep(0.02)
        self.wait()
        if self.process.returncode != -signal.SIGKILL: raise AssertionError(self.said[-1500:])
        return self

    def state(self):
        return torch.load(self.folder/'checkpoint.pt', map_location='cpu', weights_only=True)


def last_step(folder):
    "Return the last step in a run's log."
    try: lines = (folder/'log.jsonl').read_text().splitlines()
    except OSError: return 0
    try: return json.loads(lines[-1])['step'] if lines else 0
    except ValueError: return 0


def common_words(args):
    "Return what all runs are started with: 60 steps with a k-NN in between."
    epochs, steps, batch, workers = (4, 4, 8, 0) if args.toy else (4, 10, 32, 2)
    knn = 0 if args.toy else epochs // 2
    words = (f'--data {args.scratch}/data --recipe tiny --epochs {epochs} --warmup-epochs 1 '
             f'--knn-every {knn} --batch-size {batch} --workers {workers} '
             f'--log-every {steps} --checkpoint-steps {steps} --device {args.device}')
    return [*words.split(), *('--embed-dim 48 --depth 1 --num-heads 2'.split() if args.toy else [])]


def make_data(folder, n):
    "Write n images in each of two classes."
    from torchvision.transforms.functional import to_pil_image
    for i, image in enumerate(pictures(2 * n)):
        path = folder/('ab'[i % 2])/f'{i}.jpg'
        path.parent.mkdir(parents=True, exist_ok=True)
        to_pil_image(image).save(path)


def difference(one, other):
    "Return the largest difference between two states, and whether they are equal bit for bit."
    def tensors(value, name=''):
        if isinstance(value, torch.Tensor): yield name, value
        elif isinstance(value, dict):
            for key, part in value.items(): yield from tensors(part, f'{name} {key}')
    pairs = [(a, b) for (_, a), (_, b) in zip(tensors(one), tensors(other), strict=True)]
    worst = max((a.double() - b.double()).abs().max().item() for a, b in pairs if a.numel())
    return dict(difference=worst, equal=all(torch.equal(a, b) for a, b in pairs))


def runs(args):
    "Yield the checks of whole runs; all of them start at once."
    make_data(args.scratch/'data', 32 if args.toy else 270)
    middle = 12 if args.toy else 30
    eager, torchrun = ('--no-compile',), ('-m', 'torch.distributed.run', '--standalone',
                                          '--nproc_per_node=1')
    whole = Job(args, 'whole', DETERMINISTIC, eager).start()
    broken = Job(args, 'broken', DETERMINISTIC, eager).start()
    if not args.toy:
        torched = Job(args, 'torchrun', words=eager, launcher=torchrun).start()
        free = [Job(args, f'free{i}', words=eager).start() for i in range(2)]
        compiled = [Job(args, f'compiled{i}').start() for i in range(2)]
        crowded = Job(args, 'crowded', NO_MEMORY, eager).start()
        words = *eager, '--fsdp', '--recompute'
        split = Job(args, 'split', words=words, launcher=torchrun).start()

    def resumed():
        broken.kill_at(middle)
        at = last_step(broken.folder)
        broken.start().finish()
        if 'going on at step' not in broken.said: raise AssertionError(broken.said[-1500:])
        found = difference(whole.finish().state(), broken.state())
        return dict(killed_at=at) | found | dict(ok=found['equal'])
    yield 'killed and resumed', resumed

    def without():
        if args.toy: raise LeftOut('a CPU adds in one order')
        return difference(*(job.finish().state() for job in free))
    yield 'two runs, not deterministic', without

    def out_of_memory():
        if args.toy: raise LeftOut('only a card runs out of memory alone')
        status = crowded.wait()
        said = [text for text in crowded.said.splitlines() if text.startswith('dino_train:')]
        return dict(status=status, step=crowded.state()['step'], sentence=' '.join(said)[:150],
                    ok=status == 1 and len(said) == 1 and crowded.state()['step'] >= 20
                    and 'Traceback' not in crowded.said)
    yield 'out of memory', out_of_memory

    def launched():
        if args.toy: raise LeftOut('tests/ do it')
        torched.finish()
        return dict(ok=(torched.folder/'summary.json').exists())
    yield 'torchrun, one process', launched

    def fsdp():
        if args.toy: raise LeftOut('tests/ do it')
        split.finish()
        return dict(ok=(split.folder/'summary.json').exists())
    yield 'fsdp, recompute', fsdp

    def compiled_runs():
        if args.toy: raise LeftOut('compiled on cards only')
        found = difference(*(job.finish().state() for job in compiled))
        summary = json.loads((compiled[0].folder/'summary.json').read_text())
        return found | dict(verdict=summary['verdict'])
    yield 'two runs as shipped', compiled_runs
    shutil.rmtree(args.scratch, ignore_errors=True)
