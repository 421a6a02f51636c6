"""The layers of a looped GPT: pre-norm transformer blocks, and the core that repeats.

Shapes: `n` examples, `p` token positions, `e` model width, `h` heads.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_layers import GradientCheckpointingLayer

from captum_sdi.models.looped_gpt_config import LoopedGPTConfig


def attention_pattern(attention_mask: Tensor | None, *, is_causal: bool) -> Tensor | None:
    """Return which positions see which: boolean, (n, 1, p, p), True = seen.

    None when no token is padding, because attention is faster without a mask. A padding position
    sees itself, so that no row of the softmax is empty: an empty one is NaN on some backends.
    """
    if attention_mask is None:
        return None
    is_token = attention_mask != 0  # (n, p)
    if bool(is_token.all()):
        return None
    length = is_token.shape[1]
    seen = torch.ones(length, length, dtype=torch.bool, device=is_token.device)
    if is_causal:
        seen = seen.tril()
    diagonal = torch.eye(length, dtype=torch.bool, device=is_token.device)
    return (seen & is_token[:, None, None, :]) | diagonal


class SoftEmbedding(nn.Embedding):
    """Embed token ids, or distributions over them: the mean of the tokens' vectors."""

    def forward(self, tokens: Tensor) -> Tensor:
        """Map ids (n, p), or probabilities (n, p, v), to (n, p, e)."""
        if tokens.is_floating_point():
            return tokens @ self.weight
        return super().forward(tokens)


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, config: LoopedGPTConfig) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.is_causal = config.is_causal
        width = config.n_embd
        self.qkv = nn.Linear(width, 3 * width, bias=config.bias)
        self.proj = nn.Linear(width, width, bias=config.bias)

    def forward(self, hidden: Tensor, mask: Tensor | None) -> Tensor:
        """Mix the positions of `hidden` (n, p, e); `mask` as `attention_pattern` returns it."""
        projections = self.qkv(hidden).chunk(3, dim=-1)
        query, key, value = map(self.split_heads, projections)  # (n, h, p, e / h)
        is_causal = self.is_causal and mask is None
        mixed = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=is_causal,
        )
        merged = mixed.transpose(1, 2).flatten(2)  # (n, p, e)
        return self.proj(merged)

    def split_heads(self, projection: Tensor) -> Tensor:
        """Turn (n, p, e) into (n, h, p, e / h)."""
        heads = projection.unflatten(-1, (self.n_head, -1))  # (n, p, h, e / h)
        return heads.transpose(1, 2)


class MLP(nn.Module):
    """The two-layer network of a block, four times as wide inside."""

    def __init__(self, config: LoopedGPTConfig) -> None:
        super().__init__()
        width = config.n_embd
        self.fc = nn.Linear(width, 4 * width, bias=config.bias)
        self.proj = nn.Linear(4 * width, width, bias=config.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """Transform each position of `hidden` (n, p, e) alone."""
        activation = F.gelu(self.fc(hidden), approximate="tanh")  # tanh, as in GPT-2
        return self.proj(activation)


class Block(GradientCheckpointingLayer):
    """A pre-norm transformer block."""

    def __init__(self, config: LoopedGPTConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = MLP(config)

    def forward(self, hidden: Tensor, mask: Tensor | None) -> Tensor:
        """Map `hidden` (n, p, e) to the same shape."""
        hidden = hidden + self.attn(self.ln_1(hidden), mask)
        return hidden + self.mlp(self.ln_2(hidden))


class Core(nn.Module):
    """The blocks that repeat: one call is one loop step."""

    def __init__(self, config: LoopedGPTConfig) -> None:
        super().__init__()
        width = config.n_embd
        self.injection = config.injection
        self.adapter: nn.Linear | None = None
        if config.injection == "concat":
            self.adapter = nn.Linear(2 * width, width, bias=config.bias)
        self.blocks = stack_blocks(config, config.n_core)

    def forward(self, state: Tensor, inputs: Tensor, mask: Tensor | None) -> Tensor:
        """Return the next state; `state` and `inputs` are (n, p, e)."""
        if self.injection == "none":
            hidden = state
        elif self.adapter is None:
            hidden = state + inputs
        else:
            state_and_inputs = torch.cat([state, inputs], dim=-1)
            hidden = self.adapter(state_and_inputs)
        for block in self.blocks:
            hidden = block(hidden, mask)
        return hidden


def stack_blocks(config: LoopedGPTConfig, n_blocks: int) -> nn.ModuleList:
    """Make `n_blocks` blocks with weights of their own."""
    return nn.ModuleList(Block(config) for _ in range(n_blocks))
