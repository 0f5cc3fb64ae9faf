"Weights in every layout that is published: loaded whole, or refused in one sentence."
import argparse
import hashlib
import json
import os
import re
import socket
import time
import zipfile
from functools import partial

import huggingface_hub.constants as hub
import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers import LayerNorm, SwiGLUPacked

from dino_nb import report
from dino_nb.attention import attention_maps
from dino_nb.backbone import create_backbone
from dino_nb.checkpoint import load_checkpoint, save_checkpoint
from dino_nb.core import generator
from dino_nb.data import open_images
from dino_nb.features import extract_features
from dino_nb.knn import evaluate_knn
from dino_nb.loop import Learner
from dino_nb.settings import make_config
from dino_nb.shapes import Shapes
from dino_nb.train import main
from dino_nb.weights import load_backbone

SMALL = dict(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3)
ROTARY = {name: value for name, value in SMALL.items() if name != 'img_size'}
HEADS = dict(num_heads=3)


@pytest.fixture(autouse=True)
def asked(monkeypatch):
    "There is no network; the hosts that were asked for"
    hosts = []
    def refuse(host, *args, **kwargs):
        hosts.append(host)
        raise socket.gaierror(-2, 'Name or service not known')
    monkeypatch.setattr(socket, 'getaddrinfo', refuse)
    monkeypatch.setattr(time, 'sleep', lambda seconds: None)   # between the hub's attempts
    return hosts


def trained(network, seed=0):
    "A network none of whose tensors is as it was made"
    random = generator(seed, 'trained')
    for name, value in network.state_dict().items():
        if not value.is_floating_point(): continue
        noise = torch.randn(value.shape, generator=random)
        value.add_(noise.abs() if name.endswith('running_var') else 0.1 * noise)
    return network.eval()


def vit(seed=0, **more):
    return trained(create_backbone('vit_tiny_patch16_224', **SMALL | more), seed)


def head():
    return {'head.mlp.0.weight': torch.ones(8, 48), 'head.last_layer.weight_g': torch.ones(16, 1),
            'head.last_layer.weight_v': torch.ones(16, 8)}


def prefixed(prefix, tensors): return {prefix + name: value for name, value in tensors.items()}


def renamed(tensors, *pairs):
    for old, new in pairs: tensors = {k.replace(old, new): v for k, v in tensors.items()}
    return tensors


def cut(tensors, whole, *parts):
    "Tensors of which those with `whole` in their name are cut in parts"
    found = {}
    for name, value in tensors.items():
        if whole not in name: found[name] = value; continue
        for part, rows in zip(parts, value.chunk(len(parts))):
            found[name.replace(whole, part)] = rows.contiguous()
    return found


def hf_old(tensors):
    "The names of ViT in Hugging Face's files"
    tensors = cut(tensors, '.attn.qkv.', *(f'.attention.attention.{part}.'
                                           for part in ('query', 'key', 'value')))
    return renamed(tensors, ('blocks.', 'encoder.layer.'),
                   ('.attn.proj.', '.attention.output.dense.'),
                   ('.mlp.fc1.', '.intermediate.dense.'), ('.mlp.fc2.', '.output.dense.'),
                   ('.norm1.', '.layernorm_before.'), ('.norm2.', '.layernorm_after.'), *HF_COMMON)


HF_COMMON = (('patch_embed.proj.', 'embeddings.patch_embeddings.projection.'),
             ('pos_embed', 'embeddings.position_embeddings'), ('cls_token', 'embeddings.cls_token'),
             ('reg_token', 'embeddings.register_tokens'))


def hf_new(tensors):
    "The names of ViT in Hugging Face's newest networks"
    tensors = cut(tensors, '.attn.qkv.', *(f'.attention.{part}_proj.' for part in 'qkv'))
    return renamed(tensors, ('blocks.', 'layers.'), ('.attn.proj.', '.attention.o_proj.'),
                   ('.norm1.', '.layernorm_before.'), ('.norm2.', '.layernorm_after.'), *HF_COMMON)


def hf_dinov2(tensors):
    "The names of DINOv2 in Hugging Face's files"
    tensors = cut(tensors, '.attn.qkv.', *(f'.attention.attention.{part}.'
                                           for part in ('query', 'key', 'value')))
    tensors = renamed(tensors, ('blocks.', 'encoder.layer.'),
                      ('.attn.proj.', '.attention.output.dense.'),
                      ('.ls1.gamma', '.layer_scale1.lambda1'),
                      ('.ls2.gamma', '.layer_scale2.lambda1'), *HF_COMMON)
    return tensors | {'embeddings.mask_token': torch.zeros(1, 48)}


def final_norm(tensors):
    return {f'layer{name}' if name.startswith('norm.') else name: value
            for name, value in tensors.items()}


