#include "network.h"

#include <chrono>
#include <unordered_map>

namespace bitkernels::network {
namespace {

constexpr size_t kMostPlans = 8;

// The strides of a description: all 0 mean a dense tensor.
Sizes strides_of(const bk_tensor& t) {
  Sizes strides;
  bool given = false;
  for (int i = 0; i < t.rank; ++i) {
    strides.push(t.strides[i]);
    given |= t.strides[i] != 0;
  }
  for (int64_t i = t.rank - 1, step = 1; !given && i >= 0; --i) {
    strides[static_cast<int>(i)] = step;
    step = times(step, std::max<int64_t>(t.sizes[i], 1));
  }
  return strides;
}

bool same_strides(const Sizes& sizes, const Sizes& a, const Sizes& b) {
  for (int i = 0; i < sizes.rank; ++i)
    if (sizes[i] > 1 && a[i] != b[i]) return false;
  return true;
}

bool is_like(const View& v, const bk_tensor& t) {
  if (t.dtype != static_cast<int32_t>(v.element) || t.rank != v.sizes.rank) return false;
  return std::equal(v.sizes.begin(), v.sizes.end(), t.sizes) &&
         same_strides(v.sizes, v.strides, strides_of(t));
}

std::string described(const bk_tensor& t) {
  if (t.rank < 0 || t.rank > kMostRank) return text("a tensor of ", t.rank, " dimensions");
  if (t.dtype < 0 || t.dtype > 3) return text("a tensor of type ", t.dtype);
  Type type = {static_cast<Element>(t.dtype), {}};
  for (int i = 0; i < t.rank; ++i) type.sizes.push(t.sizes[i]);
  return text_of(type);
}

// Checks one input; `bound` keeps what the names of free sizes stand for.
View checked(const Input& input, const bk_tensor& t,
             std::unordered_map<std::string, int64_t>& bound) {
  bool fits = t.dtype == static_cast<int32_t>(input.element) && t.rank == input.sizes.rank;
  std::string wanted;
  for (int i = 0; i < input.sizes.rank; ++i) {
    const std::string& name = input.names[static_cast<size_t>(i)];
    int64_t size = input.sizes[i];
    if (fits && size < 0) size = bound.emplace(name, t.sizes[i]).first->second;
    fits = fits && t.sizes[i] == size && size >= 0;
    wanted += text(i ? ", " : "", size < 0 ? name : text(size));
  }
  if (!fits)
    fail(quoted(input.name), " must be ", name_of(input.element), " of shape (", wanted, "), got ",
         described(t));
  View v;
  v.element = input.element;
  for (int i = 0; i < t.rank; ++i) v.sizes.push(t.sizes[i]);
  v.bytes();
  v.strides = strides_of(t);
  int64_t reach = bytes_of(v.element);
  for (int i = 0; i < t.rank; ++i) {
    if (v.strides[i] < 0)
      fail(quoted(input.name), " must have strides of at least 0, got ", v.strides[i]);
    reach = plus(reach, times(times(v.sizes[i], v.strides[i]), bytes_of(v.element)));
  }
  return v;
}

}  // namespace

Network::Network(SafeTensors file)
    : file_(std::move(file)),
      graph_(graph_of(file_)),
      kernel_(kernel()),
      constants_(graph_, file_) {
  std::vector<View> example;
  for (const Input& input : graph_.inputs) {
    View v;
    v.element = input.element;
    v.sizes = v.strides = input.example;
    v.bytes();
    int64_t step = 1;
    for (int i = v.sizes.rank - 1; i >= 0; --i) {
      v.strides[i] = step;
      step = times(step, std::max<int64_t>(v.sizes[i], 1));
    }
    example.push_back(v);
  }
  plans_.push_back(made(std::move(example)));
  // What other sizes may read too: all constants but weights, which are arranged by now.
  std::vector<bool> read(graph_.nodes.size());
  for (const Node& node : graph_.nodes)
    for (size_t i = 0; i < node.args.size(); ++i) {
      const Arg& arg = node.args[i];
      const std::string& name = node.op->params[i].name;
      const bool weight =
          (name == "weight" && (node.op->fuse == Fuse::kConv)) || name == "weight_words";
      if (arg.kind == Arg::kNode && !weight) read[static_cast<size_t>(arg.integer)] = true;
      for (const Arg& item : arg.items)
        if (item.kind == Arg::kNode) read[static_cast<size_t>(item.integer)] = true;
    }
  for (int output : graph_.outputs) read[static_cast<size_t>(output)] = true;
  for (size_t i = 0; i < read.size(); ++i)
    if (read[i] && graph_.nodes[i].tensor) constants_.raw(static_cast<int>(i));
  file_.close();
}

std::shared_ptr<Plan> Network::made(std::vector<View> inputs) {
  auto plan = std::make_shared<Plan>();
  plan->inputs = std::move(inputs);
  Lowering(graph_, constants_, kernel_, *plan).run();
  return plan;
}

std::shared_ptr<Plan> Network::plan(const bk_tensor* inputs) {
  const std::lock_guard<std::mutex> lock(mutex_);
  for (size_t i = 0; i < graph_.inputs.size(); ++i)
    if (inputs[i].rank < 0 || inputs[i].rank > kMostRank || inputs[i].dtype < 0 ||
        inputs[i].dtype > 3)
      fail(quoted(graph_.inputs[i].name), " must be a tensor, got ", described(inputs[i]));
  for (size_t p = 0; p < plans_.size(); ++p) {
    bool fits = true;
    for (size_t i = 0; i < graph_.inputs.size(); ++i)
      fits = fits && is_like(plans_[p]->inputs[i], inputs[i]);
    if (!fits) continue;
    std::rotate(plans_.begin(), plans_.begin() + static_cast<int64_t>(p),
                plans_.begin() + static_cast<int64_t>(p) + 1);
    return plans_.front();
  }
  std::unordered_map<std::string, int64_t> bound;
  std::vector<View> views;
  for (size_t i = 0; i < graph_.inputs.size(); ++i)
    views.push_back(checked(graph_.inputs[i], inputs[i], bound));
  std::shared_ptr<Plan> plan = made(std::move(views));
  plans_.insert(plans_.begin(), plan);
  if (plans_.size() > kMostPlans) plans_.pop_back();
  return plan;
}

int64_t Network::constant_bytes() {
  const std::lock_guard<std::mutex> lock(mutex_);
  return constants_.bytes();
}

void Network::run(Plan& plan, const bk_tensor* inputs, const bk_tensor* outputs,
                  bk_step* steps) const {
  const auto has_data = [](const View& v, const bk_tensor& t) {
    return t.data || v.sizes.count() == 0;
  };
  for (size_t i = 0; i < plan.inputs.size(); ++i)
    if (!has_data(plan.inputs[i], inputs[i]))
      fail(quoted(graph_.inputs[i].name), " must have data, got NULL");
  for (size_t i = 0; i < plan.outputs.size(); ++i) {
    if (outputs[i].rank < 0 || outputs[i].rank > kMostRank || !is_like(plan.outputs[i], outputs[i]))
      fail("output ", i, " must be ", text_of(plan.outputs[i]), " with strides ",
           text_of(plan.outputs[i].strides), ", as bk_output describes it, got ",
           described(outputs[i]));
    if (!has_data(plan.outputs[i], outputs[i])) fail("output ", i, " must have data, got NULL");
  }
  std::unique_ptr<Arena> arena = plan.take();
  for (size_t b = 0; b < plan.buffers.size(); ++b) {
    const Buffer& buffer = plan.buffers[b];
    const auto index = static_cast<size_t>(buffer.index);
    if (buffer.kind == Buffer::kInput) arena->address[b] = static_cast<char*>(inputs[index].data);
    if (buffer.kind == Buffer::kOutput) arena->address[b] = static_cast<char*>(outputs[index].data);
  }
  const Frame frame = {arena->address.data()};
  if (!steps) {
    for (const Step& step : plan.steps) step.run(frame);
  } else {
    using Clock = std::chrono::steady_clock;
    for (size_t i = 0; i < plan.steps.size(); ++i) {
      const Step& step = plan.steps[i];
      const auto start = Clock::now();
      step.run(frame);
      const std::chrono::duration<double> taken = Clock::now() - start;
      steps[i] = {step.name, step.call, step.weight, taken.count()};
    }
  }
  plan.give(std::move(arena));
}

}  // namespace bitkernels::network
