"""How much memory a training takes, part by part, from the base's shape and a handful of settings. Pure arithmetic.

The peak is what stays (weights, adapter, its gradients and optimizer) and the larger of two moments: the end of a
training step's forward pass, when activations and logits are all there, and an evaluation batch. Constants that no
formula gives are named below; `benchmarks/plan_memory.py` holds the sum against published figures, row by row.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from adapterhub.trainers.planning.shapes import Linear, ModelShape, Targets, adapted, lora_parameters

GB = 10**9
Bits = Literal[4, 8, 16, 32]
Logits = Literal["whole", "chunked", "trained"]

# Bytes a weight of a quantised linear layer. nf4 with double quantisation (arXiv:2305.14314, section 3): half a byte,
# an 8-bit scale for 64 weights, a float32 scale for 256 of those. LLM.int8: a byte, and a float32 scale a row.
_QUANTISED = {4: 0.5 + 1 / 64 + 4 / (64 * 256), 8: 1.0}
# Tokens whose logits are there at once where the loss is computed in chunks.
_CHUNK = 512
_OPTIMIZER = {"adam": 2.0, "adam8bit": 0.5, "sgd": 0.0, "adafactor": 0.01}  # states, in units of the adapter's bytes


@dataclass(frozen=True)
class Setup:
    """What decides about memory, whatever a config calls it."""

    rank: int
    micro_batch: int  # rows at once
    tokens: int  # a row, padded
    targets: Targets = "all-linear"
    base_bits: Bits = 16
    compute_bytes: int = 2  # of an activation: 2 for bfloat16, 4 for float32
    adapter_bytes: int = 4  # of an adapter's element: PEFT keeps float32 beside a bfloat16 base
    optimizer: str = "adam"
    checkpointing: bool = False
    eager_attention: bool = False  # keeps the whole (tokens, tokens) product; the others never do
    dropout: bool = False
    logits: Logits = "whole"
    logit_bytes: int = 12  # at the peak of the cross entropy: the logits, in float32 log-softmax and gradient as well
    trained_share: float = 1.0  # of the tokens, where logits are "trained"
    eval_batch: int = 0  # rows; 0: no evaluation
    models: int = 1  # forward passes whose activations are there at once: 2 for pairs
    shards: int = 1  # processes that share the weights (FSDP, ZeRO-3); the rest is each one's own
    unpacked_bytes: float | None = None  # an element of a quantised weight while it is used; None: compute_bytes
    runtime: int = GB  # bytes of the CUDA context, libraries and the allocator's rounding


@dataclass(frozen=True)
class Memory:
    """Bytes on one device, at the peak."""

    weights: int
    adapter: int
    optimizer: int
    gradients: int
    activations: int
    logits: int
    evaluation: int  # of one evaluation batch, when no training step runs
    runtime: int

    @property
    def total(self) -> int:
        stays = self.weights + self.adapter + self.optimizer + self.gradients + self.runtime
        return stays + max(self.activations + self.logits, self.evaluation)

    def to_json(self) -> dict[str, int]:
        return {f.name: getattr(self, f.name) for f in fields(self)} | {"total": self.total}


def memory(shape: ModelShape, setup: Setup) -> Memory:
    """The peak of a LoRA training. Raises ConfigError for targets that the base does not have."""
    trained = lora_parameters(shape, rank=setup.rank, targets=setup.targets)
    tokens = setup.micro_batch * setup.tokens * setup.models
    eval_tokens = setup.eval_batch * setup.tokens
    c = setup.compute_bytes
    return Memory(
        weights=_weights(shape, setup),
        adapter=trained * setup.adapter_bytes,
        optimizer=int(trained * setup.adapter_bytes * _OPTIMIZER[setup.optimizer]),
        gradients=trained * setup.adapter_bytes,
        activations=_activations(shape, setup, tokens),
        logits=_logits(shape, setup, tokens),
        evaluation=eval_tokens
        * (shape.vocabulary * (setup.logit_bytes - 4) + c * (4 * shape.hidden + 3 * _mlp_width(shape))),
        runtime=setup.runtime,
    )


def _weights(shape: ModelShape, setup: Setup) -> int:
    linear = sum(x.inputs * x.outputs for x in shape.linears)
    rest = (shape.parameters - linear) * max(setup.compute_bytes, 2)
    if setup.base_bits in _QUANTISED:
        unpacked = setup.compute_bytes if setup.unpacked_bytes is None else setup.unpacked_bytes
        whole = linear * _QUANTISED[setup.base_bits] + rest + shape.largest_linear * unpacked
    else:
        whole = shape.parameters * setup.base_bits / 8
    if setup.shards == 1:
        return int(whole)
    at_once = 3 * whole / (shape.layers + 2)  # the block at work, the one before it and the one being fetched
    return int(whole / setup.shards + at_once)


def _activations(shape: ModelShape, setup: Setup, tokens: int) -> int:
    """Kept for the backward pass: of every block, or of one and every block's input (arXiv:1604.06174)."""
    c = setup.compute_bytes
    block = _block(shape, setup)
    backward = c * (3 * _mlp_width(shape) + 2 * shape.hidden)  # gradients on their way through one block
    if setup.checkpointing:
        return int(tokens * (shape.layers * shape.hidden * c + block + backward))
    return int(tokens * (shape.layers * block + backward))


def _block(shape: ModelShape, setup: Setup) -> float:
    """Bytes a token that one block keeps where only LoRA factors are trained: a frozen layer keeps no input."""
    c, h = setup.compute_bytes, shape.hidden
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    names = {x.name for x in adapted(shape, setup.targets)}
    block = shape.linears[: len(shape.linears) // shape.layers]
    mine = [x for x in block if x.name in names]
    copies = setup.dropout or setup.adapter_bytes != c  # then every adapter keeps an input of its own
    inputs = sum(x.inputs for x in mine) * c * copies + (0 if copies else c * _shared_inputs(mine, h))
    masks = sum(x.inputs for x in mine) * setup.dropout
    norms = 2 * 4 * h  # computed in float32
    attention = c * (queries + 2 * keys) + c * queries
    if setup.eager_attention:
        attention += shape.heads * setup.tokens * (c + 4)
    return norms + attention + 3 * c * _mlp_width(shape) + inputs + masks


def _shared_inputs(mine: list[Linear], hidden: int) -> int:
    """Elements of the distinct inputs: queries, keys and values share one, gate and up another."""
    attention = any(x.inputs == hidden and "mlp" not in x.name for x in mine)
    mlp = any(x.inputs == hidden and "mlp" in x.name for x in mine)
    down = sum(x.inputs for x in mine if x.inputs != hidden)
    return (attention + mlp) * hidden + down


def _mlp_width(shape: ModelShape) -> int:
    return shape.intermediate * max(1, shape.experts_used)


def _logits(shape: ModelShape, setup: Setup, tokens: int) -> int:
    if setup.logits == "chunked":
        tokens = min(tokens, _CHUNK)
    elif setup.logits == "trained":
        tokens = int(tokens * setup.trained_share)
    return tokens * shape.vocabulary * setup.logit_bytes