def hf_dinov3(tensors):
    "The names of DINOv3 in Hugging Face's files"
    tensors = cut(tensors, '.attn.qkv.', *(f'.attention.{part}_proj.' for part in 'qkv'))
    return renamed(tensors, ('blocks.', 'layer.'), ('.attn.proj.', '.attention.o_proj.'),
                   ('.attn.q_bias', '.attention.q_proj.bias'),
                   ('.attn.v_bias', '.attention.v_proj.bias'),
                   ('.gamma_1', '.layer_scale1.lambda1'), ('.gamma_2', '.layer_scale2.lambda1'),
                   ('.mlp.fc1_g.', '.mlp.gate_proj.'), ('.mlp.fc1_x.', '.mlp.up_proj.'),
                   ('.mlp.fc1.', '.mlp.up_proj.'), ('.mlp.fc2.', '.mlp.down_proj.'),
                   ('patch_embed.proj.', 'embeddings.patch_embeddings.'),
                   ('cls_token', 'embeddings.cls_token'),
                   ('reg_token', 'embeddings.register_tokens')
                   ) | {'embeddings.mask_token': torch.zeros(1, 1, 48)}


def dinov2(**more):
    "A ViT like DINOv2's, and its tensors as Meta's files have them"
    network = vit(init_values=1., **more)
    tensors = network.state_dict() | dict(mask_token=torch.zeros(1, 48))
    if network.reg_token is not None:           # the class token's position is apart there
        position = torch.randn(1, 1, 48, generator=generator(0, 'position'))
        tensors['cls_token'] = tensors['cls_token'] - position
        network.cls_token.data = tensors['cls_token'] + position
        tensors['pos_embed'] = torch.cat([position, tensors['pos_embed']], 1)
    return network, tensors


def full(folder, student, teacher, in_front=('module.backbone.', 'backbone.'), **more):
    "A file as the published script writes it"
    state = {who: prefixed(prefix, network.state_dict()) | head() for who, network, prefix in
             zip(('student', 'teacher'), (student, teacher), in_front)}
    state['student'] = {name if name.startswith('module') else f'module.{name}': value
                        for name, value in state['student'].items()}
    optimizer = dict(param_groups=[dict(lr=np.float64(1e-3), betas=(0.9, 0.999))],
                     state={0: dict(exp_avg=torch.ones(3))})
    torch.save(state | dict(optimizer=optimizer, epoch=800, fp16_scaler={'scale': 1.},
                            args=argparse.Namespace(arch='vit_small', lr=5e-4, out_dim=65536),
                            **more), folder/'full.pth')
    return folder/'full.pth'


def hf_folder(folder, tensors, pickled=False, **config):
    "A folder as transformers writes it"
    (folder/'config.json').write_text(json.dumps(
        dict(num_attention_heads=3, hidden_act='gelu', layer_norm_eps=1e-6) | config))
    if pickled: torch.save(tensors, folder/'pytorch_model.bin')
    else: save_file({k: v.contiguous().clone() for k, v in tensors.items()},
                    folder/'model.safetensors')
    return folder


def saved(folder, tensors, name='file.pth', **how):
    if name.endswith('.safetensors'): save_file(tensors, folder/name)
    else: torch.save(tensors, folder/name, **how)
    return folder/name


# Each writes a source, and returns it, how it is loaded, and the network that its weights are of

LAYOUTS = {}
def layout(function): LAYOUTS[function.__name__] = function; return function


@layout
def published(folder):
    network = vit()
    return saved(folder, network.state_dict()), HEADS, network

@layout
def published_in_a_usual_size(folder):
    network = vit(embed_dim=192, depth=12)     # 3 heads, as all ViTs of this size have
    return saved(folder, network.state_dict()), {}, network

@layout
def google_landmarks(folder):
    network = vit()
    tensors = prefixed('module.backbone.', network.state_dict()) | prefixed('module.', head())
    return saved(folder, dict(teacher=tensors)), HEADS, network

@layout
def full_checkpoint_teacher(folder):
    center = dict(center=torch.ones(1, 16))
    return full(folder, vit(1), network := vit(2), dino_loss=center), HEADS, network

@layout
def full_checkpoint_of_old_numpy(folder):
    "Its numbers are of a module that NumPy 2 has renamed"
    network = vit(2)
    with zipfile.ZipFile(full(folder, vit(1), network)) as old, \
            zipfile.ZipFile(folder/'old.pth', 'w') as new:
        for name in old.namelist():
            new.writestr(name, old.read(name).replace(b'numpy._core', b'numpy.core'))
    return folder/'old.pth', HEADS, network

