"""A trained network as one graph on bits: `convert`.

What Larq Compute Engine's converter does for TFLite, for PyTorch (Bannink et al. 2021, arXiv
2011.09398): between binary layers nothing is real that need not be. One pass a file:

  capture   the model as a graph of operators, by torch.export
  spellings other spellings of one computation become one
  recognise products of signs in code that computes on real numbers; sign_forms: what is a sign
  lower     binary operators to products of packed bits; weights to words
  sequences norms and activations behind 1-d convolutions as those of images
  epilogue  batch norm, clamp, residual, activation into the product before them
  joins     steps behind a concatenation of products, in front of it
  signs     signs taken early: through pools, joins and norms, and written by the product itself
  real      batch norms into real convolutions; bfloat16
  int8      real convolutions and linear layers in int8
  report    what became of each layer
  inputs    the types and sizes that a graph was made for, looked at in each call
  engine    a graph as one call of the C++ engine, csrc/network
  compare   a converted network against its model, sign by sign
  profile   where its time goes
  described the graph as JSON, for the file and the engine
  onnx      what torch.onnx.export gets of a converted network
  file      a converted network in one file, without pickle and without the model's code
"""

from bitkernels.converter.compare import Comparison, Signs, compare
from bitkernels.converter.converted import Converted, convert
from bitkernels.converter.file import load_converted, save_converted
from bitkernels.converter.profile import Profile, profile
from bitkernels.converter.report import ConvertReport, Product

__all__ = ["Comparison", "ConvertReport", "Converted", "Product", "Profile", "Signs", "compare",
           "convert", "load_converted", "profile", "save_converted"]
