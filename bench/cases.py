"""Named real shapes, shared by the benchmarks and the tests.

``13b-896-2img-b4`` is LLaMA-13B's adapter on four samples of two 896-pixel images; ``released`` in a name means
the maths of the authors' released code (8 heads of 640 or 512), ``lite`` the narrow adapter on the 13B host,
``small`` the host that the CPU runs in seconds, ``tiny`` a shape for smoke tests. ``px896`` is the encoder alone,
whose shapes no host changes. Ragged mixes have the sizes of real radiographs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace

from hia.config import HiAConfig

Size = tuple[int, int]  # height, width, pixels

OPS = (
    "stem", "conv_norm_act", "condition_queries", "cross_attention", "norm_linear", "inject_rows", "row_softmax",
    "latent_attention", "linear", "head_linear",
)  # fmt: skip
COMPOSITES = (
    "encode", "extract", "inject", "adapter_layer", "second_question", "adapter_train_step", "encode_train_step",
)  # fmt: skip
ENCODER_OPS = ("stem", "conv_norm_act", "encode", "encode_train_step")
TRAIN_STEPS = ("adapter_train_step", "encode_train_step")
ABSORBED_OPS = ("row_softmax", "latent_attention", "head_linear")  # of the attention with absorbed projections
WITH_ENCODER = ("adapter_layer", "adapter_train_step")

# LLaMA-2: hidden size, decoder layers
HOSTS: dict[str, tuple[int, int]] = {"13b": (5120, 40), "7b": (4096, 32), "small": (768, 6), "tiny": (64, 6)}
RESOLUTIONS = (448, 896, 1792, 4096)
VISUAL_TOKENS = 576  # an image's tokens in the host: CLIP ViT-L/14 at 336 pixels
TEXT_TOKENS = 60
NUM_QUERIES = 256
STRIDE = 32

# chest, pelvis, knee, hand and foot radiographs as published; two are DICOM, of 15 and 10 bits
CHEST, PELVIS, KNEE, HAND = (2000, 2000), (2084, 2675), (1913, 1067), (2082, 1466)
FOOT, ANKLE, DICOM_RG1, DICOM_RG3 = (1322, 2638), (1087, 1037), (1955, 1841), (1760, 1760)

# the encoder's steps that differ in shape: stage, kernel, stride, channels in and out in widths, residual
CONVOLUTIONS: dict[str, tuple[int, int, int, int, int, bool]] = {
    "stage1-3x3": (1, 3, 1, 1, 1, False),
    "stage1-expand": (1, 1, 1, 1, 4, True),
    "stage2-down": (1, 3, 2, 2, 2, False),
    "stage3-reduce": (3, 1, 1, 16, 4, False),
    "stage3-3x3": (3, 3, 1, 4, 4, False),
    "stage4-expand": (4, 1, 1, 8, 32, True),
}
# where an op occurs in one layer
ROLES: dict[str, tuple[str, ...]] = {
    "conv_norm_act": tuple(CONVOLUTIONS),
    "cross_attention": ("extract", "inject"),
    "norm_linear": ("queries", "features", "visual", "extracted"),
    "linear": ("features", "output"),
    "head_linear": ("queries", "results"),  # through the keys' projection, and through the values'
    "latent_attention": ("folded", "deep"),  # the latent: projected and normed features, or the features themselves
}
# what a GPU run without names measures first, and the only shapes it compiles for
FIRST = ("13b-896-2img", "13b-released-896-2img", "px896")
# those that a CPU has time for
CPU_ROLES: dict[str, tuple[str, ...]] = {
    "conv_norm_act": ("stage1-3x3", "stage2-down", "stage4-expand"),
    "norm_linear": ("features", "visual"),
    "linear": ("features",),
}


def halved(size: Size, times: int) -> Size:
    """A side halved several times, rounding up."""
    return -(-size[0] // 2**times), -(-size[1] // 2**times)


@dataclass(frozen=True)
class ImageCase:
    """Images for the encoder alone.

    Attributes:
        name: of the case.
        sizes: (height, width) of each image, pixels.
        width: channels of the encoder's stem; it ends in 32 times that.
        bits: of a pixel, 8 or 16.
        sets: "cpu", "gpu" (what a run without ``--case`` measures there), "quick", and "dispatch": small enough
            to show what a call costs before it computes; "batch" is the GPU's for "encode" alone: a training
            step would keep the activations of all these pixels.
    """

    name: str
    sizes: tuple[Size, ...]
    width: int = 64
    bits: int = 8
    sets: tuple[str, ...] = ()

    @property
    def channels(self) -> int:
        """C of the features."""
        return 32 * self.width


@dataclass(frozen=True)
class LayerCase:
    """A batch of prompts with images, and the adapter's layer that they meet.

    Attributes:
        name: of the case.
        host: a key of :data:`HOSTS`.
        preset: of :class:`hia.HiAConfig`: "paper", "released" or "lite".
        samples: for each sample of the batch its images' (height, width), pixels.
        num_queries: M.
        visual_tokens: rows an image has in the host's sequence.
        text_tokens: rows beside the images'.
        width: channels of the encoder's stem.
        dim: the adapter's width where it isn't the preset's.
        sets: as in :class:`ImageCase`; "absorbed" is the GPU's for :data:`ABSORBED_OPS`.
    """

    name: str
    host: str
    preset: str
    samples: tuple[tuple[Size, ...], ...]
    num_queries: int = NUM_QUERIES
    visual_tokens: int = VISUAL_TOKENS
    text_tokens: int = TEXT_TOKENS
    width: int = 64
    dim: int | None = None
    sets: tuple[str, ...] = ()

    @cached_property
    def config(self) -> HiAConfig:
        """The adapter's, with one layer."""
        hidden_size, layers = HOSTS[self.host]
        host = SimpleNamespace(hidden_size=hidden_size, num_hidden_layers=layers, model_type="llama")
        changes = {} if self.dim is None else {"dim": self.dim}
        if self.preset == "released" and hidden_size % 128:
            changes["num_heads"] = 4  # eight heads would be narrower than the op takes
        build = getattr(HiAConfig, self.preset)
        return build(host, layers="half", num_queries=self.num_queries, encoder_width=self.width, **changes)

    @property
    def hidden_size(self) -> int:
        """D1."""
        return HOSTS[self.host][0]

    @property
    def sizes(self) -> tuple[Size, ...]:
        """Of all images, sample by sample."""
        return tuple(size for images in self.samples for size in images)

    @property
    def channels(self) -> int:
        """C of the features."""
        return self.config.encoder_channels

    @property
    def batch(self) -> int:
        """B, samples."""
        return len(self.samples)

    @property
    def images(self) -> int:
        """n."""
        return len(self.sizes)

    @property
    def seq_len(self) -> int:
        """S, tokens of the longest prompt; the others are padded to it."""
        return max(len(images) for images in self.samples) * self.visual_tokens + self.text_tokens

    @property
    def feature_lengths(self) -> list[int]:
        """Features of each image: N."""
        return [rows * columns for rows, columns in (halved(size, 5) for size in self.sizes)]

    @property
    def is_even(self) -> bool:
        """Whether all images have one size."""
        return len(set(self.sizes)) == 1

    def attention_lengths(self, role: str) -> tuple[list[int], list[int]]:
        """Query and key lengths of each image for ``role`` "extract" or "inject"."""
        if role == "extract":
            return [self.num_queries] * self.images, self.feature_lengths
        return [self.visual_tokens] * self.images, [self.num_queries] * self.images


