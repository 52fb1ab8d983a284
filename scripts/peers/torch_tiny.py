"""The same tiny training in eager PyTorch: the peers of scripts/benchmark.py tiny.

Two models have the same shape: ``lean``, written here with as few eager operations as possible, and the Llama of
``transformers``, which the PyTorch trainers train.
"""

import functools

import torch
import torch.nn.functional as F


class Layer(torch.nn.Module):
    """RMSNorm, rotary attention, SwiGLU."""

    def __init__(self, c):
        super().__init__()
        self.heads, width = c.heads, c.width
        self.norms = torch.nn.ModuleList(torch.nn.RMSNorm(width) for _ in range(2))
        self.qkv, self.out = torch.nn.Linear(width, 3 * width, bias=False), torch.nn.Linear(width, width, bias=False)
        self.wide = torch.nn.Linear(width, 2 * c.feed_forward, bias=False)
        self.down = torch.nn.Linear(c.feed_forward, width, bias=False)

    def forward(self, x, cos, sin):
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norms[0](x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k = (
            y * cos + torch.cat([-y[..., y.shape[-1] // 2 :], y[..., : y.shape[-1] // 2]], -1) * sin for y in (q, k)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(batch, length, width)
        x = x + self.out(y)
        gate, up = self.wide(self.norms[1](x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


class Decoder(torch.nn.Module):
    """The decoder of the library, in PyTorch."""

    def __init__(self, c, length):
        super().__init__()
        self.embedding, self.norm = torch.nn.Embedding(c.vocab_size, c.width), torch.nn.RMSNorm(c.width)
        self.layers = torch.nn.ModuleList(Layer(c) for _ in range(c.layers))
        self.head = torch.nn.Linear(c.width, c.vocab_size, bias=False)
        angle = torch.arange(length)[:, None] * c.rope_theta ** (-torch.arange(c.key_size // 2) * 2 / c.key_size)
        self.cos, self.sin = torch.cat([angle, angle], -1).cos(), torch.cat([angle, angle], -1).sin()

    def forward(self, tokens):
        one = lambda x, layer: layer(x, self.cos, self.sin)  # noqa: E731
        return self.head(self.norm(functools.reduce(one, self.layers, self.embedding(tokens))))


def llama(c, length):
    """The Llama of ``transformers``, tokens in, logits out."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=c.vocab_size,
            hidden_size=c.width,
            intermediate_size=c.feed_forward,
            num_hidden_layers=c.layers,
            num_attention_heads=c.heads,
            max_position_embeddings=length,
            use_cache=False,
        )
    )
    return model, lambda tokens: model(tokens).logits


def lean(c, length):
    """``Decoder``, tokens in, logits out."""
    model = Decoder(c, length)
    return model, model


def torch_tiny(case, examples, build):
    """``run(n)``: n eager steps with a live teacher, KL at T=2, clipping, AdamW; ``build`` is ``lean`` or ``llama``."""
    (_, teacher), (model, student) = (build(c, examples.inputs.shape[1]) for c in (case.teacher, case.student))
    inputs, mask = torch.from_numpy(examples.inputs).long(), torch.from_numpy(examples.mask)
    update = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.0)

    def run(steps):
        for _ in range(steps):
            rows = torch.randint(len(inputs), (case.batch_size,))
            with torch.no_grad():
                target = F.log_softmax(teacher(inputs[rows]) / 2, -1)
            kl = F.kl_div(F.log_softmax(student(inputs[rows]) / 2, -1), target, log_target=True, reduction="none")
            update.zero_grad()
            (4 * kl.sum(-1)[mask[rows]].mean()).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            update.step()

    return run


PEERS = {
    "lean eager PyTorch": functools.partial(torch_tiny, build=lean),
    "transformers' Llama, eager": functools.partial(torch_tiny, build=llama),
}
