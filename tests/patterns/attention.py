"""Attention in its spellings: heads, and the sizes of queries and keys and of values within them, are groups of their own."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from patterns.registry import Net, conv, pattern, table, tokens


class Block(Net):
    """Sixteen tokens of twelve channels, and a block with three heads of four that is added to them."""

    def __init__(self, **layers: nn.Module | torch.Tensor) -> None:
        super().__init__(stem=conv(3, 12, 2, stride=2, padding=0), proj=nn.Linear(12, 12), head=nn.Linear(12, 4), **layers)

    def forward(self, x):
        x = tokens(self.stem(x))
        return self.head((x + self.proj(self.attend(x))).mean(1))


def heads(x, n=3):
    """[N, L, C] to [N, heads, L, C / heads]."""
    return x.unflatten(-1, (n, -1)).transpose(1, 2)


def together(x):
    """[N, heads, L, D] to [N, L, C]."""
    return x.transpose(1, 2).flatten(2)


FUSED = {"stem": 12, "qkv:heads": 3, "qkv:head_dim": 4, "qkv:head_dim:1": 4}  # queries and keys have one head size, values theirs
SEPARATE = {"stem": 12, "q:heads": 3, "q:head_dim": 4, "v:head_dim": 4}


@pattern(FUSED, drops={"qkv:heads", "qkv:head_dim:1"})
class FusedAttention(Block):
    """One linear for queries, keys and values: reshape, permute, unbind, fused attention."""

    def __init__(self) -> None:
        super().__init__(qkv=nn.Linear(12, 36))

    def attend(self, x):
        n, length, c = x.shape
        q, k, v = self.qkv(x).reshape(n, length, 3, 3, c // 3).permute(2, 0, 3, 1, 4).unbind(0)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, length, c)


@pattern(FUSED, drops={"qkv:heads", "qkv:head_dim:1"})
class ChunkedAttention(Block):
    """One linear in three chunks, and the softmax written out."""

    def __init__(self) -> None:
        super().__init__(qkv=nn.Linear(12, 36, bias=False))

    def attend(self, x):
        q, k, v = (heads(part) for part in self.qkv(x).chunk(3, -1))
        return together((q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(-1) @ v)


@pattern(SEPARATE, drops={"q:heads", "v:head_dim"})
class SeparateAttention(Block):
    """Three linears, and torch.einsum."""

    def __init__(self) -> None:
        super().__init__(q=nn.Linear(12, 12), k=nn.Linear(12, 12), v=nn.Linear(12, 12))

    def attend(self, x):
        n, length, c = x.shape
        q, k, v = (layer(x).view(n, length, 3, 4) for layer in (self.q, self.k, self.v))
        weights = torch.einsum("nqhd,nkhd->nhqk", q, k).mul(0.5).softmax(-1)
        return torch.einsum("nhqk,nkhd->nqhd", weights, v).reshape(n, length, c)


MANY = {"stem": 12, "many.in_proj:heads": 3, "many.in_proj:head_dim": 4, "many.in_proj:head_dim:1": 4}


@pattern(MANY, drops={"many.in_proj:heads", "many.in_proj:head_dim:1"})
class MultiheadFirst(Net):
    """nn.MultiheadAttention with the batch first."""

    def __init__(self) -> None:
        super().__init__(
            stem=conv(3, 12, 2, stride=2, padding=0), many=nn.MultiheadAttention(12, 3, batch_first=True), head=nn.Linear(12, 4)
        )

    def forward(self, x):
        x = tokens(self.stem(x))
        return self.head((x + self.many(x, x, x, need_weights=False)[0]).mean(1))


@pattern(MANY, drops={"many.in_proj:heads", "many.in_proj:head_dim:1"})
class MultiheadSecond(Net):
    """nn.MultiheadAttention with the sequence first, and the weights asked for."""

    def __init__(self) -> None:
        super().__init__(stem=conv(3, 12, 2, stride=2, padding=0), many=nn.MultiheadAttention(12, 3), head=nn.Linear(12, 4))

    def forward(self, x):
        x = self.stem(x).flatten(2).permute(2, 0, 1)
        return self.head((x + self.many(x, x, x)[0]).mean(0))


LAYER = {
    "stem": 12, "layer.self_attn.in_proj:heads": 3, "layer.self_attn.in_proj:head_dim": 4,
    "layer.self_attn.in_proj:head_dim:1": 4, "layer.linear1": 10,
}  # fmt: skip


@pattern(LAYER, drops=LAYER.keys() - {"stem", "layer.self_attn.in_proj:head_dim"})
class EncoderLayer(Net):
    """nn.TransformerEncoderLayer, norms after the sums."""

    def __init__(self) -> None:
        super().__init__(
            stem=conv(3, 12, 2, stride=2, padding=0), layer=nn.TransformerEncoderLayer(12, 3, 10, batch_first=True),
            head=nn.Linear(12, 4),
        )  # fmt: skip

    def forward(self, x):
        return self.head(self.layer(tokens(self.stem(x))).mean(1))


@pattern(FUSED, drops={"qkv:heads", "qkv:head_dim:1"})
class RelativePositions(Block):
    """A table of biases by distance, one column a head, looked up by an index buffer."""

    def __init__(self) -> None:
        super().__init__(qkv=nn.Linear(12, 36), bias=table(49, 3))
        place = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij")).flatten(1)
        apart = place[:, :, None] - place[:, None, :] + 3
        self.register_buffer("apart", apart[0] * 7 + apart[1])

    def attend(self, x):
        q, k, v = (heads(part) for part in self.qkv(x).chunk(3, -1))
        bias = self.bias[self.apart.view(-1)].view(16, 16, -1).permute(2, 0, 1)
        return together(((q * 0.5) @ k.mT + bias[None]).softmax(-1) @ v)


@pattern(FUSED, drops={"qkv:heads", "qkv:head_dim:1"})
class ShiftedWindows(Block):
    """Attention within windows of a map that is rolled before and rolled back after, with a mask between windows."""

    def __init__(self) -> None:
        super().__init__(qkv=nn.Linear(12, 36))
        self.register_buffer("mask", torch.where(torch.rand(4, 4, 4) < 0.3, -100.0, 0.0))

    def attend(self, x):
        n, _, c = x.shape
        x = x.view(n, 4, 4, c).roll((-1, -1), (1, 2))
        x = x.view(n, 2, 2, 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, c)
        q, k, v = self.qkv(x).reshape(-1, 4, 3, 3, 4).permute(2, 0, 3, 1, 4)
        weights = (q * 0.5) @ k.transpose(-2, -1)
        weights = weights.view(n, 4, 3, 4, 4) + self.mask[:, None]
        x = (weights.view(-1, 3, 4, 4).softmax(-1) @ v).transpose(1, 2).reshape(-1, 4, c)
        x = x.view(n, 2, 2, 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(n, 4, 4, c)
        return x.roll((1, 1), (1, 2)).view(n, 16, c)


@pattern({"stem": 12, "qkv:heads": 3, "qkv:head_dim": 4, "qkv:heads:1": 3, "qkv:head_dim:1": 4, "before": 3},
         drops={"qkv:heads:1", "qkv:head_dim:1"})  # fmt: skip
class TalkingHeads(Block):
    """A linear mixes the heads before the softmax and another after it."""

    def __init__(self) -> None:
        super().__init__(qkv=nn.Linear(12, 36), before=nn.Linear(3, 3), after=nn.Linear(3, 3))

    def attend(self, x):
        q, k, v = (heads(part) for part in self.qkv(x).chunk(3, -1))
        weights = self.before((q @ k.mT * 0.5).permute(0, 2, 3, 1)).softmax(2)
        return together(self.after(weights).permute(0, 3, 1, 2) @ v)


@pattern(SEPARATE, drops={"q:heads", "v:head_dim"})
class LinearAttention(Block):
    """Keys meet values first: no softmax, a positive map instead."""

    def __init__(self) -> None:
        super().__init__(q=nn.Linear(12, 12), k=nn.Linear(12, 12), v=nn.Linear(12, 12))

    def attend(self, x):
        q, k, v = heads(F.elu(self.q(x)) + 1), heads(F.elu(self.k(x)) + 1), heads(self.v(x))
        context = k.transpose(-2, -1) @ v
        scale = 1 / (q * k.sum(2, keepdim=True)).sum(-1, keepdim=True)
        return together(q @ context * scale)


@pattern({"stem": 12, "q:heads": 2, "q:head_dim": 3, "v:head_dim": 3}, drops={"q:heads", "v:head_dim"})
class GroupedQueries(Block):
    """Four heads of queries share two of keys and values."""

    def __init__(self) -> None:
        super().__init__(q=nn.Linear(12, 12), k=nn.Linear(12, 6), v=nn.Linear(12, 6))

    def attend(self, x):
        q, k, v = heads(self.q(x), 4), heads(self.k(x), 2), heads(self.v(x), 2)
        return together(F.scaled_dot_product_attention(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)))


@pattern(SEPARATE, drops={"q:heads", "v:head_dim"})
class OneKey(Block):
    """Three heads of queries share one of keys and one of values."""

    def __init__(self) -> None:
        super().__init__(q=nn.Linear(12, 12), k=nn.Linear(12, 4), v=nn.Linear(12, 4))

    def attend(self, x):
        weights = (heads(self.q(x)) @ self.k(x)[:, None].mT * 0.5).softmax(-1)
        return together(weights @ self.v(x)[:, None])


@pattern(SEPARATE, drops={"q:heads", "v:head_dim"})
class ClassAttention(Net):
    """Only a learned token asks; it and the patches answer."""

    def __init__(self) -> None:
        super().__init__(
            stem=conv(3, 12, 2, stride=2, padding=0), token=table(1, 1, 12), q=nn.Linear(12, 12), k=nn.Linear(12, 12),
            v=nn.Linear(12, 12), proj=nn.Linear(12, 12), head=nn.Linear(12, 4),
        )  # fmt: skip

    def forward(self, x):
        token = self.token.expand(x.shape[0], -1, -1)
        x = torch.cat([token, tokens(self.stem(x))], 1)
        answer = F.scaled_dot_product_attention(heads(self.q(x[:, :1])), heads(self.k(x)), heads(self.v(x)))
        return self.head((token + self.proj(together(answer))).squeeze(1))


@pattern(SEPARATE, drops={"q:heads", "v:head_dim"})
class CosineAttention(Block):
    """Queries and keys of length one, and a learned temperature for each head."""

    def __init__(self) -> None:
        super().__init__(q=nn.Linear(12, 12), k=nn.Linear(12, 12), v=nn.Linear(12, 12), scale=table(3, 1, 1))

    def attend(self, x):
        q, k = F.normalize(heads(self.q(x)), dim=-1), F.normalize(heads(self.k(x)), dim=-1)
        return together((q @ k.mT * self.scale.clamp(max=4.6).exp()).softmax(-1) @ heads(self.v(x)))


@pattern({"stem": 12, "q:heads": 3, "q:head_dim": 2, "v:head_dim": 4}, drops={"q:heads", "v:head_dim"})
class Rotary(Block):
    """Halves of queries and keys are turned against each other by the position."""

    def __init__(self) -> None:
        super().__init__(q=nn.Linear(12, 12), k=nn.Linear(12, 12), v=nn.Linear(12, 12))
        angle = torch.arange(16.0)[:, None] * torch.tensor([1.0, 0.1])
        self.register_buffer("cos", angle.cos().repeat(1, 2))
        self.register_buffer("sin", angle.sin().repeat(1, 2))

    def turned(self, x):
        one, two = x.chunk(2, -1)
        return x * self.cos + torch.cat([-two, one], -1) * self.sin

    def attend(self, x):
        q, k = self.turned(heads(self.q(x))), self.turned(heads(self.k(x)))
        return together(F.scaled_dot_product_attention(q, k, heads(self.v(x))))


@pattern(SEPARATE, drops={"q:heads", "v:head_dim"})
class NormedQueries(Block):
    """Layer norms over each head's queries and keys."""

    def __init__(self) -> None:
        super().__init__(q=nn.Linear(12, 12), k=nn.Linear(12, 12), v=nn.Linear(12, 12), one=nn.LayerNorm(4), two=nn.LayerNorm(4))

    def attend(self, x):
        q, k, v = self.one(heads(self.q(x))), self.two(heads(self.k(x))), heads(self.v(x))
        return together(F.scaled_dot_product_attention(q, k, v))


