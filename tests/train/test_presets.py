from __future__ import annotations

import pytest
import torch

from nsa._dispatch import supports
from nsa.train.presets import PRESETS, preset


@pytest.mark.parametrize("name", PRESETS)
def test_a_gpu_can_run_it(name):
    assert supports("triton", torch.device("cuda"), torch.bfloat16, PRESETS[name].model.nsa) is None


def test_the_default_is_for_the_device():
    assert preset(None, torch.device("cpu"))[0] == "tiny"
    assert preset(None, torch.device("cuda"))[0] == "small"
    with pytest.raises(ValueError, match="preset must be one of micro, tiny, small, got 'huge'"):
        preset("huge", torch.device("cpu"))
