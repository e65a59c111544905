// compactmlip::ghost_exchange and compactmlip::owned: features where a structure is split among processes.
//
//   ghost_exchange   rows of owned atoms -> rows of all nodes; gradients of ghosts go to their owners
//   owned            rows of all nodes -> rows of owned atoms
//
// Without an exchange (see the header) all nodes are owned, and both operators return what they are given.
#include "ghost_exchange.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/alias.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>
#include <utility>
#include <vector>

namespace compactmlip {
namespace {

using at::Tensor;
using at::TensorList;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

thread_local const compactmlip_exchange* current = nullptr;

void check(const Tensor& x, int64_t rows, const char* name) {
  TORCH_CHECK_VALUE(x.dim() >= 1 && x.size(0) == rows, name, ": a tensor has shape ", x.sizes(), ", not ", rows,
                    " rows.");
  TORCH_CHECK_VALUE(x.device().is_cpu(), name, ": tensors must be on the CPU, not on ", x.device(), ".");
}

std::vector<compactmlip_rows> rows_of(const variable_list& tensors) {
  std::vector<compactmlip_rows> rows;
  for (const Tensor& t : tensors)
    rows.push_back({t.data_ptr(), t.numel() / std::max<int64_t>(t.size(0), 1) * t.element_size()});
  return rows;
}

class GhostExchange : public torch::autograd::Function<GhostExchange> {
 public:
  static variable_list forward(AutogradContext* context, TensorList features) {
    const compactmlip_exchange& exchange = *current;
    variable_list all;
    for (const Tensor& owned : features) {
      check(owned, exchange.owned, "compactmlip::ghost_exchange");
      auto shape = owned.sizes().vec();
      shape[0] = exchange.nodes;
      all.push_back(at::empty(shape, owned.options()));
      all.back().narrow(0, 0, exchange.owned).copy_(owned);
    }
    exchange.forward(exchange.self, rows_of(all).data(), static_cast<int64_t>(all.size()));
    context->saved_data["exchange"] = reinterpret_cast<int64_t>(current);
    return all;
  }

  static variable_list backward(AutogradContext* context, variable_list gradients) {
    const int64_t of_forward = context->saved_data["exchange"].toInt();
    TORCH_CHECK(current && reinterpret_cast<int64_t>(current) == of_forward,
                "compactmlip::ghost_exchange: the gradient must be taken while the exchange of the features is set.");
    const compactmlip_exchange& exchange = *current;
    variable_list all;
    for (const Tensor& gradient : gradients) {
      check(gradient, exchange.nodes, "compactmlip::ghost_exchange");
      all.push_back(gradient.clone(at::MemoryFormat::Contiguous));
    }
    const int64_t scalar = all.empty() ? 0 : static_cast<int64_t>(all[0].element_size());
    for (const Tensor& gradient : all)
      TORCH_CHECK_VALUE(gradient.is_floating_point() && gradient.element_size() == scalar,
                        "compactmlip::ghost_exchange: gradients must have one type.");
    exchange.reverse(exchange.self, rows_of(all).data(), static_cast<int64_t>(all.size()), scalar);
    for (Tensor& gradient : all) gradient = gradient.narrow(0, 0, exchange.owned);
    return all;
  }
};

// What is recorded (torch.jit.trace, without gradients) must be a new tensor, or later uses of the argument
// would become uses of the result.  With gradients that would be one more node of the graph for nothing.
Tensor itself(const Tensor& x) { return x.requires_grad() && at::GradMode::is_enabled() ? x : at::alias(x); }

std::vector<Tensor> ghost_exchange(TensorList features) {
  if (current) return features.empty() ? std::vector<Tensor>() : GhostExchange::apply(features);
  std::vector<Tensor> found;
  for (const Tensor& x : features) found.push_back(itself(x));
  return found;
}

std::vector<Tensor> owned(TensorList features) {
  std::vector<Tensor> found;
  for (const Tensor& x : features) {
    if (current) check(x, current->nodes, "compactmlip::owned");
    found.push_back(current ? x.narrow(0, 0, current->owned) : itself(x));
  }
  return found;
}

}  // namespace
}  // namespace compactmlip

__attribute__((visibility("default"))) const compactmlip_exchange* compactmlip_set_exchange(
    const compactmlip_exchange* exchange) {
  return std::exchange(compactmlip::current, exchange);
}

TORCH_LIBRARY_FRAGMENT(compactmlip, m) {
  m.def("ghost_exchange(Tensor[] features) -> Tensor[]", compactmlip::ghost_exchange);
  m.def("owned(Tensor[] features) -> Tensor[]", compactmlip::owned);
}
