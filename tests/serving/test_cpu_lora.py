"""The LoRA product on CPU beside the plain sum over tokens, and the proof that vLLM's own is still wrong."""

from __future__ import annotations

import importlib
import random
import warnings
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest

pytestmark = pytest.mark.slow  # importing vLLM alone takes 10 s

SLOTS, MAX_RANK, IN = 4, 16, 48
IDS: list[int | None] = [11, 12, 13, None]  # adapter of each slot, as vLLM hands it over
RANKS = (4, 16, 1, 0)


@pytest.fixture(scope="module")
def cpu_lora() -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # vLLM's own, while it is imported
        return importlib.import_module("adapterhub.serving.engine.cpu_lora")


@dataclass
class Module:
    """One layer's stacked factors, as vLLM keeps them: padded with zeros to the largest rank."""

    widths: tuple[int, ...]
    a: tuple[Any, ...]
    b: tuple[Any, ...]

    @classmethod
    def random(cls, widths: tuple[int, ...], dtype: Any) -> Module:
        import torch

        a = tuple(torch.zeros(SLOTS, 1, MAX_RANK, IN, dtype=dtype) for _ in widths)
        b = tuple(torch.zeros(SLOTS, 1, width, MAX_RANK, dtype=dtype) for width in widths)
        module = cls(widths, a, b)
        for slot, rank in enumerate(RANKS):
            module.set(slot, rank)
        return module

    def set(self, slot: int, rank: int) -> None:
        """What vLLM's `set_lora` does: zero the slot, then copy."""
        import torch

        for a, b in zip(self.a, self.b, strict=True):
            a[slot], b[slot] = 0, 0
            a[slot, 0, :rank].copy_(torch.randn(rank, IN) / IN**0.5)
            b[slot, 0, :, :rank].copy_(torch.randn(b.shape[2], rank) / max(rank, 1) ** 0.5)

    def expected(self, y: Any, x: Any, slots: list[int]) -> Any:
        """Token by token in float64."""
        import torch

        y = y.double().clone()
        for token, slot in enumerate(slots):
            if slot >= 0:
                parts = [b[slot, 0].double() @ (a[slot, 0].double() @ x[token].double()) for a, b in self.pairs]
                y[token] += torch.cat(parts)
        return y

    @property
    def pairs(self) -> list[tuple[Any, Any]]:
        return list(zip(self.a, self.b, strict=True))


def wrapper_for(kind: Any, slots: list[int]) -> Any:
    """A punica wrapper that was told which token uses which slot."""
    wrapper = kind(256, 256, "cpu")
    tell(wrapper, slots)
    return wrapper


def tell(wrapper: Any, slots: list[int]) -> None:
    from vllm.lora.layers import LoRAMapping

    adapters = tuple(IDS[slot] or 0 if slot >= 0 else 0 for slot in slots)
    wrapper.update_metadata(LoRAMapping(adapters, adapters, is_prefill=True), IDS, SLOTS + 1, 1000)


def apply(wrapper: Any, module: Module, y: Any, x: Any) -> Any:
    y = y.clone()
    wrapper.add_lora_linear(y, x, module.a, module.b, 1.0, module.widths)
    return y


