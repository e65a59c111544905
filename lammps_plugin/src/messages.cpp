#include "messages.h"

#include <cstring>

namespace compactmlip {
namespace {

template <class T>
void add(char* to, const char* from, int64_t bytes) {
  T* sum = reinterpret_cast<T*>(to);
  const int64_t n = bytes / static_cast<int64_t>(sizeof(T));
  for (int64_t k = 0; k < n; k++) {
    T value;
    std::memcpy(&value, from + k * sizeof(T), sizeof(T));
    sum[k] += value;
  }
}

}  // namespace

int Messages::begin(const compactmlip_rows* rows, int64_t count, int64_t scalar) {
  rows_ = rows, count_ = count, scalar_ = scalar;
  int64_t bytes = 0;
  for (int64_t t = 0; t < count; t++) bytes += rows[t].bytes;
  width_ = static_cast<int>((bytes + 7) / 8);
  return width_;
}

int Messages::pack(int n, const int* atoms, double* buffer) const {
  for (int k = 0; k < n; k++) {
    char* to = reinterpret_cast<char*>(buffer + static_cast<size_t>(k) * width_);
    const int node = system_.node(atoms[k]);
    for (int64_t t = 0; t < count_; to += rows_[t].bytes, t++) {
      if (node >= 0) std::memcpy(to, row(t, node), rows_[t].bytes);
      else std::memset(to, 0, rows_[t].bytes);
    }
  }
  return n * width_;
}

void Messages::unpack(int n, int first, const double* buffer) const {
  const int64_t owned = system_.graph().owned;
  for (int k = 0; k < n; k++) {
    const int node = system_.node(first + k);
    if (node < owned) continue;  // none, or an image of an own atom
    const char* from = reinterpret_cast<const char*>(buffer + static_cast<size_t>(k) * width_);
    for (int64_t t = 0; t < count_; from += rows_[t].bytes, t++) std::memcpy(row(t, node), from, rows_[t].bytes);
  }
}

int Messages::pack_reverse(int n, int first, double* buffer) const {
  const int64_t owned = system_.graph().owned;
  for (int k = 0; k < n; k++) {
    const int node = system_.node(first + k);
    char* to = reinterpret_cast<char*>(buffer + static_cast<size_t>(k) * width_);
    for (int64_t t = 0; t < count_; to += rows_[t].bytes, t++) {
      if (node < owned) {
        std::memset(to, 0, rows_[t].bytes);
      } else {
        std::memcpy(to, row(t, node), rows_[t].bytes);
        std::memset(row(t, node), 0, rows_[t].bytes);
      }
    }
  }
  return n * width_;
}

void Messages::add_reverse(int n, const int* atoms, const double* buffer) const {
  for (int k = 0; k < n; k++) {
    const int node = system_.node(atoms[k]);
    if (node < 0) continue;
    const char* from = reinterpret_cast<const char*>(buffer + static_cast<size_t>(k) * width_);
    for (int64_t t = 0; t < count_; from += rows_[t].bytes, t++) {
      if (scalar_ == 4) add<float>(row(t, node), from, rows_[t].bytes);
      else add<double>(row(t, node), from, rows_[t].bytes);
    }
  }
}

}  // namespace compactmlip
