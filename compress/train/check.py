"""Whether data, network and task fit together, before anything is trained."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from compress.data import Data
from compress.errors import DataError, LoadError
from compress.example import Example, arguments
from compress.task import Classification, Segmentation, Task


def check_data(task: Task, loaded: Data) -> None:
    """Our tasks want labels or masks; what a task of one's own wants only that task knows.

    Raises:
        DataError: the data set holds the other kind.
    """
    if isinstance(task, Classification) and loaded.val.has_masks:
        raise DataError(f"'{loaded.name}' holds masks, a class for each pixel; classification takes one class per "
                        "image: give --task segmentation")  # fmt: skip
    if isinstance(task, Segmentation) and not loaded.val.has_masks:
        raise DataError(f"'{loaded.name}' holds one class per image; segmentation takes a folder with SPLIT/images and "
                        "SPLIT/masks: give such a --data, or --task classification")  # fmt: skip


def check_output(model: nn.Module, example: Example, task: Task, labels: Sequence[str]) -> None:
    """See that the network gives what the task compares with the targets, and a value for each of the `labels`.

    A task of one's own only has to give a tensor.

    Raises:
        LoadError: it does not run on images of this size, gives another shape, or has fewer outputs.
    """
    given, was_training = arguments(example), model.training
    try:
        with torch.no_grad():
            output = model.eval()(*given)
    except Exception as error:
        line = (str(error).splitlines() or [""])[0]
        raise LoadError(f"the network does not run on images of shape {tuple(given[0].shape[1:])}: {line}") from error
    finally:
        model.train(was_training)
    try:
        logits = task.logits(output)
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        text = f"{type(error).__name__}: {error}"
        raise LoadError(f"the task {task.name} finds no logits in the network's output: {text}") from error
    kind = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
    if isinstance(task, Classification) and (not isinstance(logits, Tensor) or logits.dim() != 2):
        raise LoadError(f"the network gives {kind} where a classifier gives (N, classes)")
    size = tuple(given[0].shape[2:])
    if isinstance(task, Segmentation) and (not isinstance(logits, Tensor) or tuple(logits.shape[2:]) != size):
        raise LoadError(f"the network gives {kind} where segmentation of these images gives (N, classes, "
                        f"{', '.join(map(str, size))}); let it resize its output")  # fmt: skip
    if not isinstance(logits, Tensor):
        raise LoadError(f"the task {task.name} finds {kind} in the network's output; it must give a tensor")
    if isinstance(task, Classification | Segmentation) and logits.shape[1] < len(labels):
        raise LoadError(
            f"the network has {logits.shape[1]} outputs, the data set {len(labels)} classes; "
            f"give the matching --data, or --arch-arg num_classes={len(labels)} with weights that fit"
        )