@layout
def full_checkpoint_student(folder):
    return full(folder, network := vit(1), vit(2)), HEADS | dict(which='student'), network

@layout
def full_checkpoint_of_before_june_2021(folder):
    network = vit()
    tensors = network.state_dict() | renamed(head(), ('head.', 'projection_head.'))
    return saved(folder, dict(student=vit(1).state_dict(), teacher=tensors)), HEADS, network

@layout
def old_file_format(folder):
    network = vit()
    tensors = network.state_dict()
    return saved(folder, tensors, _use_new_zipfile_serialization=False), HEADS, network

@layout
def resnet50(folder):
    network = trained(create_backbone('resnet50'))
    return saved(folder, network.state_dict()), {}, network

@layout
def resnet_full_checkpoint(folder):
    "No center; a head of two layers with a plain last one"
    network = trained(create_backbone('resnet18'))
    two_layers = {'head.mlp.0.weight': torch.ones(8, 512), 'head.mlp.2.weight': torch.ones(4, 8),
                  'head.last_layer.weight': torch.ones(16, 4)}
    tensors = prefixed('backbone.', network.state_dict()) | two_layers
    student = prefixed('module.', trained(create_backbone('resnet18'), 1).state_dict())
    return saved(folder, dict(student=student, teacher=tensors)), {}, network

@layout
def torchvision_resnet(folder):
    network = trained(create_backbone('resnet18'))
    classifier = {'fc.weight': torch.ones(10, 512), 'fc.bias': torch.ones(10)}
    return saved(folder, dict(state_dict=network.state_dict() | classifier, epoch=3)), {}, network

@layout
def xcit(folder):
    network = trained(create_backbone('xcit_nano_12_p16_224'))
    tensors = {}
    for name, value in network.state_dict().items():
        if '.attn.k.' in name or '.attn.v.' in name: continue
        if '.attn.q.' in name:
            parts = [network.state_dict()[name.replace('.q.', f'.{part}.')] for part in 'qkv']
            name, value = name.replace('.q.', '.qkv.'), torch.cat(parts)
        tensors[name.replace('pos_embed.', 'pos_embeder.')] = value
    return saved(folder, tensors), {}, network

@layout
def xcit_of_timm(folder):
    network = trained(create_backbone('xcit_nano_12_p8_224'))
    return saved(folder, network.state_dict()), {}, network

@layout
def timm_safetensors(folder):
    network = vit()
    tensors = network.state_dict() | {'head.weight': torch.ones(10, 48)}
    return saved(folder, tensors, 'model.safetensors'), HEADS, network

@layout
def timm_registers(folder):
    network = vit(reg_tokens=4, no_embed_class=True)
    return saved(folder, dict(model=network.state_dict())), HEADS, network

@layout
def timm_mean_of_patches(folder):
    network = vit(global_pool='avg')
    state = dict(state_dict_ema=network.state_dict(), state_dict=vit(1).state_dict())
    return saved(folder, state), HEADS, network

@layout
def timm_folder(folder):
    network = trained(create_backbone('convnext_atto'))
    (folder/'config.json').write_text('{"architecture": "convnext_atto", "num_classes": 10}')
    tensors = network.state_dict() | {'head.fc.weight': torch.ones(10, 320)}
    return saved(folder, tensors, 'model.safetensors').parent, {}, network

@layout
def another_network_of_timm(folder):
    network = trained(create_backbone('convnext_atto'))
    tensors = prefixed('module.', network.state_dict())
    return saved(folder, dict(model=tensors)), dict(architecture='convnext_atto'), network

@layout
def flat_student_and_teacher(folder):
    network = vit()
    teacher = prefixed('teacher.backbone.', network.state_dict())
    student = prefixed('student.backbone.', vit(1).state_dict())
    return saved(folder, dict(model=student | teacher)), HEADS, network

@layout
def hf_vit_pickled(folder):
    network = vit(norm_layer=partial(LayerNorm, eps=1e-3))  # an eps that can be seen
    tensors = final_norm(hf_old(network.state_dict())) | {'pooler.dense.weight': torch.ones(48, 48)}
    return hf_folder(folder, tensors, pickled=True, layer_norm_eps=1e-3), {}, network

@layout
def hf_vit_safetensors(folder):
    network = vit()
    return hf_folder(folder, final_norm(hf_old(network.state_dict()))), {}, network

@layout
def hf_vit_of_new_names(folder):
    network = vit()
    return hf_folder(folder, final_norm(hf_new(network.state_dict()))), {}, network

@layout
def hf_classifier(folder):
    network = vit()
    tensors = prefixed('vit.', final_norm(hf_old(network.state_dict())))
    return hf_folder(folder, tensors | {'classifier.weight': torch.ones(10, 48)}), {}, network

