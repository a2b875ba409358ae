"""The neighbour probe: what it catches, what it lets pass, and that it leaves no trace and reads no private value."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dpkit.engine.probe import probe_forward, probe_loss
from dpkit.errors import CrossExample, Refused, UnsupportedModule
from dpkit.gradients import ghost, trainable, vmap

VOCABULARY, WIDTH = 7, 6


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))


def batch(rows: int = 6) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, 5), torch.randint(0, 3, (rows,))


def classify(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


class Tokens(nn.Module):
    """A tiny causal transformer: ids (B, T) -> logits (B, T, V), or (T, B, V); between them, examples lie as asked."""

    def __init__(self, inside: str = "first", *, outputs_first: bool = True, positions: int = 16) -> None:
        super().__init__()
        self.inside, self.outputs_first = inside, outputs_first
        self.tokens, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(positions, WIDTH)
        self.norm, self.mix, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        rows, length = ids.shape
        x = self.tokens(ids) + self.positions(torch.arange(length))
        x = x.cumsum(1)
        if self.inside == "first":
            x = torch.tanh(self.mix(self.norm(x)))
        elif self.inside == "second":
            x = torch.tanh(self.mix(self.norm(x.transpose(0, 1)))).transpose(0, 1)
        elif self.inside == "flat, example by example":
            x = torch.tanh(self.mix(self.norm(x.reshape(-1, WIDTH)))).view(rows, length, WIDTH)
        elif self.inside == "flat, step by step":
            x = torch.tanh(self.mix(self.norm(x.transpose(0, 1).reshape(-1, WIDTH))))
            x = x.view(length, rows, WIDTH).transpose(0, 1)
        elif self.inside == "flat, read wrongly":
            x = torch.tanh(self.mix(self.norm(x.transpose(0, 1).reshape(-1, WIDTH)))).view(rows, length, WIDTH)
        logits = self.head(x)
        return logits if self.outputs_first else logits.transpose(0, 1)


def tokens_loss(model: nn.Module, batch: Any) -> Tensor:
    logits = model(batch[0])
    logits = logits if getattr(model, "outputs_first", True) else logits.transpose(0, 1)
    return F.cross_entropy(logits.flatten(0, 1), batch[1].flatten(), reduction="none").view(len(batch[0]), -1).sum(1)


def one_by_one(model: nn.Module, loss_fn: Callable[..., Tensor], batch: tuple[Tensor, ...]) -> list[list[Tensor]]:
    rows = [loss_fn(model, tuple(t[b : b + 1] for t in batch))[0] for b in range(len(batch[0]))]
    return [list(torch.autograd.grad(loss, list(trainable(model).values()))) for loss in rows]


LAYOUTS = ("first", "second", "flat, example by example", "flat, step by step")


@pytest.mark.parametrize("length", [4, 8, 5, 6])
@pytest.mark.parametrize("inside", LAYOUTS)
def test_layouts_are_found_whatever_their_lengths(inside: str, length: int) -> None:
    """T = B and T = 2B in the probe (4 rows) and in the batch (6 rows, 3 rows), and neither."""
    torch.manual_seed(0)
    model = Tokens(inside)
    for rows in (6, 3, length):
        ids = torch.randint(0, VOCABULARY, (rows, length)), torch.randint(0, VOCABULARY, (rows, length))
        probe_loss(model, tokens_loss, ids, ghost)
        gradients, _ = ghost.per_sample(model, tokens_loss, ids, rows)
        expected = one_by_one(model, tokens_loss, ids)
        norms = gradients.sq_norms()
        for number, name in enumerate(trainable(model)):
            wanted = torch.stack([row[number].double().square().sum() for row in expected])
            torch.testing.assert_close(norms[name], wanted, rtol=1e-4, atol=1e-10, msg=name)


@pytest.mark.parametrize("outputs_first", [True, False])
@pytest.mark.parametrize("rows", [3, 6, 8])
@pytest.mark.parametrize("inside", LAYOUTS)
def test_outputs_may_have_the_examples_on_any_axis(inside: str, rows: int, outputs_first: bool) -> None:
    model = Tokens(inside, outputs_first=outputs_first)
    assert probe_forward(model, ((torch.randint(0, VOCABULARY, (rows, 6)),), {}), rows)


@pytest.mark.parametrize("length", [4, 8, 5])
def test_a_layout_that_is_read_wrongly_is_refused_with_its_parameter_and_operation(length: int) -> None:
    ids = torch.randint(0, VOCABULARY, (6, length)), torch.randint(0, VOCABULARY, (6, length))
    with pytest.raises(Refused, match=r"parameter.*'(mix|head|norm|tokens|positions)") as caught:
        probe_loss(Tokens("flat, read wrongly"), tokens_loss, ids, ghost)
    assert re.search(r"linear|layer_norm|embedding", str(caught.value))


# -- what mixes -------------------------------------------------------------------------------------------------------


class Around(nn.Module):
    """Something done to the inputs, or to the features, of a small network."""

    def __init__(self, act: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.act = act
        self.first, self.last = nn.Linear(5, 8), nn.Linear(8, 3)
        self.kept: Any = None

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.act(self, self.first(x))))


def remembers(model: Any, h: Tensor) -> Tensor:
    before = h.detach() if model.kept is None else model.kept
    model.kept = h.detach().clone()
    return h + before.mean() * 0.1


MIXES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "batch normalisation by hand": lambda m, h: (h - h.mean(0)) / (h.std(0) + 1e-5),
    "detached statistics": lambda m, h: h - h.mean(0).detach(),
    "a batch normalisation function": lambda m, h: F.batch_norm(h, None, None, training=True),
    "scaling by the largest in the batch": lambda m, h: h / h.abs().max(),
    "detached scaling": lambda m, h: h / h.detach().abs().max(),
    "a roll": lambda m, h: h + 0.1 * h.roll(1, 0).detach(),
    "mixup": lambda m, h: 0.7 * h + 0.3 * h.flip(0).detach(),
    "a sum of everything": lambda m, h: h + 0.01 * h.sum(),
    "attention over the batch": lambda m, h: torch.softmax(h @ h.T, 1) @ h,
    "a cache that remembers": remembers,
}


@pytest.mark.parametrize("form", ["functional", "loop"])
@pytest.mark.parametrize("what", MIXES)
def test_examples_that_move_each_other_are_refused(what: str, form: str) -> None:
    torch.manual_seed(0)
    model = Around(MIXES[what])
    with pytest.raises(Refused, match=r"first\.|last\.|'kept'") as caught:
        if form == "functional":
            probe_loss(model, classify, batch(), ghost)
        else:
            probe_forward(model, ((batch()[0],), {}), 6)
    assert model.kept is None
    assert "Look for" in str(caught.value) or "remedy" in str(caught.value) or "replace it" in str(caught.value)


@pytest.mark.parametrize("what", ["detached statistics", "a roll", "mixup", "detached scaling"])
def test_the_refusal_names_the_parameter_the_operation_and_the_line(what: str) -> None:
    with pytest.raises(CrossExample, match=r"parameter '(first|last)\.\w+' \([\w.]*linear\).*test_probe\.py, line \d+"):
        probe_loss(Around(MIXES[what]), classify, batch(), ghost)


def contrastive(model: nn.Module, batch: Any) -> Tensor:
    z = F.normalize(model(batch[0]), dim=1)
    return F.cross_entropy(z @ z.T, torch.arange(len(z)), reduction="none")


def compares_with_the_mean(model: nn.Module, batch: Any) -> Tensor:
    z = model(batch[0])
    return (z - z.mean(0)).square().sum(1)


def hardest_only(model: nn.Module, batch: Any) -> Tensor:
    losses = classify(model, batch)
    return losses * (losses >= losses.max() * 0.999)


def over_the_mean_loss(model: nn.Module, batch: Any) -> Tensor:
    losses = classify(model, batch)
    return losses / losses.mean().detach()


@pytest.mark.parametrize("loss_fn", [contrastive, compares_with_the_mean, hardest_only, over_the_mean_loss])
def test_losses_that_compare_examples_are_refused(loss_fn: Callable[..., Tensor]) -> None:
    with pytest.raises(CrossExample, match=r"parameter '\d\.(weight|bias)' \([\w.]*linear\).*mixes"):
        probe_loss(net(), loss_fn, batch(), ghost)


class Ragged(NamedTuple):
    ids: Tensor
    attention_mask: Tensor


def ragged(rows: int = 6, length: int = 7, dtype: torch.dtype = torch.long) -> tuple[Tensor, Tensor]:
    mask = torch.arange(length) < torch.randint(1, length, (rows, 1))
    return torch.randint(1, VOCABULARY, (rows, length)), mask.to(dtype)


def masked_losses(model: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    logits = model(ids)
    losses = F.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="none").view(ids.shape)
    return (losses * mask).sum(1)


TOKEN_MEANS: dict[str, tuple[Callable[[Any, Any], Tensor], Any]] = {
    "a mask by position": (lambda m, b: masked_losses(m, *b) / b[1].sum(), ragged()),
    "a mask of bools": (lambda m, b: masked_losses(m, *b) / b[1].sum(), ragged(dtype=torch.bool)),
    "a mask of floats": (lambda m, b: masked_losses(m, *b) / b[1].sum(), ragged(dtype=torch.float)),
    "a mask by name": (lambda m, b: masked_losses(m, b["ids"], b["mask"]) / b["mask"].sum(), "mask"),
    "a named tuple": (lambda m, b: masked_losses(m, *b) / b.attention_mask.sum(), Ragged(*ragged())),
    "padding tokens": (lambda m, b: masked_losses(m, b[0], b[0] != 0) / (b[0] != 0).sum(), ragged()[:1]),
    "lengths": (
        lambda m, b: masked_losses(m, b["ids"], torch.arange(7) < b["lengths"][:, None]) / b["lengths"].sum(),
        "lengths",
    ),
    "labels that are ignored": (
        lambda m, b: F.cross_entropy(
            m(b["ids"]).flatten(0, 1), b["labels"].flatten(), reduction="none"
        ).view(b["ids"].shape).sum(1) / (b["labels"] >= 0).sum(),
        "labels",
    ),
}  # fmt: skip


def named(what: Any) -> Any:
    ids, mask = ragged()
    return {
        "mask": {"ids": ids, "mask": mask},
        "lengths": {"ids": ids, "lengths": mask.sum(1)},
        "labels": {"ids": ids, "labels": ids.masked_fill(mask == 0, -100)},
    }[what]


@pytest.mark.parametrize("made_up", [True, False])
@pytest.mark.parametrize("what", TOKEN_MEANS)
def test_a_token_mean_over_a_ragged_batch_is_refused(what: str, made_up: bool) -> None:
    torch.manual_seed(0)
    loss_fn, given = TOKEN_MEANS[what]
    given = named(given) if isinstance(given, str) else given
    given = copy_rows(given, 1) if made_up else given
    with pytest.raises(CrossExample, match="mixes the examples"):
        probe_loss(Tokens(), loss_fn, given, ghost)


def copy_rows(given: Any, rows: int) -> Any:
    if isinstance(given, dict):
        return {name: t[:rows] for name, t in given.items()}
    return type(given)(*(t[:rows] for t in given)) if hasattr(given, "_fields") else tuple(t[:rows] for t in given)


def mean_of_own_tokens(model: nn.Module, batch: Any) -> Tensor:
    ids, mask = batch["ids"], batch["mask"]
    return masked_losses(model, ids, mask) / mask.sum(1)


def mean_of_own_labels(model: nn.Module, batch: Any) -> Tensor:
    losses = F.cross_entropy(model(batch["ids"]).flatten(0, 1), batch["labels"].flatten(), reduction="none")
    return losses.view(batch["ids"].shape).sum(1) / (batch["labels"] >= 0).sum(1)


def last_token(model: nn.Module, batch: Any) -> Tensor:
    last = model(batch["ids"])[torch.arange(len(batch["ids"])), batch["lengths"] - 1]
    return last.square().sum(1)


@pytest.mark.parametrize("rows", [1, 6])
@pytest.mark.parametrize(
    ("what", "loss_fn"), [("mask", mean_of_own_tokens), ("labels", mean_of_own_labels), ("lengths", last_token)]
)
def test_a_mean_over_an_examples_own_tokens_passes(what: str, loss_fn: Callable[..., Tensor], rows: int) -> None:
    probe_loss(Tokens(), loss_fn, copy_rows(named(what), rows), ghost)


@pytest.mark.parametrize("backend", [ghost, vmap], ids=["ghost", "vmap"])
def test_the_other_backend_is_probed_too(backend: Any) -> None:
    probe_loss(net(), classify, batch(), backend)


def test_vmap_sees_one_example_at_a_time_so_nothing_can_mix_there() -> None:
    with pytest.raises(CrossExample):
        probe_loss(net(), compares_with_the_mean, batch(), vmap)


def test_good_models_differ_by_exactly_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from dpkit.engine import probe

    monkeypatch.setattr(probe, "_TOLERANCE", {torch.float64: 0.0, torch.float32: 0.0})
    found: list[str] = []
    require = probe.Probe._require

    def recorded(self: Any, left: Any, right: Any, what: str, **options: Any) -> None:
        if "another" in what and "alone" not in what:  # what must not move by a single bit
            require(self, left, right, what, **options)
            found.append(what)

    monkeypatch.setattr(probe.Probe, "_require", recorded)
    for inside in LAYOUTS:
        ids = torch.randint(0, VOCABULARY, (6, 5)), torch.randint(0, VOCABULARY, (6, 5))
        probe_loss(Tokens(inside).double(), tokens_loss, ids, ghost)
    probe_loss(net().double(), classify, (batch()[0].double(), batch()[1]), ghost)
    assert len(found) == 3 * 5


# -- what it leaves behind --------------------------------------------------------------------------------------------


class Restless(nn.Module):
    """Touches all that a module can keep, and drops out in every way."""

    def __init__(self, *, fails: bool = False) -> None:
        super().__init__()
        self.first, self.drop, self.last = nn.Linear(5, 8), nn.Dropout(0.5), nn.Linear(8, 3)
        self.register_buffer("counter", torch.zeros(1), persistent=False)
        self.history: list[Tensor] = []
        self.table: dict[str, Any] = {"calls": 0}
        self.last_input: Any = None
        self.fails = fails

    def forward(self, x: Tensor) -> Tensor:
        self.history.append(x)
        self.table["calls"] += 1
        self.last_input = x
        if self.fails and len(self.history) > 5:
            raise ValueError("enough")
        h = self.drop(self.first(x))
        h = F.dropout(h, 0.3, self.training)
        return self.last(h)


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("form", ["functional", "loop"])
def test_nothing_is_left_behind(form: str, fails: bool) -> None:
    model = Restless(fails=False)
    model.fails = fails
    model.first.eval()
    modes = [module.training for module in model.modules()]
    counter, history = model.counter, model.history
    before = copy.deepcopy(model.state_dict())
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    try:
        if form == "functional":
            probe_loss(model, classify, batch(), ghost) if not fails else probe_loss(model, raising, batch(), ghost)
        else:
            model.table["calls"] = 0
            torch.manual_seed(7)
            probe_forward(model, ((torch.zeros(6, 5),), {}), 6)
    except CrossExample:
        assert fails
    if form == "loop":
        assert torch.equal(torch.rand(3), expected)
    assert [module.training for module in model.modules()] == modes
    assert model.counter is counter and model.history is history
    assert (model.history, model.table, model.last_input) == ([], {"calls": 0}, None)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def raising(model: nn.Module, batch: Any) -> Tensor:
    model(batch[0])
    raise RuntimeError("no loss today")


class Drops(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.first, self.last = nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        if self.how == "function":
            h = F.dropout(h, p=0.5, training=self.training)
        elif self.how == "torch function":
            h = torch.dropout(h, 0.5, self.training)
        elif self.how == "attention":
            q = h[:, None, :4], h[:, None, 4:]
            q = torch.cat(q, 1)
            h = F.scaled_dot_product_attention(q, q, q, dropout_p=0.5).flatten(1)
        elif self.how == "noise of its own":
            h = h + 0.1 * torch.randn_like(h)
        return self.last(h)


@pytest.mark.parametrize("how", ["function", "torch function", "attention", "noise of its own"])
def test_random_models_pass(how: str) -> None:
    model = Drops(how)
    probe_loss(model, classify, batch(), ghost)
    probe_forward(model, ((batch()[0],), {}), 6)


def test_a_refused_model_does_not_spoil_what_is_probed_after_it() -> None:
    model = Around(MIXES["detached statistics"])
    with pytest.raises(Refused):
        probe_loss(model, classify, batch(), ghost)
    model.act = lambda m, h: h
    probe_loss(model, classify, batch(), ghost)
    ghost.per_sample(model, classify, batch(), 6)


def test_a_stored_buffer_that_moves_is_refused() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()
            self.register_buffer("mean", torch.zeros(5))

        def forward(self, x: Tensor) -> Tensor:
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
            return self.net(x)

    model = Counts()
    with pytest.raises(UnsupportedModule, match="'mean'"):
        probe_loss(model, classify, batch(), ghost)
    assert torch.equal(model.mean, torch.zeros(5))


class Poison(nn.Module):
    """Refuses to run on a private value."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, x: Tensor, *others: Tensor, **more: Tensor) -> Tensor:
        for tensor in (x, *others, *more.values()):
            assert not bool((tensor == 1234).any()), "a private value"
        return self.net(x) + sum(tensor.float().mean() for tensor in (*others, *more.values()) if tensor.dim() != 2)


