"""The configuration of ``dpkit train``: read, checked and explained before anything touches data.

Unknown keys and repeated keys are errors, because a misspelt ``epsilon`` must never become a default one.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from accounting.values import shown
from dpkit.errors import ConfigError

EXAMPLE = """\
# A training run of `dpkit train`. Keys that are not listed here are errors.

dataset: digits          # digits (comes with scikit-learn); from --data-dir or DPKIT_DATA: mnist | fashion | adult |
                         # dutch | compas | sst2
model: mlp               # linear | mlp | tanh_cnn (mnist and fashion) | bag_of_embeddings (sst2 and nothing else)
output: runs/digits      # the run folder; a new one for every run
private: true            # false: train without privacy, for comparison; results then go to OUTPUT/nonprivate

privacy:
  epsilon: 3.0           # what all steps together may cost; or give noise_multiplier instead
  # noise_multiplier: 3.9
  delta: 1.0e-4          # well below 1 / number of training examples
  max_grad_norm: 1.0     # every example's gradient is cut to this length
  # num_examples: 1437   # declare the size public: add/remove relation; left out: zero-out relation
  # noise_seed: 0        # repeatable noise, for debugging only: the statement then says NOT certified

training:
  epochs: 40
  batch_size: 256        # expected size of a batch: Poisson sampling draws around it
  learning_rate: 2.0
  momentum: 0.0
  schedule: linear       # linear: the learning rate falls to zero | constant
  # max_physical_batch_size: 64   # cut batches to save memory
  # checkpoint_every: 100  # steps from one checkpoint to the next; left out: one an epoch
  # seed: 0              # repeatable initial weights; the noise stays fresh

