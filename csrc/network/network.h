// A loaded network: its graph and constants, and plans of the sizes that it ran last.
#pragma once
#include <memory>
#include <mutex>
#include <vector>

#include "bitkernels.h"
#include "lowering.h"

namespace bitkernels::network {

class Network {
 public:
  explicit Network(SafeTensors file);

  const Graph& graph() const { return graph_; }
  // The plan for these inputs; throws Error where the network does not take them.
  std::shared_ptr<Plan> plan(const bk_tensor* inputs);
  // `steps`, where not null, gets the time of each.
  void run(Plan& plan, const bk_tensor* inputs, const bk_tensor* outputs, bk_step* steps) const;
  int64_t constant_bytes();

 private:
  std::shared_ptr<Plan> made(std::vector<View> inputs);

  SafeTensors file_;
  Graph graph_;
  const Kernel& kernel_;
  Constants constants_;
  std::mutex mutex_;
  std::vector<std::shared_ptr<Plan>> plans_;  // the last used first
};

}  // namespace bitkernels::network
