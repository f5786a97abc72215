"""What binarize alone makes of a torchvision network: trained on scikit-learn's digits at 32x32.

  python examples/binarize_digits.py mobilenet_v2 [--epochs 10] [--lr 3e-3] [--seed 0] [--threads 2]

Takes any classifier of torchvision by its name. A fifth of the 1,797 digits is held out, split by
class. Prints the accuracy on it after each epoch, and of the packed network.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
import torch.nn.functional as F
import torchvision
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import bitkernels.nn as bnn

BATCH = 64


def digits(seed: int) -> list[Tensor]:
    """Images (N, 3, 32, 32) in [-1, 1] and labels: train, held-out images, then their labels."""
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
    x = F.interpolate(x, size=32, mode="bilinear").repeat(1, 3, 1, 1)
    return train_test_split(x, torch.tensor(labels), test_size=0.2, stratify=labels,
                            random_state=seed)


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    return (model(images).argmax(1) == labels).float().mean().item()


def main(arguments: Sequence[str] | None = None) -> list[float]:
    """The accuracy after each epoch."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a name of torchvision.models")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="default: PyTorch's choice")
    args = parser.parse_args(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)

    train_x, test_x, train_y, test_y = digits(args.seed)
    model = torchvision.models.get_model(args.model, num_classes=10)
    bnn.binarize(model, verbose=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)
    steps = args.epochs * -(-len(train_x) // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    reached = []
    for epoch in range(args.epochs):
        model.train()
        for batch in torch.randperm(len(train_x)).split(BATCH):
            loss = F.cross_entropy(model(train_x[batch]), train_y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        reached.append(accuracy(model.eval(), test_x, test_y))
        print(f"epoch {epoch + 1}: {reached[-1]:.2%} of {len(test_y)} held-out digits", flush=True)
    packed = bnn.pack(model, filter=lambda name, layer: layer.pack_obstacle() is None)
    print(f"packed: {accuracy(packed, test_x, test_y):.2%}")
    return reached


if __name__ == "__main__":
    main()
