"""Where other libraries fail or are silently wrong, one test each: training is right, or refused with the reason.

"Right" is measured on what is released: with a noise of 1e-6, ``p.grad`` after ``engine.backward`` is the sum of the
examples' clipped gradients, computed one by one, over the expected batch.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gradients.loop import one_by_one
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import dpkit
from dpkit.engine import PrivacyEngine
from dpkit.errors import CrossExample, LossShape, Refused, UnsupportedModule

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*:FutureWarning:transformers"),
    pytest.mark.filterwarnings("ignore:.*:DeprecationWarning:transformers"),
]

BATCH = 6
Loss = Callable[[Any, Any], Tensor]


def sequences(length: int = 3, width: int = 4) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(24, length, width, generator=generator), torch.arange(24) % 3)


def texts(length: int = 6) -> TensorDataset:
    """Token numbers, and a mask for texts of different lengths."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 19, (24, length), generator=generator)
    return TensorDataset(ids, (torch.arange(length) < 2 + torch.arange(24)[:, None] % (length - 1)).long())


def attached(
    tmp_path: Path, model: nn.Module, dataset: TensorDataset, **options: Any
) -> tuple[PrivacyEngine, Any, torch.optim.Optimizer, Any]:
    engine = PrivacyEngine(tmp_path / "run")
    model, optimizer, loader = engine.make_private(
        model,
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1),
        DataLoader(dataset, batch_size=BATCH),
        num_examples=len(dataset),
        noise_multiplier=1e-6,
        target_delta=1e-4,
        epochs=1,
        max_grad_norm=0.5,
        **options,
    )
    return engine, model, optimizer, loader


def trains_right(
    tmp_path: Path, model: nn.Module, dataset: TensorDataset, loss_fn: Loss, tolerance: float = 1e-4
) -> nn.Module:
    """Attach, and compare what is released with a loop over examples; returns the trained model."""
    model.train()
    engine, model, optimizer, loader = attached(tmp_path, model, dataset)
    compared = 0
    for batch in loader:
        plain = copy.deepcopy(model)  # copies are not attached
        truth = one_by_one(plain, loss_fn, batch, len(batch[0])).gradients
        optimizer.zero_grad()
        engine.backward(loss_fn(model, batch))
        real = engine.nonprivate.units
        norms = torch.stack([rows.norm(dim=1).square() for rows in truth.values()]).sum(0).sqrt()[:real]
        factors = (0.5 / (norms + 1e-30)).clamp(max=1)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                expected = factors @ truth[name][:real] / BATCH
                assert parameter.grad is not None
                error = float((parameter.grad.double().flatten() - expected).norm())
                assert error <= tolerance * 0.5 * max(1, real) / BATCH + 1e-5, (name, error)
        optimizer.step()
        compared += real
    assert compared > 0
    return model


def classify(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]).flatten(1)[:, :3], batch[1], reduction="none")


def next_tokens(model: Any, batch: Any) -> Tensor:
    ids, mask = batch
    scores = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
    losses = F.cross_entropy(scores.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(len(ids), -1)
    return (losses * mask[:, 1:]).sum(1) / mask[:, 1:].sum(1).clamp(min=1)


def text_class(model: Any, batch: Any) -> Tensor:
    ids, mask = batch
    return F.cross_entropy(model(input_ids=ids, attention_mask=mask).logits, ids[:, 0] % 2, reduction="none")


class Pooled(nn.Module):
    """A sequence model and a head on the mean of its states; ``turned`` where it wants (T, B, d)."""

    def __init__(self, inner: nn.Module, width: int, turned: bool = False) -> None:
        super().__init__()
        self.inner, self.head, self.turned = inner, nn.Linear(width, 3), turned

    def forward(self, x: Tensor) -> Tensor:
        out = self.inner(x.transpose(0, 1) if self.turned else x)
        out = out[0] if isinstance(out, tuple) else out
        return self.head(out.mean(0 if self.turned else 1))


class SelfAttention(nn.Module):
    def __init__(self, batch_first: bool = True) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(4, 2, batch_first=batch_first)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, x, x)[0]