@layout
def hf_in_several_files(folder):
    network = vit()
    tensors = [*final_norm(hf_old(network.state_dict())).items()]
    for i, part in enumerate((tensors[:9], tensors[9:])):
        hf_folder(folder, dict(part))
        (folder/'model.safetensors').rename(folder/f'model-{i}.safetensors')
    index = {name: f'model-{int(i >= 9)}.safetensors' for i, (name, _) in enumerate(tensors)}
    (folder/'model.safetensors.index.json').write_text(json.dumps(dict(weight_map=index)))
    return folder, {}, network

@layout
def hf_file_alone(folder):
    network = vit()
    tensors = final_norm(hf_old(network.state_dict()))
    return hf_folder(folder, tensors)/'model.safetensors', HEADS, network

@layout
def hf_dinov2_plain(folder):
    network = vit(init_values=1.)
    return hf_folder(folder, final_norm(hf_dinov2(network.state_dict()))), {}, network

@layout
def hf_dinov2_registers(folder):
    network, tensors = dinov2(reg_tokens=4, no_embed_class=True)
    del tensors['mask_token']
    return hf_folder(folder, final_norm(hf_dinov2(tensors))), {}, network

GATED = dict(mlp_layer=SwiGLUPacked, mlp_ratio=16 / 3, act_layer=torch.nn.SiLU)

@layout
def hf_dinov2_gated(folder):
    network = vit(init_values=1., **GATED)
    tensors = renamed(hf_dinov2(network.state_dict()), ('.fc1.', '.weights_in.'),
                      ('.fc2.', '.weights_out.'))
    return hf_folder(folder, final_norm(tensors)), {}, network

@layout
def hf_dinov2_gated_of_new_names(folder):
    network = vit(init_values=1., **GATED)
    tensors = cut(hf_dinov2(network.state_dict()), '.fc1.', '.gate_proj.', '.up_proj.')
    tensors = renamed(tensors, ('.fc2.', '.down_proj.'),
                      ('.attention.attention.query.', '.attention.q_proj.'),
                      ('.attention.attention.key.', '.attention.k_proj.'),
                      ('.attention.attention.value.', '.attention.v_proj.'),
                      ('.attention.output.dense.', '.attention.o_proj.'))
    return hf_folder(folder, final_norm(tensors)), {}, network

def rotary(name):
    return trained(create_backbone(name, **ROTARY, global_pool='token'))

@layout
def hf_dinov3_plain(folder):
    network = rotary('vit_small_patch16_dinov3_qkvb')
    return hf_folder(folder, hf_dinov3(network.state_dict()), layer_norm_eps=1e-5), {}, network

@layout
def hf_dinov3_gated(folder):
    network = rotary('vit_small_plus_patch16_dinov3')
    config = dict(layer_norm_eps=1e-5, hidden_act='silu')
    return hf_folder(folder, hf_dinov3(network.state_dict()), **config), {}, network

@layout
def dinov2_published(folder):
    network, tensors = dinov2()
    return saved(folder, tensors), HEADS, network

@layout
def dinov2_registers_in_chunks(folder):
    network, tensors = dinov2(reg_tokens=4, no_embed_class=True)
    tensors = renamed(tensors, ('reg_token', 'register_tokens'), ('blocks.0.', 'blocks.0.0.'),
                      ('blocks.1.', 'blocks.1.1.'))
    heads = {f'{name}_head.mlp.0.weight': torch.ones(8, 48) for name in ('dino', 'ibot')}
    return saved(folder, dict(teacher=prefixed('backbone.', tensors) | heads)), HEADS, network

@layout
def dinov2_gated(folder):
    network, tensors = dinov2(**GATED)
    tensors = renamed(tensors, ('.mlp.fc1.', '.mlp.w12.'), ('.mlp.fc2.', '.mlp.w3.'))
    return saved(folder, tensors), HEADS, network

@layout
def dinov3_published(folder):
    network = rotary('vit_small_patch16_dinov3_qkvb')
    tensors = renamed(network.state_dict(), ('reg_token', 'storage_tokens'),
                      ('gamma_1', 'ls1.gamma'), ('gamma_2', 'ls2.gamma'))
    for i in range(2):
        q, v = (tensors.pop(f'blocks.{i}.attn.{part}_bias') for part in 'qv')
        tensors[f'blocks.{i}.attn.qkv.bias'] = torch.cat([q, torch.full_like(q, torch.nan), v])
        tensors[f'blocks.{i}.attn.qkv.bias_mask'] = torch.ones(144)
    tensors |= {'mask_token': torch.zeros(1, 48), 'rope_embed.periods': torch.ones(4)}
    return saved(folder, tensors), HEADS, network


