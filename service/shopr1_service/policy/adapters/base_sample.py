"""Check that an adapter was trained on the policy's own weights, by a sample of the sender's base weights.

An adapter on another base gives the numbers of a model that nobody trained, and nothing else would show it.
"""

from collections.abc import Mapping

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor
from transformers import PreTrainedModel

from shopr1_client.field_messages import plain_message
from shopr1_client.json_text import DuplicateKeyError, read_json
from shopr1_client.wire_policy import BASE_SAMPLE_KEY, TensorSample
from shopr1_service.policy.adapters.lora_config import AdapterError
from shopr1_service.weights.conversion import NameConverter
from shopr1_service.weights.safetensors_header import DTYPES

_SAMPLES: TypeAdapter[dict[str, TensorSample]] = TypeAdapter(dict[str, TensorSample])


def check_base(model: PreTrainedModel, text: str) -> None:
    """Compare a sample with the policy's weights, in the coarser of the two dtypes.

    Tensors that the policy has not, or has in another form, are left out.

    Args:
        text: JSON of `TensorSample` by name, from the metadata of the adapter's file.

    Raises:
        AdapterError: a tensor differs; its name is the location.
    """
    try:
        samples = _SAMPLES.validate_json(text)
        read_json(text)
    except DuplicateKeyError as error:
        raise AdapterError(BASE_SAMPLE_KEY, str(error)) from error
    except ValidationError as error:
        raise AdapterError(BASE_SAMPLE_KEY, plain_message(error.errors(include_url=False)[0])) from error
    differing = [name for name, own in _own(model, samples).items() if not _is_equal(samples[name], own)]
    if differing:
        others = f", and so do {len(differing) - 1} more" if len(differing) > 1 else ""
        raise AdapterError(
            differing[0],
            f"the model that was sent has other weights here than the policy{others}: the adapter alone would"
            " give other numbers; send merged weights, with merge=True",
        )


def _own(model: PreTrainedModel, names: Mapping[str, object]) -> dict[str, Tensor]:
    """The model's tensors by the sender's names."""
    converter = NameConverter(model)
    found = {name: (name, None) if name in converter.own else converter.find(name) for name in names}
    return {
        name: converter.own[target]
        for name, (target, pattern) in found.items()
        if pattern is None and target in converter.own and converter.own[target].is_floating_point()
    }


def _is_equal(sample: TensorSample, own: Tensor) -> bool:
    if sample.shape != list(own.shape):
        return False
    given = torch.tensor(sample.values, dtype=torch.float64)
    values = own.reshape(-1)[:: sample.step][: len(given)].double().cpu()
    dtype = DTYPES[sample.dtype]
    if dtype == own.dtype:
        return torch.equal(given, values)
    limit = max(torch.finfo(each).eps for each in (dtype, own.dtype))
    return given.shape == values.shape and torch.allclose(given, values, rtol=limit, atol=1e-7)
