"""Families that attend inside their own modules: what is led to the door, and what is left alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from common.attention.call import Call
from common.attention.inlets import _FusedKernel, lead_to
from tests import architectures

ATTEND = nn.functional.scaled_dot_product_attention


@pytest.mark.parametrize(("is_causal", "masked"), [(True, False), (False, True), (False, False)])
def test_torchs_kernel_is_the_door_while_the_mode_holds(is_causal, masked):
    """Falcon calls the kernel with a mask or with `is_causal`: queries see what they see without the mode."""
    query, key, value = torch.randn(3, 2, 4, 5, 8, generator=torch.Generator().manual_seed(0))
    mask = torch.rand(2, 1, 5, 5, generator=torch.Generator().manual_seed(1)) > 0.3 if masked else None
    if mask is not None:
        mask = mask | torch.eye(5, dtype=torch.bool)
    calls = []
    options = {"attn_mask": mask, "dropout_p": 0.0, "is_causal": is_causal}

    def attend(*args, **given):
        calls.append(Call(*args, **given))
        return calls[-1].output

    with _FusedKernel(nn.Identity(), attend):
        led = ATTEND(query, key, value, **options)
        assert torch.equal(query.softmax(-1), torch.softmax(query, -1)) and len(calls) == 1, "all else is torch's own"
    plain = ATTEND(query, key, value, **options)
    assert len(calls) == 1, "and after it the kernel is torch's again"
    assert led.numpy() == pytest.approx(plain.numpy(), abs=1e-6)
    ahead = calls[0].pattern().triu(1).abs().max()
    assert (ahead == 0) == is_causal


@pytest.mark.parametrize(("family", "led"), [("bloom", True), ("mpt", True), ("gpt2", False), ("llama", False)])
def test_only_families_without_a_seam_are_led(family, led):
    network = architectures.build(family, 50)
    assert lead_to(network, lambda *args, **given: Call(*args, **given).output) == led
    replaced = [module for module in network.modules() if "forward" in module.__dict__ or "_attn" in module.__dict__]
    assert len(replaced) == (architectures.LAYERS if led else 0)