class Functional(nn.Module):
    """A weight used outside of its module's forward."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.mean(1)
        return self.b(F.linear(torch.tanh(self.a(x)), self.a.weight))


class RawParameters(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 4))
        self.scale = nn.Parameter(torch.ones(4))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        return self.head((x * self.scale).tanh().mean(1))


class CountedPositions(nn.Module):
    """Position numbers for a batch of one: ``arange(T)[None]``."""

    def __init__(self) -> None:
        super().__init__()
        self.positions, self.head = nn.Embedding(8, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.positions(torch.arange(x.shape[1])[None])
        return self.head(torch.tanh(x).mean(1))


class TiedTokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(19, 4), nn.Linear(4, 19, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.table(ids)).mean(1))


def tied_loss(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[0][:, -1], reduction="none")


class CalledTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.layer(torch.tanh(self.layer(x.mean(1))))))


def in_place() -> nn.Module:
    return nn.Sequential(
        *(
            nn.Linear(4, 6),
            nn.ReLU(inplace=True),
            nn.Linear(6, 6),
            nn.ReLU(inplace=True),
            nn.Flatten(),
            nn.Linear(18, 3),
        )
    )


def weight_normed() -> nn.Module:
    normed = nn.utils.parametrizations.weight_norm
    return nn.Sequential(normed(nn.Linear(4, 5)), nn.Tanh(), nn.Flatten(), normed(nn.Linear(15, 3)))


def encoder(batch_first: bool = True) -> nn.Module:
    layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=batch_first)
    return nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)


ROWS: dict[str, tuple[Callable[[], nn.Module], TensorDataset, Loss]] = {
    "MultiheadAttention as it is": (lambda: Pooled(SelfAttention(), 4), sequences(), classify),
    "LSTM as it is": (lambda: Pooled(nn.LSTM(4, 3, batch_first=True), 3), sequences(), classify),
    "GRU as it is": (lambda: Pooled(nn.GRU(4, 3, batch_first=True), 3), sequences(), classify),
    "TransformerEncoder as it is": (lambda: Pooled(encoder(), 4), sequences(), classify),
    "raw parameters": (RawParameters, sequences(), classify),
    "weight norm": (weight_normed, sequences(), classify),
    "relu in place": (in_place, sequences(), classify),
    "convolution with group norm": (
        lambda: nn.Sequential(nn.Conv1d(3, 4, 2), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(12, 3)),
        sequences(),
        classify,
    ),
    "tied embedding": (TiedTokens, texts(), tied_loss),
    "layer called twice": (CalledTwice, sequences(), classify),
    "weight used functionally": (Functional, sequences(), classify),
    "sequence first, T != B": (lambda: Pooled(nn.LSTM(4, 3), 3, turned=True), sequences(), classify),
    "sequence first, T == B": (lambda: Pooled(nn.LSTM(4, 3), 3, turned=True), sequences(BATCH), classify),
    "sequence first, attention, T == B": (
        lambda: Pooled(SelfAttention(batch_first=False), 4, turned=True),
        sequences(BATCH),
        classify,
    ),
    "sequence first, linear, T == B": (lambda: Pooled(nn.Linear(4, 4), 4, turned=True), sequences(BATCH), classify),
    "sequence first, encoder, T == B": (lambda: Pooled(encoder(False), 4, turned=True), sequences(BATCH), classify),
    "position numbers for a batch of one": (CountedPositions, sequences(), classify),
    "frozen parts": (lambda: frozen(CalledTwice()), sequences(), classify),
}


def frozen(model: nn.Module) -> nn.Module:
    model.layer.weight.requires_grad_(False)  # pyright: ignore
    return model


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS.keys())
def test_row_trains_right(row: tuple[Callable[[], nn.Module], TensorDataset, Loss], tmp_path: Path) -> None:
    build, dataset, loss_fn = row
    torch.manual_seed(0)
    trains_right(tmp_path, build(), dataset, loss_fn)


# ------------------------------------------------------------------------------------------------ transformers and peft


def gpt2() -> Any:
    transformers = pytest.importorskip("transformers", reason="the extra 'hf' (transformers, peft) is not installed")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=19, n_positions=8, n_embd=8, n_layer=1, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
        bos_token_id=0, eos_token_id=1, use_cache=False,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def bert() -> Any:
    transformers = pytest.importorskip("transformers", reason="the extra 'hf' (transformers, peft) is not installed")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=19, max_position_embeddings=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=12, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


def llama() -> Any:
    transformers = pytest.importorskip("transformers", reason="the extra 'hf' (transformers, peft) is not installed")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=19, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12, use_cache=False,
        bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def adapted(model: Any, *modules: str) -> Any:
    peft = pytest.importorskip("peft", reason="the extra 'hf' (transformers, peft) is not installed")
    config = peft.LoraConfig(r=2, target_modules=list(modules), lora_dropout=0.0, fan_in_fan_out="c_attn" in modules)
    return peft.get_peft_model(model, config)


def test_gpt2_in_full_without_position_numbers(tmp_path: Path) -> None:
    trains_right(tmp_path, gpt2(), texts(), next_tokens)


def test_bert_in_full_without_position_or_type_numbers(tmp_path: Path) -> None:
    trains_right(tmp_path, bert(), texts(), text_class)


def test_llama_in_full(tmp_path: Path) -> None:
    trains_right(tmp_path, llama(), texts(), next_tokens)


@pytest.mark.parametrize(
    ("build", "modules", "loss_fn"),
    [
        (gpt2, ("c_attn",), next_tokens),
        (bert, ("query", "value"), text_class),
        (llama, ("q_proj", "v_proj"), next_tokens),
    ],
    ids=["gpt2", "bert", "llama"],
)
def test_lora_moves_all_its_tensors_and_nothing_else(
    build: Callable[[], Any], modules: tuple[str, ...], loss_fn: Loss, tmp_path: Path
) -> None:
    model = adapted(build(), *modules)
    keys = list(model.state_dict())
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trained = trains_right(tmp_path, model, texts(), loss_fn)
    assert trained is model, "attached, not wrapped"
    assert list(model.state_dict()) == keys
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("lora_" in name)
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name


def test_an_attached_model_still_generates(tmp_path: Path) -> None:
    model = adapted(gpt2(), "c_attn")
    _, attached_model, _, _ = attached(tmp_path, model, texts())
    attached_model.eval()
    ids = torch.tensor([[3, 4]])
    found = attached_model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False, pad_token_id=1
    )
    assert found.shape[1] > 2
    assert attached_model.config.n_embd == 8
    assert all(parameter.grad is None for parameter in attached_model.parameters())


# ------------------------------------------------------------------------------------------------------- precision


def test_parameters_in_bfloat16(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Flatten(), nn.Linear(18, 3)).to(torch.bfloat16)
    x, y = sequences().tensors
    trains_right(tmp_path, model, TensorDataset(x.to(torch.bfloat16), y), classify, tolerance=3e-2)


def test_autocast_to_bfloat16(tmp_path: Path) -> None:
    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return classify(model, batch).float()

    torch.manual_seed(0)
    model = Pooled(nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6)), 6)
    trains_right(tmp_path, model, sequences(), loss_fn, tolerance=3e-2)


# ----------------------------------------------------------------------------------------------------- refused, and why


def refused(tmp_path: Path, model: nn.Module, dataset: TensorDataset, loss_fn: Loss, **options: Any) -> str:
    """The reason, which comes before anything is charged."""
    with pytest.raises(Refused) as refusal:
        engine, model, optimizer, loader = attached(tmp_path, model, dataset, **options)
        try:
            for batch in loader:
                optimizer.zero_grad()
                engine.backward(loss_fn(model, batch))
                optimizer.step()
        finally:
            assert sum(count for _, count in engine.ledger.plans()) == 0
    return str(refusal.value)


@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm_is_refused(affine: bool, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.BatchNorm1d(4, affine=affine), nn.Linear(4, 3))
    message = refused(tmp_path, model, sequences(), classify)
    assert "BatchNorm1d at '2'" in message
    assert "GroupNorm" in message


def functional_form(tmp_path: Path, model: nn.Module, dataset: TensorDataset, loss_fn: Loss) -> None:
    plan = dpkit.Plan(
        sampler=dpkit.Poisson(0.25),
        clip=dpkit.clipping.Flat(1.0),
        mechanism=dpkit.Gaussian(1.0),
        steps=2,
        num_examples=len(dataset),
        delta=1e-4,
    )
    engine = PrivacyEngine(tmp_path / "run")
    step = engine.attach(model, loss_fn, torch.optim.SGD(model.parameters(), 0.1), plan=plan, dataset=dataset)
    for batch in engine.batches():
        step(batch)


def test_a_token_mean_over_a_ragged_batch_is_refused(tmp_path: Path) -> None:
    """The usual loss of language models: divided by the number of tokens of the whole batch."""

    def loss_fn(model: Any, batch: Any) -> Tensor:
        ids, mask = batch
        losses = F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        return (losses.view(len(ids), -1) * mask[:, 1:]).sum(1) / mask[:, 1:].sum()

    model = nn.Sequential(nn.Embedding(19, 4), nn.Linear(4, 19))
    with pytest.raises(CrossExample, match=r"parameter '.*mixes the examples.*token means"):
        functional_form(tmp_path, model, texts(), loss_fn)


def test_a_contrastive_loss_is_refused(tmp_path: Path) -> None:
    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        z = F.normalize(model(batch[0].flatten(1)), dim=-1)
        return F.cross_entropy(z @ z.roll(1, -1).T / 0.1, torch.arange(len(z)), reduction="none")

    with pytest.raises(CrossExample, match=r"parameter '.*mixes the examples.*compare examples"):
        functional_form(tmp_path, nn.Linear(12, 4), sequences(), loss_fn)


def test_a_contrastive_head_inside_the_model_is_refused(tmp_path: Path) -> None:
    class Contrastive(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tower = nn.Linear(12, 4)

        def forward(self, x: Tensor) -> Tensor:
            z = self.tower(x.flatten(1))
            return z @ z.T

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0]), torch.arange(len(batch[0])), reduction="none")

    message = refused(tmp_path, Contrastive(), sequences(), loss_fn)
    assert "tower." in message


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_criterion_that_reduces_is_refused_unless_it_is_declared(reduction: str, tmp_path: Path) -> None:
    criterion = nn.CrossEntropyLoss(reduction=reduction)

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        return criterion(model(batch[0]), batch[1])

    with pytest.raises(LossShape, match=r'reduction="none"|loss_reduction'):
        engine, model, _, loader = attached(tmp_path, CalledTwice(), sequences())
        engine.backward(loss_fn(model, next(iter(loader))))


def test_buffers_that_follow_the_batch_are_refused(tmp_path: Path) -> None:
    model = nn.Sequential(nn.InstanceNorm1d(3, track_running_stats=True), nn.Flatten(), nn.Linear(12, 3))
    with pytest.raises(UnsupportedModule, match=r"InstanceNorm1d|running_mean"):
        engine, model, _, loader = attached(tmp_path, model, sequences())
        engine.backward(classify(model, next(iter(loader))))


# ------------------------------------------------------------------------------------------- records that would show


def test_one_row_that_is_not_a_number_shows_nowhere(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x, y = sequences().tensors
    x[3] = torch.nan
    engine, model, optimizer, loader = attached(tmp_path, CalledTwice(), TensorDataset(x, y))
    met = 0
    for batch in loader:
        engine.backward(classify(model, batch))
        kept = torch.isfinite(batch[0]).all((1, 2)) & (torch.arange(len(batch[0])) < engine.nonprivate.units)
        met += int((~torch.isfinite(batch[0]).all((1, 2))).sum())
        good = [part[kept] for part in batch]
        truth = one_by_one(copy.deepcopy(model), classify, good, len(good[0])).gradients
        norms = torch.stack([rows.norm(dim=1).square() for rows in truth.values()]).sum(0).sqrt()
        for name, parameter in model.named_parameters():
            expected = (0.5 / norms).clamp(max=1) @ truth[name] / BATCH
            assert float((parameter.grad.double().flatten() - expected).norm()) < 1e-4
        optimizer.step()
        optimizer.zero_grad()
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_an_example_alone_is_clipped_as_among_others(tmp_path: Path) -> None:
    """A loss that grows with its inputs never moves the model further than the bound."""
    x, y = sequences().tensors
    for scale in (1.0, 1e3, 1e6):
        torch.manual_seed(0)
        engine, model, _, loader = attached(tmp_path / str(scale), Functional(), TensorDataset(x * scale, y))
        engine.backward(classify(model, next(iter(loader))))
        length = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
        assert length <= 0.5 * engine.nonprivate.units / BATCH * (1 + 1e-4)