@pattern({"stem": 12, "q:heads": 3, "q:head_dim": 4, "k:head_dim": 4}, drops={"q:heads", "q:head_dim"})
class ChannelAttention(Net):
    """Channels attend to channels: a map of a head's size squared, over all pixels."""

    def __init__(self) -> None:
        super().__init__(
            stem=conv(3, 12, 2, stride=2, padding=0), q=conv(12, 12, 1), k=conv(12, 12, 1), v=conv(12, 12, 1),
            scale=table(3, 1, 1), proj=conv(12, 12, 1), head=nn.Linear(12, 4),
        )  # fmt: skip

    def forward(self, x):
        x = self.stem(x)
        n, c, h, w = x.shape
        q, k, v = (layer(x).reshape(n, 3, 4, h * w) for layer in (self.q, self.k, self.v))
        weights = (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT * self.scale).softmax(-1)
        return self.head((x + self.proj((weights @ v).reshape(n, c, h, w))).mean((2, 3)))


@pattern(stem=8, q=4, v=5, drops={"v"})
class NonLocal(Net):
    """Every pixel against every other, without heads, on maps; a learned scalar weighs the answer."""

    def __init__(self) -> None:
        super().__init__(
            stem=conv(3, 8, stride=2), q=conv(8, 4, 1), k=conv(8, 4, 1), v=conv(8, 5, 1), out=conv(5, 8, 1), gamma=table(1),
            head=nn.Linear(8, 4),
        )  # fmt: skip

    def forward(self, x):
        x = F.relu(self.stem(x))
        q, k, v = self.q(x).flatten(2), self.k(x).flatten(2), self.v(x).flatten(2)
        weights = torch.bmm(q.transpose(1, 2), k).softmax(-1)
        y = torch.bmm(v, weights.transpose(1, 2)).view(x.shape[0], -1, 4, 4)
        return self.head((x + self.gamma * self.out(y)).mean((2, 3)))


