// JSON as Python writes it (NaN and Infinity too), of files that nobody vouches for.
#pragma once
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "error.h"

namespace bitkernels::network {

struct Json {
  enum Kind { kNull, kBool, kInt, kReal, kString, kList, kObject };
  Kind kind = kNull;
  bool flag = false;
  int64_t integer = 0;
  double real = 0;
  std::string string;
  std::vector<Json> items;
  std::vector<std::pair<std::string, Json>> members;  // sorted by key, each key once

  // The member of that key; null where there is none.
  const Json* find(const std::string& key) const;
};

// Throws Error for anything but one value, for nesting of more than 32 levels and for more than a
// million values. `what` names the text in the message.
Json parse_json(const std::string& what, const char* begin, const char* end);

}  // namespace bitkernels::network
