"""One training step of ViT-S/16, 2 x 224 and 8 x 96 crops, K = 65536: from the structure of the
published code to dino_nb.train_step, one change at a time, each timed in turn with the baseline.

    python benchmarks/step.py --write          # all rungs, bf16 where the hardware has it
    python benchmarks/step.py --only shipped   # the rungs with this word in their name
"""
import argparse
import os

import changes
import common
import torch
from published import Head, MultiCrop, PairLoss, ViT, clip_in_a_loop, ema_in_a_loop

from dino_nb.core import autocast, default_dtype
from dino_nb.data import ImageSource
from dino_nb.dist import World
from dino_nb.learner import Learner, train_step
from dino_nb.loss import DINOLoss
from dino_nb.optim import clip_gradients, make_optimizer, param_groups
from dino_nb.settings import TrainConfig
from dino_nb.teacher import ema_update

K, N_LOCAL, LR, DECAY, MOMENTUM, TEACHER_TEMP, CLIP = 65536, 8, 1e-5, 0.04, 0.996, 0.04, 3.
ATTENTION = {'fused attention': changes.fused_attention,
             'baddbmm attention': changes.baddbmm_attention,
             'scaled queries': changes.scaled_queries}
LADDER = ['one log-softmax', 'foreach clipping', 'fused AdamW', 'foreach EMA',
          'teacher without graph', 'scaled queries', 'class token alone in last block']
VARIANTS = ['class token alone in last MLP', 'fused attention', 'baddbmm attention',
            'fused attention in the teacher', 'teacher in inference mode', 'channels last',
            'teacher in bf16', 'two autocast regions', 'packed sizes', 'lengths after the product',
            'denormals flushed', 'compiled loss', 'compiled backbone']
INSTEAD = [ATTENTION, ('class token alone in last MLP', 'class token alone in last block')]
# A rung of the ladder stands on all before it, a variant on the whole ladder; a variant in a row
# of INSTEAD takes the place of the others there.


def random_views(batch, device, global_size=224, local_size=96):
    "Return global and local crops of noise, crop-major."
    random = torch.Generator().manual_seed(0)
    return [torch.randn(n * batch, 3, size, size, generator=random).to(device)
            for n, size in ((2, global_size), (N_LOCAL, local_size))]


class Step:
    "The published structure with some changes."
    def __init__(self, weights, views, dtype, names=()):
        self.names, self.dtype, self.device = set(names), dtype, views[0].device
        self.views = [v for group, n in zip(views, (2, N_LOCAL)) for v in group.chunk(n)]
        self.student, self.teacher = self.network(weights), self.network(weights)
        self.teacher.requires_grad_(False)
        if 'fused attention in the teacher' in names:
            for block in self.teacher.backbone.blocks[:-1]:
                block.attn.forward = changes.fused_attention.__get__(block.attn)
        one = 'one log-softmax' in names
        self.loss = (DINOLoss(K) if one else PairLoss(K, 2 + N_LOCAL)).to(self.device)
        if 'compiled loss' in names: self.loss.compile()
        groups = param_groups(self.student)
        if 'fused AdamW' in names: self.optimizer = make_optimizer('adamw', groups)
        else: self.optimizer = torch.optim.AdamW(groups, foreach=False)
        for group, decay in zip(self.optimizer.param_groups, (DECAY, 0.)):
            group.update(lr=LR, weight_decay=decay)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=dtype == torch.float16)
        self.shadow = None  # a copy of the teacher whose products need no casts of weights
        if 'teacher in bf16' in names:
            self.shadow = self.network(weights).requires_grad_(False)
            for layer in self.shadow.modules():
                if isinstance(layer, torch.nn.Linear): layer.bfloat16()

    def network(self, weights):
        model = MultiCrop(ViT(), Head(384, K))
        model.load_state_dict(weights)
        for block in model.backbone.blocks:
            for name in ATTENTION.keys() & self.names:
                block.attn.forward = ATTENTION[name].__get__(block.attn)
        if 'class token alone in last block' in self.names:
            block.forward = changes.class_token_block.__get__(block)
        if 'class token alone in last MLP' in self.names:
            block.forward = changes.class_token_mlp.__get__(block)
        if 'lengths after the product' in self.names:
            model.head.last_layer = changes.LengthsAfter(model.head.last_layer)
        if 'packed sizes' in self.names: model.forward = changes.packed_forward.__get__(model)
        model.to(self.device)
        if 'channels last' in self.names:
            model.backbone.patch_embed.to(memory_format=torch.channels_last)
        if 'compiled backbone' in self.names: model.backbone.compile()
        return model

    def forward(self):
        "Return the student's and the teacher's logits."
        no_graph = [f'teacher {how}' in self.names
                    for how in ('without graph', 'in inference mode')]
        with autocast(self.device, self.dtype):
            with torch.inference_mode(no_graph[1]), torch.set_grad_enabled(not any(no_graph)):
                teacher = (self.shadow or self.teacher)(self.views[:2])
            if 'two autocast regions' not in self.names: return self.student(self.views), teacher
        with autocast(self.device, self.dtype): return self.student(self.views), teacher

    def step(self):
        if self.shadow:
            with torch.no_grad(): torch._foreach_copy_([*self.shadow.parameters()],
                                                       [*self.teacher.parameters()])
        student, teacher = self.forward()
        loss = self.loss(student, teacher, TEACHER_TEMP)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        if 'foreach clipping' in self.names: clip_gradients(self.student.parameters(), CLIP)
        else: clip_in_a_loop(self.student, CLIP)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if 'one log-softmax' in self.names: self.loss.update_center(teacher)
        ema = ema_update if 'foreach EMA' in self.names else ema_in_a_loop
        ema(self.teacher, self.student, MOMENTUM)
        return loss.detach()


