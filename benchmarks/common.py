"What the benchmarks share: quiet machine, interleaved timing, a table, rows in a CSV file."
import csv
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from datetime import datetime, timezone
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent


def pick_device(name):
    "Return the device of a flag: auto, cpu, cuda or mps."
    from dino_nb.core import default_device
    return default_device() if name == 'auto' else torch.device(name)


def wait_until_quiet(limit=0.7, minutes=5):
    "Wait until the load of the last minute is below limit, and return it."
    deadline = time.time() + 60 * minutes
    while os.getloadavg()[0] > limit and time.time() < deadline: time.sleep(5)
    return os.getloadavg()[0]


def synchronize(device):
    if device.type == 'cuda': torch.cuda.synchronize(device)


def measure(work, device):
    "Return the wall seconds and the processor seconds of one call."
    synchronize(device)
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    synchronize(device)
    return time.perf_counter() - wall, time.process_time() - cpu


def compare(work, baseline, device, repeats, warmups=1):
    """Time work and baseline in turn and return a row: medians, minima and ratio of the medians.

    The ratio is baseline / work, so above 1 is faster; cpu_ratio is that of the fewest processor
    seconds of this process, which other programs disturb less."""
    for _ in range(warmups): work()
    pairs = [(measure(baseline, device), measure(work, device)) for _ in range(repeats)]
    slow, fast = (list(zip(*side)) for side in zip(*pairs))
    middle = statistics.median
    return dict(seconds=middle(fast[0]), best=min(fast[0]), cpu_seconds=min(fast[1]),
                ratio=middle(slow[0]) / middle(fast[0]), best_ratio=min(slow[0]) / min(fast[0]),
                cpu_ratio=min(slow[1]) / min(fast[1]), baseline=middle(slow[0]))


def machine(device):
    "Return what a reader must know about the machine and the programs; no host name."
    cpu = platform.processor() or platform.machine()
    if Path('/proc/cpuinfo').exists():
        lines = Path('/proc/cpuinfo').read_text().splitlines()
        cpu = next((l.split(':')[1].strip() for l in lines if l.startswith('model name')), cpu)
    git = ['git', '-C', str(HERE), 'describe', '--always', '--dirty', '--abbrev=10', '--exclude=*']
    try: commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    except OSError: commit = ''
    gpu = torch.cuda.get_device_name(device) if device.type == 'cuda' else ''
    command = ['python', f'benchmarks/{Path(sys.argv[0]).name}', *sys.argv[1:]]
    return dict(cpu=cpu, cores=os.cpu_count(), threads=torch.get_num_threads(), gpu=gpu,
                torch=torch.__version__, date=f'{datetime.now(timezone.utc):%Y-%m-%d}',
                commit=commit or 'unknown', load1=round(os.getloadavg()[0], 2),
                command=shlex.join(command))


def shown(value):
    return f'{value:.4g}' if isinstance(value, float) else str(value)


def print_table(rows, columns):
    "Print rows (dicts) as a plain-text table."
    table = [columns] + [[shown(row.get(name, '')) for name in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(*table)]
    for line in table: print('  '.join(cell.ljust(w) for cell, w in zip(line, widths)).rstrip())


def write_rows(name, rows, facts):
    "Append rows to results/<name>.csv, each with the facts of its machine."
    path = HERE / 'results' / f'{name}.csv'
    path.parent.mkdir(exist_ok=True)
    rows = [{k: shown(v) for k, v in (row | facts).items()} for row in rows]
    new = not path.exists()
    with open(path, 'a', newline='') as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator='\n')
        if new: writer.writeheader()
        elif path.read_text().splitlines()[0] != ','.join(rows[0]):
            raise ValueError(f'{path} has other columns; move it away first.')
        writer.writerows(rows)
    print(f'{len(rows)} rows added to {path}')
