"""The adapter's config and its three presets."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import Any

NAMED_LAYERS = {"half": 1, "thirds": 2, "quarters": 3}  # number of injections (paper, Table 4)
ENCODERS = ("resnet50", "strided")
NORMS = ("pre", "pre_post")
GATES = ("zero_init", "tanh", "none")
POSITIONS = ("sincos", "none")
INITS = ("lecun_normal", "pytorch")
SWITCHES = ("encoder_bias", "shared_projection", "query_residual", "instruction_aware")
# What configs written before these fields existed stand for: the values of that time, not today's defaults.
BEFORE_FIELD_EXISTED = {"position": "none", "init": "pytorch", "query_std": 0.02, "query_residual": False}
# Fields of older configs that are choices of a run now, with the values they had where nobody chose.
RUN_OPTIONS = {"plan": "auto", "high_resolution": True, "batch_norm": "running"}
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def _choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices:
        raise ValueError(f"HiAConfig: {name} must be {' or '.join(map(repr, choices))}, got {value!r}")


def _positive(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"HiAConfig: {name} must be a positive int, got {value!r}")


@dataclass(frozen=True)
class HiAConfig:
    """The shape of an adapter. Presets make one: ``HiAConfig.paper(host)``, ``.released(host)``, ``.lite(host)``.

    It says nothing of a run: plan, resolution and batch-norm's statistics are arguments of :func:`hia.get_hia_model`.

    Attributes:
        hidden_size: D1, the host LLM's hidden size.
        num_hidden_layers: L, the host LLM's layers.
        host_type: the host's ``model_type``; an adapter is not loaded onto another.
        dim: D, the adapter's width.
        num_heads: heads of both cross-attentions; must divide ``dim`` into a multiple of 16, at most 640.
        num_queries: M, learnable queries (paper, Table 4: 256).
        layers: "half", "thirds", "quarters" (paper, Table 4), or 0-based decoder layer indices; the injection
            goes into the *output* of these layers.
        encoder: "resnet50" (stride 32) or "strided" (a stem and four 3 x 3 convolutions).
        encoder_width: channels of the stem; "resnet50" ends in 32 times that, "strided" in 16 times.
        encoder_stride: 32, or 16 with "strided": pixels per feature along an axis.
        encoder_bias: "resnet50" with biases on the convolutions behind the stem, as the released code has.
        shared_projection: the released code's extra Linear(C -> D1), shared by the layers.
        norms: "pre" (queries, features, visual tokens, extracted tokens) or "pre_post" (and LN after the sum).
        gate: "zero_init" (the injection's output projection starts at zero), "tanh" (a learnt scalar that
            starts at 0), or "none" (attaching disturbs the host, as the released code does).
        position: "sincos" adds two-dimensional sines and cosines to the features, so that *where* can be learnt;
            "none" leaves them a bag of tokens, as the paper and the released code do (:mod:`hia.encoder.position`).
        init: how the projections of both cross-attentions start: "lecun_normal" (unit variance out of unit variance,
            biases zero, the condition's weight a tenth of that), or "pytorch" (``nn.Linear``'s own start).
        query_std: standard deviation the queries start with.
        query_residual: add the conditioned queries to what they extract, as the decoders of DETR and Q-Former do; the
            paper's equation has no such term. It keeps the M extracted tokens apart (docs/learning.md).
        instruction_aware: condition the queries on the instruction (paper, Table 2).
        image_mean: per-channel mean of the windowed image (0 to 1) for the encoder.
        image_std: likewise, standard deviation.
    """

    hidden_size: int
    num_hidden_layers: int
    host_type: str = "llama"
    dim: int = 1024
    num_heads: int = 8
    num_queries: int = 256
    layers: str | tuple[int, ...] = "thirds"
    encoder: str = "resnet50"
    encoder_width: int = 64
    encoder_stride: int = 32
    encoder_bias: bool = False
    shared_projection: bool = False
    norms: str = "pre"
    gate: str = "zero_init"
    position: str = "sincos"
    init: str = "lecun_normal"
    query_std: float = 1.0
    query_residual: bool = False
    instruction_aware: bool = True
    image_mean: tuple[float, float, float] = IMAGENET_MEAN
    image_std: tuple[float, float, float] = IMAGENET_STD

    def __new__(cls, *_values: Any, **fields: Any) -> HiAConfig:
        """Refuse what older versions took for fields.

        Raises:
            TypeError: a choice of a run, not of the weights.
        """
        for name in RUN_OPTIONS:
            if name in fields:
                raise TypeError(
                    f"HiAConfig: fields must say what the weights are, got {name}={fields[name]!r}, a choice of a run; "
                    f"use get_hia_model(base, config, {name}={fields[name]!r}) or model.set_{name}({fields[name]!r})"
                )
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for name in ("hidden_size", "num_hidden_layers", "dim", "num_heads", "num_queries", "encoder_width"):
            _positive(name, getattr(self, name))
        _choice("encoder", self.encoder, ENCODERS)
        _choice("encoder_stride", self.encoder_stride, (16, 32) if self.encoder == "strided" else (32,))
        _choice("norms", self.norms, NORMS)
        _choice("gate", self.gate, GATES)
        _choice("position", self.position, POSITIONS)
        _choice("init", self.init, INITS)
        std = self.query_std
        if isinstance(std, bool) or not isinstance(std, (int, float)) or not 0 <= std < math.inf:
            raise ValueError(f"HiAConfig: query_std must be a finite number that is not negative, got {std!r}")
        for name in SWITCHES:
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"HiAConfig: {name} must be True or False, got {getattr(self, name)!r}")
        if self.encoder_bias and self.encoder != "resnet50":
            raise ValueError(f"HiAConfig: encoder_bias must be False with encoder {self.encoder!r}, got True")
        for name in ("image_mean", "image_std"):
            values = tuple(float(value) for value in getattr(self, name))
            if len(values) != 3 or (name == "image_std" and min(values) <= 0):
                raise ValueError(f"HiAConfig: {name} must hold three values (std above 0), got {values}")
            object.__setattr__(self, name, values)
        if self.dim % self.num_heads:
            raise ValueError(f"HiAConfig: num_heads must divide dim {self.dim}, got {self.num_heads}")
        head_dim = self.dim // self.num_heads
        if head_dim % 16 or head_dim > 640:
            raise ValueError(
                f"HiAConfig: dim / num_heads must be a multiple of 16 of at most 640, got "
                f"{self.dim} / {self.num_heads} = {head_dim}"
            )
        if not isinstance(self.layers, str):
            object.__setattr__(self, "layers", tuple(self.layers))
        self._check_layers()

    def _check_layers(self) -> None:
        if isinstance(self.layers, str):
            _choice("layers", self.layers, tuple(NAMED_LAYERS))
        elif not self.layers:
            raise ValueError("HiAConfig: layers must name at least one decoder layer, got none")
        wrong = [index for index in self.layer_indices if not isinstance(index, int)]
        beyond = [index for index in self.layer_indices if index not in range(self.num_hidden_layers)]
        if wrong or beyond:
            raise ValueError(
                f"HiAConfig: layers must be in [0, {self.num_hidden_layers}), got {wrong or beyond}; "
                f"the host has {self.num_hidden_layers} decoder layers"
            )
        if len(set(self.layer_indices)) != len(self.layer_indices):
            raise ValueError(f"HiAConfig: layers must not repeat, got {list(self.layer_indices)}")

    @property
    def layer_indices(self) -> tuple[int, ...]:
        """List the decoder layers, 0-based: floor(j * L / (n + 1)), j = 1..n, for a named choice (released code)."""
        if not isinstance(self.layers, str):
            return self.layers
        count = NAMED_LAYERS[self.layers]
        return tuple(j * self.num_hidden_layers // (count + 1) for j in range(1, count + 1))

    @property
    def head_dim(self) -> int:
        """Return the channels of a head."""
        return self.dim // self.num_heads

    @property
    def encoder_channels(self) -> int:
        """Return C, the channels of the encoder's features."""
        return (32 if self.encoder == "resnet50" else 16) * self.encoder_width

    @classmethod
    def paper(cls, host: Any, **changes: Any) -> HiAConfig:
        """Describe the paper's adapter: D = D1, head_dim 128 (where it divides D1), M = 256, layers L/3 and 2L/3.

        Args:
            host: the model, or its config.
            changes: fields that should differ.
        """
        facts = host_facts(host)
        width = changes.get("dim", facts["hidden_size"])
        return cls(**{**facts, "dim": width, "num_heads": _heads_of(width, 128), **changes})

    @classmethod
    def released(cls, host: Any, **changes: Any) -> HiAConfig:
        """Describe the adapter of the authors' released code: D = D1, 8 heads, LN after the sum, no gate."""
        facts = host_facts(host)
        preset = {
            "dim": facts["hidden_size"],
            "num_heads": 8,
            "norms": "pre_post",
            "gate": "none",
            "shared_projection": True,
            "encoder_bias": changes.get("encoder", "resnet50") == "resnet50",
            "position": "none",
            "init": "pytorch",
            "query_std": 1.0,
        }
        return cls(**{**facts, **preset, **changes})

    @classmethod
    def lite(cls, host: Any, **changes: Any) -> HiAConfig:
        """Describe a narrow adapter that learns fast: D = 1024, head_dim 128, queries added to what they extract."""
        width = changes.get("dim", 1024)
        preset = {"dim": width, "num_heads": _heads_of(width, 128), "query_residual": True}
        return cls(**{**host_facts(host), **preset, **changes})

    def replace(self, **changes: Any) -> HiAConfig:
        """Copy with other values."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, ready for JSON."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> HiAConfig:
        """Build a config from :meth:`to_dict`'s fields; one that older files lack takes the value it had then.

        Raises:
            ValueError: unknown or missing fields. TypeError: an older file's choice of a run, which
                :meth:`hia.HiAModel.from_pretrained` would follow.
        """
        values = {name: value for name, value in values.items() if RUN_OPTIONS.get(name, ...) != value}
        fields = {field.name: field for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - set(fields) - set(RUN_OPTIONS))
        missing = [name for name in ("hidden_size", "num_hidden_layers") if name not in values]
        if unknown or missing:
            raise ValueError(
                f"HiAConfig: fields must be among {sorted(fields)}, got unknown {unknown}, missing {missing}"
            )
        lists: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
        }
        if lists.get("encoder") == "strided":
            lists["encoder_bias"] = False  # older versions let it be said, and had none
        return cls(**{**BEFORE_FIELD_EXISTED, **lists})


def _heads_of(width: int, head_dim: int) -> int:
    """Count heads of ``head_dim``, or of the nearest smaller size that divides a narrow or odd width."""
    for size in range(min(head_dim, width) // 16 * 16, 0, -16):
        if width % size == 0:
            return width // size
    raise ValueError(f"HiAConfig: dim must be a multiple of 16, got {width}")


def host_facts(host: Any) -> dict[str, Any]:
    """Read hidden_size, num_hidden_layers and host_type off a model or its config.

    Raises:
        TypeError: no such attributes: not a transformers model or config.
    """
    config = getattr(host, "config", host)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    try:
        return {
            "hidden_size": int(text.hidden_size),
            "num_hidden_layers": int(text.num_hidden_layers),
            "host_type": str(config.model_type),
        }
    except AttributeError as error:
        raise TypeError(
            f"HiAConfig: host must be a transformers model or config with hidden_size and num_hidden_layers, "
            f"got {type(host).__name__}"
        ) from error
