"""Tiny policies made in memory, and a slow reference for every number of the engine.

Models are transformers' own classes with random weights, large enough that no distribution is near uniform.
Tokenizers are trained on a few lines, and so small that they must cut characters of several bytes.
"""

import contextlib
import copy
import functools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers.models import BPE, Unigram, WordPiece
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from shopr1_rewards import Span
from shopr1_rewards.recipe import Divergence, Position, SelfCertaintyRecipe, Vocabulary
from shopr1_service.policy.factory import build_policy
from shopr1_service.policy.loaded_policy import LoadedPolicy
from shopr1_service.settings import Settings


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Use one thread: on models this small, threads only wait for each other."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


# --- tokenizers -------------------------------------------------------------------------------------

NUM_TOKENS = 371
"""Tokens of the byte-level tokenizer: 256 bytes, 3 special ones, 112 merges. Most CJK characters are cut."""
NUM_ROWS = 389
"""Rows of every head, unless a family says otherwise: 18 rows are padding."""

_LINES = [
    '{"rationale": "I want the cheaper tea, the price is lower.", "action": {"type": "terminate"}}',
    '{"rationale": "The reviews say it is too sweet.", "action": {"type": "click", "name": "back"}}',
    "Die Größe passt nicht, das Öl ist zu teuer – für 3 €.",
    "我想要更便宜的茶。 お茶を買いたい 🍵🛒",
]
_CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@functools.cache
def byte_level_json() -> str:
    """A tokenizer.json like GPT-2's, Llama 3's and Qwen's: bytes, written as printable characters."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=NUM_TOKENS,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_LINES * 3, trainer)
    return str(tokenizer.to_str())


def byte_level(*, normalizer: Any = None, chat_template: str = _CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer.from_str(byte_level_json())
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    return wrapped(tokenizer, chat_template=chat_template)


def normalising() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer that changes its text: `ﬁ` becomes `fi`, `A` becomes `a`."""
    return byte_level(normalizer=normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()]))


