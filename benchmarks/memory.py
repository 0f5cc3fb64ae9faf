"""Peak memory of head and loss at B = 64, K = 65536, V = 10, forward and backward: one log-softmax
per pair of views (published) against one per view (ours); a fresh process for each. On a CPU it
needs Linux.

    python benchmarks/memory.py --write
"""
import argparse
import inspect
import json
import subprocess
import sys
from pathlib import Path

import common
import torch

from dino_nb.core import autocast
from dino_nb.loss import DINOLoss

VARIANTS = ('published', 'ours') + (
    ('ours, chunks=8',) if 'chunks' in inspect.signature(DINOLoss).parameters else ())


def status(field):
    "Return a line of Linux's record of this process in bytes: VmRSS now, VmHWM at its peak."
    lines = Path('/proc/self/status').read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


def peak_of(work, device):
    "Return the bytes of memory that work adds at its peak."
    if device.type == 'cuda':
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    before = status('VmRSS')
    work()
    return status('VmHWM') - before


def build(variant, n_views, batch, out_dim, device):
    "Return a function that makes one forward and backward through head and loss."
    from published import Head, PairLoss

    from dino_nb.head import DINOHead
    ours = variant != 'published'
    head = (DINOHead(384, out_dim) if ours else Head(384, out_dim)).to(device)
    chunks = {'chunks': int(variant.split('=')[1])} if 'chunks' in variant else {}
    loss_fn = (DINOLoss(out_dim, **chunks) if ours else PairLoss(out_dim, n_views)).to(device)
    features = torch.randn(n_views * batch, 384, device=device, requires_grad=True)
    def work():
        with autocast(device, torch.bfloat16):
            with torch.set_grad_enabled(not ours): teacher = head(features[:2 * batch].detach())
            student = head(features)
        loss = loss_fn(student, teacher.detach(), 0.04)
        loss.backward()
        if ours: loss_fn.update_center(teacher)
    return work


def child(args):
    device = common.pick_device(args.device)
    torch.set_num_threads(1)
    build(args.variant, 10, 2, 1024, device)()  # loads kernels and libraries
    work = build(args.variant, 10, args.batch, args.out_dim, device)
    print(json.dumps(dict(peak_MB=peak_of(work, device) / 1e6)))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n\n')[0])
    parser.add_argument('--device', default='auto', help='auto, cpu or cuda')
    parser.add_argument('--batch', type=int, default=64)
    parser.add_argument('--out-dim', type=int, default=65536)
    parser.add_argument('--variant', default='', help='used by the script itself')
    parser.add_argument('--write', action='store_true', help='append to results/memory.csv')
    args = parser.parse_args()
    if args.variant: return child(args)
    device, rows = common.pick_device(args.device), []
    for variant in VARIANTS:
        command = [sys.executable, *sys.argv[:1], '--variant', variant, '--device', args.device,
                   '--batch', str(args.batch), '--out-dim', str(args.out_dim)]
        found = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        rows.append(dict(rung=variant, **json.loads(found.splitlines()[-1]), device=device.type,
                         batch=args.batch, out_dim=args.out_dim, views=10))
        rows[-1]['ratio'] = rows[0]['peak_MB'] / rows[-1]['peak_MB']
    common.print_table(rows, ['rung', 'peak_MB', 'ratio'])
    if args.write: common.write_rows('memory', rows, common.machine(device))


if __name__ == '__main__': main()
