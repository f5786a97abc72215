// bitkernels.h: exceptions become bk_error().
#include <new>

#include "network.h"
#include "threads.h"

using bitkernels::network::Element;
using bitkernels::network::Network;
using bitkernels::network::Plan;
using bitkernels::network::SafeTensors;

struct bk_network : Network {
  using Network::Network;
};

namespace {

std::string& error() {
  thread_local std::string text;
  return text;
}

void set_error(const char* what) noexcept {
  try {
    error() = what;
    for (char& c : error())
      if (c == '\n') c = ' ';
    if (error().rfind("bitkernels: ", 0) != 0) error().insert(0, "bitkernels: ");
  } catch (...) {
  }
}

// 0 and what f did, or 1 and why it could not.
template <class F>
int guarded(const F& f) {
  try {
    f();
    return 0;
  } catch (const std::bad_alloc&) {
    set_error("not enough memory");
  } catch (const std::exception& e) {
    set_error(e.what());
  } catch (...) {
    set_error("an unknown error");
  }
  return 1;
}

template <class T>
void need(const T* pointer, const char* name) {
  if (!pointer) bitkernels::network::fail(name, " must not be NULL");
}

// All pointers that a call takes besides its network.
std::shared_ptr<Plan> plan_of(bk_network* network, const bk_tensor* inputs) {
  need(network, "network");
  if (!network->graph().inputs.empty()) need(inputs, "inputs");
  return network->plan(inputs);
}

}  // namespace

extern "C" {

const char* bk_error(void) { return error().c_str(); }
const char* bk_version(void) { return "0.1.0"; }

const char* bk_kernel(void) {
  const char* name = nullptr;
  guarded([&] { name = bitkernels::kernel().name; });
  return name;
}

int bk_set_threads(int count) {
  return guarded([&] {
    if (count < 1) bitkernels::network::fail("count must be at least 1, got ", count);
    if (const char* reason = bitkernels::network::set_threads(count))
      bitkernels::network::fail(reason);
  });
}

bk_network* bk_load(const char* path) {
  bk_network* network = nullptr;
  guarded([&] {
    need(path, "path");
    network = new bk_network(SafeTensors::open(path));
  });
  return network;
}

bk_network* bk_load_memory(const void* data, size_t size) {
  bk_network* network = nullptr;
  guarded([&] {
    need(data, "data");
    network = new bk_network(SafeTensors::over(data, size));
  });
  return network;
}

void bk_free(bk_network* network) { delete network; }

int bk_input_count(const bk_network* network) {
  return network ? static_cast<int>(network->graph().inputs.size()) : 0;
}
int bk_output_count(const bk_network* network) {
  return network ? static_cast<int>(network->graph().outputs.size()) : 0;
}

const char* bk_input_name(const bk_network* network, int index) {
  if (index < 0 || index >= bk_input_count(network)) return nullptr;
  return network->graph().inputs[static_cast<size_t>(index)].name.c_str();
}

int bk_input(const bk_network* network, int index, bk_tensor* description) {
  return guarded([&] {
    need(network, "network");
    need(description, "description");
    if (index < 0 || index >= bk_input_count(network))
      bitkernels::network::fail("index must be below ", bk_input_count(network), ", got ", index);
    const auto& input = network->graph().inputs[static_cast<size_t>(index)];
    *description = {};
    description->dtype = static_cast<int32_t>(input.element);
    description->rank = input.sizes.rank;
    std::copy(input.sizes.begin(), input.sizes.end(), description->sizes);
  });
}

int bk_output(bk_network* network, int index, const bk_tensor* inputs, bk_tensor* description) {
  return guarded([&] {
    const auto plan = plan_of(network, inputs);
    need(description, "description");
    if (index < 0 || index >= bk_output_count(network))
      bitkernels::network::fail("index must be below ", bk_output_count(network), ", got ", index);
    const auto& output = plan->outputs[static_cast<size_t>(index)];
    *description = {};
    description->dtype = static_cast<int32_t>(output.element);
    description->rank = output.sizes.rank;
    std::copy(output.sizes.begin(), output.sizes.end(), description->sizes);
    std::copy(output.strides.begin(), output.strides.end(), description->strides);
  });
}

int64_t bk_bytes(const bk_tensor* description) {
  int64_t bytes = -1;
  guarded([&] {
    need(description, "description");
    if (description->rank < 0 || description->rank > BK_MAX_RANK || description->dtype < 0 ||
        description->dtype > 3)
      bitkernels::network::fail("description must be one of a tensor");
    int64_t count = bitkernels::network::bytes_of(static_cast<Element>(description->dtype));
    for (int i = 0; i < description->rank; ++i)
      count = bitkernels::network::times(count, description->sizes[i]);
    bytes = count;
  });
  return bytes;
}

int bk_run(bk_network* network, const bk_tensor* inputs, bk_tensor* outputs) {
  return guarded([&] {
    const auto plan = plan_of(network, inputs);
    need(outputs, "outputs");
    network->run(*plan, inputs, outputs, nullptr);
  });
}

int bk_memory(bk_network* network, const bk_tensor* inputs, int64_t* constants,
              int64_t* activations) {
  return guarded([&] {
    const auto plan = plan_of(network, inputs);
    if (constants) *constants = network->constant_bytes();
    if (activations) *activations = plan->arena_bytes;
  });
}

int bk_step_count(bk_network* network, const bk_tensor* inputs, int* count) {
  return guarded([&] {
    const auto plan = plan_of(network, inputs);
    need(count, "count");
    *count = static_cast<int>(plan->steps.size());
  });
}

int bk_run_timed(bk_network* network, const bk_tensor* inputs, bk_tensor* outputs, bk_step* steps,
                 int count) {
  return guarded([&] {
    const auto plan = plan_of(network, inputs);
    need(outputs, "outputs");
    need(steps, "steps");
    if (count != static_cast<int>(plan->steps.size()))
      bitkernels::network::fail("count must be ", plan->steps.size(),
                                ", as bk_step_count says, got ", count);
    network->run(*plan, inputs, outputs, steps);
  });
}

}  // extern "C"
