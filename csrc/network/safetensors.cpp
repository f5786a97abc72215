#include "safetensors.h"

#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

namespace bitkernels::network {
namespace {

constexpr uint64_t kMostHeader = 100u << 20;  // as of the safetensors library

int64_t bytes_of(const std::string& type) {
  static const std::pair<const char*, int64_t> kTypes[] = {
      {"BOOL", 1}, {"U8", 1},  {"I8", 1},  {"F8_E4M3", 1}, {"F8_E5M2", 1},
      {"I16", 2},  {"U16", 2}, {"F16", 2}, {"BF16", 2},    {"I32", 4},
      {"U32", 4},  {"F32", 4}, {"I64", 8}, {"U64", 8},     {"F64", 8}};
  for (const auto& [name, bytes] : kTypes)
    if (type == name) return bytes;
  return 0;
}

}  // namespace

SafeTensors SafeTensors::open(const std::string& path) {
  SafeTensors s;
  s.path_ = path;
  s.file_.reset(std::fopen(path.c_str(), "rb"));
  if (!s.file_) fail(path, " cannot be read: ", std::strerror(errno));
  struct stat status;
  if (fstat(fileno(s.file_.get()), &status) != 0 || !S_ISREG(status.st_mode))
    fail(path, " cannot be read: it is no file");
  s.parse(static_cast<uint64_t>(status.st_size));
  return s;
}

SafeTensors SafeTensors::over(const void* data, size_t size) {
  SafeTensors s;
  s.path_ = "the memory";
  s.memory_ = static_cast<const char*>(data);
  s.parse(size);
  return s;
}

void SafeTensors::bytes(int64_t begin, int64_t count, void* to) const {
  if (count == 0) return;
  if (!memory_ && !file_) fail(path_, " is closed");
  if (memory_) {
    std::memcpy(to, memory_ + begin, static_cast<size_t>(count));
  } else if (fseeko(file_.get(), begin, SEEK_SET) != 0 ||
             std::fread(to, 1, static_cast<size_t>(count), file_.get()) !=
                 static_cast<size_t>(count)) {
    fail(path_, " cannot be read to its end");
  }
}

void SafeTensors::parse(uint64_t size) {
  const std::string broken = path_ + " is not a safetensors file, or not a whole one: ";
  unsigned char first[8];
  if (size < 8) fail(broken, size, " bytes");
  bytes(0, 8, first);
  uint64_t length = 0;
  for (int i = 7; i >= 0; --i) length = length << 8 | first[i];
  if (length > kMostHeader || length > size - 8) fail(broken, "a header of ", length, " bytes");
  std::string header(length, '\0');
  bytes(8, static_cast<int64_t>(length), header.data());
  data_ = static_cast<int64_t>(8 + length);
  const auto rest = static_cast<int64_t>(size - 8 - length);
  Json root = parse_json(path_ + "'s header", header.data(), header.data() + header.size());
  if (root.kind != Json::kObject) fail(broken, "a header that is no object");
  metadata_.kind = Json::kObject;
  for (auto& [name, value] : root.members) {
    if (value.kind != Json::kObject) fail(broken, quoted(name), " is no object");
    if (name == "__metadata__") {
      for (const auto& [key, v] : value.members)
        if (v.kind != Json::kString) fail(broken, "metadata ", quoted(key), " is no string");
      metadata_ = std::move(value);
      continue;
    }
    const Json *type = value.find("dtype"), *shape = value.find("shape"),
               *offsets = value.find("data_offsets");
    if (!type || type->kind != Json::kString || !shape || shape->kind != Json::kList || !offsets ||
        offsets->kind != Json::kList || offsets->items.size() != 2)
      fail(broken, "the tensor ", quoted(name), " lacks its type, shape or place");
    Entry entry = {name, type->string, {}, 0, 0};
    int64_t count = bytes_of(entry.type);
    if (count == 0) fail(broken, "the tensor ", quoted(name), " is of type ", quoted(entry.type));
    for (const Json& n : shape->items) {
      if (n.kind != Json::kInt || n.integer < 0) fail(broken, quoted(name), " has a strange shape");
      entry.shape.push_back(n.integer);
      count = times(count, n.integer);
    }
    for (const Json& n : offsets->items)
      if (n.kind != Json::kInt || n.integer < 0 || n.integer > rest)
        fail(broken, "the tensor ", quoted(name), " lies outside of the file");
    entry.begin = offsets->items[0].integer;
    entry.bytes = offsets->items[1].integer - entry.begin;
    if (entry.bytes != count)
      fail(broken, "the tensor ", quoted(name), " has ", entry.bytes, " bytes, its shape ", count);
    entries_.push_back(std::move(entry));
  }
  // One behind the other, without holes, to the end.
  std::vector<const Entry*> order;
  for (const Entry& e : entries_) order.push_back(&e);
  std::sort(order.begin(), order.end(), [](const Entry* a, const Entry* b) {
    return std::pair(a->begin, a->bytes) < std::pair(b->begin, b->bytes);
  });
  int64_t at = 0;
  for (const Entry* e : order) {
    if (e->begin != at) fail(broken, "the tensor ", quoted(e->name), " overlaps or leaves a hole");
    at += e->bytes;
  }
  if (at != rest) fail(broken, rest, " bytes of tensors, where the header describes ", at);
}

const SafeTensors::Entry* SafeTensors::find(const std::string& name) const {
  const auto at = std::lower_bound(entries_.begin(), entries_.end(), name,
                                   [](const Entry& e, const std::string& n) { return e.name < n; });
  return at != entries_.end() && at->name == name ? &*at : nullptr;
}

void SafeTensors::close() {
  file_.reset();
  memory_ = nullptr;
}

void SafeTensors::read(const Entry& entry, void* to) const {
  bytes(data_ + entry.begin, entry.bytes, to);
}

}  // namespace bitkernels::network
