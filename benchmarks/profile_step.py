"""Where the time of one training step goes, by group of operators, and the share of the machine's
matrix peak that the step reaches; the peak is that of large square products in the same run.

    python benchmarks/profile_step.py --write
"""
import argparse
import os
import statistics
from collections import defaultdict

import common
import step as steps
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from dino_nb.core import default_dtype

GROUPS = {'matrix products': 'mm addmm mkldnn_convolution convolution_backward cudnn_convolution',
          'products of attention': 'bmm baddbmm',
          'softmax of attention': '_softmax _softmax_backward_data',
          'GELU': 'gelu gelu_backward',
          'layer norm': 'native_layer_norm native_layer_norm_backward',
          'copies and casts': 'copy_ cat clone _foreach_copy_',
          'sums (gradients of biases)': 'sum',
          'residual and other additions': 'add add_ mul mul_ div sub neg sqrt addcdiv_ addcmul_',
          'weight norm': '_weight_norm_interface _weight_norm_interface_backward',
          'log-softmax of the loss': '_log_softmax _log_softmax_backward_data',
          'AdamW': '_fused_adamw_ _fused_adam_',
          'EMA': 'lerp_ _foreach_lerp_',
          'clipping': 'linalg_vector_norm _foreach_norm _foreach_mul_ clamp'}
GROUP_OF = {'aten::' + op: group for group, ops in GROUPS.items() for op in ops.split()}


def group_of(name):
    if name.startswith(('aten::_scaled_dot', 'aten::_flash')): return 'products of attention'
    return GROUP_OF.get(name, 'everything else')


def seconds_by_group(step, device, repeats):
    "Return for each group its seconds per step: of every operator and shape, the median time."
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == 'cuda')
    with profile(activities=kinds, record_shapes=True) as recorded:
        for _ in range(repeats): step()
        common.synchronize(device)
    times = defaultdict(list)
    for event in recorded.events():
        own = event.self_device_time_total if device.type == 'cuda' else event.self_cpu_time_total
        if event.name.startswith('aten::') and own:
            times[event.name, str(event.input_shapes)].append(own)
    total = defaultdict(float)
    for (name, _), values in times.items():
        total[group_of(name)] += statistics.median(values) * len(values) / repeats / 1e6
    return total


def matrix_peak(device, dtype, size=4096):
    "Return the FLOP/s of large square products; the best of ten."
    a = torch.randn(size, size, device=device, dtype=dtype)
    b = torch.randn(size, size, device=device, dtype=dtype)
    a @ b
    return 2 * size ** 3 / min(common.measure(lambda: a @ b, device)[0] for _ in range(10))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n\n')[0])
    parser.add_argument('--device', default='auto', help='auto, cpu or cuda')
    parser.add_argument('--batch', type=int, default=0, help='images; 0: 8 on a CPU, else 64')
    parser.add_argument('--threads', type=int, default=os.cpu_count())
    parser.add_argument('--repeats', type=int, default=3)
    parser.add_argument('--wait', type=float, default=5, help='minutes to wait for a quiet machine')
    parser.add_argument('--write', action='store_true', help='append to results/profile.csv')
    args = parser.parse_args()
    device = common.pick_device(args.device)
    dtype, batch = default_dtype(device), args.batch or (8 if device.type == 'cpu' else 64)
    torch.set_num_threads(args.threads)
    views = steps.random_views(batch, device)
    shipped = steps.Shipped(views, dtype)
    weights = {name: w.clone() for name, w in shipped.student.state_dict().items()}
    load, rows = common.wait_until_quiet(minutes=args.wait), []
    sides = {'published structure': steps.Step(weights, views, dtype),
             'whole ladder': steps.Step(weights, views, dtype, steps.LADDER), 'shipped': shipped}
    for name, side in sides.items():
        for _ in range(3): side.step()
        with FlopCounterMode(display=False) as counter: side.step()
        peak = matrix_peak(device, dtype)
        wall = statistics.median(common.measure(side.step, device)[0] for _ in range(args.repeats))
        groups = seconds_by_group(side.step, device, args.repeats)
        facts = dict(step=name, batch=batch, wall=wall, gflop=counter.get_total_flops() / 1e9,
                     peak_gflops=peak / 1e9, share_of_peak=counter.get_total_flops() / wall / peak,
                     load_before=load)
        rows += [dict(group=group, seconds=s, share=s / wall) | facts for group, s in
                 sorted(groups.items(), key=lambda pair: -pair[1])]
        print(f'\n{name}: {wall:.2f} s, {facts["gflop"]:.0f} GFLOP, '
              f'{facts["share_of_peak"]:.0%} of a peak of {peak / 1e9:.0f} GFLOP/s')
        common.print_table(rows[-len(groups):], ['group', 'seconds', 'share'])
    if args.write: common.write_rows('profile', rows, common.machine(device))


if __name__ == '__main__': main()
