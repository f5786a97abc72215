#include "json.h"

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <limits>

namespace bitkernels::network {

std::string quoted(const std::string& s) {
  std::string out = "'";
  for (char c : s.substr(0, 80)) out += c >= 32 && c < 127 ? c : '?';
  return out + (s.size() > 80 ? "...'" : "'");
}

const Json* Json::find(const std::string& key) const {
  const auto at = std::lower_bound(members.begin(), members.end(), key,
                                   [](const auto& m, const std::string& k) { return m.first < k; });
  return at != members.end() && at->first == key ? &at->second : nullptr;
}

namespace {

constexpr int kMostLevels = 32;
constexpr int64_t kMostValues = 1000000;

class Parser {
 public:
  Parser(const std::string& what, const char* begin, const char* end)
      : what_(what), begin_(begin), at_(begin), end_(end) {}

  Json whole() {
    Json value = parse(0);
    skip();
    if (at_ != end_) wrong("more behind the value");
    return value;
  }

 private:
  [[noreturn]] void wrong(const char* why) const {
    fail(what_, " is no JSON: ", why, " at byte ", at_ - begin_);
  }
  void skip() {
    while (at_ != end_ && (*at_ == ' ' || *at_ == '\n' || *at_ == '\t' || *at_ == '\r')) ++at_;
  }
  bool take(char c) {
    skip();
    if (at_ == end_ || *at_ != c) return false;
    ++at_;
    return true;
  }
  bool word(const char* w) {
    const auto n = static_cast<int64_t>(std::strlen(w));
    if (end_ - at_ < n || std::memcmp(at_, w, n) != 0) return false;
    at_ += n;
    return true;
  }

  Json parse(int level) {
    if (level > kMostLevels) wrong("nested too deeply");
    if (++values_ > kMostValues) wrong("too many values");
    skip();
    if (at_ == end_) wrong("an early end");
    Json v;
    if (*at_ == '{') return object(level);
    if (*at_ == '[') return list(level);
    if (*at_ == '"') {
      v.kind = Json::kString;
      v.string = string();
    } else if (word("true") || word("false")) {
      v.kind = Json::kBool;
      v.flag = at_[-2] == 'u';
    } else if (word("null")) {
      v.kind = Json::kNull;
    } else {
      number(v);
    }
    return v;
  }

  Json list(int level) {
    Json v;
    v.kind = Json::kList;
    ++at_;
    if (take(']')) return v;
    do v.items.push_back(parse(level + 1));
    while (take(','));
    if (!take(']')) wrong("a list without its end");
    return v;
  }

  Json object(int level) {
    Json v;
    v.kind = Json::kObject;
    ++at_;
    if (take('}')) return v;
    do {
      skip();
      if (at_ == end_ || *at_ != '"') wrong("a key that is no string");
      std::string key = string();
      if (!take(':')) wrong("a key without a value");
      v.members.emplace_back(std::move(key), parse(level + 1));
    } while (take(','));
    if (!take('}')) wrong("an object without its end");
    std::sort(v.members.begin(), v.members.end(),
              [](const auto& a, const auto& b) { return a.first < b.first; });
    for (size_t i = 1; i < v.members.size(); ++i)
      if (v.members[i].first == v.members[i - 1].first) wrong("a key given twice");
    return v;
  }

  std::string string() {
    std::string out;
    for (++at_; at_ != end_ && *at_ != '"'; ++at_) {
      if (static_cast<unsigned char>(*at_) < 32) wrong("a control character");
      if (*at_ != '\\') {
        out += *at_;
        continue;
      }
      if (++at_ == end_) break;
      static const char kNames[] = "\"\\/bfnrt", kMeant[] = "\"\\/\b\f\n\r\t";
      if (*at_ == 'u') {
        append(out, unit());
      } else if (const char* found = *at_ ? std::strchr(kNames, *at_) : nullptr) {
        out += kMeant[found - kNames];
      } else {
        wrong("an unknown escape");
      }
    }
    if (at_ == end_) wrong("a string without its end");
    ++at_;
    return out;
  }

  // The four digits behind \u, a pair of them for characters past 16 bits; at_ on the last digit.
  uint32_t unit() {
    const uint32_t first = digits();
    if (first < 0xd800 || first > 0xdfff) return first;
    if (first > 0xdbff || end_ - at_ < 3 || at_[1] != '\\' || at_[2] != 'u')
      wrong("half a character");
    at_ += 2;
    const uint32_t second = digits();
    if (second < 0xdc00 || second > 0xdfff) wrong("half a character");
    return 0x10000 + ((first - 0xd800) << 10) + (second - 0xdc00);
  }
  uint32_t digits() {
    if (end_ - at_ < 5) wrong("an early end");
    uint32_t code = 0;
    for (int i = 0; i < 4; ++i) {
      const char c = *++at_;
      const int digit = c >= '0' && c <= '9'   ? c - '0'
                        : c >= 'a' && c <= 'f' ? c - 'a' + 10
                        : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                               : -1;
      if (digit < 0) wrong("an unknown escape");
      code = code << 4 | static_cast<uint32_t>(digit);
    }
    return code;
  }
  static void append(std::string& out, uint32_t code) {
    if (code < 0x80) {
      out += static_cast<char>(code);
      return;
    }
    const int more = code < 0x800 ? 1 : code < 0x10000 ? 2 : 3;
    out += static_cast<char>((0xf00u >> more & 0xff) | code >> 6 * more);
    for (int i = more - 1; i >= 0; --i) out += static_cast<char>(0x80 | (code >> 6 * i & 0x3f));
  }

  void number(Json& v) {
    v.kind = Json::kReal;
    const bool negative = at_ != end_ && *at_ == '-';
    if (word("NaN")) {
      v.real = std::numeric_limits<double>::quiet_NaN();
      return;
    }
    if (word("Infinity") || word("-Infinity")) {
      v.real = negative ? -std::numeric_limits<double>::infinity()
                        : std::numeric_limits<double>::infinity();
      return;
    }
    const char* from = at_;
    bool whole = true;
    while (at_ != end_ && *at_ && std::strchr("+-0123456789.eE", *at_)) {
      whole &= *at_ != '.' && *at_ != 'e' && *at_ != 'E';
      ++at_;
    }
    const std::string digits(from, at_);  // ends in 0, which the text need not
    if (digits.empty() || digits.size() > 400 || digits[0] == '+') wrong("an unknown value");
    char* stop = nullptr;
    errno = 0;
    if (whole) {
      v.integer = std::strtoll(digits.c_str(), &stop, 10);
      v.kind = Json::kInt;
    }
    if (!whole || errno != 0) {
      v.kind = Json::kReal;
      v.real = std::strtod(digits.c_str(), &stop);
    } else {
      v.real = static_cast<double>(v.integer);
    }
    if (*stop) wrong("a strange number");
  }

  const std::string& what_;
  const char *begin_, *at_, *end_;
  int64_t values_ = 0;
};

}  // namespace

Json parse_json(const std::string& what, const char* begin, const char* end) {
  return Parser(what, begin, end).whole();
}

}  // namespace bitkernels::network
