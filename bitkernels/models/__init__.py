"""Binary networks with the exact structure of the published ones, which `create_model` makes.

The defaults of `BinaryNet`, `ReActNet` and `QuickNet` suit images of 8 to 64 pixels: `create`.

Each has the option binary_weights. False keeps the activations binary and the weights real, with
the same state_dict keys: the first step of ReActNet's training, whose result the second step loads
strictly.
"""

from bitkernels.models.alexnet import BinaryAlexNet
from bitkernels.models.binarynet import BinaryNet
from bitkernels.models.birealnet import BiRealNet
from bitkernels.models.bnext import BNext, BNextBlock
from bitkernels.models.densenet import BinaryDenseNet
from bitkernels.models.dorefanet import DoReFaNet
from bitkernels.models.meliusnet import MeliusNet
from bitkernels.models.quicknet import QuickNet, QuickNetBlock, QuickNetTransition
from bitkernels.models.reactnet import ReActBlock, ReActNet
from bitkernels.models.reactnet18 import ReActNet18, reactnet18_block
from bitkernels.models.real_to_binary import RealToBinaryNet
from bitkernels.models.registry import create, create_model, list_models, names
from bitkernels.models.resnet_e import BinaryResNetE
from bitkernels.models.weights import (
    from_pretrained,
    load_weights,
    public_weights,
    push_to_hub,
    save_pretrained,
)
from bitkernels.models.xnornet import XNORNet

__all__ = [
    "BNext",
    "BNextBlock",
    "BiRealNet",
    "BinaryAlexNet",
    "BinaryDenseNet",
    "BinaryNet",
    "BinaryResNetE",
    "DoReFaNet",
    "MeliusNet",
    "QuickNet",
    "QuickNetBlock",
    "QuickNetTransition",
    "ReActBlock",
    "ReActNet",
    "ReActNet18",
    "RealToBinaryNet",
    "XNORNet",
    "create",
    "create_model",
    "from_pretrained",
    "list_models",
    "load_weights",
    "names",
    "public_weights",
    "push_to_hub",
    "reactnet18_block",
    "save_pretrained",
]
