"""Train a small binary network on handwritten digits, pack it, and classify with the packed one.

  python examples/digits.py [--epochs 30] [--seed 0] [--threads 2]

The data are the 1,797 digits of 8x8 pixels that come with scikit-learn; a fifth, split by class, is
held out. As in Bi-Real Net and ReActNet the first convolution and the last layer are real, and a
binary block is  x -> RPReLU(x + BatchNorm(binary convolution(RSign(x)))).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from tqdm import trange

import bitkernels.nn as bnn

CHANNELS = 64
BATCH = 64


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.sign = bnn.RSign(channels)
        self.conv = bnn.BinaryConv2d(channels, channels, 3, padding=1, bias=False,
                                     input_quantizer=None, weight_scale="detached")
        self.norm = nn.BatchNorm2d(channels)
        self.act = bnn.RPReLU(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x + self.norm(self.conv(self.sign(x))))


def network(channels: int = CHANNELS) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels),
        Block(channels), Block(channels), nn.AvgPool2d(2),
        Block(channels), Block(channels), nn.AvgPool2d(2),
        nn.Flatten(), nn.Linear(4 * channels, 10))


def digits(seed: int) -> list[Tensor]:
    """Images (N, 1, 8, 8) in [-1, 1] and labels: train and held-out images, then their labels."""
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
    return train_test_split(x, torch.tensor(labels), test_size=0.2, stratify=labels,
                            random_state=seed)


def shifted(images: Tensor) -> Tensor:
    """Every image moved by -1, 0 or 1 pixels along both axes, background moving in."""
    count, size = len(images), images.shape[-1]
    padded = F.pad(images[:, 0], (1, 1, 1, 1), value=-1.0)
    pixels = torch.arange(size) + torch.randint(0, 3, (2, count, 1))
    rows, columns = pixels[0].unsqueeze(2), pixels[1].unsqueeze(1)
    return padded[torch.arange(count).view(-1, 1, 1), rows, columns].unsqueeze(1)


def weight_signs(model: nn.Module) -> Tensor:
    return torch.cat([layer.weight.detach().flatten() < 0
                      for layer in model.modules() if isinstance(layer, bnn.BinaryLayer)])


@torch.no_grad()
def predict(model: nn.Module, images: Tensor) -> Tensor:
    return model(images).argmax(1)


def train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int) -> None:
    """Adam, one cosine, no weight decay: the binary signs settle as the rate falls to 0."""
    steps = epochs * -(-len(images) // BATCH)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    for _ in (progress := trange(epochs, desc="training", unit="epoch", disable=None)):
        before, correct, total_loss = weight_signs(model), 0, 0.0
        for batch in torch.randperm(len(images)).split(BATCH):
            logits = model(shifted(images[batch]))
            loss = F.cross_entropy(logits, labels[batch], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            correct += (logits.argmax(1) == labels[batch]).sum().item()
            total_loss += loss.item() * len(batch)
        flips = (weight_signs(model) != before).float().mean().item()
        progress.set_postfix(loss=f"{total_loss / len(images):.3f}",
                             accuracy=f"{correct / len(images):.1%}", flips=f"{flips:.2%}")


def main(arguments: Sequence[str] | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Held-out labels, predictions of the trained network, predictions of the packed one."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="default: PyTorch's choice")
    args = parser.parse_args(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)

    train_images, test_images, train_labels, test_labels = digits(args.seed)
    model = network()
    train(model, train_images, train_labels, args.epochs)

    model.eval()
    trained = predict(model, test_images)
    packed = predict(bnn.pack(model), test_images)
    for name, predictions in (("trained", trained), ("packed", packed)):
        accuracy = (predictions == test_labels).float().mean().item()
        print(f"{name:8} {accuracy:.2%} of {len(test_labels)} held-out digits")
    print(f"equal predictions: {(trained == packed).sum()} of {len(test_labels)}")
    return test_labels, trained, packed


if __name__ == "__main__":
    main()
