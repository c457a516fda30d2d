"""The same as own_loop.py in a loop of Hugging Face accelerate, on one process or several.

accelerate launch examples/with_accelerate.py; torchrun --nproc-per-node 2 examples/with_accelerate.py

Each process reckons the penalty from its own images and the same weights, and the gradients of loss and penalty are
averaged together. The first process prints and writes; the last line is JSON.
"""

import json

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from own_loop import digits, made, measure, network, options
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import compress


def train(device, model, data, epochs, regularizers=()):
    """Optimiser, wrapper and loader belong to one phase: after a cut the parameters are others."""
    own = [{"params": list(r.parameters()), "weight_decay": 1e-4} for r in regularizers]
    optimizer = torch.optim.SGD([{"params": model.parameters()}, *own], lr=0.05, momentum=0.9)
    loader = DataLoader(data, batch_size=64 // device.num_processes, shuffle=True, drop_last=True)
    wrapped, optimizer, loader = device.prepare(model.train(), optimizer, loader)
    for _ in range(epochs):
        for images, labels in loader:
            loss = F.cross_entropy(wrapped(images), labels)
            loss = loss + sum(r.penalty().to(loss.device) for r in regularizers)
            optimizer.zero_grad()
            device.backward(loss)
            optimizer.step()
            for r in regularizers:
                r.after_step()
    device.free_memory()


if __name__ == "__main__":
    given, device = options(), Accelerator(cpu=not torch.cuda.is_available())
    torch.manual_seed(0)  # the same network in every process
    x, y = (tensor.to(device.device) for tensor in digits())
    model, data = network().to(device.device), TensorDataset(x[:1400].cpu(), y[:1400].cpu())
    regularizer = made(given.method)
    regularizer.attach(model, compress.trace(model, x[:8]))  # to the bare network, before it is wrapped
    train(device, model, data, given.epochs, [regularizer])
    before, scores = measure(model, x[1400:], y[1400:]), [regularizer.scores()]
    regularizer.detach()
    broadcast_object_list(scores)  # every process cuts by the first one's, whatever a method of your own does
    compress.shrink(model, x[:8], keep=given.keep, score=scores[0], round_to=4)
    train(device, model, data, given.epochs)
    if device.is_main_process:
        compress.to_onnx(model.cpu(), x[:8].cpu(), given.out)
        after = measure(model, x[1400:].cpu(), y[1400:].cpu())
        after |= {"file": given.out.name, "bytes": given.out.stat().st_size}
        print(json.dumps({"method": given.method, "before": before, "after": after}))
    device.end_training()