Case = ImageCase | LayerCase


@dataclass(frozen=True)
class Workload:
    """What is measured: an op or composite at a case.

    Attributes:
        op: of :data:`OPS` or :data:`COMPOSITES`.
        case: its shapes.
        role: where in the layer, for an op that occurs in several shapes; else "".
    """

    op: str
    case: Case
    role: str = ""

    @property
    def level(self) -> str:
        """ "op" or "composite"."""
        return "op" if self.op in OPS else "composite"

    @property
    def name(self) -> str:
        """Of the case, and the role behind a colon."""
        return f"{self.case.name}:{self.role}" if self.role else self.case.name


def _image_cases() -> list[ImageCase]:
    squares = [ImageCase(f"px{side}", ((side, side),), sets=("gpu",)) for side in RESOLUTIONS]
    return [
        *squares,
        ImageCase("px2048", ((2048, 2048),)),
        ImageCase("px2048-16bit", ((2048, 2048),), bits=16),
        ImageCase("px2048-b8", ((2048, 2048),) * 8, sets=("batch",)),
        ImageCase("px4096-b8", ((4096, 4096),) * 8, sets=("batch",)),
        ImageCase("px224", ((224, 224),), sets=("cpu",)),
        ImageCase("px-chest", (CHEST,)),
        ImageCase("px-ragged", (CHEST, PELVIS, KNEE, HAND), sets=("gpu",)),
        ImageCase("px-dicom", (DICOM_RG1, DICOM_RG3)),
        ImageCase("px-tiny", ((70, 101),), width=8, sets=("quick", "dispatch")),
    ]


def _square(host: str, side: int, images: int, batch: int, preset: str = "paper", *sets: str) -> LayerCase:
    kind = {"paper": host, "released": f"{host}-released", "lite": "lite"}[preset]
    name = f"{kind}-{side}" + ("-2img" if images == 2 else "") + (f"-b{batch}" if batch > 1 else "")
    return LayerCase(name, host, preset, (((side, side),) * images,) * batch, sets=sets)


