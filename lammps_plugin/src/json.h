// Reads the description that a deployed file carries.
#pragma once

#include <cstdlib>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace compactmlip {

// A value of JSON, NaN and infinities included.
struct Json {
  std::string text;  // of strings and literals
  double number = 0;
  std::vector<Json> items;
  std::vector<std::pair<std::string, Json>> members;

  const Json* find(const std::string& key) const {
    for (const auto& [name, value] : members)
      if (name == key) return &value;
    return nullptr;
  }
  const Json& at(const std::string& key) const {
    const Json* value = find(key);
    if (!value) throw std::runtime_error("it has no '" + key + "'");
    return *value;
  }
};

class JsonReader {
 public:
  explicit JsonReader(const std::string& text) : text_(text) {}

  Json read() {
    Json value = read_value(0);
    skip_space();
    if (at_ != text_.size()) fail();
    return value;
  }

 private:
  static constexpr int kDeepest = 64;

  [[noreturn]] void fail() const {
    throw std::runtime_error("its description is damaged at character " + std::to_string(at_));
  }
  void skip_space() {
    while (at_ < text_.size() && (text_[at_] == ' ' || text_[at_] == '\n' || text_[at_] == '\t' || text_[at_] == '\r'))
      at_++;
  }
  char next() {
    skip_space();
    if (at_ >= text_.size()) fail();
    return text_[at_];
  }
  bool take(char c) {
    if (next() != c) return false;
    at_++;
    return true;
  }

  Json read_value(int depth) {
    if (depth > kDeepest) fail();
    Json value;
    const char c = next();
    if (c == '"') {
      value.text = read_string();
    } else if (take('[')) {
      if (take(']')) return value;
      do value.items.push_back(read_value(depth + 1));
      while (take(','));
      if (!take(']')) fail();
    } else if (take('{')) {
      if (take('}')) return value;
      do {
        if (next() != '"') fail();
        std::string key = read_string();
        if (!take(':')) fail();
        value.members.emplace_back(std::move(key), read_value(depth + 1));
      } while (take(','));
      if (!take('}')) fail();
    } else {
      while (at_ < text_.size() && std::string(",]} \n\t\r").find(text_[at_]) == std::string::npos)
        value.text += text_[at_++];
      if (value.text.empty()) fail();
      value.number = std::strtod(value.text.c_str(), nullptr);
    }
    return value;
  }

  // Characters beyond ASCII, which Python escapes, become '?': they occur in names only.
  std::string read_string() {
    std::string found;
    at_++;
    while (at_ < text_.size() && text_[at_] != '"') {
      char c = text_[at_++];
      if (c == '\\') {
        if (at_ >= text_.size()) fail();
        const char escaped = text_[at_++];
        if (escaped == 'u') {
          if (at_ + 4 > text_.size()) fail();
          const long code = std::strtol(text_.substr(at_, 4).c_str(), nullptr, 16);
          c = code > 0 && code < 128 ? static_cast<char>(code) : '?';
          at_ += 4;
        } else {
          c = escaped == 'n' ? '\n' : escaped == 't' ? '\t' : escaped;
        }
      }
      found += c;
    }
    if (at_ >= text_.size()) fail();
    at_++;
    return found;
  }

  const std::string& text_;
  size_t at_ = 0;
};

}  // namespace compactmlip
