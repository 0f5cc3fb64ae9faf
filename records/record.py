"""Set a record: train by the one command of a folder, once per seed, and write down what came out.

    python records/record.py cifar10_cpu path/to/cifar10
    python records/record.py cifar10_cpu path/to/cifar10 --seeds 3 4 5

The clock runs from the start of each command to its end: imports, images, baselines, figures. Of
every seed the last step counts. Logs go to the record's folder, a row of figures to
benchmarks/results/records.csv; the rules are in nbs/65_records.ipynb."""
import argparse
import json
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent/'benchmarks'))
import common


def train(words, seed, folder):
    "Run the command for a seed and return the seconds that it took, from start to end."
    command = [sys.executable, '-m', 'dino_nb.train', *words]
    command += ['--seed', str(seed), '--out', str(folder)]
    begin = time.monotonic()
    status = subprocess.run(command, cwd=HERE.parent).returncode
    if status: sys.exit(f'record.py: the run of seed {seed} ended with status {status}.')
    return time.monotonic() - begin


def row_of(name, words, seed, seconds, folder):
    "Return the row of a finished run."
    found = json.loads((folder/'summary.json').read_text())
    if 'knn_teacher' not in found: sys.exit('record.py: the data has no labels, so no k-NN.')
    device = torch.device(found['device'])
    return dict(
        record=name, seed=seed, seconds=seconds, training=found['seconds'], steps=found['steps'],
        images_per_second=found['images_per_second'], knn20_teacher=found['knn_teacher']['20'],
        knn20_student=found['knn_student']['20'], knn200_teacher=found['knn_teacher']['200'],
        knn20_pixels=found['baselines']['raw pixels'],
        knn20_untrained=found['baselines']['random init'], verdict=found['verdict']
    ) | common.machine(device) | dict(command='dino_train ' + shlex.join(words))


def main():
    records = sorted(path.parent.name for path in HERE.glob('*/command'))
    parser = argparse.ArgumentParser(description=__doc__.split('\n\n')[0], allow_abbrev=False)
    parser.add_argument('record', choices=records)
    parser.add_argument('data', type=Path, help='folder with a train and a test part')
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    args = parser.parse_args()
    if not args.data.is_dir(): parser.error(f'data is {args.data}, which is no folder.')
    words, folder = shlex.split((HERE/args.record/'command').read_text()), HERE/args.record
    for seed in args.seeds:
        with tempfile.TemporaryDirectory() as scratch:
            out = Path(scratch)/f'seed{seed}'
            seconds = train(words + ['--data', str(args.data.resolve())], seed, out)
            row = row_of(args.record, words, seed, seconds, out)
            shutil.copy(out/'log.jsonl', folder/f'seed{seed}.jsonl')
        common.write_rows('records', [row], {})
        common.print_table([row], ['record', 'seed', 'seconds', 'knn20_teacher', 'knn20_pixels'])


if __name__ == '__main__': main()