@pytest.mark.parametrize('name', LAYOUTS)
def test_a_layout_is_loaded_whole(name, tmp_path, asked):
    source, how, network = LAYOUTS[name](tmp_path)
    said, before = [], contents(tmp_path)
    backbone = load_backbone(source, **how, report=said.append)
    images = torch.randn(2, 3, 32, 32, generator=generator(0, 'images'))
    with torch.no_grad():
        torch.testing.assert_close(backbone(images), network(images), atol=1e-6, rtol=1e-6)
    loaded = backbone.state_dict()
    for key, value in network.state_dict().items(): assert torch.equal(loaded[key], value), key
    line, = said
    assert ' loaded into ' in line and 'random' not in line and 'not used' not in line, line
    assert not backbone.training and not asked and contents(tmp_path) == before


def contents(folder):
    "What a folder holds, byte by byte"
    return {path: hashlib.sha1(path.read_bytes()).digest() if path.is_file() else None
            for path in folder.rglob('*')}


def test_a_run_of_the_script_is_loaded_and_used(images, tmp_path, monkeypatch, asked):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(report, 'figures', lambda *args: {})
    main(['--recipe', 'tiny', '--data', str(images), '--out', 'runs/mine', '--depth', '2',
          '--epochs', '2', '--warmup-epochs', '0', '--freeze-last-layer', '0', '--lr', '0.05',
          '--teacher-momentum', '0.5', '--workers', '0', '--device', 'cpu'])
    before, said, views = contents(tmp_path), [], torch.rand(2, 3, 40, 40)
    state = load_checkpoint('runs/mine/checkpoint.pt')
    for which, source in (('teacher', 'runs/mine'), ('student', 'runs/mine/checkpoint.pt')):
        backbone = load_backbone(source, which, report=said.append)
        loaded = backbone.state_dict()
        for name, value in loaded.items():
            assert torch.equal(value, state[which][f'backbone.{name}']), name
        assert f'{len(loaded)} tensors of {which}.backbone loaded' in said[-1]
        assert f'{which}.head' in said[-1] and 'optimizer' in said[-1]
    assert not torch.equal(state['teacher']['backbone.cls_token'], loaded['cls_token'])
    source = open_images(images)
    features = extract_features(backbone, source, 40)
    assert features.shape == (96, 96) and features.isfinite().all()
    assert evaluate_knn(backbone, source, source, 40, ks=(1,))[1].top1 == 1
    assert attention_maps(backbone, views).shape == (2, 3, 5, 5)
    assert contents(tmp_path) == before and not asked


@pytest.mark.parametrize('name,size', [('convnext_atto', 64), ('swin_tiny_patch4_window7_224', 64),
                                       ('vit_small_patch14_reg4_dinov2', (28, 42))])
def test_a_run_of_another_backbone_is_loaded(name, size, tmp_path):
    shape = dict(convnext={}, swin=dict(embed_dim=24), vit=dict(embed_dim=48, depth=2, num_heads=3))
    unset = dict.fromkeys(('patch_size', 'embed_dim', 'depth', 'num_heads'))
    config = make_config('tiny', backbone=name, global_size=size, local_size=size, device='cpu',
                         **unset | shape[name.split('_')[0]])
    run = Learner(config, open_images(Shapes(32, size=32)))
    save_checkpoint(tmp_path/'any_name.pt', run.state())
    backbone = load_backbone(tmp_path/'any_name.pt')
    views = torch.randn(2, 3, *((size, size) if isinstance(size, int) else size))
    with torch.no_grad():
        torch.testing.assert_close(backbone(views), run.teacher.backbone.eval()(views))


def in_cache(folder, monkeypatch, repo, tensors, **config):
    "Put a repository into a cache of the hub, as its library would have"
    monkeypatch.setattr(hub, 'HF_HUB_CACHE', str(folder/'cache'))
    place = folder/'cache'/f'models--{repo.replace("/", "--")}'
    (place/'refs').mkdir(parents=True)
    (place/'refs'/'main').write_text('0123')
    (place/'snapshots'/'0123').mkdir(parents=True)
    save_file(tensors, place/'snapshots'/'0123'/'model.safetensors')
    if config: (place/'snapshots'/'0123'/'config.json').write_text(json.dumps(config))


def offline(monkeypatch):
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    monkeypatch.setattr(hub, 'HF_HUB_OFFLINE', True)


NAMED = {'vit_small_patch16_224.dino': ('apache-2.0', 'num_heads 6)'),
         'vit_small_patch14_reg4_dinov2.lvd142m': ('apache-2.0', 'num_heads 6)'),
         'vit_small_patch16_dinov3.lvd1689m': ('dinov3-license', 'mean of patches'),
         'vit_tiny_patch16_224.augreg_in21k': ('apache-2.0', 'num_heads 3)'),
         'resnet10t': ('apache-2.0', '')}

