"""A regulariser in a bare PyTorch loop, from a dense network to a smaller ONNX file, on scikit-learn's digits.

python examples/own_loop.py [--method halo] [--keep 0.3] [--epochs 3] [--out digits.onnx]; the last line is JSON.
"""

import argparse
import json
from itertools import pairwise
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import compress

# For 66 steps, where the papers' defaults are for tens of thousands: a stronger pull, other places more often.
OPTIONS = {"halo": {"xi": 1e-2}, **{name: {"interval": 5} for name in ("ggr", "rigl", "set")}}


def network():  # images (N, 1, 8, 8) -> logits (N, 10); any network of your own will do
    blocks = [(nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU()) for a, b in pairwise((1, 16, 16, 32, 32))]
    return nn.Sequential(*(layer for block in blocks for layer in block), nn.Flatten(), nn.Linear(2048, 10))


def digits():  # images, labels
    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1, torch.tensor(labels)


def train(model, x, y, epochs, regularizers=()):
    own = [{"params": list(r.parameters()), "weight_decay": 1e-4} for r in regularizers]  # HALO's lambda needs decay
    optimizer = torch.optim.SGD([{"params": model.parameters()}, *own], lr=0.05, momentum=0.9)
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(64):
            loss = F.cross_entropy(model.train()(x[batch]), y[batch]) + sum(r.penalty() for r in regularizers)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            for r in regularizers:
                r.after_step()


def measure(model, x, y):  # parameters, top-1 in percent
    with torch.no_grad():
        top1 = 100 * float((model.eval()(x).argmax(1) == y).float().mean())
    return {"params": sum(p.numel() for p in model.parameters()), "top1": round(top1, 2)}


def made(method):
    return compress.regularize.REGULARIZERS[method](**OPTIONS.get(method, {}))


def options():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="halo", choices=list(compress.regularize.REGULARIZERS))
    parser.add_argument("--keep", type=float, default=0.3, help="share of the parameters that may remain")
    parser.add_argument("--epochs", type=int, default=3, help="with the regulariser, and again after the cut")
    parser.add_argument("--out", type=Path, default=Path("digits.onnx"))
    return parser.parse_args()


if __name__ == "__main__":
    given, (x, y), model = options(), digits(), network()
    regularizer = made(given.method)
    regularizer.attach(model, compress.trace(model, x[:8]))  # which channels leave together, proved by trial cuts
    train(model, x[:1400], y[:1400], given.epochs, [regularizer])
    before, scores = measure(model, x[1400:], y[1400:]), regularizer.scores()
    regularizer.detach()
    compress.shrink(model, x[:8], keep=given.keep, score=scores, round_to=4)  # in place; then a new optimiser
    train(model, x[:1400], y[:1400], given.epochs)
    compress.to_onnx(model, x[:8], given.out)  # proved equal, or an error and no file
    after = measure(model, x[1400:], y[1400:]) | {"file": given.out.name, "bytes": given.out.stat().st_size}
    print(json.dumps({"method": given.method, "before": before, "after": after}))