class Shipped:
    "dino_nb.train_step, with the defaults of ViT-S/16."
    def __init__(self, views, dtype, compiled=None, **settings):
        self.views, batch = views, len(views[0]) // 2
        config = TrainConfig(**dict(
            batch_size=batch, drop_path_rate=0., freeze_last_layer=0, lr=0.01, compile=compiled,
            precision=str(dtype).split('.')[1], device=views[0].device.type) | settings)
        images = torch.zeros(4 * batch, 3, 8, 8, dtype=torch.uint8)
        source = ImageSource(images, [str(i) for i in range(len(images))])
        self.run = Learner(config, source, World(device=views[0].device))
        self.run.step, self.student = 1, self.run.student  # the first step has learning rate 0

    def step(self, measure=False): return train_step(self.run, self.views, measure).get('loss')


def gradients(step):
    "Return the loss of one step and its clipped gradients by name."
    loss = step.step(True) if isinstance(step, Shipped) else step.step()
    return float(loss), {name: p.grad.float().clone() for name, p in
                         step.student.named_parameters() if p.grad is not None}


def difference(result, truth):
    "Return the relative differences of the losses and of the gradients."
    if result[1].keys() != truth[1].keys(): raise ValueError('other parameters have gradients')
    apart = sum((result[1][n] - g).square().sum() for n, g in truth[1].items())
    whole = sum(g.square().sum() for g in truth[1].values())
    return abs(result[0] / truth[0] - 1), float((apart / whole).sqrt())


def check(name, result, truth, allowed):
    "Stop if a rung's loss or gradients are further from float32 than rounding explains."
    loss, grad = difference(result, truth)
    if loss > allowed[0] or grad > allowed[1]:
        raise AssertionError(f'{name}: loss off by {loss:.2g} (allowed {allowed[0]:.2g}), '
                             f'gradients by {grad:.2g} (allowed {allowed[1]:.2g})')
    return dict(loss_error=loss, grad_error=grad)


def rungs(only, variants):
    "Yield (name of the rung, its changes)."
    ladder = [('+ ' + name, LADDER[:i + 1]) for i, name in enumerate(LADDER)]
    for name in variants:
        base = [n for n in LADDER if not any(name in same and n in same for same in INSTEAD)]
        ladder.append((f'ladder + {name}', base + [name]))
    yield from [(n, c) for n, c in ladder + [('shipped', None), ('shipped, compiled', None)]
                if only in n]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n\n')[0])
    parser.add_argument('--device', default='auto', help='auto, cpu, cuda or mps')
    parser.add_argument('--precision', default='auto', help='auto, bfloat16 or float32')
    parser.add_argument('--batch', type=int, default=0, help='images; 0: 8 on a CPU, else 64')
    parser.add_argument('--threads', type=int, default=os.cpu_count())
    parser.add_argument('--repeats', type=int, default=5, help='timed steps of each side')
    parser.add_argument('--only', default='', help='rungs with this in their name')
    parser.add_argument('--ladder', action='store_true', help='the ladder, without the variants')
    parser.add_argument('--fp32', type=int, default=2, help='repeats beside the float32 baseline')
    parser.add_argument('--wait', type=float, default=5, help='minutes to wait for a quiet machine')
    parser.add_argument('--write', action='store_true', help='append to results/step.csv')
    args = parser.parse_args()
    device = common.pick_device(args.device)
    dtype = default_dtype(device) if args.precision == 'auto' else getattr(torch, args.precision)
    batch = args.batch or (8 if device.type == 'cpu' else 64)
    torch.set_num_threads(args.threads)
    views = random_views(batch, device)
    shipped = Shipped(views, dtype)
    weights = {name: w.clone() for name, w in shipped.student.state_dict().items()}
    truth = gradients(Step(weights, views, torch.float32))
    baseline = Step(weights, views, dtype)
    first = difference(gradients(baseline), truth)
    allowed = [1e-5, 1e-3] if dtype == torch.float32 else [5e-3, 1.25 * first[1]]
    facts = dict(device=device.type, precision=str(dtype).split('.')[1], batch=batch)
    rows = []
    def measure(name, step, against, base, repeats):
        errors = check(name, gradients(step), truth, allowed)
        facts['load_before'] = common.wait_until_quiet(minutes=args.wait)
        times = common.compare(step.step, base.step, device, repeats)
        rows.append(dict(rung=name, against=against) | times | errors | facts)
        common.print_table(rows[-1:], ['rung', 'seconds', 'baseline', 'ratio', 'cpu_ratio'])
        if args.write: common.write_rows('step', rows[-1:], common.machine(device))

    for name, names in rungs(args.only, () if args.ladder else VARIANTS):
        if names is not None: step = Step(weights, views, dtype, names)
        else: step = Shipped(views, dtype, compiled=True) if 'compiled' in name else shipped
        if 'denormals' in name: torch.set_flush_denormal(True)
        measure(name, step, facts['precision'] + ' baseline', baseline, args.repeats)
        torch.set_flush_denormal(False)
    if args.fp32 and dtype != torch.float32:
        full = Step(weights, views, torch.float32)
        for name, step in (('baseline', Step(weights, views, dtype)),
                           ('whole ladder', Step(weights, views, dtype, LADDER)),
                           ('shipped', Shipped(views, dtype)),
                           ('shipped, compiled', Shipped(views, dtype, compiled=True))):
            measure(name, step, 'float32 baseline', full, args.fp32)
    print(f'\nB = {batch}, {facts["precision"]} on {device.type}, {args.threads} threads')
    common.print_table(rows, ['rung', 'against', 'seconds', 'best', 'ratio', 'best_ratio',
                              'cpu_ratio', 'loss_error', 'grad_error', 'load_before'])

if __name__ == '__main__': main()
