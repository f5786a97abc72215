"""Record what the original implementations compute, for test_traces.py.

  python make_traces.py larq                              needs tensorflow-cpu, tf_keras, larq
  python make_traces.py adambnn path/to/AdamBNN           needs torch and a checkout of
                                                          github.com/liuzechun/AdamBNN

Each writes one file beside this script, larq.npz or adambnn.npz, whose entry "header" says from
which versions the values are. Nothing here computes an expected value by itself: inputs are made
with numpy's generator, outputs are those of Larq's and AdamBNN's own code.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
STEPS = 60

# name: gamma, threshold, gradients, initial weights. "linear" is a schedule from 1e-2 to 1e-4.
BOP = {
    "default": (1e-4, 1e-8, "normal", "signs"),
    "cifar": (1e-3, 1e-6, "normal", "signs"),
    "coarse": (1e-2, 1e-3, "normal", "signs"),
    "real_start": (1e-2, 1e-6, "normal", "real"),
    "threshold_0": (1e-2, 0.0, "sparse", "signs"),
    "equality": (1.0, 0.25, "quarters", "signs"),
    "equality_half": (0.5, 0.25, "quarters", "signs"),
    "equality_0": (1.0, 0.0, "quarters", "signs"),
    "schedule": ("linear", 1e-6, "normal", "signs"),
}

# name: class, arguments, and what it is applied to.
QUANTIZERS = {
    "ste_sign": ("SteSign", {}, "grid"),
    "ste_sign_1.25": ("SteSign", {"clip_value": 1.25}, "grid"),
    "ste_sign_none": ("SteSign", {"clip_value": None}, "grid"),
    "approx_sign": ("ApproxSign", {}, "grid"),
    "swish_sign": ("SwishSign", {}, "grid"),
    "swish_sign_2": ("SwishSign", {"beta": 2.0}, "grid"),
    "ste_heaviside": ("SteHeaviside", {}, "grid"),
    "ste_tern": ("SteTern", {}, "grid"),
    "ste_tern_0.5": ("SteTern", {"threshold_value": 0.5, "clip_value": 2.0}, "grid"),
    "dorefa_1": ("DoReFa", {"k_bit": 1, "mode": "activations"}, "grid"),
    "dorefa_2": ("DoReFa", {"k_bit": 2, "mode": "activations"}, "grid"),
    "dorefa_5": ("DoReFa", {"k_bit": 5, "mode": "activations"}, "grid"),
    "noop": ("NoOp", {"precision": 1}, "grid"),
    "magnitude_aware_sign": ("MagnitudeAwareSign", {}, "kernel"),
    "magnitude_aware_sign_0.5": ("MagnitudeAwareSign", {"clip_value": 0.5}, "kernel"),
    "ste_tern_twn": ("SteTern", {"ternary_weight_networks": True}, "kernel"),
    "dorefa_weights_1": ("DoReFa", {"k_bit": 1, "mode": "weights"}, "kernel"),
    "dorefa_weights_2": ("DoReFa", {"k_bit": 2, "mode": "weights"}, "kernel"),
    "dorefa_weights_4": ("DoReFa", {"k_bit": 4, "mode": "weights"}, "kernel"),
}


def grid() -> np.ndarray:
    """[-3, 3], every edge of the quantizers above, and the float32 numbers next to the edges."""
    edges = np.array([0.05, 0.25, 0.5, 1.0, 1.25, 2.0], np.float32)
    edges = np.concatenate([edges, np.nextafter(edges, np.float32(0)),
                            np.nextafter(edges, np.float32(9)), [np.float32(1e-30)]])
    middles = (np.arange(-90, 91) + 0.37).astype(np.float32) / 30
    return np.concatenate([middles, edges, -edges, [0.0, -0.0, np.inf, -np.inf]]).astype(np.float32)


def larq() -> None:
    os.environ["TF_USE_LEGACY_KERAS"] = "1"
    os.environ["TF_ENABLE_ONEDNN_OPTS"] = "0"
    from importlib.metadata import version

    import larq as lq
    import tensorflow as tf

    rng = np.random.default_rng(0)
    gradients = {
        "normal": rng.normal(size=(STEPS, 48)),
        "sparse": rng.normal(size=(STEPS, 48)) * (rng.random((STEPS, 48)) < 0.03),
        "quarters": rng.integers(-2, 3, size=(STEPS, 48)) / 4,
    }
    starts = {"signs": rng.choice([-1.0, 1.0], 48), "real": rng.normal(size=48) * 0.1}
    arrays = {f"bop/gradients/{k}": v.astype(np.float32) for k, v in gradients.items()}
    arrays |= {f"bop/start/{k}": v.astype(np.float32) for k, v in starts.items()}
    for name, (gamma, threshold, gradient, start) in BOP.items():
        weights = tf.Variable(arrays[f"bop/start/{start}"])
        if gamma == "linear":
            gamma = tf.keras.optimizers.schedules.PolynomialDecay(1e-2, STEPS, 1e-4)
        bop = lq.optimizers.Bop(threshold=threshold, gamma=gamma)
        trace, momentum = [], []
        for step in range(STEPS):
            bop.apply_gradients([(tf.constant(arrays[f"bop/gradients/{gradient}"][step]),
                                  weights)])
            trace.append(weights.numpy().copy())
            momentum.append(bop.get_slot(weights, "m").numpy().copy())
        arrays[f"bop/{name}/weights"] = np.stack(trace).astype(np.int8)
        assert np.array_equal(arrays[f"bop/{name}/weights"], np.stack(trace)), "not signs"
        arrays[f"bop/{name}/momentum"] = np.stack(momentum)

    kernel = (rng.normal(size=(3, 3, 4, 8)) * 0.6).astype(np.float32)  # (kh, kw, in, out)
    kernel.reshape(-1)[:8] = [0.0, -0.0, 1.0, -1.0, 0.5, -0.5, 2.0, -2.0]
    inputs = {"grid": grid(), "kernel": kernel}
    for kind, values in inputs.items():
        arrays[f"quantizers/{kind}"] = values
        arrays[f"quantizers/{kind}/gradient"] = rng.normal(size=values.shape).astype(np.float32)
    for name, (cls, arguments, kind) in QUANTIZERS.items():
        x = tf.constant(inputs[kind])
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = getattr(lq.quantizers, cls)(**arguments)(x)
        gradient = tape.gradient(y, x, tf.constant(arrays[f"quantizers/{kind}/gradient"]))
        arrays[f"quantizers/{name}/forward"] = y.numpy()
        arrays[f"quantizers/{name}/backward"] = tf.convert_to_tensor(gradient).numpy()

    save("larq.npz", arrays, f"""All outputs are those of larq {version("larq")} on tensorflow-cpu \
{version("tensorflow-cpu")} with tf_keras {version("tf_keras")}, Python \
{sys.version.split()[0]}: larq.optimizers.Bop over {STEPS} updates, larq.quantizers forward and \
with the gradient entered. Inputs: numpy {np.__version__}, default_rng(0). bop/NAME/momentum is \
the slot m after each update. TensorFlow flushes denormals to zero, so the inputs have none.""")


def adambnn(checkout: Path) -> None:
    import torch
    from torch import nn

    commit = subprocess.run(["git", "-C", str(checkout), "rev-parse", "HEAD"], text=True,
                            capture_output=True, check=True).stdout.strip()[:7]
    net = load(checkout / "step2" / "reactnet.py")
    loss = load(checkout / "utils" / "KD_loss.py").DistributionLoss()
    rng = np.random.default_rng(1)
    arrays = {}

    def tensor(name: str, value: np.ndarray, dtype=torch.float64) -> torch.Tensor:
        arrays[name] = value.astype(np.float32)
        return torch.tensor(arrays[name], dtype=dtype)

    x = tensor("sign/input", grid()[np.isfinite(grid())]).requires_grad_()
    y = net.BinaryActivation()(x)
    y.backward(tensor("sign/gradient", rng.normal(size=x.shape)))
    arrays["sign/forward"], arrays["sign/backward"] = y.detach().numpy(), x.grad.numpy()

    conv = net.HardBinaryConv(6, 5, 3, 1, 1).double()
    weight = rng.normal(size=(5, 6, 3, 3)) * 0.7
    weight.reshape(-1)[:6] = [1, -1, np.nextafter(np.float32(1), 2), -2, 0.25, -1e-30]
    conv.weight.data = tensor("conv/weight", weight)
    x = tensor("conv/input", rng.choice([-1.0, 1.0], (3, 6, 5, 5))).requires_grad_()
    y = conv(x)
    y.backward(tensor("conv/gradient", rng.normal(size=y.shape)))
    arrays |= {"conv/forward": y.detach().numpy(), "conv/weight_backward": conv.weight.grad.numpy(),
               "conv/input_backward": x.grad.numpy()}

    model = nn.Sequential(net.firstconv3x3(1, 4, 1), net.BasicBlock(4, 8, 2),
                          net.BasicBlock(8, 8, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                          nn.Linear(8, 5)).double()
    names = [name for name, _ in model.named_parameters()]
    for name, parameter in model.named_parameters():
        if "bn" in name or "prelu" in name:
            value = rng.uniform(0.2, 1.0, parameter.shape)
        else:
            value = rng.normal(size=parameter.shape) * (0.05 if "binary" in name else 0.3)
        parameter.data = tensor(f"net/start/{name}", value)
    images = tensor("net/images", rng.normal(size=(4, 16, 1, 8, 8)))
    teacher = tensor("net/teacher", rng.normal(size=(4, 16, 5)) * 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    binary = {f"{name}.weight": m.weight for name, m in model.named_modules()
              if isinstance(m, net.HardBinaryConv)}
    losses, signs, momentum, smallest = [], [], [], []
    for module in model.modules():
        if isinstance(module, net.BinaryActivation):
            module.register_forward_pre_hook(
                lambda _m, inputs: smallest.append(inputs[0].abs().min().item()))
    for step in range(STEPS):
        value = loss(model(images[step % 4]), teacher[step % 4])
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
        flat = torch.cat([w.detach().flatten() for w in binary.values()])
        smallest.append(flat.abs().min().item())
        signs.append(np.packbits(flat.numpy() < 0))
        if step % 5 == 4:
            momentum.append(torch.cat([optimizer.state[w]["momentum_buffer"].flatten()
                                       for w in binary.values()]).numpy())
    arrays |= {"net/losses": np.array(losses), "net/signs": np.stack(signs),
               "net/momentum": np.stack(momentum).astype(np.float32),
               "net/names": np.array(names), "net/binary": np.array(list(binary))}
    save("adambnn.npz", arrays, f"""All outputs are those of github.com/liuzechun/AdamBNN at \
