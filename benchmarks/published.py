"""A training step with the structure of the published DINO code, written from its description.

It is the baseline of the benchmarks: attention in plain products, one log-softmax per pair of
views, weight_norm as a hook, and Python loops over parameters for clipping and the teacher.
"""
import warnings

import torch
import torch.nn.functional as F
from torch import nn

warnings.filterwarnings('ignore', message='.*weight_norm.*')


class Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads, self.scale = heads, (dim // heads) ** -0.5
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x):
        n, tokens, dim = x.shape
        qkv = self.qkv(x).reshape(n, tokens, 3, self.heads, dim // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attention = (q @ k.transpose(-2, -1)) * self.scale
        attention = attention.softmax(dim=-1)
        return self.proj((attention @ v).transpose(1, 2).reshape(n, tokens, dim))


class MLP(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim)

    def forward(self, x): return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn, self.mlp = Attention(dim, heads), MLP(dim)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    def __init__(self, dim, patch):
        super().__init__()
        self.proj = nn.Conv2d(3, dim, kernel_size=patch, stride=patch)

    def forward(self, x): return self.proj(x).flatten(2).transpose(1, 2)


class ViT(nn.Module):
    def __init__(self, dim=384, depth=12, heads=6, patch=16, image=224):
        super().__init__()
        self.patch, self.side = patch, image // patch
        self.patch_embed = PatchEmbed(dim, patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.side ** 2, dim))
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def positions(self, tokens, h, w):
        if tokens == self.pos_embed.shape[1] and h == w: return self.pos_embed
        grid = self.pos_embed[:, 1:].reshape(1, self.side, self.side, -1).permute(0, 3, 1, 2)
        scale = [(size // self.patch + 0.1) / self.side for size in (h, w)]
        grid = F.interpolate(grid, scale_factor=scale, mode='bicubic')
        grid = grid.permute(0, 2, 3, 1).reshape(1, tokens - 1, -1)
        return torch.cat((self.pos_embed[:, :1], grid), dim=1)

    def forward(self, images):
        x = self.patch_embed(images)
        x = torch.cat((self.cls_token.expand(len(x), -1, -1), x), dim=1)
        x = x + self.positions(x.shape[1], *images.shape[-2:])
        for block in self.blocks: x = block(x)
        return self.norm(x)[:, 0]


class Head(nn.Module):
    def __init__(self, dim, out_dim, hidden=2048, bottleneck=256):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, hidden),
                                 nn.GELU(), nn.Linear(hidden, bottleneck))
        self.last_layer = nn.utils.weight_norm(nn.Linear(bottleneck, out_dim, bias=False))
        self.last_layer.weight_g.requires_grad_(False)

    def forward(self, x): return self.last_layer(F.normalize(self.mlp(x), dim=-1, p=2))


class MultiCrop(nn.Module):
    "Views (a list) grouped by size: one backbone call per size, one head call."
    def __init__(self, backbone, head):
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, views):
        sizes = torch.tensor([view.shape[-1] for view in views])
        ends = torch.unique_consecutive(sizes, return_counts=True)[1].cumsum(0)
        start, outputs = 0, []
        for end in ends.tolist():
            outputs.append(self.backbone(torch.cat(views[start:end])))
            start = end
        return self.head(torch.cat(outputs))


class PairLoss(nn.Module):
    "One log-softmax for every pair of a teacher's and another student's view."
    def __init__(self, out_dim, n_views, student_temp=0.1, momentum=0.9):
        super().__init__()
        self.n_views, self.student_temp, self.momentum = n_views, student_temp, momentum
        self.register_buffer('center', torch.zeros(1, out_dim))

    def forward(self, student, teacher, teacher_temp):
        # float(): what autocast does by itself around a softmax on CUDA, and not on a CPU
        students = (student.float() / self.student_temp).chunk(self.n_views)
        targets = F.softmax((teacher.float() - self.center) / teacher_temp, dim=-1)
        total, n_terms = 0, 0
        for i, target in enumerate(targets.detach().chunk(2)):
            for v, view in enumerate(students):
                if v == i: continue
                loss = torch.sum(-target * F.log_softmax(view, dim=-1), dim=-1)
                total, n_terms = total + loss.mean(), n_terms + 1
        self.update_center(teacher)
        return total / n_terms

    @torch.no_grad()
    def update_center(self, teacher):
        mean = torch.sum(teacher.float(), dim=0, keepdim=True) / len(teacher)
        self.center = self.center * self.momentum + mean * (1 - self.momentum)


def clip_in_a_loop(model, limit):
    "Clip every parameter's gradient by itself, reading each norm back from the device."
    norms = []
    for _, parameter in model.named_parameters():
        if parameter.grad is None: continue
        norm = parameter.grad.data.norm(2)
        norms.append(norm.item())
        coefficient = limit / (norm + 1e-6)
        if coefficient < 1: parameter.grad.data.mul_(coefficient)
    return norms


@torch.no_grad()
def ema_in_a_loop(teacher, student, momentum):
    for old, new in zip(teacher.parameters(), student.parameters()):
        old.data.mul_(momentum).add_((1 - momentum) * new.detach().data)
