"""Copies of models: they share the weights, and nothing that a pass changes."""

import torch

from shopr1_service.engine.forward.unused_copy import unused_copy
from shopr1_service.engine.lm_head import trunk_of
from tests.support.models import model_of, tiny_model


def test_weights_are_shared() -> None:
    model = tiny_model(tie_word_embeddings=True)
    model.register_buffer("packed_weight", torch.ones(2))
    copied = unused_copy(model)
    for name, tensor in model.state_dict(keep_vars=True).items():
        assert copied.get_parameter_or_buffer(name) is tensor


def test_everything_else_is_its_own() -> None:
    model = model_of("recurrent_gemma")  # its layers keep their state
    copied = unused_copy(model)
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        expected = trunk_of(copied)(input_ids=ids, use_cache=False).last_hidden_state
        trunk_of(model)(input_ids=ids, use_cache=True)
        model.config.num_attention_heads = 0
        for module in model.modules():
            for buffer in module._buffers.values():
                if buffer is not None:
                    buffer.fill_(torch.nan)
        actual = trunk_of(copied)(input_ids=ids, use_cache=False).last_hidden_state
    assert copied.config.num_attention_heads == 4
    assert torch.equal(actual, expected)