def test_private_values_are_never_read() -> None:
    private = torch.full((6, 5), 1234.0)
    probe_forward(Poison(), ((private,), {}), 6)
    probe_forward(Poison(), ((private, private.clone()), {"pair": torch.full((12, 3), 1234)}), 6)
    probe_forward(Poison(), ((private, torch.tensor(1234.0)), {}), 6)


# -- arguments --------------------------------------------------------------------------------------------------------


class Masked(nn.Module):
    """Attention with a (T, T) mask among the arguments, which is as long as the batch where T = B."""

    def __init__(self, *, batch_first: bool = True) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.first, self.last = nn.Linear(5, WIDTH), nn.Linear(WIDTH, 3)
        self.bias = nn.Parameter(torch.randn(1, 1, 1))

    def forward(self, x: Tensor, mask: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        if mask.shape != (x.shape[1 if self.batch_first else 0],) * 2:
            raise ValueError("a mask for every two steps")
        x = x if self.batch_first else x.transpose(0, 1)
        if padding_mask is not None and padding_mask.shape != x.shape[:2]:
            raise ValueError("a mask for every step")
        h = self.first(x)
        scores = h @ h.mT + (self.bias * mask)
        if padding_mask is not None:
            scores = scores.masked_fill(padding_mask[:, None], -1e9)
        h = self.last(torch.softmax(scores, 2) @ h)
        return h if self.batch_first else h.transpose(0, 1)


@pytest.mark.parametrize("rows", [6, 8])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("padded", [True, False])
def test_a_square_mask_is_no_batch(rows: int, batch_first: bool, padded: bool) -> None:
    model, steps = Masked(batch_first=batch_first), 6
    x = torch.randn(rows, steps, 5) if batch_first else torch.randn(steps, rows, 5)
    more = {"padding_mask": torch.zeros(rows, steps, dtype=torch.bool)} if padded else {}
    found = probe_forward(model, ((x, torch.zeros(steps, steps)), more), rows)
    assert [tuple(place) for place in found] == [(0, 0 if batch_first else 1)] + [(2, 0)] * padded


def test_the_capture_takes_the_arguments_of_the_batch_and_no_others(tmp_path: Any) -> None:
    from torch.utils.data import DataLoader, TensorDataset

    from dpkit.engine import PrivacyEngine

    torch.manual_seed(0)
    model, steps = Masked(), 16  # as many as a private batch would have rows
    data = TensorDataset(torch.randn(40, steps, 5), torch.randint(0, 3, (40, steps)))
    engine = PrivacyEngine(tmp_path)
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    clean = copy.deepcopy(model)
    model, optimizer, loader = engine.make_private(
        model, optimizer, DataLoader(data, batch_size=8), num_examples=40, noise_multiplier=1e-6, target_delta=1e-3,
        steps=2, max_grad_norm=100.0,
    )  # fmt: skip
    mask = torch.zeros(steps, steps).tril(-1) + 1
    x, y = next(iter(loader))
    assert len(x) == 2 * steps, "a sequence as long as the batch could be taken for it"
    engine.backward(losses(model, x, y, mask))
    real = x.flatten(1).any(1)
    losses(clean, x[real], y[real], mask).sum().backward()
    for (name, p), q in zip(model.named_parameters(), clean.parameters(), strict=True):
        assert p.grad is not None
        torch.testing.assert_close(p.grad * 8, q.grad, rtol=1e-3, atol=1e-3, msg=name)


def losses(model: nn.Module, x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    return F.cross_entropy(model(x, mask).flatten(0, 1), y.flatten(), reduction="none").view(y.shape).sum(1)


def test_a_table_with_a_row_for_every_example_of_the_batch_stays_of_the_batch() -> None:
    """Read as a constant it would pass, and its examples mix."""

    class Centres(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def forward(self, x: Tensor, z: Tensor) -> Tensor:
            return self.net(x + z - z.mean(0))

    with pytest.raises(CrossExample):
        probe_forward(Centres(), ((torch.randn(6, 5), torch.randn(6, 5)), {}), 6)


class Sums(nn.Module):
    """Returns what a user of the loop reduces itself: one number."""

    def __init__(self, reduce: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.model, self.reduce = Tokens(), reduce

    def forward(self, ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        logits = self.model(ids)
        losses = F.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="none").view(ids.shape)
        return {"loss": self.reduce(losses, attention_mask), "logits": logits}


def test_a_mean_over_the_batch_among_the_outputs_passes_unless_it_is_of_tokens() -> None:
    ids, mask = ragged()
    call = ((), {"ids": ids, "attention_mask": mask})
    probe_forward(Sums(lambda losses, mask: (losses * mask).sum(1).mean()), call, 6)
    with pytest.raises(CrossExample, match="another example is replaced"):
        probe_forward(Sums(lambda losses, mask: (losses * mask).sum() / mask.sum()), call, 6)


def test_a_head_of_zeros_hides_nothing() -> None:
    class Zeros(Around):
        def __init__(self, act: Callable[[Any, Tensor], Tensor]) -> None:
            super().__init__(act)
            nn.init.zeros_(self.last.weight)
            nn.init.zeros_(self.last.bias)

    probe_forward(Zeros(lambda m, h: h), ((batch()[0],), {}), 6)
    with pytest.raises(CrossExample, match=r"last\.weight"):
        probe_forward(Zeros(lambda m, h: h - h.mean(0)), ((batch()[0],), {}), 6)


# -- Hugging Face -----------------------------------------------------------------------------------------------------


def gpt2() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=20, n_positions=16, n_embd=8, n_layer=1, n_head=2)
    return transformers.GPT2LMHeadModel(config)


@pytest.mark.filterwarnings("ignore")
def test_a_model_of_transformers_is_probed_by_its_keyword_arguments() -> None:
    model, (ids, mask) = gpt2(), ragged()
    modes = [module.training for module in model.modules()]
    call = ((), {"input_ids": ids, "attention_mask": mask})
    assert probe_forward(model, call, 6)
    assert [module.training for module in model.modules()] == modes
    # Its own loss is a mean over the tokens of the batch.
    with pytest.raises(CrossExample, match="single number.*another example is replaced.*labels="):
        probe_forward(model, ((), {**call[1], "labels": ids}), 6)


@pytest.mark.filterwarnings("ignore")
def test_a_model_of_transformers_with_a_loss_for_each_example_passes() -> None:
    def loss_fn(model: Any, batch: Any) -> Tensor:
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        labels = batch["labels"][:, 1:]
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape).sum(1)

    ids, mask = ragged()
    public = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    for rows in (1, 6):
        probe_loss(gpt2(), loss_fn, copy_rows(public, rows), ghost)


class SequenceFirst(nn.Module):
    """Torch's own way: (T, B, d), a class token as the first step, and masks that are (T, T) and (B, T)."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.first, self.token, self.last = nn.Linear(5, 8), nn.Parameter(torch.randn(1, 1, 8)), nn.Linear(8, 3)
        self.kind = kind
        if kind == "attention":
            layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1)
            self.inner: nn.Module = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        else:
            self.inner = nn.LSTM(8, 8, num_layers=2, dropout=0.3) if kind == "recurrent" else nn.Tanh()

    def forward(self, x: Tensor, mask: Tensor | None = None, src_key_padding_mask: Tensor | None = None) -> Tensor:
        h = self.first(x)
        if self.kind == "attention":
            h = self.inner(h, mask, src_key_padding_mask)
        elif self.kind == "recurrent":
            h, _ = self.inner(h)
        else:
            h = self.inner(torch.cat([self.token.expand(1, h.shape[1], 8), h]))
        return self.last(h)


@pytest.mark.filterwarnings("ignore:.*mismatched key_padding_mask")
@pytest.mark.parametrize("steps", [3, 4, 8])
@pytest.mark.parametrize("masks", ["none", "square", "both"])
@pytest.mark.parametrize("kind", ["attention", "recurrent", "class token"])
def test_models_that_put_the_sequence_first_are_read_rightly(kind: str, masks: str, steps: int) -> None:
    if masks != "none" and kind != "attention":
        pytest.skip("takes no masks")
    model, rows = SequenceFirst(kind), 6
    more = {"mask": nn.Transformer.generate_square_subsequent_mask(steps).isinf()} if masks != "none" else {}
    if masks == "both":
        more["src_key_padding_mask"] = torch.zeros(rows, steps, dtype=torch.bool)
    places = probe_forward(model, ((torch.randn(steps, rows, 5),), more), rows)
    assert [tuple(place) for place in places] == [(0, 1)] + [(2, 0)] * (masks == "both")


def test_a_model_may_ask_for_gradients_of_its_own_input_but_train_nothing_else() -> None:
    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.outsider = net(), [torch.randn(5, requires_grad=True)]

        def forward(self, x: Tensor) -> Tensor:
            x = x[:, None]
            x.requires_grad = True
            return self.net(x + (self.outsider[0] if self.outsider else 0))[:, 0]

    model = Asks()
    with pytest.raises(Refused, match="shape \\(5,\\)"):
        probe_forward(model, ((batch()[0],), {}), 6)
    model.outsider = []
    probe_forward(model, ((batch()[0],), {}), 6)
    probe_loss(model, classify, batch(), ghost)