@pytest.mark.parametrize('name', NAMED)
def test_a_name_of_timm_gives_its_weights(name, tmp_path, monkeypatch, asked):
    any_size = dict(dynamic_img_size=True) if 'vit' in name else {}
    network = trained(timm.create_model(name, **any_size))
    known, said = timm.get_pretrained_cfg(name), []
    offline(monkeypatch)
    in_cache(tmp_path, monkeypatch, known.hf_hub_id, network.state_dict())
    backbone = load_backbone(name, pos_embed_rule='timm', report=said.append)
    network.reset_classifier(0)
    images = torch.randn(1, 3, 112, 112)
    with torch.no_grad():
        torch.testing.assert_close(backbone(images), network(images), atol=1e-6, rtol=1e-6)
    if known.mean[0] == 0.5: assert 'of mean (0.5, 0.5, 0.5) and std' in said.pop(1)
    assert len(said) == 2 and known.hf_hub_id in said[0] and not asked
    for words, line in zip(NAMED[name], said): assert words in line, line


@pytest.mark.parametrize('prefix', ['', 'hf-hub:'])
def test_an_id_of_the_hub_gives_its_weights(prefix, tmp_path, monkeypatch, asked):
    network, said = vit(), []
    offline(monkeypatch)
    tensors = {name: value.contiguous().clone()
               for name, value in final_norm(hf_old(network.state_dict())).items()}
    in_cache(tmp_path, monkeypatch, 'facebook/dino-vits16', tensors, num_attention_heads=3)
    backbone = load_backbone(f'{prefix}facebook/dino-vits16', report=said.append)
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad(): torch.testing.assert_close(backbone(images), network(images))
    assert len(said) == 2 and 'fetching facebook/dino-vits16' in said[0] and not asked


def refusal(source, said=None, **how):
    "The one sentence with which a source is refused"
    with pytest.raises(ValueError) as error:
        load_backbone(source, report=lambda line: said.append(line) if said is not None else None,
                      **how)
    sentence = str(error.value)
    assert sentence[-1] in '.?' and '\n' not in sentence and len(sentence) <= 300, sentence
    return sentence


@pytest.mark.parametrize('name', ['vit_small_patch16_224.dino', 'facebook/dino-vits16'])
def test_without_a_network_one_sentence_says_so(name, tmp_path, monkeypatch, asked, capfd):
    monkeypatch.setattr(hub, 'HF_HUB_CACHE', str(tmp_path/'cache'))
    said = []
    sentence = refusal(name, said)
    assert 'hub: it cannot be reached, and the cache here has none' in sentence and asked
    assert len(said) == 1 and said[0].startswith('fetching ')
    offline(monkeypatch)
    asked.clear()
    assert 'HF_HUB_OFFLINE is set' in refusal(name, said) and not asked
    assert not ''.join(capfd.readouterr())


class Code:
    "Makes a file when it is unpickled by something that runs pickles"
    def __init__(self, path): self.path = path
    def __reduce__(self): return os.mkdir, (str(self.path),)


def halved(path):
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])
    return path


@pytest.mark.parametrize('kind', ['file.pth', 'old.pth', 'file.safetensors'])
def test_a_damaged_file_is_refused_wherever_the_damage_is(kind, tmp_path):
    how = dict(_use_new_zipfile_serialization=False) if kind == 'old.pth' else {}
    path, random = saved(tmp_path, TENSORS, kind, **how), np.random.default_rng(0)
    whole, refused = path.read_bytes(), 0
    for part in np.linspace(0, 1, 30, endpoint=False):
        path.write_bytes(whole[:int(part * len(whole))])
        refusal(path, num_heads=3)
    for _ in range(30):                           # what is not its tensors' names may be anything
        damaged = bytearray(whole)
        for place in random.integers(0, 2000, 20): damaged[place] = random.integers(256)
        path.write_bytes(damaged)
        try: load_backbone(path, num_heads=3, report=lambda line: None)
        except ValueError as error: refused += '\n' not in str(error) and len(str(error)) <= 300
        else: refused += 1
    assert refused == 30


def without(tensors, *names): return {k: v for k, v in tensors.items() if k not in names}


TENSORS = vit().state_dict()
KEY = 'encoder.layer.1.attention.attention.key.weight'
HF = final_norm(hf_old(TENSORS))