# Besides OUTPUT/metrics.jsonl: OUTPUT/tensorboard, and OUTPUT/mlflow.db or the server in MLFLOW_TRACKING_URI. Needs
# the extra `log`.
# logging: [tensorboard, mlflow]
"""


def _no_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("is true or false, and must be a number")
    return value


def _a_file_name(path: Path) -> Path:
    try:
        possible = b"\0" not in os.fsencode(path)
    except UnicodeEncodeError:
        possible = False
    if not possible:
        raise ValueError("has characters that no file name can have")
    return path


# The products of these numbers stay well inside what accounting and tensors can count.
Positive = Annotated[float, BeforeValidator(_no_bool), Field(gt=0, le=1e9, allow_inf_nan=False)]
Count = Annotated[int, BeforeValidator(_no_bool), Field(ge=1, le=10**9)]
Seed = Annotated[int, BeforeValidator(_no_bool), Field(ge=0, lt=2**63)]


_DEEPEST = 10


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Privacy(_Section):
    """The guarantee. ``epsilon`` or ``noise_multiplier`` decides the noise; see :class:`dpkit.PrivacyEngine`."""

    delta: Annotated[Positive, Field(lt=1)]
    max_grad_norm: Positive
    epsilon: Positive | None = None
    noise_multiplier: Positive | None = None
    num_examples: Count | None = None
    noise_seed: Seed | None = None

    @model_validator(mode="after")
    def _one_target(self) -> Self:
        if (self.epsilon is None) == (self.noise_multiplier is None):
            raise ValueError("give exactly one of epsilon and noise_multiplier")
        return self


class Training(_Section):
    """How the model is trained; all of it is public."""

    epochs: Count
    batch_size: Count
    learning_rate: Positive
    momentum: Annotated[float, BeforeValidator(_no_bool), Field(ge=0, lt=1)] = 0.0
    schedule: Literal["constant", "linear"] = "constant"
    max_physical_batch_size: Count | None = None
    checkpoint_every: Count | None = None
    seed: Seed | None = None


class Config(_Section):
    """One run of ``dpkit train``. Without ``private`` the privacy section is not needed and not used."""

    dataset: Literal["digits", "mnist", "fashion", "adult", "dutch", "compas", "sst2"]
    model: Literal["linear", "mlp", "tanh_cnn", "bag_of_embeddings"]
    output: Annotated[Path, AfterValidator(_a_file_name)]
    training: Training
    privacy: Privacy | None = None
    private: bool = True
    logging: tuple[Literal["tensorboard", "mlflow"], ...] = ()

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.private and self.privacy is None:
            raise ValueError("the section `privacy` is missing; add it, or say `private: false`")
        if self.model == "tanh_cnn" and self.dataset not in {"mnist", "fashion"}:
            raise ValueError("model tanh_cnn takes images of 28x28; use dataset mnist or fashion, or another model")
        if (self.model == "bag_of_embeddings") != (self.dataset == "sst2"):
            raise ValueError("dataset sst2 is text, and model bag_of_embeddings takes text alone; use them together")
        return self


def read(path: Path) -> Config:
    """The configuration in ``path``.

    Raises:
      ConfigError: the file cannot be read, is not YAML, repeats a key, or holds unknown keys or wrong values.
    """
    try:
        content = path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a path that no file can have
        raise ConfigError(f"{path} cannot be read ({error}); `dpkit init {path}` writes an example.") from None
    return decode(content, source=str(path))


def decode(content: bytes, *, source: str) -> Config:
    """The configuration that the YAML bytes ``content`` hold; ``source`` is how errors call them."""
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{source} cannot be read ({error}); `dpkit init` writes an example.") from None
    return parse(text, source=source)


def parse(text: str, *, source: str) -> Config:
    """The configuration that the YAML ``text`` holds; ``source`` is how errors call it."""
    try:
        _refuse_fancy_yaml(text, source)
        _refuse_repeated_keys(yaml.compose(text, Loader=yaml.SafeLoader), source)
        content = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date of month 13, a number of thousands of digits
        raise ConfigError(f"{source} is not YAML: {error}. `dpkit init` writes an example.") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{source} holds no keys; `dpkit init` writes an example.")
    try:
        return Config.model_validate(content)
    except ValidationError as error:
        raise ConfigError(f"{source}: {_explain(error)}. `dpkit init` writes an example with every key.") from None


def dump(config: Config) -> str:
    """YAML that :func:`parse` turns into an equal configuration."""
    return yaml.safe_dump(config.model_dump(mode="json", exclude_none=True), sort_keys=False)


def _refuse_fancy_yaml(text: str, source: str) -> None:
    """No aliases, tags or deep nesting: a configuration has two levels, and those could nest it without end."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        refused = None
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if isinstance(event, yaml.AliasEvent):
            refused = f"the alias *{event.anchor}"
        elif tag := getattr(event, "tag", None):
            refused = f"the tag {tag}"
        elif depth > _DEEPEST:
            refused = f"nesting deeper than {_DEEPEST} levels"
        if refused:
            line = "" if event.start_mark is None else f", line {event.start_mark.line + 1}"
            raise ConfigError(
                f"{source}{line}: {refused} is not used in configurations; write plain keys and values. "
                "`dpkit init` writes an example."
            )


def _refuse_repeated_keys(node: yaml.Node | None, source: str) -> None:
    """YAML keeps the last of several equal keys in silence; here the second one is an error."""
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if key.tag != "tag:yaml.org,2002:str":
                raise ConfigError(
                    f"{source}, line {key.start_mark.line + 1}: a key is not a plain word. `dpkit init` writes an "
                    "example."
                )
            if key.value in seen:
                raise ConfigError(
                    f"{source}, line {key.start_mark.line + 1}: the key {key.value!r} is there twice; keep one of them."
                )
            seen.add(key.value)
            _refuse_repeated_keys(value, source)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _refuse_repeated_keys(item, source)


def _explain(error: ValidationError) -> str:
    problems = []
    for detail in error.errors(include_url=False):
        where = ".".join(str(part) for part in detail["loc"])
        match detail["type"]:
            case "extra_forbidden":
                problems.append(f"unknown key {where}")
            case "missing":
                problems.append(f"{where} is missing")
            case "value_error":
                problems.append(f"{where} {detail['msg'].removeprefix('Value error, ')}".strip())
            case _:
                problems.append(f"{where} is {shown(detail['input'])}: {detail['msg'][:1].lower()}{detail['msg'][1:]}")
    return "; ".join(problems)
