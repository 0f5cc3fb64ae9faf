"Backbones of many families: what is supported trains, evaluates and goes on; what is not says so."
from multiprocessing import get_context

import pytest
import torch
import torch.distributed as dist

from dino_nb.attention import attention_maps, reads_class_token
from dino_nb.backbone import create_backbone
from dino_nb.core import set_seed
from dino_nb.data import open_images
from dino_nb.dist import World
from dino_nb.features import extract_features
from dino_nb.knn import evaluate_knn
from dino_nb.loop import Learner
from dino_nb.settings import make_config
from dino_nb.shapes import Shapes
from dino_nb.teacher import make_teacher
from dino_nb.train import main

SHAPES = open_images(Shapes(16, size=32))
FREE = dict(patch_size=None, embed_dim=None, depth=None, num_heads=None, drop_path_rate=0.)
SMALL = FREE | dict(global_size=32, local_size=16, batch_size=4, epochs=0.75, warmup_epochs=0,
                    freeze_last_layer=0, out_dim=32, hidden_dim=32, bottleneck_dim=16, n_local=1,
                    device='cpu')
FAMILIES = dict(
    resnet='resnet10t', resnetv2='resnetv2_18', convnext='convnext_atto', regnet='regnetx_002',
    efficientnet='efficientnet_lite0', mobilenetv3='mobilenetv3_small_050', repvit='repvit_m0_9',
    edgenext='edgenext_xx_small', mobilevit='mobilevit_xxs', xcit='xcit_nano_12_p16_224',
    poolformer='poolformer_s12', efficientvit='efficientvit_b0', vit='vit_tiny_patch16_224',
    swin='swin_tiny_patch4_window7_224')
LARGE = dict(global_size=64, local_size=32)  # for those that halve the sides once more
SHALLOW = dict(vit=dict(depth=2), swin=LARGE | dict(embed_dim=24), convnext=LARGE, edgenext=LARGE)


def small(family, **settings):
    return make_config('tiny', **SMALL | dict(backbone=FAMILIES.get(family, family))
                       | SHALLOW.get(family, {}) | settings)


def take(run, n):
    run.sampler.n_steps = run.step + n
    run.fit(report=lambda line: None)
    return run


@pytest.mark.parametrize('family', FAMILIES)
def test_a_family_trains_three_steps_evaluates_and_goes_on(family):
    whole, first, second = (Learner(small(family), SHAPES) for _ in range(3))
    take(whole, 3)
    state = take(first, 2).state()
    second.load_state(state); take(second, 1)
    assert whole.n_steps == 3 == second.step and not whole.skipped
    for name, value in whole.teacher.state_dict().items():
        assert torch.equal(value, second.teacher.state_dict()[name]), name
    features = extract_features(whole.teacher.backbone, SHAPES, whole.config.global_size)
    assert features.shape == (16, whole.teacher.backbone.embed_dim) and features.isfinite().all()
    assert features.std(0).max() > 0


@pytest.mark.parametrize('family', FAMILIES)
def test_a_teacher_draws_no_random_numbers(family):
    try: student = create_backbone(FAMILIES[family], img_size=64, drop_path_rate=0.5)
    except ValueError: student = create_backbone(FAMILIES[family], img_size=64)
    teacher, seen, views = make_teacher(student.train()), [], torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        for seed in (0, 1): set_seed(seed); seen.append(teacher(views))
    assert teacher.training and torch.equal(*seen)


@pytest.mark.parametrize('family', FAMILIES)
def test_attention_is_looked_at_where_features_are_a_class_token(family):
    backbone = create_backbone(FAMILIES[family], img_size=32)
    assert reads_class_token(backbone) == (family == 'vit')
    if reads_class_token(backbone): assert attention_maps(backbone, torch.rand(1, 3, 32, 32)).sum()
    else: pytest.raises(ValueError, attention_maps, backbone, torch.rand(1, 3, 32, 32))


def accuracies(run):
    "k-NN of student and teacher, whose test images the processes share"
    return [evaluate_knn(network.backbone, SHAPES, SHAPES, 32, ks=(1, 3), world=run.world)
            for network in (run.student, run.teacher)]


def two_lives(rank, folder):
    "In one of two processes: a whole run, and one that goes on from the main process's checkpoint"
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{folder}/meet', rank=rank, world_size=2)
    world = World(rank, 2, rank)
    config = small('resnet', use_bn=True, epochs=1.5, lr=0.1)
    whole, first, second = (Learner(config, SHAPES, world) for _ in range(3))
    take(whole, 6)
    state = take(first, 3).state()
    if rank == 0: torch.save(state, f'{folder}/state.pt')
    dist.barrier()
    second.load_state(torch.load(f'{folder}/state.pt'))
    take(second, 3)
    for name in ('student', 'teacher'):
        theirs, shared = getattr(second, name).state_dict(), [None, None]
        for key, value in getattr(whole, name).state_dict().items():
            assert torch.equal(value, theirs[key]), f'{name} {key} after going on'
            dist.all_gather_object(shared, value)
            assert torch.equal(*shared), f'{name} {key} in both processes'
    assert accuracies(whole) == accuracies(second)
    dist.destroy_process_group()


def test_two_processes_with_batch_norm_go_on_exactly(tmp_path):
    processes = [get_context('fork').Process(target=two_lives, args=(rank, tmp_path))
                 for rank in range(2)]
    for process in processes: process.start()
    for process in processes: process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]


REFUSED = [('--local-size 20', 'vit_tiny_patch16_224 does not take local_size 20: images are 20 x 20'),
           ('--backbone mixer_s32_224 --global-size 64 --local-size 32', 'takes no size but'),
           ('--backbone halonet26t', 'halonet26t does not take global_size 40: AssertionError')]


@pytest.mark.parametrize('words,sentence', REFUSED)
def test_what_a_network_cannot_take_is_said_before_anything_is_written(
        words, sentence, images, tmp_path, capsys):
    out = tmp_path/'run'
    with pytest.raises(SystemExit) as end:
        main(['--recipe', 'tiny', '--data', str(images), '--out', str(out), *words.split()])
    err = capsys.readouterr().err
    assert end.value.code == 2 and sentence in err and len(err.strip().splitlines()) == 1, err
    assert not out.exists()