FAULTY = dict(
    renamed=(lambda top: saved(top, renamed(TENSORS, ('1.norm2.bias', '1.norm2.beta'))),
             'missing: blocks.1.norm2.bias; left over: blocks.1.norm2.beta; perhaps some were'),
    other_shape=(lambda top: saved(top, TENSORS | {'norm.bias': torch.zeros(47)}),
                 r'other shape: norm.bias, \(47,\), not \(48,\); perhaps it is of anot'),
    missing=(lambda top: saved(top, without(TENSORS, 'blocks.0.mlp.fc2.weight')),
             'missing: blocks.0.mlp.fc2.weight; perhaps the file is not whole'),
    block_missing=(lambda top: saved(top, {k: v for k, v in TENSORS.items() if 's.0.' not in k}),
                   'attention|architecture'),
    more=(lambda top: saved(top, TENSORS | dict(dist_token=torch.ones(1, 1, 48))),
          'left over: dist_token; perhaps it has parts that this architecture lacks'),
    nan=(lambda top: saved(top, TENSORS | {'norm.bias': torch.full((48,), torch.nan)}),
         'norm.bias has NaN or infinity'),
    whole_numbers=(lambda top: saved(top, TENSORS | {'norm.bias': torch.ones(48).char()}),
                   'norm.bias, torch.int8'),
    hf_renamed=(lambda top: hf_folder(top, renamed(HF, (KEY, KEY + 's'))),
                'missing: blocks.1.attn.qkv.weight; left over: .*perhaps some were renamed'),
    hf_missing=(lambda top: hf_folder(top, without(HF, KEY)), 'missing: blocks.1.attn.qkv.weight'),
    hf_other_shape=(lambda top: hf_folder(top, HF | {KEY: torch.zeros(24, 48)}),
                    r', \(120, 48\), not \(144, 48\)'),
    hf_odd_shape=(lambda top: hf_folder(top, HF | {KEY: torch.zeros(48)}),
                  'missing: blocks.1.attn'),
    hf_activation=(lambda top: hf_folder(top, HF, hidden_act='relu'), 'activation is relu'),
    hf_config=(lambda top: (hf_folder(top, HF), (top/'config.json').write_text('[{'))[0],
               'config.json: it is no JSON object'),
    other_heads=(lambda top: hf_folder(top, HF, num_attention_heads=7), 'num_heads is 7'),
    positions=(lambda top: saved(top, TENSORS | dict(pos_embed=torch.zeros(1, 30, 48))),
               'table of 30 positions is not square; give img_size'),
    flat_shapes=(lambda top: saved(top, {k: v.flatten() for k, v in TENSORS.items()}),
                 'give architecture'),
    no_backbone=(lambda top: saved(top, dict(state_dict=prefixed('module.linear.', dict(
        weight=torch.ones(10, 384), bias=torch.ones(10))))), 'give architecture'),
    nobody_knows=(lambda top: saved(top, create_backbone('mobilenetv3_small_050').state_dict()),
                  'give architecture'),
    two_networks=(lambda top: saved(top, prefixed('a.', TENSORS) | prefixed('b.', TENSORS)),
                  'several networks'),
    student_only=(lambda top: saved(top, dict(student=TENSORS)), 'no teacher, only a student'),
    numbers=(lambda top: saved(top, dict(epoch=3)), 'no tensors by name, but a dict'),
    list_of_tensors=(lambda top: saved(top, [*TENSORS.values()]), 'no tensors by name, but a list'),
    code=(lambda top: saved(top, TENSORS | dict(args=Code(top/'ran'))),
          r'holds code \(posix.mkdir'),
    code_in_old_format=(lambda top: saved(top, TENSORS | dict(args=Code(top/'ran')),
                                          _use_new_zipfile_serialization=False),
                        r'holds code \(posix.mkdir'),
    code_in_a_folder=(lambda top: hf_folder(top, HF | dict(args=Code(top/'ran')), pickled=True),
                      r'holds code \(posix.mkdir'),
    whole_module=(lambda top: saved(top, vit()), r'holds code \(dino_nb.backbone.DINOViT'),
    half=(lambda top: halved(saved(top, TENSORS)), 'cut short, damaged or no file of weights'),
    half_old=(lambda top: halved(saved(top, TENSORS, _use_new_zipfile_serialization=False)),
              'cut short, damaged or no file of weights'),
    half_safetensors=(lambda top: halved(saved(top, TENSORS, 'half.safetensors')),
                      'cut short, damaged or no file of weights'),
    empty=(lambda top: (top/'empty.pth').touch() or top/'empty.pth', 'cut short, damaged'),
    pointer=(lambda top: (top/'model.safetensors').write_text('version https://git-lfs.github.com')
             and top, 'git lfs pull'),
    page=(lambda top: (top/'page.pth').write_text('<html>') and top/'page.pth', 'a web page'),
    pipe=(lambda top: os.mkfifo(top/'pipe') or top/'pipe', 'Is a pipe, not a file'),
    broken_link=(lambda top: (top/'link.pth').symlink_to('none') or top/'link.pth', 'not exist'),
    empty_folder=(lambda top: top, 'a folder without a run'),
    none=(lambda top: top/'none.pth', 'does not exist'),
    run_without_checkpoint=(lambda top: (top/'config.json').write_text(json.dumps(dict(
        data='', backbone='vit', batch_size=1, out_dim=1, teacher_temp=1.))) and top,
        'checkpoint.pt does not exist'),
    no_run=(lambda top: saved(top, dict(step=3), 'checkpoint.pt').parent, 'holds no run'))


