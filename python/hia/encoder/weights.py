"""ResNet-50 weights in the layouts people have them in."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

# names that are counters or belong to a classifier: left out, in every layout
_IGNORED = re.compile(r"(.*\.)?num_batches_tracked|(fc|classifier)\..*")
_HUGGING_FACE = re.compile(
    r"encoder\.stages\.(?P<stage>\d+)\.layers\.(?P<block>\d+)\."
    r"(?:layer\.(?P<conv>\d+)|(?P<shortcut>shortcut))\.(?P<kind>convolution|normalization)\.(?P<leaf>\w+)"
)
_HUGGING_FACE_STEM = re.compile(r"embedder\.embedder\.(?P<kind>convolution|normalization)\.(?P<leaf>\w+)")
_RELEASED_PREFIX = re.compile(r".*spm\.stem\.")


def load_resnet50(encoder: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Load a ResNet-50's weights and running statistics into a ``resnet50`` encoder, strictly.

    The layout is told by the names: torchvision's and timm's (``layer1.0.conv1.weight``), Hugging Face's
    ``ResNetModel`` (``encoder.stages.0.layers.0.layer.0.convolution.weight``, with or without ``resnet.``), and that
    of HiA's released code (``spm.stem.layer1.0.batch_norm1.weight``). Ignored everywhere: ``fc.*``,
    ``classifier.*`` and ``*.num_batches_tracked``. The network must have its stride on the 3 x 3 convolutions
    (version 1.5; not Hugging Face's ``downsample_in_bottleneck``), which names and shapes don't tell. An encoder with
    ``encoder_bias`` takes weights without any biases: they are zero then.

    Args:
        encoder: of :func:`hia.encoder.encoder.build_encoder`.
        state_dict: names to tensors; may be of any dtype and device.

    Raises:
        ValueError: no layout this function knows, or missing, unexpected or wrong-shaped tensors, all listed.
    """
    own = {name: tensor for name, tensor in encoder.state_dict().items() if not _IGNORED.fullmatch(name)}
    if "layer1.0.conv1.weight" not in own:
        raise ValueError(f"hia.load_resnet50: encoder must be a 'resnet50', got {type(encoder).__name__}")
    renamed = _renamed(state_dict)
    biases = {name for name in own if re.fullmatch(r"layer\d\.\d\.(conv\d|downsample\.0)\.bias", name)}
    if not biases & set(renamed):
        renamed |= {name: torch.zeros_like(own[name]) for name in biases}
    problems = [f"missing {name}" for name in sorted(set(own) - set(renamed))]
    problems += [f"unexpected {name}" for name in sorted(set(renamed) - set(own))]
    for name in sorted(set(own) & set(renamed)):
        if own[name].shape != renamed[name].shape:
            problems.append(f"{name} of shape {list(renamed[name].shape)} instead of {list(own[name].shape)}")
    if problems:
        raise ValueError(f"hia.load_resnet50: state_dict must fit the encoder, got {'; '.join(problems)}")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(renamed[name])


def _renamed(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename tensors to torchvision's names; those of no layout keep theirs."""
    tensors = {name.removeprefix("resnet."): tensor for name, tensor in state_dict.items()}
    names = {name: _RELEASED_PREFIX.sub("", name) for name in tensors}
    if any(_RELEASED_PREFIX.match(name) for name in tensors):  # a whole model's: the rest of it is not ours
        names = {name: short for name, short in names.items() if short != name}
    if not any(short in ("conv1.weight", "embedder.embedder.convolution.weight") for short in names.values()):
        raise ValueError(
            "hia.load_resnet50: state_dict must have torchvision's, timm's, Hugging Face's or the released code's "
            f"names, got {', '.join(sorted(state_dict)[:3]) or 'no tensor'} ..."
        )
    renamed = {}
    for name, short in names.items():
        if not _IGNORED.fullmatch(short):
            renamed[_torchvision_name(short)] = tensors[name]
    return renamed


def _torchvision_name(name: str) -> str:
    if match := _HUGGING_FACE_STEM.fullmatch(name):
        return f"{'conv1' if match['kind'] == 'convolution' else 'bn1'}.{match['leaf']}"
    if match := _HUGGING_FACE.fullmatch(name):
        convolution = match["kind"] == "convolution"
        block = f"layer{int(match['stage']) + 1}.{match['block']}"
        if match["shortcut"]:
            return f"{block}.downsample.{0 if convolution else 1}.{match['leaf']}"
        return f"{block}.{'conv' if convolution else 'bn'}{int(match['conv']) + 1}.{match['leaf']}"
    return name.replace("batch_norm", "bn").replace("i_downsample", "downsample")