@pytest.mark.parametrize("tokens", [1, 2, 8, 32, 33, 200])
@pytest.mark.parametrize("widths", [(40,), (48, 16, 16)], ids=["one", "qkv"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_is_the_sum_over_each_tokens_own_adapter(
    cpu_lora: ModuleType, tokens: int, widths: tuple[int, ...], dtype: str
) -> None:
    import torch

    torch.manual_seed(tokens)
    choose = random.Random(tokens)
    module = Module.random(widths, getattr(torch, dtype))
    for slots in ([-1] * tokens, [2] * tokens, [choose.choice([-1, 0, 1, 2]) for _ in range(tokens)]):
        x = torch.randn(tokens, IN).to(getattr(torch, dtype))
        y = torch.randn(tokens, sum(widths)).to(getattr(torch, dtype))
        answer = apply(wrapper_for(cpu_lora.AdapterProduct, slots), module, y, x)
        # bfloat16: one rounding of the sum, nothing more
        torch.testing.assert_close(answer, module.expected(y, x, slots).to(answer.dtype), rtol=2**-8, atol=2e-5)
        without = [token for token, slot in enumerate(slots) if slot < 0]
        assert torch.equal(answer[without], y[without])


@pytest.mark.parametrize("tokens", [2, 64])
def test_modules_that_no_adapter_has_add_nothing(cpu_lora: ModuleType, tokens: int) -> None:
    """As q, k and v beside an adapter of the MLP alone: their factors are all zeros."""
    import torch

    module = Module.random((48, 16, 16), torch.float32)
    for slot in range(SLOTS):
        module.set(slot, 0)
    x, y = torch.randn(tokens, IN), torch.randn(tokens, 80)
    wrapper = wrapper_for(cpu_lora.AdapterProduct, [0, -1] * (tokens // 2))
    assert torch.equal(apply(wrapper, module, y, x), y)
    module.set(1, 4)
    module.set(1, 0)  # an adapter that came and went
    assert torch.equal(apply(wrapper, module, y, x), y)


@pytest.mark.parametrize("tokens", [8, 64])
def test_a_slot_that_vllm_wrote_to_is_read_again(cpu_lora: ModuleType, tokens: int) -> None:
    import torch

    module, slots = Module.random((40,), torch.float32), [0, 1] * (tokens // 2)
    wrapper = wrapper_for(cpu_lora.AdapterProduct, slots)
    x, y = torch.randn(tokens, IN), torch.zeros(tokens, 40)
    for rank in (4, 2, 16, 0):  # smaller, larger than any before, none
        module.set(1, rank)
        torch.testing.assert_close(apply(wrapper, module, y, x), module.expected(y, x, slots).float())


@pytest.mark.parametrize("tokens", [4, 64])
def test_an_adapter_that_overflows_stays_among_its_own_tokens(cpu_lora: ModuleType, tokens: int) -> None:
    import torch

    module, slots = Module.random((40,), torch.float32), [0, 1, -1, 2] * (tokens // 4)
    module.a[0][1, 0, 0, 0] = float("inf")
    module.b[0][1, 0, 0, 0] = float("nan")
    x, y = torch.randn(tokens, IN), torch.zeros(tokens, 40)
    answer = apply(wrapper_for(cpu_lora.AdapterProduct, slots), module, y, x)
    others = [token for token, slot in enumerate(slots) if slot != 1]
    torch.testing.assert_close(answer[others], module.expected(y, x, slots)[others].float())


def test_the_output_and_the_input_layer(cpu_lora: ModuleType) -> None:
    import torch

    slots = [2, -1, 0, 1, 0]
    module, wrapper = Module.random((64,), torch.float32), wrapper_for(cpu_lora.AdapterProduct, slots)
    (a,), (b,) = module.a, module.b
    x, y = torch.randn(5, IN), torch.randn(5, 64)
    logits = y.clone()
    wrapper.add_lora_logits(logits, x, a, b, 1.0)
    torch.testing.assert_close(logits, module.expected(y, x, slots).float())

    looked_up = torch.stack([a[slot, 0] @ x[token] for token, slot in enumerate(slots)])
    embedded = y.clone()
    wrapper.add_lora_embedding(embedded, looked_up, b, add_input=True)
    torch.testing.assert_close(embedded, module.expected(y, x, slots).float())


def test_an_output_layer_that_vllm_wrote_to_is_read_again(cpu_lora: ModuleType) -> None:
    import torch

    slots = [0, 1, -1]
    module, wrapper = Module.random((64,), torch.float32), wrapper_for(cpu_lora.AdapterProduct, slots)
    (a,), (b,) = module.a, module.b
    x, y = torch.randn(3, IN), torch.randn(3, 64)
    for rank in (0, 4, 0):  # no factors for this layer, some, none again
        module.set(1, rank)
        logits = y.clone()
        wrapper.add_lora_logits(logits, x, a, b, 1.0)
        torch.testing.assert_close(logits, module.expected(y, x, slots).float())


def test_layers_in_two_halves(cpu_lora: ModuleType) -> None:
    import torch

    slots, widths = [2, -1, 0, 1, 0], (24, 8)
    module, wrapper = Module.random(widths, torch.float32), wrapper_for(cpu_lora.AdapterProduct, slots)
    x, y = torch.randn(5, IN), torch.randn(5, 32)
    halves = torch.zeros(2, 5, MAX_RANK)
    wrapper.add_shrink(halves, x, module.a, 1.0)
    answer = y.clone()
    wrapper.add_expand(answer, halves, module.b, widths, offset_start=0, add_input=True)
    torch.testing.assert_close(answer, module.expected(y, x, slots).float())


def test_vllms_own_wrapper_is_still_wrong(cpu_lora: ModuleType) -> None:
    """The day this fails, ours goes: a token without an adapter is answered as it should be."""
    import torch
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

    slots = [0, -1]
    module = Module.random((40,), torch.float32)
    module.set(SLOTS - 1, 8)  # the last slot: what −1 means in torch
    x, y = torch.randn(2, IN), torch.randn(2, 40)
    answer = apply(wrapper_for(PunicaWrapperCPU, slots), module, y, x)
    torch.testing.assert_close(answer[0], module.expected(y, x, slots)[0].float())
    torch.testing.assert_close(answer[1], module.expected(y, x, [0, SLOTS - 1])[1].float())
    assert not torch.allclose(answer[1], y[1])


def test_install_replaces_vllms_own_and_no_other(cpu_lora: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.platforms import current_platform

    platform = type(current_platform)
    stock = current_platform.get_punica_wrapper()
    monkeypatch.setattr(platform, "get_punica_wrapper", classmethod(lambda cls: stock))
    assert not cpu_lora.active()
    cpu_lora.install()
    cpu_lora.install()
    assert cpu_lora.active()

    from vllm.lora.punica_wrapper import get_punica_wrapper

    assert type(get_punica_wrapper(8, 8, "cpu")).__name__ == "AdapterProduct"

    another = "vllm.lora.punica_wrapper.punica_gpu.PunicaWrapperGPU"
    monkeypatch.setattr(platform, "get_punica_wrapper", classmethod(lambda cls: another))
    cpu_lora.install()
    assert current_platform.get_punica_wrapper() == another