@pytest.mark.parametrize('fault', FAULTY)
def test_what_is_amiss_is_said_and_nothing_is_done(fault, tmp_path, asked):
    write, words = FAULTY[fault]
    source = write(tmp_path)
    before = contents(tmp_path)
    for partial in (False, True) if fault in ('half', 'code', 'numbers', 'nan') else (False,):
        sentence = refusal(source, num_heads=None if source == tmp_path else 3, partial=partial)
        assert re.search(words, sentence) and source.name[-8:] in sentence, sentence
    assert contents(tmp_path) == before and not asked


WRONG = [(dict(which='both'), "which is 'both'"),
         (dict(which='student'), 'no student, only one network'),
         (dict(), 'depth 2 and width 48.*give num_heads'),
         (dict(num_heads=5), 'num_heads is 5; it must divide'),
         (dict(num_heads=0), 'num_heads is 0'),
         (dict(num_heads=3, img_size=64), r'pos_embed, \(1, 17, 48\), not \(1, 65, 48\)'),
         (dict(num_heads=3, img_size=33), 'multiple of the patch size'),
         (dict(num_heads=3, pos_embed_rule='mine'), 'pos_embed_rule'),
         (dict(architecture='vit_smal'), "backbone is 'vit_smal', which is not known"),
         (dict(architecture='resnet18'), '0 tensors fit resnet18.*another architecture'),
         (dict(architecture='resnet18', partial=True), '0 tensors fit resnet18'),
         (dict(architecture='vit_tiny_patch16_224'), 'another architecture')]

@pytest.mark.parametrize('how,words', WRONG)
def test_wrong_arguments_are_one_sentence(how, words, tmp_path):
    assert re.search(words, sentence := refusal(saved(tmp_path, TENSORS), **how)), sentence


def test_channels_that_do_not_fit_are_named(tmp_path):
    gray = create_backbone('resnet18', in_chans=1).state_dict()
    sentence = refusal(saved(tmp_path, gray))
    assert re.search(r'conv1.weight, \(64, 1, 7, 7\), not \(64, 3, 7, 7\)', sentence), sentence
    gray = vit(in_chans=1)
    backbone = load_backbone(saved(tmp_path, gray.state_dict()), num_heads=3)
    images = torch.randn(2, 1, 32, 32)
    with torch.no_grad(): assert torch.equal(backbone(images), gray(images))


def test_partial_says_what_stays_random(tmp_path):
    path, said = saved(tmp_path, without(TENSORS, 'norm.bias') | dict(x=torch.ones(1))), []
    backbone = load_backbone(path, num_heads=3, partial=True, report=said.append)
    assert 'random: norm.bias; not used: x' in said[0]
    for name, value in backbone.state_dict().items():
        assert torch.equal(value, TENSORS[name]) == (name != 'norm.bias'), name


NAMES = ['runs/x', './facebook', '~/weights', 'facebook/dino.pth', 'model.safetensors', 'a/b/c', '',
         'here/x', 'vit_smal_patch16_224.dino', 'vit_small_patch16_224.dinov',
         'no name of anything', 'facebook\\dino', 'x' * 10_000, '\0', 'a\nb']

@pytest.mark.parametrize('name', NAMES, ids=range(len(NAMES)))
def test_what_is_no_name_is_not_asked_for(name, tmp_path, monkeypatch, asked):
    monkeypatch.chdir(tmp_path)
    (tmp_path/'here').mkdir()
    assert re.search('not exist|not known', sentence := refusal(name)), sentence
    assert not asked


@pytest.mark.parametrize('rule', ['published', 'timm'])
def test_positions_are_resampled_by_name(rule, tmp_path):
    network = vit(pos_embed_rule=rule)
    path, images = saved(tmp_path, network.state_dict()), torch.randn(1, 3, 48, 24)
    backbone = load_backbone(path, num_heads=3, pos_embed_rule=rule)
    other = load_backbone(path, num_heads=3, pos_embed_rule={'published': 'timm'}.get(rule))
    with torch.no_grad():
        assert torch.equal(backbone(images), network(images))
        assert (other(images) - network(images)).abs().max() > 1e-3