def byte_fallback() -> PreTrainedTokenizerFast:
    """A tokenizer like Llama 2's: words are marked by `▁`, unknown characters become bytes like `<0xE8>`."""
    pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    trained = Tokenizer(BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizer
    trainer = trainers.BpeTrainer(vocab_size=100, special_tokens=["<unk>"], show_progress=False)
    trained.train_from_iterator(_LINES[:2] * 3, trainer)
    model = json.loads(trained.to_str())["model"]
    pieces = dict.fromkeys(
        ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *model["vocab"]]
    )
    tokenizer = Tokenizer(
        BPE(
            vocab={piece: i for i, piece in enumerate(pieces)},
            merges=[tuple(merge) for merge in model["merges"]],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return _fast(tokenizer, eos_token="</s>", unk_token="<unk>")


def unigram() -> PreTrainedTokenizerFast:
    """A tokenizer like T5's and Gemma's: Unigram, with `▁` and bytes for unknown characters."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁a", *"abcdefgh"]
    tokenizer = Tokenizer(Unigram([(piece, -1.0) for piece in pieces], unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return _fast(tokenizer, eos_token="</s>", unk_token="<unk>")


def word_piece() -> PreTrainedTokenizerFast:
    """A tokenizer like BERT's: lower case, words and parts of words marked by `##`."""
    pieces = ["[UNK]", "tea", "cheap", "##er"]
    tokenizer = Tokenizer(WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return _fast(tokenizer, unk_token="[UNK]")


def word_ends() -> PreTrainedTokenizerFast:
    """A tokenizer like GPT-1's: tokens mark ends of words, and a token's text depends on the one before."""
    tokenizer = Tokenizer(BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.BPEDecoder(suffix="</w>")
    trainer = trainers.BpeTrainer(
        vocab_size=100, special_tokens=["<unk>"], end_of_word_suffix="</w>", show_progress=False
    )
    tokenizer.train_from_iterator(_LINES[:2] * 3, trainer)
    return _fast(tokenizer, unk_token="<unk>")


def wrapped(tokenizer: Tokenizer, *, chat_template: str | None = _CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    return _fast(tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=chat_template)


def _fast(tokenizer: Tokenizer, **options: Any) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options)  # type: ignore[no-untyped-call]


def ids_of(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return list(tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids)


@functools.cache
def _shown_bytes() -> dict[str, int]:
    """The characters by which byte-level vocabularies write bytes: printable ones, others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def token_bytes(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[bytes]:
    """The bytes of each token, from the spelling of its piece and not from any decoder."""
    pieces = [str(tokenizer.convert_ids_to_tokens(token_id)) for token_id in ids]
    special = set(tokenizer.all_special_tokens) | {"<|im_start|>"}
    if "▁" not in tokenizer.get_vocab():
        shown = _shown_bytes()
        return [p.encode() if p in special else bytes(shown[char] for char in p) for p in pieces]
    spelt = [
        bytes([int(p[3:5], 16)]) if p.startswith("<0x") else p.replace("▁", " ").encode() for p in pieces
    ]
    if spelt and spelt[0].startswith(b" "):  # the mark of the first word is no space of the text
        spelt[0] = spelt[0][1:]
    return spelt


def slow_overlapping(tokens: Sequence[bytes], text: str, span: Span) -> list[int]:
    """Indices of the tokens that have a byte of the span, from the bytes themselves."""
    assert b"".join(tokens) == text.encode()
    start, end = len(text[: span.start].encode()), len(text[: span.end].encode())
    position, overlapping = 0, []
    for i, token in enumerate(tokens):
        if any(start <= position + k < end for k in range(len(token))):
            overlapping.append(i)
        position += len(token)
    return overlapping


# --- models -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Family:
    """An architecture, and the head and forward strategy that the service should choose."""

    kind: str
    options: Mapping[str, Any] = field(default_factory=dict)
    head: str = "linear"
    forward: str = "shared_prefix"


_GPT2_SIZES = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512}
_MAMBA2_SIZES = {
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 8,
}
_MIXED_WINDOW = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}

# No attention interface.
_EXPANDED = {"bloom", "falcon", "gpt_neo", "gptj", "mpt"}
# Recurrent layers that continue from a state by several tokens, or by single ones only.
_BRANCHED = {
    *("bamba", "falcon_h1", "granitemoehybrid", "lfm2", "mamba2", "nemotron_h", "qwen3_next"),
}
_STEPPED = {"jamba", "mamba", "minimax"}

FAMILIES = {
    "llama": Family("llama"),
    "qwen2_full": Family("qwen2"),  # as Qwen2.5 is: no window
    "llama_tied": Family("llama", {"tie_word_embeddings": True}),
    "llama_unpadded": Family("llama", {"vocab_size": NUM_TOKENS}),
    "llama_narrow_head": Family("llama", {"vocab_size": NUM_TOKENS - 20}),  # fewer rows than tokens
    "qwen2": Family("qwen2", {"use_sliding_window": True, **_MIXED_WINDOW}),
    "qwen3": Family("qwen3", {"head_dim": 8}),
    "qwen3_moe": Family(
        "qwen3_moe", {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    ),
    "mistral": Family("mistral", {"sliding_window": 8}),
    "phi": Family("phi"),  # its head has a bias
    "phi3": Family("phi3", {"sliding_window": 8}),
    "gemma2": Family(
        "gemma2",
        {
            "head_dim": 8,
            "sliding_window": 8,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 3.0,  # low enough to bend most logits
        },
    ),
    "gemma3": Family("gemma3_text", {"head_dim": 8, **_MIXED_WINDOW}),
    "granite": Family("granite", {"logits_scaling": 0.5, "residual_multiplier": 0.5}),
    "cohere": Family("cohere", {"logit_scale": 2.0}),
    "cohere2": Family("cohere2", {"logit_scale": 2.0, **_MIXED_WINDOW}),
    "olmo2": Family("olmo2"),
    "smollm3": Family("smollm3", {"no_rope_layers": [1, 0]}),
    "glm4": Family("glm4", {"head_dim": 8}),
    "gpt_oss": Family(
        "gpt_oss", {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, **_MIXED_WINDOW}
    ),
    "deepseek_v3": Family(
        "deepseek_v3",
        {
            "num_key_value_heads": 4,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
        },
    ),
    "gpt2": Family("gpt2", _GPT2_SIZES),
    "gptj": Family("gptj", {**_GPT2_SIZES, "rotary_dim": 4}),
    "gpt_neo": Family(
        "gpt_neo",
        {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 8},
    ),
    "gpt_neox": Family("gpt_neox"),
    "falcon": Family("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "opt": Family("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    # Positions, states or convolutions that a shared prompt may break.
    "bloom": Family("bloom", {"n_layer": 2, "n_head": 4}),
    "mpt": Family("mpt", {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 512}),
    "openai_gpt": Family("openai-gpt", _GPT2_SIZES, forward="independent"),
    "mamba": Family("mamba", {"state_size": 8}),
    "mamba2": Family(
        "mamba2",
        {"state_size": 8, "num_heads": 4, "head_dim": 16, "expand": 2, "n_groups": 1, "chunk_size": 8},
    ),
    "recurrent_gemma": Family(
        "recurrent_gemma",
        {
            "lru_width": 32,
            "attention_window_size": 8,
            "head_dim": 8,
            "block_types": ["recurrent", "attention"],
            "logits_soft_cap": 3.0,  # not the name that a linear head looks for
        },
        head="module",
        forward="independent",
    ),
    "rwkv": Family("rwkv", {"attention_hidden_size": 32, "context_length": 512}, forward="independent"),
    "jamba": Family(
        "jamba",
        {
            "num_experts": 2,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
        },
    ),
    "bamba": Family("bamba", {"attn_layer_indices": [1], **_MAMBA2_SIZES}),
    "minimax": Family(
        "minimax",
        {
            "head_dim": 8,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "block_size": 8,
            "layer_types": ["linear_attention", "full_attention"],
        },
    ),
    "falcon_h1": Family(
        "falcon_h1", {"head_dim": 8, "mamba_d_ssm": 64, "lm_head_multiplier": 0.5, **_MAMBA2_SIZES}
    ),
    "lfm2": Family("lfm2", {"layer_types": ["conv", "full_attention"]}),
    "granitemoehybrid": Family(
        "granitemoehybrid",
        {
            "layer_types": ["mamba", "attention"],
            "num_local_experts": 2,
            "shared_intermediate_size": 32,
            **_MAMBA2_SIZES,
        },
    ),
    "nemotron_h": Family(
        "nemotron_h",
        {
            "layers_block_type": ["linear_attention", "full_attention"],
            "head_dim": 8,
            "mamba_num_heads": 4,
            "mamba_head_dim": 16,
            "ssm_state_size": 8,
            "n_groups": 1,
            "chunk_size": 8,
            "time_step_min": 0.1,  # kept by its scan of several tokens, and not by its step of one
        },
    ),
    "qwen3_next": Family(
        "qwen3_next",
        {
            "initializer_range": 0.2,  # its delta rule is fp32 inside, whatever the model's dtype
            "head_dim": 8,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
        },
    ),
}
_MIXTURE_SIZES = {"num_experts": 4, "num_experts_per_tok": 2}
MIXTURES = {
    "qwen2_moe": Family(
        "qwen2_moe",
        {
            **_MIXTURE_SIZES,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
            "decoder_sparse_step": 1,
        },
    ),
    "olmoe": Family("olmoe", _MIXTURE_SIZES),
    "mixtral": Family("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
}
"""Further mixtures of experts, whose checkpoints have a tensor for each expert."""
FAMILIES |= {name: replace(FAMILIES[name], forward="expanded") for name in _EXPANDED}
FAMILIES |= {name: replace(FAMILIES[name], forward="branched") for name in _BRANCHED}
FAMILIES |= {name: replace(FAMILIES[name], forward="stepped") for name in _STEPPED}


def tiny_model(kind: str = "llama", dtype: torch.dtype = torch.float32, **options: Any) -> PreTrainedModel:
    """A model of this `model_type` with random weights, always the same ones."""
    sizes = {
        "vocab_size": NUM_ROWS,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.3,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    given = {key: value for key, value in {**sizes, **options}.items() if value is not None}
    config = AutoConfig.for_model(kind, **given)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
        disturb(model)
    model.to(dtype)
    model.train(False)
    return model  # type: ignore[no-any-return]


@torch.no_grad()
def disturb(model: PreTrainedModel) -> None:
    """Make biases and the weights of norms random too: at 0 and 1 their loss would go unnoticed."""
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.add_(0.2 * torch.randn_like(parameter))


def llama4(**options: Any) -> PreTrainedModel:
    """A layer with chunked attention, and one with full attention and no positions."""
    sizes = {"head_dim": 8, "intermediate_size_mlp": 48, "num_local_experts": 2, "attention_chunk_size": 8}
    layers = {"layer_types": ["chunked_attention", "full_attention"], "no_rope_layers": [1, 0]}
    return tiny_model("llama4_text", **{**sizes, **layers, **options})


def gemma3_multimodal() -> PreTrainedModel:
    """A vision tower that text does not use, and Gemma 3."""
    config = AutoConfig.for_model(
        "gemma3",
        text_config={**_TEXT_SIZES, "head_dim": 8, "sliding_window": 8, "initializer_range": 0.3},
        vision_config={**_VISION_SIZES, "num_attention_heads": 4, "image_size": 16, "patch_size": 4},
        mm_tokens_per_image=4,
        image_token_index=3,
        boi_token_index=4,
        eoi_token_index=5,
    )
    return _seeded(AutoModelForImageTextToText, config)


def qwen3_5_multimodal() -> PreTrainedModel:
    """Qwen 3.5, of which a causal language model has the text part only."""
    config = AutoConfig.for_model(
        "qwen3_5",
        text_config={
            **_TEXT_SIZES,
            "head_dim": 8,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "initializer_range": 0.2,
        },
        vision_config={**_VISION_SIZES, "depth": 2, "num_heads": 4, "out_hidden_size": 32, "patch_size": 4},
        image_token_id=3,
        video_token_id=4,
        vision_start_token_id=5,
        vision_end_token_id=6,
    )
    return _seeded(AutoModelForImageTextToText, config)


def _seeded(kind: Any, config: Any) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = kind.from_config(config, dtype=torch.float32)
        disturb(model)
    model.train(False)
    return model  # type: ignore[no-any-return]


_TEXT_SIZES = {
    "vocab_size": NUM_ROWS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_VISION_SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
MULTIMODAL = {"gemma3": gemma3_multimodal, "qwen3_5": qwen3_5_multimodal}


def embedding_of(model: PreTrainedModel) -> nn.Embedding:
    return cast("nn.Embedding", model.get_input_embeddings())


def head_of(model: PreTrainedModel) -> nn.Linear:
    return cast("nn.Linear", model.get_output_embeddings())  # type: ignore[no-untyped-call]


def model_of(name: str) -> PreTrainedModel:
    return tiny_model(FAMILIES[name].kind, **FAMILIES[name].options)


@functools.cache
def shared_model(name: str) -> PreTrainedModel:
    """`model_of`, made once for all tests that only read it."""
    return model_of(name)


def policy_of(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast | None = None, **settings: Any
) -> LoadedPolicy:
    return build_policy(model, tokenizer or byte_level(), _settings(**settings), name="tiny")


@functools.cache  # making settings takes as long as checking a tiny model
def _settings(**options: Any) -> Settings:
    return Settings(**{"max_sequence_tokens": 512, **options})


def random_ids(num: int, *, seed: int = 0, below: int = NUM_TOKENS - 20) -> list[int]:
    """Ids that every head and tokenizer here has, none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randint(3, below, (num,), generator=generator).tolist())


# --- the reference ----------------------------------------------------------------------------------


class Reference:
    """Divergences from the full logits of a copy of the model in fp64, one sequence at a time."""

    def __init__(self, model: PreTrainedModel, num_tokenizer_tokens: int = NUM_TOKENS) -> None:
        self._model = copy.deepcopy(model).double()
        self._model.set_experts_implementation("eager")  # grouped_mm knows no fp64
        self._num_tokenizer_tokens = num_tokenizer_tokens
        self._logits: dict[tuple[int, ...], Tensor] = {}

    @torch.no_grad()
    def logits(self, ids: Sequence[int]) -> Tensor:
        key = tuple(ids)
        if key not in self._logits:
            self._logits[key] = self._model(input_ids=torch.tensor([key]), use_cache=False).logits[0]
        return self._logits[key]

    def forget(self) -> None:
        """Drop the logits that are kept for further calls."""
        self._logits.clear()

    def values(
        self,
        prompt_ids: Sequence[int],
        completion_ids: Sequence[int],
        measured: Sequence[int],
        rules: SelfCertaintyRecipe,
    ) -> list[float]:
        shift = 0 if rules.position is Position.SHIFTED else -1
        rows = [len(prompt_ids) + index + shift for index in measured]
        logits_T_V = self.logits([*prompt_ids, *completion_ids])[rows].double() / rules.temperature
        if rules.vocabulary is Vocabulary.TOKENIZER:
            logits_T_V = logits_T_V[:, : self._num_tokenizer_tokens]
        return naive(logits_T_V, rules.divergence)


def naive(logits_T_V: Tensor, divergence: Divergence) -> list[float]:
    """The divergences by their definitions, term by term."""
    V = logits_T_V.shape[1]
    p_T_V = logits_T_V.softmax(dim=1)
    match divergence:
        case Divergence.KL_U_P:
            values_T = (1 / V * (math.log(1 / V) - p_T_V.log())).sum(dim=1)
        case Divergence.KL_P_U:
            values_T = (p_T_V * (p_T_V * V).log()).sum(dim=1)
        case Divergence.EQ3:
            values_T = (p_T_V * (p_T_V * V).log()).sum(dim=1) / V
    return list(values_T.tolist())


def rules(**options: Any) -> SelfCertaintyRecipe:
    return SelfCertaintyRecipe.model_validate({"alpha": 0.005, **options})