def _layer_cases() -> list[LayerCase]:
    gpu = {("13b", 896, 2, 1), ("13b", 448, 2, 1), ("13b", 1792, 2, 1), ("13b", 4096, 1, 1), ("13b", 896, 2, 4),
           ("7b", 896, 2, 1)}  # fmt: skip
    shapes = [(host, side, images, batch) for host in ("13b", "7b") for side in RESOLUTIONS
              for images in (1, 2) for batch in (1, 4)]  # fmt: skip
    cases = [_square(*shape, "paper", *(("gpu",) if shape in gpu else ())) for shape in shapes]
    for side in RESOLUTIONS:
        for images in (1, 2):
            chosen = ("gpu",) if (side, images) == (896, 2) else ()
            alone = ("absorbed",) if images == 1 and side in (896, 4096) else ()
            cases.append(_square("13b", side, images, 1, "released", *chosen, *alone))
            cases.append(_square("7b", side, images, 1, "released", *chosen))
            cases.append(_square("13b", side, images, 1, "lite", *chosen, *alone))
    # 12544 features, for the attention alone
    cases += [_square("13b", 3584, 1, 1), *(_square(host, 3584, 1, 1, "released") for host in ("13b", "7b"))]
    ragged = ((CHEST, CHEST), (KNEE,), (HAND, PELVIS), (ANKLE,))
    cases += [
        LayerCase("13b-ragged-b4", "13b", "paper", ragged, sets=("gpu",)),
        LayerCase("7b-ragged-b4", "7b", "paper", ragged),
        LayerCase("13b-ragged-2img", "13b", "paper", ((FOOT, HAND),)),
        LayerCase("lite-ragged-b4", "13b", "lite", ragged),
    ]
    return cases + _small_cases()


def _small_cases() -> list[LayerCase]:
    tiny = {"host": "tiny", "num_queries": 8, "visual_tokens": 4, "text_tokens": 6, "width": 4}
    pair = (((448, 448), (448, 448)),)
    return [
        LayerCase("small-224", "small", "paper", (((224, 224),),), sets=("cpu",)),
        LayerCase("small-released-224", "small", "released", (((224, 224),),), sets=("cpu",)),
        LayerCase("small-448-2img", "small", "paper", pair, sets=("cpu",)),
        LayerCase("small-released-448-2img", "small", "released", pair, sets=("cpu",)),
        LayerCase("small-896-2img", "small", "paper", (((896, 896), (896, 896)),)),
        LayerCase("small-ragged-b2", "small", "paper", (((478, 366), (521, 668)), ((478, 266),)), sets=("cpu",)),
        LayerCase("tiny", preset="paper", samples=(((64, 64), (64, 64)),), sets=("quick", "dispatch"), **tiny),
        LayerCase("tiny-ragged", preset="paper", samples=(((64, 100), (70, 64)), ((33, 64),)), sets=("quick",), **tiny),
        LayerCase("tiny-released", preset="released", samples=(((64, 64), (64, 64)),), sets=("quick",), **tiny),
    ]


CASES: dict[str, Case] = {case.name: case for case in (*_image_cases(), *_layer_cases())}


def workloads(op: str) -> list[Workload]:
    """Every case of an op or composite, each role a workload of its own.

    Raises:
        ValueError: no such op or composite.
    """
    if op not in OPS + COMPOSITES:
        raise ValueError(f"workloads: op must be among {', '.join(OPS + COMPOSITES)}, got {op!r}")
    kind = ImageCase if op in ENCODER_OPS else LayerCase
    found = [case for case in CASES.values() if isinstance(case, kind)]
    if op in ("stem", "conv_norm_act"):  # the encoder runs one image at a time
        found = [case for case in found if len(case.sizes) == 1]
    if op in ABSORBED_OPS:  # with the many narrow heads of the paper's preset absorbing costs more than it saves
        found = [case for case in found if case.preset != "paper" or case.host == "tiny"]
    return [Workload(op, case, role) for case in found for role in ROLES.get(op, ("",))]


def in_set(workload: Workload, name: str) -> bool:
    """Whether a run without ``--case`` has it. To the other ops, ragged cases and the released preset are other
    numbers of rows, nothing more: those stay with the attention and the composites."""
    case = workload.case
    if workload.op in ABSORBED_OPS and name == "gpu":
        return "absorbed" in case.sets
    if workload.op == "encode" and name == "gpu" and "batch" in case.sets:
        return True
    if name not in case.sets:
        return False
    if name == "cpu":
        if workload.role not in CPU_ROLES.get(workload.op, (workload.role,)):
            return False
        if isinstance(case, LayerCase) and (workload.op in WITH_ENCODER) != ("224" in case.name):
            return False  # the encoder takes seconds at 448 pixels, and minutes to check and time
        if workload.op == "adapter_train_step" and case.preset != "released":
            return False
    main = isinstance(case, ImageCase) or (case.is_even and case.preset != "released")
    return main or workload.op in ("cross_attention", *ABSORBED_OPS, *COMPOSITES)
