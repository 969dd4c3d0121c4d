from unittest.mock import Mock

import torch

from shopr1_service.engine.transfer import on_device


def test_a_tensor_of_the_cpu_stays() -> None:
    tensor = torch.arange(3)
    assert on_device(tensor, torch.device("cpu")) is tensor


def test_copies_to_cuda_do_not_wait() -> None:
    """Pinned first: a copy from other memory waits whatever it is asked."""
    tensor, device = Mock(), torch.device("cuda")
    assert on_device(tensor, device) is tensor.pin_memory().to.return_value
    tensor.pin_memory().to.assert_called_once_with(device, non_blocking=True)
