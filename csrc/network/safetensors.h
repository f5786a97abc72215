// A safetensors file: what its header says, checked, and its tensors one by one.
#pragma once
#include <cstdio>
#include <memory>
#include <string>
#include <vector>

#include "json.h"
#include "values.h"

namespace bitkernels::network {

class SafeTensors {
 public:
  struct Entry {
    std::string name, type;  // "F32", ...
    std::vector<int64_t> shape;
    int64_t begin, bytes;
  };

  // Throw Error for what cannot be read and for a header that does not describe the whole rest.
  static SafeTensors open(const std::string& path);
  static SafeTensors over(const void* data, size_t size);  // not copied

  const Json& metadata() const { return metadata_; }  // an object of strings
  const Entry* find(const std::string& name) const;
  void read(const Entry& entry, void* to) const;
  // After this nothing can be read any more; entries stay.
  void close();

 private:
  struct Close {
    void operator()(std::FILE* file) const { std::fclose(file); }
  };
  void parse(uint64_t size);
  void bytes(int64_t begin, int64_t count, void* to) const;

  std::string path_;
  std::unique_ptr<std::FILE, Close> file_;
  const char* memory_ = nullptr;
  int64_t data_ = 0;  // where the tensors begin
  Json metadata_;
  std::vector<Entry> entries_;  // by name
};

}  // namespace bitkernels::network
