"Stages of gpu.py that measure: the machine, the step, a whole run, a record."
import re
import shutil
import statistics
import tarfile
import time
from collections import defaultdict
from itertools import islice

import common
import input as inputs
import step as steps
import torch
from gpu import LeftOut
from profile_step import matrix_peak
from torch.utils.flop_counter import FlopCounterMode

from dino_nb.backbone import set_fused_attention
from dino_nb.core import default_dtype
from dino_nb.data import find_splits, open_images
from dino_nb.dist import World
from dino_nb.knn import evaluate_knn, pixel_knn
from dino_nb.learner import build_student, train_step
from dino_nb.loop import Learner
from dino_nb.settings import make_config
from dino_nb.views import MultiCrop, hold_images, to_views
from dino_nb.workers import read_ahead


def seconds_of(work, device, repeats, warmups=2):
    "Return the median seconds of a call, and how far its quarters are apart, as a share."
    for _ in range(warmups): work()
    times = sorted(common.measure(work, device)[0] for _ in range(repeats))
    middle = statistics.median(times)
    return middle, (times[-1 - len(times) // 4] - times[len(times) // 4]) / middle


def inventory(args):
    "Yield what the machine is, and what it can do at most."
    device, size = torch.device(args.device), 128 if args.toy else 8192
    def programs():
        import timm
        found = dict(torch=torch.__version__, timm=timm.__version__,
                     threads=torch.get_num_threads())
        if args.toy: return found
        facts = torch.cuda.get_device_properties(device)
        return found | dict(card=facts.name, memory_gib=facts.total_memory / 2**30,
                            processors=facts.multi_processor_count, cuda=torch.version.cuda,
                            cudnn=torch.backends.cudnn.version())
    yield 'programs', programs
    for name in ('bfloat16', 'float32'):
        yield f'{name} product', lambda: dict(
            tflops=matrix_peak(device, getattr(torch, name), size) / 1e12)

    def copies():
        n = 2**22 if args.toy else 2**30
        here, there = (torch.empty(n, dtype=torch.uint8, device=device).random_() for _ in 'ab')
        inside = 2 * n / seconds_of(lambda: there.copy_(here), device, 5)[0]
        host = torch.empty(n // 4, dtype=torch.uint8, pin_memory=not args.toy)
        send = lambda: here[:n // 4].copy_(host, non_blocking=True)
        sent = n / 4 / seconds_of(send, device, 5)[0]
        return dict(copy_gb_s=inside / 1e9, to_device_gb_s=sent / 1e9)
    yield 'copies', copies


# The step ------------------------------------------------------------------------------------

class Toy:
    "What the step is shrunk to on a CPU."
    batch, settings = 2, dict(global_size=32, local_size=16, patch_size=8, embed_dim=32, depth=2,
                              num_heads=2, hidden_dim=64, bottleneck_dim=32, out_dim=1024)


def shipped(args, batch, compiled):
    "Return a run of ViT-S/16 as dino_train would have it, and views of noise."
    device, small = torch.device(args.device), Toy.settings if args.toy else {}
    sizes = {name: small[name] for name in ('global_size', 'local_size') if name in small}
    views = steps.random_views(batch, device, **sizes)
    return steps.Shipped(views, default_dtype(device), compiled, **small).run, views


def timed(work, args, batch, warm=3):
    "Return images/s, its spread and the memory that was reserved, recorded kernels' included."
    device, begin = torch.device(args.device), time.monotonic()
    for _ in range(warm): work()
    common.synchronize(device)
    first = time.monotonic() - begin
    if not args.toy: torch.cuda.reset_peak_memory_stats()
    n = 1 if args.toy else 5
    def several():
        for _ in range(n): work()
    middle, spread = seconds_of(several, device, 2 if args.toy else 7, 0)
    found = dict(images_per_s=n * batch / middle, spread=spread, warm_s=first)
    if not args.toy: found['peak_gib'] = torch.cuda.max_memory_reserved() / 2**30
    return found


def step(args):
    "Yield the published structure and ours, timed in turn on the same machine."
    device, batch = torch.device(args.device), Toy.batch if args.toy else 64
    dtype = default_dtype(device)
    peak = matrix_peak(device, dtype, 128 if args.toy else 8192)
    known = {}

    def published():
        if args.toy: raise LeftOut('step.py times it on CPUs')
        views = steps.random_views(batch, device)
        weights = steps.MultiCrop(steps.ViT(), steps.Head(384, steps.K)).state_dict()
        side = steps.Step(weights, views, torch.float16)
        known['published'] = found = timed(side.step, args, batch)
        return found
    yield 'published structure, fp16', published

    def ours(compiled, fused=True, channels_last=False, batch=batch):
        run, views = shipped(args, batch, compiled)
        for network in (run.student, run.teacher):
            set_fused_attention(network, fused)
            if channels_last: network.backbone.patch_embed.to(memory_format=torch.channels_last)
        found = timed(lambda: train_step(run, views), args, batch)
        if not compiled and 'flops' not in known and fused:
            with FlopCounterMode(display=False) as counter: train_step(run, views)
            known['flops'] = counter.get_total_flops() / batch
        if 'flops' in known:
            found['share_of_peak'] = found['images_per_s'] * known['flops'] / peak
        if 'published' in known and batch == 64:
            found['times_published'] = found['images_per_s'] / known['published']['images_per_s']
            found['share_of_memory'] = found['peak_gib'] / known['published']['peak_gib']
        if compiled: known['compiled', batch] = run, views
        return found

    def larger(batch):
        if args.toy: raise LeftOut('larger batches are for cards')
        torch._dynamo.reset()  # or graphs of all sizes count together, of which there may be eight
        found = ours(True, batch=batch)
        del known['compiled', batch]
        return found
    yield 'ours, eager', lambda: ours(False)
    yield 'ours, compiled', lambda: ours(not args.toy)

    def kernels():
        if args.toy: raise LeftOut('kernels are those of cards')
        known['kernels'] = kernel_seconds(lambda: train_step(*known['compiled', batch]))
        groups = defaultdict(float)
        for kernel, seconds in known['kernels'].items(): groups[kind_of(kernel)] += seconds
        return milliseconds(groups, 10) | dict(all=1000 * sum(groups.values()))
    yield 'milliseconds by kernel', kernels
    if not args.toy:
        yield 'longest kernels, milliseconds', lambda: milliseconds(known['kernels'], 30)

    def host():
        if args.toy: raise LeftOut('on a CPU host and device are one')
        run, views = known['compiled', batch]
        common.synchronize(device)
        begin = time.perf_counter()
        for _ in range(3): train_step(run, views)
        ran = time.perf_counter() - begin
        common.synchronize(device)
        return dict(host_ms=1000 * ran / 3, step_ms=1000 * (time.perf_counter() - begin) / 3)
    yield 'host', host
    if not args.toy: known.pop(('compiled', batch), None)
    yield 'ours, compiled, B = 256', lambda: larger(256)
    yield 'ours, eager, plain attention', lambda: ours(False, fused=False)
    yield 'ours, eager, channels last', lambda: ours(False, channels_last=True)
    yield 'ours, compiled, B = 512', lambda: larger(512)


KERNELS = {'attention': 'flash|fmha|attention|sdpa|mem_eff',
           'matrix products': 'gemm|cutlass|nvjet|cublas|wgrad|dgrad|xmma', 'compiled reductions': 'triton_(red|per)',
           'compiled others': 'triton', 'copies and casts': 'memcpy|memset|copy|cast|CatArray',
           'optimizer, teacher, clipping': 'multi_tensor|foreach|adam|lpnorm',
           'softmax': 'softmax', 'layer norm': 'layer_norm|layernorm|GammaBeta',
           'sums': 'reduce', 'element by element': 'elementwise'}


def kind_of(kernel):
    "Return the group that a kernel's name tells."
    return next((group for group, words in KERNELS.items() if re.search(words, kernel, re.I)),
                'others')


def milliseconds(seconds, n):
    "Return the largest n of some seconds, in milliseconds."
    largest = sorted(seconds.items(), key=lambda pair: -pair[1])[:n]
    return {name[:80]: 1000 * value for name, value in largest}


def kernel_seconds(work, repeats=3):
    "Return the seconds of a call by kernel."
    from torch.profiler import ProfilerActivity, profile
    work()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as recorded:
        for _ in range(repeats): work()
        torch.cuda.synchronize()
    found = defaultdict(float)
    for event in recorded.key_averages():
        if event.device_type.name == 'CUDA' and event.self_device_time_total:
            found[event.key] += event.self_device_time_total / 1e6 / repeats
    return found


# A whole run ---------------------------------------------------------------------------------

def photographs(args, n):
    "Return a source of n JPEGs of 500 x 375, copies of the given or of made ones."
    folder = args.scratch/'photos'
    folder.mkdir()
    paths = inputs.photographs(args.images) if args.images else []
    if not paths: paths = inputs.synthesised(args.scratch, 2 if args.toy else 64)
    for i in range(n): shutil.copy(paths[i % len(paths)], folder/f'{i:05}.jpg')
    return open_images(folder)


def whole(args):
    "Yield what a run on photographs reaches, from files to the step."
    device, batch = torch.device(args.device), Toy.batch if args.toy else 64
    source = photographs(args, 4 * batch if args.toy else 16 * batch)
    small = Toy.settings if args.toy else {}
    def learner(**settings):
        return Learner(make_config('vit_s16_100ep', **dict(
            batch_size=batch, freeze_last_layer=0, compile=not args.toy) | small | settings),
            source, World(device=device))

    def color():
        run = learner(compile=False)
        crops = MultiCrop(source, run.config).batch([(0, i) for i in range(batch)])
        if not args.toy: crops = crops._replace(crops=[c.pin_memory() for c in crops.crops])
        seconds, spread = seconds_of(lambda: to_views(crops, device), device, 5)
        common.synchronize(device)
        begin = time.perf_counter()
        to_views(crops, device)
        found = dict(images_per_s=batch / seconds, spread=spread,
                     host_ms=1000 * (time.perf_counter() - begin))
        if not args.toy:
            kernels = kernel_seconds(lambda: to_views(crops, device))
            found['device_ms'] = 1000 * sum(kernels.values())
        return found
    yield 'color alone', color

    def read_only(workers):
        run = learner(compile=False)
        read = MultiCrop(source, run.config).batch
        stream = read_ahead(read, islice(run.sampler, 10**6), workers, pin=not args.toy)
        return rate(stream, batch, args, 2 if args.toy else 40)
    yield 'files to crops, all cores', lambda: read_only(0 if args.toy else 16)

    known = {}
    def trained(seconds=10, **settings):
        run = known.setdefault('run', learner(drop_path_rate=0.))
        for name, value in settings.items(): setattr(run.config, name, value)
        stream, warm = iter(run.views()), 1 if args.toy else 12
        for n in range(3 if args.toy else 10**6):
            if n == warm:
                common.synchronize(device)
                begin, waited, worked, count = time.perf_counter(), 0., 0., 0
            if n > warm and time.perf_counter() - begin > seconds: break
            mark = time.perf_counter()
            views, _ = next(stream)
            if n >= warm: waited += time.perf_counter() - mark
            mark = time.perf_counter()
            train_step(run, views)
            run.step += 1
            if n >= warm: worked += time.perf_counter() - mark; count += 1
            if n % 50 == 49: common.synchronize(device)  # as at every line of a log
        common.synchronize(device)
        passed = time.perf_counter() - begin
        stream.close()
        return dict(images_per_s=count * batch / passed, waiting=waited / passed, steps=count,
                    step_host_ms=1000 * worked / count)
    for workers in (0,) if args.toy else (16, 8):
        yield f'run, {workers} workers', lambda: trained(workers=workers)
    yield 'run, images on the device', lambda: trained(cache='device')


def rate(stream, batch, args, n):
    "Return how many images come in a second."
    stream = iter(stream)
    for _ in range(n // 4 + 1): next(stream)
    begin, count = time.perf_counter(), 0
    while count < n and time.monotonic() < args.deadline: next(stream); count += 1
    passed = time.perf_counter() - begin
    stream.close()
    return dict(images_per_s=count * batch / passed)


# A record ------------------------------------------------------------------------------------

def cifar(args):
    "Return the images to train on and to test on, in memory."
    if not args.cifar or not args.cifar.exists():
        raise LeftOut('no CIFAR-10 here; --cifar names a folder or a tar')
    if args.cifar.is_file():
        with tarfile.open(args.cifar) as tar: tar.extractall(args.scratch/'cifar', filter='data')
        args.cifar = next((args.scratch/'cifar').glob('**/train')).parent
    found = find_splits(args.cifar)
    for source in found: hold_images(source, 0 if args.toy else 16)
    return found


def record(args):
    "Yield how far the rest of the minutes goes on CIFAR-10."
    device = torch.device(args.device)
    known = {}
    def images():
        known['train'], known['test'] = cifar(args)
        return {name: len(source) for name, source in known.items()}
    yield 'CIFAR-10', images
    if 'train' not in known: return
    train, test = known['train'], known['test']
    if args.toy: train, test = (s.subset(torch.arange(0, len(s), 500)) for s in (train, test))
    def learn():
        settings = dict(knn_every=0)
        if args.toy: settings |= dict(backbone='small_convnet', out_dim=64, batch_size=16)
        trial = Learner(make_config('cifar10_gpu', **settings), train, World(device=device))
        for n, (views, _) in enumerate(islice(trial.views(), 2 if args.toy else 60)):
            if n == (1 if args.toy else 30): common.synchronize(device); begin = time.monotonic()
            train_step(trial, views)
            trial.step += 1
        common.synchronize(device)
        seconds = (time.monotonic() - begin) / (1 if args.toy else 30)
        left = min(args.deadline - time.monotonic() - 15, 20 if args.toy else 1e9)
        n_steps = max(4, int(0.85 * left / seconds))
        epochs = n_steps / trial.steps_per_epoch
        config = make_config('cifar10_gpu', **settings | dict(
            epochs=epochs, warmup_epochs=0.1 * epochs, freeze_last_layer=0.05 * epochs,
            log_every=max(1, n_steps // 5)))
        run = Learner(config, train, World(device=device))
        def knn(network): return evaluate_knn(network, train, test, 32, 1., ks=(20, 200))
        begin = time.monotonic()
        rows = run.fit(report=print)
        common.synchronize(device)
        passed = time.monotonic() - begin
        teacher, student = knn(run.teacher.backbone), knn(run.student.backbone)
        untrained = knn(build_student(config).backbone.to(device))
        return dict(knn20_teacher=teacher[20].top1, knn200_teacher=teacher[200].top1,
                    knn20_student=student[20].top1, knn20_untrained=untrained[20].top1,
                    knn20_pixels=pixel_knn(train, test, ks=(20,))[20].top1, steps=run.n_steps,
                    epochs=epochs, seconds=passed, verdict=rows[-1]['verdict'],
                    images_per_s=run.n_steps * config.batch_size / passed)
    yield 'as far as the minutes go', learn
