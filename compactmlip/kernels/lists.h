// Lists of tensors (atoms, rows, channels) as arguments of operators with a derivative.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <array>
#include <optional>
#include <vector>

namespace compactmlip {
namespace {

using at::Tensor;
using at::TensorList;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using OptionalTensor = std::optional<Tensor>;

// Autograd looks for tensors among the arguments of a function, not in lists.
constexpr size_t kMaxParts = 6;
using Parts = std::array<OptionalTensor, kMaxParts>;
#define PARTS(p) \
  const OptionalTensor &p##0, const OptionalTensor &p##1, const OptionalTensor &p##2, \
      const OptionalTensor &p##3, const OptionalTensor &p##4, const OptionalTensor &p##5
#define ALL_PARTS(p) p##0, p##1, p##2, p##3, p##4, p##5

inline Parts parts_of(TensorList list, const char* name) {
  TORCH_CHECK(list.size() <= kMaxParts, name, ": at most ", kMaxParts, " tensors in a list, not ", list.size());
  Parts parts;
  std::copy(list.begin(), list.end(), parts.begin());
  return parts;
}

inline variable_list list_of(const Parts& parts) {
  variable_list list;
  for (const OptionalTensor& part : parts)
    if (part) list.push_back(*part);
  return list;
}

inline Tensor with_close_channels(const Tensor& t) {
  return t.stride(2) == 1 || t.size(2) <= 1 ? t : t.contiguous();
}

// Rows of one atom in one or more tensors whose channels are neighbours in memory.
template <class T>
struct Rows {
  struct Part {
    T* data;
    int64_t rows, atom_stride, row_stride;
    T* row(int64_t i, int64_t m) const { return data + i * atom_stride + m * row_stride; }
  };
  std::vector<Part> parts;

  void add(const Tensor& t) {
    T* data = t.numel() ? static_cast<T*>(t.data_ptr()) : nullptr;
    parts.push_back({data, t.size(1), t.stride(0), t.stride(1)});
  }
  int64_t of_atom(int64_t i, T** to) const {
    int64_t n = 0;
    for (const Part& part : parts)
      for (int64_t k = 0; k < part.rows; ++k) to[n++] = part.row(i, k);
    return n;
  }
};

// Through the dispatcher, so that the call is traced and differentiated like any other.
template <typename Function, typename... Arguments>
auto call_operator(const char* name, const Arguments&... arguments) {
  const auto handle = c10::Dispatcher::singleton().findSchemaOrThrow(name, "");
  return handle.template typed<Function>().call(arguments...);
}
#define CALL_OPERATOR(function, ...) \
  call_operator<decltype(function)>("compactmlip::" #function, __VA_ARGS__)

}  // namespace
}  // namespace compactmlip
