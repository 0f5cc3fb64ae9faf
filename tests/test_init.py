"Runs that begin with weights from elsewhere, as they are typed."
import json
import os
import signal

import pytest
import torch
from processes import same_run

from dino_nb.backbone import create_backbone
from dino_nb.checkpoint import load_checkpoint
from dino_nb.train import main

NETWORK = dict(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3)
FEW = ('--recipe tiny --n-local 1 --out-dim 32 --hidden-dim 32 --bottleneck-dim 16 --batch-size 16 '
       '--epochs 4 --warmup-epochs 1 --freeze-last-layer 1 --knn-every 1 --workers 0').split()


@pytest.fixture
def source(tmp_path):
    "A file with the weights of a small ViT"
    torch.manual_seed(5)
    network = create_backbone('vit_tiny_patch16_224', **NETWORK)
    torch.save(network.state_dict(), tmp_path/'weights.pth')
    return tmp_path/'weights.pth'


def words(source, images, folder, *more):
    return ['--init', str(source), '--num-heads', '3', '--data', str(images), '--out', str(folder),
            *FEW, *more]


def backbone(folder, part):
    state = load_checkpoint(folder/'checkpoint.pt')[part]
    return {name[9:]: value for name, value in state.items() if name.startswith('backbone.')}


def test_a_run_begins_with_weights_and_leaves_them_slowly(source, images, tmp_path, capsys):
    weights = torch.load(source, weights_only=True)
    main(words(source, images, tmp_path/'still', '--backbone-lr', '0', '--weight-decay-end', '0.1'))
    for part in ('student', 'teacher'):
        for name, value in backbone(tmp_path/'still', part).items():
            assert torch.equal(value, weights[name]), f'{name} of the {part} moved'
    main(words(source, images, tmp_path/'run', '--guard', '0'))
    said, moved = capsys.readouterr().out, backbone(tmp_path/'run', 'student')
    assert 'as loaded' in said and not (tmp_path/'run'/'backbone_best.pt').exists()
    far = {name: (moved[name] - weights[name]).norm() / weights[name].norm() for name in moved
           if name.endswith('fc1.weight') or name == 'patch_embed.proj.weight'}
    assert 0 < far['patch_embed.proj.weight'] < 0.1 and 0 < far['blocks.1.mlp.fc1.weight'] < 0.1
    levels = json.loads((tmp_path/'run'/'summary.json').read_text())['baselines']
    assert set(levels) == {'raw pixels', 'random init', 'as loaded'}


BOLD = '--backbone-lr 1 --layer-decay 1 --freeze-backbone 0 --lr 0.5 --checkpoint-steps 3'.split()


@pytest.fixture
def bold(source, images, tmp_path, capsys):
    "A run that forgets, what it takes to start it, and what it said"
    command = words(source, images, tmp_path/'bold', *BOLD)
    main(command)
    return tmp_path/'bold', command, capsys.readouterr().out


def test_a_run_that_forgets_is_taken_back(bold):
    folder, _, said = bold
    summary = json.loads((folder/'summary.json').read_text())
    assert summary['knn_teacher']['20'] >= summary['baselines']['as loaded']
    assert 'back to the backbone of step' in said


@pytest.mark.parametrize('damaged', [False, True])
def test_a_killed_run_goes_on_exactly(bold, job, tmp_path, damaged):
    folder = tmp_path/'run'
    command = [word.replace(str(bold[0]), str(folder)) for word in bold[1]]
    pid = job(command, tmp_path)
    job.reach(folder/'checkpoint_last_good.pt')
    os.kill(pid, signal.SIGKILL)
    job.end()
    if damaged: (folder/'backbone_best.pt').write_bytes(b'nothing')
    status, out, err = job.run(command, tmp_path)
    assert status == 0 and 'Traceback' not in err and 'going on at step' in out
    if damaged: assert 'The best is the start again' in out
    else: same_run(bold[0], folder)


@pytest.mark.parametrize('more, reason', [
    (['--depth', '3'], 'depth is 3, but init'), (['--fsdp'], 'fsdp does not work with init'),
    (['--continue-from', 'x'], 'continue_from and init are both given'),
    (['--init', '/nowhere.pth'], '/nowhere.pth does not exist'), (['--guard', '-1'], 'guard is -1')])
def test_what_does_not_fit_is_one_sentence(source, images, tmp_path, capsys, more, reason):
    with pytest.raises(SystemExit) as end: main(words(source, images, tmp_path/'run', *more))
    said = capsys.readouterr().err
    assert end.value.code == 2 and reason in said and 'Traceback' not in said
    assert not (tmp_path/'run').exists()
