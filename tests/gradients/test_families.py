"""Model families as users load them: their per-sample gradients are those of a loop over examples, in every form.

Tiny random models from configurations; nothing is downloaded.  Losses are per example, by hand, from the outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from gradients.loop import PROBE_ROWS, assert_like_loop, observe, one_by_one, recorded, take
from torch import Tensor, nn
from torch.nn import functional as F

transformers = pytest.importorskip("transformers", reason="the extra 'hf' (transformers, peft) is not installed")

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*:FutureWarning:transformers"),
    pytest.mark.filterwarnings("ignore:.*:DeprecationWarning:transformers"),
]

Family = Callable[[str], tuple[nn.Module, dict[str, Tensor], Callable[[Any, Any], Tensor]]]
SIZE = 5
SMALL: dict[str, Any] = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12}


def ids(*shape: int, vocabulary: int = 19) -> Tensor:
    return torch.randint(3, vocabulary, shape)


def ragged(length: int) -> Tensor:
    """A mask of the tokens of SIZE examples, of different lengths."""
    return (torch.arange(length) < torch.tensor([length, 2, length - 1, 3, length])[:, None]).long()


def next_tokens(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Mean over an example's own tokens, padding left out."""
    scores = model(**batch).logits[:, :-1]
    targets, counted = batch["input_ids"][:, 1:], batch["attention_mask"][:, 1:]
    losses = F.cross_entropy(scores.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)
    return (losses * counted).sum(1) / counted.sum(1)


def classes(model: Any, batch: dict[str, Tensor]) -> Tensor:
    scores = model(**batch).logits
    return F.cross_entropy(scores, torch.ones(len(scores), dtype=torch.long), reduction="none")


def masked_words(model: Any, batch: dict[str, Tensor]) -> Tensor:
    scores = model(**batch).logits
    losses = F.cross_entropy(scores.flatten(0, 1), batch["input_ids"].flatten(), reduction="none")
    return (losses.view(scores.shape[:2]) * batch["attention_mask"]).sum(1)


