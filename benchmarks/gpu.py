"""What this library does on a CUDA device, proven and measured in one visit of a few minutes.

    python benchmarks/gpu.py --minutes 9 --out FOLDER
    python benchmarks/gpu.py --device cpu --minutes 1 --out FOLDER   # every stage, at toy size
    python benchmarks/gpu.py --csv FOLDER/gpu.jsonl                  # into results/gpu.csv

It needs torch, torchvision, timm, numpy, Pillow, matplotlib and fastcore, and nothing installed.
Stages run in the order of their worth, each in a process of its own, forked from one that has
imported everything and never touched a device. Every row is on the disk as soon as it is known
(STAGE.rows, at last gpu.jsonl; what was said in STAGE.log). What fails leaves its traceback there
and stops nothing else.
"""
import argparse
import gc
import importlib.util
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
PACKAGES = 'torch', 'torchvision', 'timm', 'numpy', 'PIL', 'matplotlib', 'fastcore'
# Stages that run side by side, and the seconds of nine minutes that they may take; 0: what is left.
PLAN = {('inventory',): 25, ('right', 'compiled', 'runs'): 120, ('step',): 195, ('whole',): 95,
        ('record',): 0}
WHERE = dict(inventory='gpu_speed', right='gpu_right', compiled='gpu_right', runs='gpu_right',
             step='gpu_speed', whole='gpu_speed', record='gpu_speed')
FORK = multiprocessing.get_context('forkserver')


class LeftOut(Exception):
    "A check that this machine or the time left does not allow."


# One stage, in its own process ---------------------------------------------------------------

def outcome(work):
    "Return a row: what a check found, or where it failed."
    begin, row = time.monotonic(), {}
    try: row['figures'] = work()
    except LeftOut as reason: row['left_out'] = str(reason)
    except Exception: row['error'] = traceback.format_exc()
    ok = row.get('figures', {}).pop('ok', True) and 'error' not in row
    return dict(ok=bool(ok), seconds=round(time.monotonic() - begin, 2)) | row


