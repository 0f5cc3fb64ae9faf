"Single changes to the published step that step.py measures; each computes the same numbers."
import torch
import torch.nn.functional as F
from torch import nn


def fused_attention(self, x):
    "Attention as one fused kernel."
    n, tokens, dim = x.shape
    qkv = self.qkv(x).reshape(n, tokens, 3, self.heads, dim // self.heads)
    x = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4).unbind(0))
    return self.proj(x.transpose(1, 2).reshape(n, tokens, dim))


def baddbmm_attention(self, x):
    "Attention whose scale is part of the first product."
    n, tokens, dim = x.shape
    qkv = self.qkv(x).reshape(n, tokens, 3, self.heads, dim // self.heads)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).flatten(1, 2).unbind(0)
    empty = q.new_empty(len(q), tokens, tokens)
    scores = torch.baddbmm(empty, q, k.mT, beta=0, alpha=self.scale)
    x = torch.bmm(scores.softmax(-1), v).view(n, self.heads, tokens, -1)
    return self.proj(x.transpose(1, 2).reshape(n, tokens, dim))


def scaled_queries(self, x):
    "Attention that scales the queries, not the (tokens x tokens) scores, as timm does."
    n, tokens, dim = x.shape
    qkv = self.qkv(x).reshape(n, tokens, 3, self.heads, dim // self.heads)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    x = (q * self.scale @ k.mT).softmax(-1) @ v
    return self.proj(x.transpose(1, 2).reshape(n, tokens, dim))


def class_token_block(self, x):
    "A block for the class token alone, which is all that the head sees of the last block."
    n, tokens, dim = x.shape
    attn, normed = self.attn, self.norm1(x)
    weights, biases = (p.split([dim, 2 * dim]) for p in (attn.qkv.weight, attn.qkv.bias))
    q = F.linear(normed[:, :1], weights[0], biases[0]).view(n, 1, attn.heads, -1).transpose(1, 2)
    kv = F.linear(normed, weights[1], biases[1]).view(n, tokens, 2, attn.heads, -1)
    k, v = kv.permute(2, 0, 3, 1, 4).unbind(0)
    out = (q * attn.scale @ k.mT).softmax(-1) @ v
    x = x[:, :1] + attn.proj(out.transpose(1, 2).reshape(n, 1, dim))
    return x + self.mlp(self.norm2(x))


def class_token_mlp(self, x):
    "A block whose attention sees all tokens and whose MLP the class token alone: two lines."
    x = x[:, :1] + self.attn(self.norm1(x))[:, :1]
    return x + self.mlp(self.norm2(x))


class LengthsAfter(nn.Module):
    "The last layer, dividing K outputs by the rows' lengths instead of K x 256 weights."
    def __init__(self, layer):
        super().__init__()
        self.weight_g, self.weight_v = layer.weight_g, layer.weight_v

    def forward(self, x):
        lengths = torch.linalg.vector_norm(self.weight_v, dim=1)
        return F.linear(x, self.weight_v) * (self.weight_g[:, 0] / lengths)


def packed_attention(attn, tokens, shapes):
    "Attention inside of each image of a row of tokens (rows, D) that holds several sizes."
    outputs, heads = [], attn.heads
    for qkv, (n, t) in zip(attn.qkv(tokens).split([n * t for n, t in shapes]), shapes):
        q, k, v = qkv.view(n, t, 3, heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        out = (q * attn.scale @ k.mT).softmax(-1) @ v
        outputs.append(out.transpose(1, 2).reshape(n * t, -1))
    return attn.proj(torch.cat(outputs))


def packed_forward(self, views):
    "Views of all sizes as one row of tokens: every linear layer is called once."
    vit, groups = self.backbone, {}
    for view in views: groups.setdefault(view.shape[-1], []).append(view)
    x, shapes = [], []
    for group in groups.values():
        images = torch.cat(group)
        tokens = vit.patch_embed(images)
        tokens = torch.cat((vit.cls_token.expand(len(tokens), -1, -1), tokens), dim=1)
        tokens = tokens + vit.positions(tokens.shape[1], *images.shape[-2:])
        x.append(tokens.flatten(0, 1))
        shapes.append(tokens.shape[:2])
    x = torch.cat(x)
    for block in vit.blocks[:-1]:
        x = x + packed_attention(block.attn, block.norm1(x), shapes)
        x = x + block.mlp(block.norm2(x))
    parts = x.split([n * t for n, t in shapes])
    x = torch.cat([class_token_block(vit.blocks[-1], part.view(n, t, -1))
                   for part, (n, t) in zip(parts, shapes)])
    return self.head(vit.norm(x)[:, 0])