def states(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Any model: a fixed direction in its last states."""
    out = model(**batch)[0].flatten(1)
    return (out * torch.cos(torch.arange(out.shape[1]))).sum(1)


def translated(model: Any, batch: dict[str, Tensor]) -> Tensor:
    scores = model(**batch).logits
    targets = batch["decoder_input_ids"].roll(-1, 1)
    return F.cross_entropy(scores.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape).mean(1)


def text(length: int = 6) -> dict[str, Tensor]:
    return {"input_ids": ids(SIZE, length), "attention_mask": ragged(length)}


def gpt2_model(attention: str) -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=19,
        n_positions=8,
        n_embd=8,
        n_layer=2,
        n_head=2,
        resid_pdrop=0,
        embd_pdrop=0,
        attn_pdrop=0,
        attn_implementation=attention,
        bos_token_id=0,
        eos_token_id=1,
        use_cache=False,
    )
    return transformers.GPT2LMHeadModel(config)


def gpt2(attention: str) -> Any:
    model: Any = gpt2_model(attention)
    assert model.lm_head.weight is model.transformer.wte.weight, "tied"
    return model, text(), next_tokens


def bert(attention: str) -> Any:
    config = transformers.BertConfig(
        vocab_size=19,
        max_position_embeddings=8,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        attn_implementation=attention,
        **SMALL,
    )
    return transformers.BertForSequenceClassification(config), text(), classes


def bert_masked(attention: str) -> Any:
    config = transformers.BertConfig(
        vocab_size=19,
        max_position_embeddings=8,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        attn_implementation=attention,
        **SMALL,
    )
    return transformers.BertForMaskedLM(config), text(), masked_words


def roberta(attention: str) -> Any:
    config = transformers.RobertaConfig(
        vocab_size=19,
        max_position_embeddings=10,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        attn_implementation=attention,
        **SMALL,
    )
    return transformers.RobertaForSequenceClassification(config), text(), classes


def llama_model(attention: str) -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=19,
        max_position_embeddings=8,
        num_key_value_heads=1,
        attn_implementation=attention,
        use_cache=False,
        **SMALL,
    )
    return transformers.LlamaForCausalLM(config)


def llama(attention: str) -> Any:
    return llama_model(attention), text(), next_tokens


def adapted(model: nn.Module, **options: Any) -> nn.Module:
    peft = pytest.importorskip("peft", reason="the extra 'hf' (transformers, peft) is not installed")
    found = peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=4, lora_dropout=0.0, **options))
    # As it starts, B is zero, and A has no gradient.
    for name, parameter in found.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    return found


def llama_lora(attention: str) -> Any:
    return adapted(llama_model(attention), target_modules=["q_proj", "v_proj", "down_proj"]), text(), next_tokens


def gpt2_lora(attention: str) -> Any:
    return adapted(gpt2_model(attention), target_modules=["c_attn"], fan_in_fan_out=True), text(), next_tokens


def llama_dora(attention: str) -> Any:
    """Magnitude and direction of the adapted weight, both learnt."""
    return adapted(llama_model(attention), target_modules=["q_proj", "o_proj"], use_dora=True), text(), next_tokens


def vit(attention: str) -> Any:
    config = transformers.ViTConfig(
        image_size=8,
        patch_size=4,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        attn_implementation=attention,
        **SMALL,
    )
    return transformers.ViTForImageClassification(config), {"pixel_values": torch.randn(SIZE, 3, 8, 8)}, classes


def t5(attention: str) -> Any:
    config = transformers.T5Config(
        vocab_size=19,
        d_model=8,
        d_kv=4,
        d_ff=12,
        num_layers=2,
        num_heads=2,
        relative_attention_num_buckets=4,
        dropout_rate=0.0,
        attn_implementation=attention,
        use_cache=False,
    )
    model = transformers.T5ForConditionalGeneration(config)
    return model, text() | {"decoder_input_ids": ids(SIZE, 4)}, translated


def whisper(attention: str) -> Any:
    config = transformers.WhisperConfig(
        vocab_size=19,
        num_mel_bins=4,
        d_model=8,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=12,
        decoder_ffn_dim=12,
        max_source_positions=6,
        dropout=0.0,
        max_target_positions=8,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        attn_implementation=attention,
        use_cache=False,
    )
    model = transformers.WhisperForConditionalGeneration(config)
    return model, {"input_features": torch.randn(SIZE, 4, 12), "decoder_input_ids": ids(SIZE, 4)}, translated


def wav2vec2(attention: str) -> Any:
    config = transformers.Wav2Vec2Config(
        conv_dim=(6, 6),
        conv_stride=(3, 2),
        conv_kernel=(4, 3),
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
        feat_proj_dropout=0.0,
        layerdrop=0.0,
        mask_time_prob=0.0,
        apply_spec_augment=False,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=12,
        attn_implementation=attention,
    )
    return transformers.Wav2Vec2Model(config), {"input_values": torch.randn(SIZE, 60)}, states


def convnext(attention: str) -> Any:
    config = transformers.ConvNextConfig(
        patch_size=2, hidden_sizes=[4, 6], depths=[1, 1], num_stages=2, drop_path_rate=0.0, layer_scale_init_value=0.5
    )
    return transformers.ConvNextForImageClassification(config), {"pixel_values": torch.randn(SIZE, 3, 8, 8)}, classes


def swin(attention: str) -> Any:
    config = transformers.SwinConfig(
        image_size=8,
        patch_size=2,
        embed_dim=4,
        depths=[2],
        num_heads=[2],
        window_size=2,
        mlp_ratio=2.0,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        drop_path_rate=0.0,
        attn_implementation=attention,
    )
    return transformers.SwinForImageClassification(config), {"pixel_values": torch.randn(SIZE, 3, 8, 8)}, classes


def clip_text(attention: str) -> Any:
    config = transformers.CLIPTextConfig(
        vocab_size=19,
        max_position_embeddings=8,
        projection_dim=4,
        eos_token_id=18,
        bos_token_id=1,
        pad_token_id=0,
        attn_implementation=attention,
        **SMALL,
    )
    return transformers.CLIPTextModelWithProjection(config), text(), states


def clip_vision(attention: str) -> Any:
    config = transformers.CLIPVisionConfig(
        image_size=8, patch_size=4, projection_dim=4, attn_implementation=attention, **SMALL
    )
    model = transformers.CLIPVisionModelWithProjection(config)
    return model, {"pixel_values": torch.randn(SIZE, 3, 8, 8)}, states


BOTH: list[Family] = [
    *(gpt2, bert, bert_masked, roberta, llama, llama_lora, gpt2_lora, llama_dora),
    *(vit, t5, whisper, wav2vec2, clip_text, clip_vision),
]
CASES = [*((family, way) for family in BOTH for way in ("eager", "sdpa")), (convnext, "eager"), (swin, "eager")]


def built(
    family: Family, attention: str, dtype: torch.dtype = torch.float32
) -> tuple[nn.Module, Callable[[Any, Any], Tensor], dict[str, Tensor]]:
    torch.manual_seed(11)
    model, batch, loss_fn = family(attention)
    batch = {name: t.to(dtype) if t.is_floating_point() else t for name, t in batch.items()}
    # Random models have near-uniform scores: larger weights make gradients differ between examples.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(dtype).train(), loss_fn, batch


@pytest.mark.parametrize(("family", "attention"), CASES, ids=[f"{f.__name__}-{way}" for f, way in CASES])
def test_family(family: Family, attention: str) -> None:
    truth = one_by_one(*built(family, attention, torch.float64), SIZE)
    model, loss_fn, batch = built(family, attention)
    # GPT-2 and Swin fold the sequence into the batch: as in the engine's probe, another batch shows how.
    observe(model, loss_fn, take(batch, slice(0, PROBE_ROWS)))
    for keep_bytes, attach in ((None, True), (0, False)):
        found, losses = recorded(model, loss_fn, batch, SIZE, keep_bytes=keep_bytes, attach=attach)
        assert_like_loop(found, losses, truth)