commit {commit}, its step2/reactnet.py and utils/KD_loss.py, on torch {torch.__version__}, CPU, \
float64: sign/ BinaryActivation, conv/ HardBinaryConv (stride 1, padding 1), net/ \
firstconv3x3(1, 4, 1), \
BasicBlock(4, 8, 2), BasicBlock(8, 8, 1), mean, Linear(8, 5) trained on DistributionLoss for \
{STEPS} updates of SGD, lr 0.05, momentum 0.9, batch step % 4. net/signs: packed weight < 0 of the \
binary weights in the order of net/binary after each update; net/momentum: the momentum buffers of \
these after updates 5, 10, ..., 60. No sign in the net is taken of a value below \
{min(smallest):.1e} in magnitude. Inputs: numpy {np.__version__}, default_rng(1).""")


def load(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def save(name: str, arrays: dict[str, np.ndarray], header: str) -> None:
    np.savez_compressed(HERE / name, header=np.array(header), **arrays)
    print(f"{name}: {(HERE / name).stat().st_size} bytes\n{header}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("larq", "adambnn"))
    parser.add_argument("checkout", type=Path, nargs="?")
    args = parser.parse_args()
    if args.what == "larq":
        larq()
    elif args.checkout is None:
        parser.error("adambnn needs the path of a checkout")
    else:
        adambnn(args.checkout)


if __name__ == "__main__":
    main()
