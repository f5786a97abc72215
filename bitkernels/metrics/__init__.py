"""What binary networks do while they train: flips, distance from the start, saturation.

Each metric is an object with `update`, `value` and `reset`, and a state_dict for an exact resume.
`watch` attaches them to a model. Without a watcher there is no hook and nothing is computed.

Signs are kept packed, one bit a weight, and counts stay on the device until `value` is read, which
waits for it. Sources: Larq's `metrics.FlipRatio`; Liu et al., "How Do Adam and Training Strategies
Help BNNs Optimization?" (AdamBNN, ICML 2021, arXiv 2106.11309): FF ratio, C2I ratio, dead weights.
"""

from bitkernels.metrics.signs import C2IRatio, DeadWeights, FlipRatio
from bitkernels.metrics.values import Histogram, Saturation
from bitkernels.metrics.watcher import Watcher, watch

__all__ = ["C2IRatio", "DeadWeights", "FlipRatio", "Histogram", "Saturation", "Watcher", "watch"]
