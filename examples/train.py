"""Train an adapter on synthetic studies, look at its health, save it, and load it again.

python train.py                            # a few steps, to see that everything works
python train.py --steps 600 --out adapter  # minutes: long enough to learn something

A host with random weights learns little; --trained-host trains the tiny one first, which takes minutes once.
"""

from __future__ import annotations

import argparse
import tempfile

import torch

import hia
from hia.phantom import PhantomDataset
from hia.phantom.batches import PhantomBatches
from hia.phantom.host import build_tiny_host, hia_processor, tiny_host


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--batch", type=int, default=8, help="questions a step")
    parser.add_argument("--samples", type=int, default=16, help="questions in all")
    parser.add_argument("--trained-host", action="store_true")
    parser.add_argument("--out", help="the adapter's folder; a temporary one without")
    options = parser.parse_args()

    torch.manual_seed(0)
    host = tiny_host() if options.trained_host else build_tiny_host()
    processor = hia_processor(host)
    batches = PhantomBatches(PhantomDataset(options.samples), processor)

    model = hia.get_hia_model(host, hia.HiAConfig.paper(host))
    model.calibrate_encoder(batches.pixels, batches.windows)  # a new encoder's norms fit no data yet
    model.train().print_trainable_parameters()
    optimizer = torch.optim.AdamW(model.parameter_groups(lr=2e-3))  # the encoder at a tenth of the rate
    for step, numbers in zip(range(options.steps), batches.shuffled(options.batch, seed=0), strict=False):
        loss = model(**batches.batch(numbers)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0 or step == options.steps - 1:
            print(f"step {step}: loss {loss.item():.3f}")

    for problem in model.adapter_health(batches.batch(range(options.batch))).problems():
        print("!", problem)  # in the first steps the adapter has not yet told the visual tokens apart

    with tempfile.TemporaryDirectory() as temporary:
        folder = options.out or temporary
        model.save_pretrained(folder)  # the adapter alone, as safetensors
        model.unload()  # the host as it was
        again = hia.HiAModel.from_pretrained(host, folder).eval()
        few = range(min(8, len(batches)))
        print("answered word for word after loading:", batches.score(again, samples=few))


if __name__ == "__main__":
    main()