@pattern(LAYER, drops=LAYER.keys() - {"stem", "layer.self_attn.in_proj:head_dim"})
class VisionTransformer(Net):
    """Patches by a linear, a class token, position embeddings, an encoder layer; the token's row goes to the head."""

    def __init__(self) -> None:
        super().__init__(
            stem=nn.Linear(12, 12), token=table(1, 1, 12), positions=table(1, 17, 12), norm=nn.LayerNorm(12),
            layer=nn.TransformerEncoderLayer(12, 3, 10, batch_first=True, norm_first=True), head=nn.Linear(12, 4),
        )  # fmt: skip

    def forward(self, x):
        n = x.shape[0]
        x = x.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5).reshape(n, 16, 12)
        x = torch.cat([self.token.expand(n, -1, -1), self.stem(x)], 1) + self.positions
        return self.head(self.norm(self.layer(x))[:, 0])


@pattern(stem=12, k=5, queries=3, v=6, c=4)
class LearnedQueries(Net):
    """Learned queries read a map; what they found is flattened."""

    def __init__(self) -> None:
        super().__init__(
            stem=conv(3, 12, 2, stride=2, padding=0), queries=table(3, 5), k=nn.Linear(12, 5), v=nn.Linear(12, 6),
            c=nn.Linear(18, 4), head=nn.Linear(4, 4),
        )  # fmt: skip

    def forward(self, x):
        x = tokens(F.relu(self.stem(x)))
        weights = (self.queries @ self.k(x).transpose(1, 2)).softmax(-1)
        return self.head(F.relu(self.c((weights @ self.v(x)).flatten(1))))


@pattern({"stem": 12, "kv:heads": 3, "kv:head_dim": 4, "kv:head_dim:1": 4}, drops={"kv:heads", "kv:head_dim:1"})
class ReducedKeys(Net):
    """Keys and values come from a map made smaller by a strided depthwise convolution with norm."""

    def __init__(self) -> None:
        super().__init__(
            stem=conv(3, 12, 2, stride=2, padding=0), q=conv(12, 12, 1), small=conv(12, 12, 2, stride=2, padding=0, groups=12),
            norm=nn.BatchNorm2d(12), kv=conv(12, 24, 1), proj=conv(12, 12, 1), head=nn.Linear(12, 4),
        )  # fmt: skip

    def forward(self, x):
        x = self.stem(x)
        n = x.shape[0]
        k, v = self.kv(self.norm(self.small(x))).view(n, 2, 3, 4, 4).unbind(1)
        q = self.q(x).view(n, 3, 4, 16)
        y = v @ (q.mT @ k * 0.5).softmax(-1).mT
        return self.head((x + self.proj(y.reshape(n, 12, 4, 4))).mean((2, 3)))
