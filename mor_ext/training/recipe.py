"""What a training run is made of: a YAML file, ``key=value`` overrides, and what they may say."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

FILE = "recipe.yaml"  # of a run, in its output folder


@dataclass
class DataRecipe:
    """Either ``files``, or ``dataset``: a name that the ``datasets`` library knows."""

    files: str | list[str] | None = None
    validation_files: str | list[str] | None = None
    held_out: float = 0.1  # share of the text, at its end, where there are no validation files
    dataset: str | None = None
    config: str | None = None
    split: str = "train"
    validation_split: str | None = None
    validation_documents: int = 1000  # the first of the split, where there is no validation split
    column: str = "text"
    streaming: bool = False
    stride: int | None = None  # tokens between training windows; None: the length

    def __post_init__(self) -> None:
        if (self.files is None) == (self.dataset is None):
            raise ValueError(
                "data must have one of files and dataset, "
                f"got files = {self.files}, dataset = {self.dataset}"
            )
        if self.streaming and self.dataset is None:
            raise ValueError("data.streaming must be false for files, got true")
        if self.streaming and self.stride is not None:
            raise ValueError(f"data.stride must be null for streaming, got {self.stride}")
        _above("data", self, 0, "validation_documents")
        if not 0 < self.held_out < 1:
            raise ValueError(f"data.held_out must be between 0 and 1, got {self.held_out}")


@dataclass
class TokenizerRecipe:
    """See mor_ext/training/tokenizer.py."""

    kind: Literal["byte", "char", "bpe", "sentencepiece", "pretrained"] = "byte"
    vocab_size: int | None = None  # bpe, sentencepiece
    name: str | None = None  # pretrained: a folder, or a model on the Hub
    documents: int = 10_000  # of a dataset, that it is trained on

    def __post_init__(self) -> None:
        if (self.kind == "pretrained") != (self.name is not None):
            raise ValueError(
                "tokenizer.name must be given for pretrained alone, "
                f"got {self.name} for {self.kind}"
            )
        if (self.kind in ("bpe", "sentencepiece")) != (self.vocab_size is not None):
            raise ValueError(
                "tokenizer.vocab_size must be given for bpe and sentencepiece alone, "
                f"got {self.vocab_size} for {self.kind}"
            )
        _above("tokenizer", self, 0, "documents")


@dataclass
class TrainingRecipe:
    """AdamW, clipping, and a schedule; a step is one of the optimizer.

    cosine: half a cosine from the peak to ``final`` of it; wsd: the peak, then linear to ``final``
    in the last ``decay`` of the steps.
    """

    steps: int | None = None
    epochs: float | None = None
    batch_size: int = 8  # windows that a device computes at once
    gradient_accumulation: int = 1
    length: int = 256  # tokens of a window
    learning_rate: float = 3e-3
    schedule: Literal["cosine", "wsd"] = "cosine"
    warmup: float = 0.05  # share of the steps
    decay: float = 0.2  # share of the steps, of wsd
    final: float = 0.0  # of the learning rate, at the last step
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    bf16: bool = False
    seed: int = 0
    log_every: int = 10  # steps, as the next two
    eval_every: int = 500
    eval_windows: int = 256  # of held-out text, evenly spread; the evaluation at the end takes all
    save_every: int = 500
    gradient_checkpointing: bool = False
    compile: bool = False
    keep_freed_memory: bool = True
    fsdp: bool = False

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(
                "training must have one of steps and epochs, "
                f"got steps = {self.steps}, epochs = {self.epochs}"
            )
        positive = ["batch_size", "gradient_accumulation", "learning_rate", "clip"]
        _above("training", self, 0, "steps", "epochs", *positive)
        _above("training", self, 0, "log_every", "eval_every", "eval_windows", "save_every")
        _above("training", self, 1, "length")
        for name in ("warmup", "decay", "final"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"training.{name} must be from 0 to 1, got {getattr(self, name)}")
        if self.schedule == "wsd" and self.warmup + self.decay > 1:
            raise ValueError(
                f"training.decay must be at most 1 - warmup = {1 - self.warmup:g}, got {self.decay}"
            )


def _above(section: str, recipe: Any, bound: int, *names: str) -> None:
    for name in names:
        value = getattr(recipe, name)
        if value is not None and value <= bound:
            raise ValueError(f"{section}.{name} must be above {bound}, got {value}")


@dataclass
class RunRecipe:
    """A run.

    ``model`` has fields of :class:`~mor_ext.models.MoRConfig`, or ``from_llama`` (a checkpoint)
    with ``init`` and the fields that :func:`~mor_ext.models.from_llama` takes.
    """

    data: DataRecipe
    training: TrainingRecipe
    model: dict[str, Any] = field(default_factory=dict)
    tokenizer: TokenizerRecipe = field(default_factory=TokenizerRecipe)
    output: str = "out"  # folder of checkpoints, logs and the run's recipe

    def __post_init__(self) -> None:
        self.model = _fields(self.model, model_fields(), "model")
        if self.data.streaming and self.training.steps is None:
            raise ValueError(
                "training.steps must be given for streaming, "
                f"got training.epochs = {self.training.epochs}"
            )

    @staticmethod
    def load(source: str | Path, overrides: Iterable[str] = ()) -> RunRecipe:
        """Reads a YAML file, or the example of that name, and overrides parts of it.

        Args:
            source: a path, or one of :func:`config_names`.
            overrides: ``section.key=value`` each, the value in YAML.

        Raises:
            ValueError: no such file, not YAML, an unknown key (the message has the valid ones), a
                value of the wrong type or out of range.
        """
        path = find_config(source)
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{path} must be YAML, got {reason}") from error
        if not isinstance(content, dict):
            raise ValueError(f"{path} must have keys and values, got {content!r}")
        for override in overrides:
            _override(content, override)
        return _build(RunRecipe, content, "")

    def save(self, folder: str | Path) -> Path:
        """Writes ``recipe.yaml``, which :meth:`load` reads."""
        content = dataclasses.asdict(self)
        content["training"]["betas"] = list(self.training.betas)
        content["model"] = {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in self.model.items()
        }
        path = Path(folder) / FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
        return path


def model_fields() -> dict[str, Any]:
    """The types of what ``model`` may say."""
    from mor_ext.models import MoRConfig

    fields = {f.name for f in dataclasses.fields(MoRConfig)}
    own = inspect.get_annotations(MoRConfig, eval_str=True)
    return {
        "from_llama": str,
        "init": str,
        **{name: kind for name, kind in own.items() if name in fields},
    }


def config_names() -> list[str]:
    """The example configs that come with the package."""
    names = (file.name for file in (resources.files("mor_ext") / "configs").iterdir())
    return sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml"))


def find_config(source: str | Path) -> Path:
    """The file of that path, or the example of that name.

    Raises:
        ValueError: there is neither.
    """
    if Path(source).is_file():
        return Path(source)
    names = config_names()
    if str(source) in names:
        return Path(str(resources.files("mor_ext") / "configs" / f"{source}.yaml"))
    raise ValueError(f"config must be a file or one of {', '.join(names)}, got {source}")


def _override(content: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not key or not equals:
        raise ValueError(f"overrides must be key=value, got {override!r}")
    *sections, name = key.split(".")
    for section in sections:
        content = content.setdefault(section, {})
        if not isinstance(content, dict):
            raise ValueError(f"{key} must be in a section, got {section} = {content!r}")
    try:
        content[name] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ValueError(f"{key} must be YAML, got {value!r}") from error


def _build(recipe: type, content: dict[str, Any], section: str) -> Any:
    for f in dataclasses.fields(recipe):
        if dataclasses.is_dataclass(get_type_hints(recipe)[f.name]):
            content = {f.name: {}, **content}
    return recipe(**_fields(content, get_type_hints(recipe), section))


def _fields(content: dict[str, Any], kinds: dict[str, Any], section: str) -> dict[str, Any]:
    """The values, each as its type; ValueError for a key that is not among the types."""
    prefix = f"{section}." if section else ""
    for name in content:
        if name not in kinds:
            close = difflib.get_close_matches(str(name), kinds, 1)
            hint = f" (did you mean {close[0]}?)" if close else ""
            raise ValueError(
                f"keys of {section or 'a recipe'} must be among {', '.join(kinds)}, "
                f"got {prefix}{name}{hint}"
            )
    return {name: _as(kinds[name], value, prefix + name) for name, value in content.items()}


def _as(kind: Any, value: Any, key: str) -> Any:
    """The value as this type, or ValueError."""
    if dataclasses.is_dataclass(kind) and isinstance(kind, type) and isinstance(value, dict):
        return _build(kind, value, key)
    converted = _converted(kind, value)
    if converted is MISMATCH:
        raise ValueError(f"{key} must be {_name(kind)}, got {value!r}")
    return converted


MISMATCH = object()


def _converted(kind: Any, value: Any) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin in (Union, UnionType):
        results = (_converted(argument, value) for argument in arguments)
        return next((result for result in results if result is not MISMATCH), MISMATCH)
    if origin is Literal:
        return value if value in arguments else MISMATCH
    if origin in (list, tuple):
        return _sequence(origin, arguments, value)
    if kind is float and not isinstance(value, bool):
        try:  # YAML takes 3e-3 for text
            return float(value)
        except (TypeError, ValueError):
            return MISMATCH
    if kind is int and isinstance(value, bool):
        return MISMATCH
    return value if isinstance(value, origin or kind) else MISMATCH


def _sequence(origin: type, arguments: tuple[Any, ...], value: Any) -> Any:
    if not isinstance(value, list | tuple):
        return MISMATCH
    fixed = origin is tuple and arguments[-1] is not Ellipsis
    if fixed and len(value) != len(arguments):
        return MISMATCH
    kinds = arguments if fixed else arguments[:1] * len(value)
    items = [_converted(kind, item) for kind, item in zip(kinds, value, strict=True)]
    return MISMATCH if MISMATCH in items else origin(items)


def _name(kind: Any) -> str:
    """How a message calls a type."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return " or ".join(map(_name, arguments))
    if origin is Literal:
        return "one of " + ", ".join(map(str, arguments))
    if dataclasses.is_dataclass(kind):
        return "a section with keys"
    if kind is NoneType:
        return "null"
    return str(kind) if origin else kind.__name__
