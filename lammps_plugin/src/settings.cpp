#include "settings.h"

#include <algorithm>
#include <charconv>
#include <cstddef>
#include <functional>
#include <map>
#include <stdexcept>

namespace compactmlip {
namespace {

using Words = std::vector<std::string>;

template <class T>
T number(const std::string& keyword, const std::string& word, const char* kind) {
  T value{};
  const char* end = word.data() + word.size();
  const auto [stop, error] = std::from_chars(word.data(), end, value);
  if (error != std::errc() || stop != end)
    throw std::runtime_error("'" + keyword + "' needs " + kind + ", not '" + word + "'");
  return value;
}

int count(const std::string& keyword, const std::string& word) {
  const int value = number<int>(keyword, word, "a whole number");
  if (value < 1) throw std::runtime_error(keyword + " must be at least 1, not " + word);
  return value;
}

std::string one_of(const std::string& keyword, const std::string& word, const Words& known) {
  if (std::find(known.begin(), known.end(), word) != known.end()) return word;
  std::string list;
  for (const std::string& name : known) list += (list.empty() ? "" : ", ") + name;
  throw std::runtime_error("unknown " + keyword + " '" + word + "'; known are " + list);
}

// Takes the values of a keyword from the words after it.
using Reader = std::function<void(Settings&, const std::string& keyword, const Words& values)>;

const std::string& only(const std::string& keyword, const Words& values) {
  if (values.empty()) throw std::runtime_error("keyword '" + keyword + "' has no value");
  return values[0];
}

void read_committee(Settings& to, const std::string& keyword, const Words& values) {
  if (values.size() < 2)
    throw std::runtime_error("keyword '" + keyword + "' needs a number of steps and the files of other models");
  to.committee_every = count(keyword, values[0]);
  to.committee.assign(values.begin() + 1, values.end());
}

void read_stop_deviation(Settings& to, const std::string& keyword, const Words& values) {
  to.stop_deviation = number<double>(keyword, only(keyword, values), "a force in eV/Angstrom");
  if (!(to.stop_deviation > 0)) throw std::runtime_error(keyword + " must be above 0, not " + values[0]);
}

const std::map<std::string, Reader>& readers() {
  static const std::map<std::string, Reader> known = {
      {"check", [](Settings& to, const auto& k, const auto& v) { to.check_every = count(k, only(k, v)); }},
      {"committee", read_committee},
      {"device", [](Settings& to, const auto& k, const auto& v) { to.device = only(k, v); }},
      {"precision", [](Settings& to, const auto& k, const auto& v) {
         to.precision = one_of(k, only(k, v), {"float32", "float64", "mixed", "bf16"});
       }},
      {"stop_deviation", read_stop_deviation},
      {"stop_outside", [](Settings& to, const auto& k, const auto& v) {
         to.stop_outside = one_of(k, only(k, v), {"yes", "no"}) == "yes";
       }},
      {"threads", [](Settings& to, const auto& k, const auto& v) { to.threads = count(k, only(k, v)); }},
  };
  return known;
}

[[noreturn]] void unknown(const std::string& word) {
  std::string names;
  for (const auto& [name, reader] : readers()) names += (names.empty() ? "" : ", ") + name;
  throw std::runtime_error("unknown keyword '" + word + "'; known are " + names);
}

}  // namespace

Settings read_settings(const Words& words) {
  Settings found;
  const auto is_keyword = [](const std::string& word) { return readers().count(word) > 0; };
  for (size_t at = 0; at < words.size();) {
    const std::string& keyword = words[at++];
    if (!is_keyword(keyword)) unknown(keyword);
    const auto end = std::find_if(words.begin() + at, words.end(), is_keyword);
    const Words values(words.begin() + at, end);
    if (keyword != "committee" && values.size() > 1) unknown(values[1]);
    readers().at(keyword)(found, keyword, values);
    at += values.size();
  }
  if (found.stop_outside && !found.check_every)
    throw std::runtime_error("'stop_outside yes' needs 'check N', which says how often to look");
  if (found.stop_deviation < std::numeric_limits<double>::infinity() && !found.committee_every)
    throw std::runtime_error("'stop_deviation' needs 'committee N FILE ...', the models to compare with");
  return found;
}

}  // namespace compactmlip