def run_stage(name, args, seconds, rows):
    "Write a row for each check of a stage as soon as it is known."
    os.setsid()
    log = os.open(rows.with_suffix('.log'), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for number in (1, 2): os.dup2(log, number)
    import torch
    sys.modules['gpu'] = sys.modules['__main__']
    args.deadline, args.toy = time.monotonic() + seconds, args.device == 'cpu'
    args.scratch = Path(tempfile.mkdtemp(prefix='dino_gpu_'))
    with open(rows, 'a', buffering=1) as file:
        def write(check, row):
            file.write(json.dumps(dict(stage=name, check=check) | row) + '\n')
        try:
            for check, work in getattr(importlib.import_module(WHERE[name]), name)(args):
                late = time.monotonic() > args.deadline
                write(check, dict(ok=True, left_out='no time') if late else outcome(work))
                gc.collect()
                if args.device == 'cuda': torch.cuda.empty_cache()
        except Exception: write('whole stage', dict(ok=False, error=traceback.format_exc()))


# All stages ----------------------------------------------------------------------------------

def start(*stage):
    "Start a stage in a process, and a process group, of its own."
    process = FORK.Process(target=run_stage, args=stage)
    process.start()
    return process


def end(process, stage, deadline, rows):
    "Wait for a stage, or end it at its deadline; return its rows."
    process.join(max(0.1, deadline - time.monotonic()))
    status = 'ended by the clock' if process.is_alive() else process.exitcode
    try: os.killpg(process.pid, signal.SIGKILL)  # with all that it started
    except ProcessLookupError: process.kill()  # it has no group yet, or is gone
    process.join()
    found = []
    for line in rows.read_text().splitlines() if rows.exists() else []:
        try: found.append(json.loads(line))
        except ValueError: pass  # cut short
    if status:
        log = rows.with_suffix('.log')
        said = log.read_text(errors='replace')[-2000:] if log.exists() else ''
        found.append(dict(stage=stage, check='whole stage', ok=False, error=f'{status}\n{said}'))
    return found


def facts(args):
    "Return what every row says of the machine and the programs."
    import common
    import torch
    found = common.machine(torch.device('cpu')) | dict(
        gpu='', torchvision=version('torchvision'), python=sys.version.split()[0])
    if args.commit: found['commit'] = args.commit
    query = ['nvidia-smi', '--query-gpu=name,driver_version,memory.total', '--format=csv,noheader']
    try: found['gpu'] = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    except OSError: pass
    return found


def run_all(args):
    "Run the stages and return their rows, each on the disk before the next stage begins."
    begin, total, rows, shared = time.monotonic(), 60 * args.minutes, [], facts(args)
    for old in args.out.glob('*.rows'): old.unlink()
    os.environ['PYTHONPATH'] = os.pathsep.join(sys.path)  # for the process that imports
    FORK.set_forkserver_preload(['dino_nb.train', 'dino_nb.report', 'torch._dynamo'])
    for stages, share in PLAN.items():
        stages = [stage for stage in stages if not args.only or stage in args.only]
        left = begin + total - 3 - time.monotonic()
        seconds = min(left, share / 540 * total if share and args.device == 'cuda' else left)
        if not stages or seconds < 1: continue
        deadline = time.monotonic() + seconds
        running = [(start(stage, args, 0.9 * seconds, args.out/f'{stage}.rows'), stage)
                   for stage in stages]
        found = [row for process, stage in running
                 for row in end(process, stage, deadline, args.out/f'{stage}.rows')]
        rows += found
        with open(args.out/'gpu.jsonl', 'a') as file:
            for row in found: file.write(json.dumps(row | shared) + '\n')
        for row in found: print(line(row), flush=True)
    return rows


# What is said --------------------------------------------------------------------------------

def line(row):
    "Return one line of the table."
    from common import shown
    mark = 'left' if 'left_out' in row else 'ok' if row['ok'] else 'FAIL'
    words = row.get('left_out') or ', '.join(f'{k} {shown(v)}' for k, v in
                                             row.get('figures', {}).items())
    if 'error' in row: words = row['error'].strip().splitlines()[-1]
    where = f'{mark:4}  {row["stage"]:9} {row["check"]:28} {row.get("seconds", 0):6.1f} s'
    return f'{where}  {words}'[:200]


def to_csv(path):
    "Append the figures of a visit to results/gpu.csv, one a line."
    from common import write_rows
    keys = 'gpu', 'cpu', 'cores', 'python', 'torch', 'torchvision', 'date', 'commit', 'command'
    rows = [json.loads(text) for text in path.read_text().splitlines()]
    write_rows('gpu', [
        dict(stage=row['stage'], check=row['check'], ok='yes' if row['ok'] else 'no', figure=name,
             value=value) | {key: row[key] for key in keys}
        for row in rows if 'left_out' not in row
        for name, value in (row.get('figures') or {'-': ''}).items()], {})


def check(args):
    "Stop with one sentence where nothing can run."
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing: sys.exit(f'gpu.py needs {", ".join(missing)}; install it.')
    if not args.minutes > 0: sys.exit(f'--minutes is {args.minutes:g}; it must be above 0.')
    unknown = set(args.only) - set(WHERE)
    if unknown: sys.exit(f'--only is {min(unknown)}; choose from {", ".join(WHERE)}.')
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        open(args.out/'gpu.jsonl', 'a').close()
    except OSError as error: sys.exit(f'--out is {args.out}, which cannot be written ({error}).')
    import torch
    if args.device == 'cuda' and not torch.cuda.is_available():
        sys.exit('gpu.py: torch finds no CUDA device here; --device cpu runs all at toy size.')


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n\n')[0], allow_abbrev=False)
    parser.add_argument('--minutes', type=float, default=9.)
    parser.add_argument('--out', type=Path, default=Path('gpu_results'), help='for gpu.jsonl')
    parser.add_argument('--device', default='cuda', choices=['cuda', 'cpu'])
    parser.add_argument('--images', type=Path, help='folder of JPEGs for the whole run; none: made')
    parser.add_argument('--cifar', type=Path, help='CIFAR-10 as folders, or a tar of them')
    parser.add_argument('--only', nargs='+', default=[], help=f'stages: {", ".join(WHERE)}')
    parser.add_argument('--commit', default='', help='named in the rows where git is not at hand')
    parser.add_argument('--csv', type=Path, help='append the rows of a visit to results/gpu.csv')
    args = parser.parse_args()
    if args.csv: return to_csv(args.csv)
    check(args)
    rows = run_all(args)
    hold = sum(row['ok'] for row in rows)
    print(f'\n{hold} of {len(rows)} checks hold; rows in {args.out}/gpu.jsonl')
    sys.exit(any(not row['ok'] for row in rows))


if __name__ == '__main__': main()
