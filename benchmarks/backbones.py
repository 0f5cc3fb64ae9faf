"""Which of timm's networks train: three steps at 64 and 32 pixels, then features, for one of each family.

python benchmarks/backbones.py               the networks of results/backbones.csv; prints rows
python benchmarks/backbones.py resnet18 ...  others
"""
import csv
import sys
import warnings
from pathlib import Path

import timm
import torch

from dino_nb.backbone import reason_of
from dino_nb.data import open_images
from dino_nb.features import extract_features
from dino_nb.loop import Learner
from dino_nb.settings import make_config
from dino_nb.shapes import Shapes

RESULTS = Path(__file__).parent/'results'/'backbones.csv'
SETTINGS = dict(patch_size=None, embed_dim=None, depth=None, num_heads=None, global_size=64,
                local_size=32, batch_size=4, epochs=1.5, warmup_epochs=0, freeze_last_layer=0,
                precision='float32', lr=1e-4)


def attempt(name: str, images) -> tuple[str, str]:
    "Millions of parameters, and what happened"
    n_params = ''
    try:
        run = Learner(make_config('tiny', backbone=name, **SETTINGS), images)
        n_params = f'{sum(p.numel() for p in run.student.backbone.parameters()) / 1e6:.1f}'
        run.fit(report=lambda line: None)
        features = extract_features(run.teacher.backbone, images, 64)
        return n_params, 'trains' if features.isfinite().all() else 'features are not finite'
    except Exception as error: return n_params, reason_of(error)


if __name__ == '__main__':
    warnings.filterwarnings('ignore')
    with RESULTS.open() as file: known = [row['backbone'] for row in csv.DictReader(file)]
    writer, images = csv.writer(sys.stdout), open_images(Shapes(8, size=64))
    writer.writerow(['backbone', 'million_parameters', 'outcome', 'torch', 'timm', 'command'])
    for name in sys.argv[1:] or known:
        writer.writerow([name, *attempt(name, images), torch.__version__, timm.__version__,
                         'python benchmarks/backbones.py'])
