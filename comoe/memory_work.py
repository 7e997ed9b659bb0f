"""What one forward pass goes through, layer by layer: its activations are what the backward pass reads."""

from __future__ import annotations

from dataclasses import dataclass, field

FULL = 4
"""Bytes of a float32."""
HALF = 2
"""Bytes of a bfloat16."""


@dataclass(frozen=True, slots=True)
class Work:
    """What one forward pass of one rank goes through; its activations are what the backward pass reads."""

    tokens: int = 0
    """Tokens of the micro-batch; 0 leaves activations and dispatch out."""
    layers: int = 0
    """Encoder layers."""
    width: int = 0
    """Encoder width M."""
    ffn_width: int | None = None
    """Hidden width of the encoder's feed-forward; None is 4 M."""
    tasks: int = 0
    """Heads that pool."""
    private_parts: int = 0
    """Tasks with a private part."""
    private_width: int = 0
    """Hidden width of one."""
    moe_layers: int = 0
    """Layers with experts."""
    top_k: int = 0
    """Experts per token k."""
    expert_width: int = 0
    """Width F of one expert."""
    recompute: bool = False
    """Activation checkpointing per layer: the inputs of all layers are kept, and one layer whole."""

    def activation_bytes(self, number: int) -> int:
        """All layers, blocks, embeddings and heads; ``number`` bytes per activation."""
        if not self.recompute:
            layers, blocks = self.layers * self.layer_bytes(number), self.moe_layers * self.block_bytes(number)
            return layers + blocks + self.outer_bytes(number)
        inputs = self.layers * self.tokens * self.width * number
        return (
            inputs
            + self.layer_bytes(number)
            + self.block_bytes(number) * (self.moe_layers > 0)
            + self.outer_bytes(number)
        )

    def layer_bytes(self, number: int) -> int:
        """One encoder layer, without the attention matrix.

        Per token 8 M + 2 F' numbers (input, query, key, value, attended, and around the feed-forward of width F') and
        two one-byte dropout masks of M. A GPU's fused attention keeps no matrix; a CPU keeps some under dropout.

        Source: Korthikanti et al. 2022, arXiv:2205.05198: 34 M bytes in 16 bits at F' = 4 M.
        """
        ffn = 4 * self.width if self.ffn_width is None else self.ffn_width
        return self.tokens * ((8 * self.width + 2 * ffn) * number + 2 * self.width)

    def block_bytes(self, number: int) -> int:
        """One cooperative block.

        Per token its norm's input and output, the gate's float32 input and a one-byte dropout mask; per route (one
        token to one expert) input, answer, and four of the expert's width: gate, up, the activated gate, the product.
        """
        routes = self.top_k * (2 * self.width + 4 * self.expert_width) * number
        return self.tokens * (self.width * (2 * number + FULL + 1) + routes)

    def outer_bytes(self, number: int) -> int:
        """Outside of the layers: three numbers of the embeddings, in bf16 a float32 copy of the last states for each
        pooling head, and for each private part its norm's answer, the sum that its head reads, a one-byte dropout mask
        and four numbers of its hidden width."""
        private = (2 * self.width + 4 * self.private_width) * number + self.width
        heads = self.width * (3 * number + (FULL * self.tasks if number < FULL else 0))
        return self.tokens * (heads + self.private_parts * private)

    def dispatch_bytes(self, number: int) -> int:
        """One layer's routes on their way: sent, received, padded for the grouped product, and answered."""
        return 4 * number * self.tokens * self.top_k * self.width if self.moe_layers else 0


@dataclass(frozen=True, slots=True)
class DecoderWork:
    """What one forward pass of one rank goes through in a decoder, for the answers that it is taught."""

    own: Work = field(default_factory=Work)
    """Its layers on the tokens of the answers, as if it were an encoder of them."""
    read_tokens: int = 0
    """Tokens of the encoder that its rows look at."""
    vocabulary: int = 0
    """Words V that every token of an answer is told from."""

    def activation_bytes(self, number: int) -> int:
        """All layers with what they look at, the gathered states of their rows, and the embeddings."""
        layers = self.own.layers if not self.own.recompute else min(1, self.own.layers)
        gathered = self.read_tokens * self.own.width * number * (self.own.layers > 0)
        return self.own.activation_bytes(number) + layers * self.look_bytes(number) + gathered

    def look_bytes(self, number: int) -> int:
        """One layer's look at the encoder's states: of each token of an answer the norm's answer, query, attended, sum
        and a one-byte dropout mask; of each token that it looks at a key and a value."""
        per_token = 4 * self.own.width * number + self.own.width
        return self.own.tokens * per_token + 2 * self.read_tokens * self.own.width * number

    def vocabulary_bytes(self, number: int) -> int:
        """Log-probabilities of all words and their gradient in float32, and in bf16 the logits before them."""
        return self.own.tokens * self.vocabulary * (2 * FULL + (number if number < FULL else 0))
