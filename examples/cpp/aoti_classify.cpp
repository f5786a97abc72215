// Classifies an image by a network that aoti_package.py has compiled: no Python, no model code.
//
//   aoti_classify ENGINE PACKAGE IMAGE     prints the logits, a line each, and the largest last
//
// ENGINE is the file bitkernels/_C.abi3.so of an installed package. IMAGE is a binary PPM (P6) of
// the network's size, which is normalized as ImageNet's images are, or a file NAME.raw of its
// 3 x height x width floats.
#include <ATen/Context.h>
#include <ATen/Functions.h>
#include <c10/core/InferenceMode.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

// The engine registers its kernels when it is loaded; the operators themselves are defined by
// Python where there is Python, here by its one function for that.
void load_engine(const char* path) {
  void* engine = dlopen(path, RTLD_LAZY | RTLD_GLOBAL);
  if (engine == nullptr) throw std::runtime_error(std::string("engine: ") + dlerror());
  auto* define = reinterpret_cast<void (*)()>(dlsym(engine, "bitkernels_define_operators"));
  if (define == nullptr)
    throw std::runtime_error(std::string("engine: ") + path + " is not bitkernels/_C.abi3.so");
  define();
}

at::Tensor floats(const std::string& path, int64_t height, int64_t width) {
  at::Tensor image = at::empty({1, 3, height, width});
  const auto bytes = static_cast<std::streamsize>(image.nbytes());
  std::ifstream file(path, std::ios::binary | std::ios::ate);
  if (!file) throw std::runtime_error("image: cannot read " + path);
  if (file.tellg() != bytes)
    throw std::runtime_error("image: " + path + " must have " + std::to_string(bytes) +
                             " bytes, 3 x " + std::to_string(height) + " x " +
                             std::to_string(width) + " floats; it has " +
                             std::to_string(file.tellg()));
  file.seekg(0).read(static_cast<char*>(image.data_ptr()), bytes);
  return image;
}

at::Tensor ppm(const std::string& path, int64_t height, int64_t width) {
  std::ifstream file(path, std::ios::binary);
  std::string magic;
  int64_t columns = 0, rows = 0, largest = 0;
  file >> magic >> columns >> rows >> largest;
  file.get();
  if (!file || magic != "P6" || largest != 255)
    throw std::runtime_error("image: " + path + " is not a PPM of type P6 with values to 255");
  if (rows != height || columns != width)
    throw std::runtime_error("image: must be " + std::to_string(width) + " x " +
                             std::to_string(height) + ", got " + std::to_string(columns) + " x " +
                             std::to_string(rows));
  std::vector<unsigned char> pixels(3 * rows * columns);
  file.read(reinterpret_cast<char*>(pixels.data()), static_cast<std::streamsize>(pixels.size()));
  if (!file) throw std::runtime_error("image: " + path + " ends early");
  const float mean[] = {0.485f, 0.456f, 0.406f}, deviation[] = {0.229f, 0.224f, 0.225f};
  at::Tensor image = at::empty({1, 3, rows, columns});
  float* values = image.mutable_data_ptr<float>();
  for (int64_t channel = 0; channel < 3; ++channel)
    for (int64_t i = 0; i < rows * columns; ++i)
      *values++ = (static_cast<float>(pixels[3 * i + channel]) / 255.0f - mean[channel]) /
                  deviation[channel];
  return image;
}

// Of the images that the package takes, which it does not check itself.
std::vector<int64_t> size_of(torch::inductor::AOTIModelPackageLoader& loader) {
  const auto metadata = loader.get_metadata();
  const auto found = metadata.find("image_size");
  std::istringstream said(found == metadata.end() ? "" : found->second);
  int64_t height = 0, width = 0;
  if (!(said >> height >> width))
    throw std::runtime_error("package: does not say its image_size; make it by aoti_package.py");
  return {height, width};
}

void classify(const char* engine, const std::string& package, const std::string& path) {
  load_engine(engine);
  c10::InferenceMode without_gradients;
  torch::inductor::AOTIModelPackageLoader loader(package);
  const auto size = size_of(loader);
  const bool raw = path.size() > 4 && path.substr(path.size() - 4) == ".raw";
  const at::Tensor image = raw ? floats(path, size[0], size[1]) : ppm(path, size[0], size[1]);
  const at::Tensor logits = loader.run({image}).at(0).flatten();
  for (int64_t i = 0; i < logits.numel(); ++i) std::printf("%.9g\n", logits[i].item<float>());
  std::printf("class %lld\n", static_cast<long long>(logits.argmax().item<int64_t>()));
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 4) {
    std::cerr << "usage: aoti_classify ENGINE PACKAGE IMAGE\n";
    return 2;
  }
  try {
    classify(arguments[1], arguments[2], arguments[3]);
  } catch (const std::exception& error) {
    std::cerr << error.what() << "\n";
    return 1;
  }
}
