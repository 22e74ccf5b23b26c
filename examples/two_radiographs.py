"""Ask two questions about two studies of one patient; the images are encoded once.

python two_radiographs.py                                               # a tiny random host on synthetic studies
python two_radiographs.py --host llava-hf/llava-1.5-13b-hf a.dcm b.png  # your own; without --adapter it is untrained
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

import hia
from hia.phantom import PhantomDataset
from hia.phantom.host import build_tiny_host, tiny_processor

QUESTIONS = ("What changed between the two studies?", "Where is the lesion?")


def load_host(name: str | None) -> tuple[Any, Any]:
    """Return a LLaVA and its processor: the tiny one without a name."""
    if name is None:
        return build_tiny_host().eval(), tiny_processor()
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    host = LlavaForConditionalGeneration.from_pretrained(name, dtype="auto")
    return host.eval(), AutoProcessor.from_pretrained(name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="*", help="files, DICOM included; synthetic studies without")
    parser.add_argument("--host", help="a LLaVA with a LLaMA inside: a folder or a name on the Hugging Face Hub")
    parser.add_argument("--adapter", help="a folder that save_pretrained has written")
    options = parser.parse_args()

    images = options.images or PhantomDataset(4, seed=0)[3].images
    host, host_processor = load_host(options.host)
    if options.adapter:
        model = hia.HiAModel.from_pretrained(host, options.adapter)
    else:
        model = hia.get_hia_model(host, hia.HiAConfig.paper(host))
    processor = hia.HiAProcessor(host_processor)
    model.eval().fold_weights()  # at once, not from the second question on: the same results, fewer FLOPs

    features = None
    for question in QUESTIONS:
        prompt = f"USER: {'<image> ' * len(images)}\n{question} ASSISTANT:"
        inputs = processor(prompt, list(images)).to(host.device)
        if features is None:
            with torch.no_grad():
                features = model.encode_images(inputs.high_res_pixels, inputs.windows)
            model.explain_plan([tuple(pixels.shape[:2]) for pixels in inputs.high_res_pixels])  # prints the choice
        del inputs["high_res_pixels"], inputs["windows"]  # their features are given instead
        answer = model.generate(**inputs, features=features, max_new_tokens=16, do_sample=False)
        text = processor.batch_decode(answer[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)[0]
        print(f"\n{question}\n  {text}")


if __name__ == "__main__":
    main()
