// Derivatives of compactmlip::convolve: each operator says which one its derivative is.
//
// convolve -> convolve_backward -> convolve_double_backward.  The form is linear in each argument, so the
// last step can also be written with the first two operators, which is how higher derivatives are formed.
#include <ATen/TensorOperators.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <array>
#include <optional>

namespace compactmlip {
namespace {

using at::IntArrayRef;
using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Optional = std::optional<Tensor>;
using Three = std::tuple<Tensor, Tensor, Tensor>;
using Four = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using Mask = std::array<bool, 3>;

using In = const Tensor&;
using Convolve = Tensor(In, In, In, In, In, IntArrayRef);
using Backward = Three(In, In, In, In, In, In, IntArrayRef, Mask);
using Maybe = const Optional&;
using DoubleBackward = Four(In, In, In, In, Maybe, Maybe, Maybe, In, In, IntArrayRef, Mask);

Tensor convolve(const Tensor& K, const Tensor& h, const Tensor& R, const Tensor& i, const Tensor& j,
                IntArrayRef path_of_row) {
  static auto op = c10::Dispatcher::singleton()
                       .findSchemaOrThrow("compactmlip::convolve", "")
                       .typed<Convolve>();
  return op.call(K, h, R, i, j, path_of_row);
}

Three backward(const Tensor& g, const Tensor& K, const Tensor& h, const Tensor& R, const Tensor& i,
               const Tensor& j, IntArrayRef path_of_row, Mask mask) {
  static auto op = c10::Dispatcher::singleton()
                       .findSchemaOrThrow("compactmlip::convolve_backward", "")
                       .typed<Backward>();
  return op.call(g, K, h, R, i, j, path_of_row, mask);
}

Four double_backward(const Tensor& g, const Tensor& K, const Tensor& h, const Tensor& R, const Optional& uK,
                     const Optional& uh, const Optional& uR, const Tensor& i, const Tensor& j,
                     IntArrayRef path_of_row, Mask mask) {
  static auto op = c10::Dispatcher::singleton()
                       .findSchemaOrThrow("compactmlip::convolve_double_backward", "")
                       .typed<DoubleBackward>();
  return op.call(g, K, h, R, uK, uh, uR, i, j, path_of_row, mask);
}

Tensor plus(const Tensor& a, const Tensor& b) { return !a.defined() ? b : b.defined() ? a + b : a; }

// As double_backward, of operators that can be differentiated again: the derivative of a sum of multilinear
// forms, one for each argument that is replaced by its direction.
variable_list differentiable_double_backward(const Tensor& g, const std::array<Tensor, 3>& at,
                                             const std::array<Tensor, 3>& u, const Tensor& i, const Tensor& j,
                                             IntArrayRef path_of_row) {
  variable_list sums(4);
  for (int k = 0; k < 3; k++) {
    if (!u[k].defined()) continue;
    auto x = at;
    x[k] = u[k];
    sums[0] = plus(sums[0], convolve(x[0], x[1], x[2], i, j, path_of_row));
    const Mask others{k != 0, k != 1, k != 2};
    auto [gK, gh, gR] = backward(g, x[0], x[1], x[2], i, j, path_of_row, others);
    if (others[0]) sums[1] = plus(sums[1], gK);
    if (others[1]) sums[2] = plus(sums[2], gh);
    if (others[2]) sums[3] = plus(sums[3], gR);
  }
  return sums;
}

class BackwardFunction : public torch::autograd::Function<BackwardFunction> {
 public:
  static variable_list forward(AutogradContext* context, const Tensor& g, const Tensor& K, const Tensor& h,
                               const Tensor& R, const Tensor& i, const Tensor& j,
                               std::vector<int64_t> path_of_row, Mask mask) {
    at::AutoDispatchBelowADInplaceOrView below;
    auto [gK, gh, gR] = backward(g, K, h, R, i, j, path_of_row, mask);
    variable_list unwanted;
    const std::array<Tensor, 3> found{gK, gh, gR};
    for (int k = 0; k < 3; k++)
      if (!mask[k]) unwanted.push_back(found[k]);
    context->mark_non_differentiable(unwanted);
    context->set_materialize_grads(false);
    context->save_for_backward({g, K, h, R, i, j});
    context->saved_data["path_of_row"] = std::move(path_of_row);
    context->saved_data["mask"] = std::vector<bool>(mask.begin(), mask.end());
    return {gK, gh, gR};
  }

  static variable_list backward(AutogradContext* context, variable_list u) {
    const auto saved = context->get_saved_variables();
    const auto path_of_row = context->saved_data["path_of_row"].toIntVector();
    const auto mask = context->saved_data["mask"].toBoolList();
    std::array<Tensor, 3> direction;
    for (int k = 0; k < 3; k++)
      if (mask.get(k)) direction[k] = u[k];
    variable_list sums(8);
    if (!direction[0].defined() && !direction[1].defined() && !direction[2].defined()) return sums;
    if (at::GradMode::is_enabled()) {
      auto found = differentiable_double_backward(saved[0], {saved[1], saved[2], saved[3]}, direction,
                                                  saved[4], saved[5], path_of_row);
      std::copy(found.begin(), found.end(), sums.begin());
      return sums;
    }
    const Mask wanted{context->needs_input_grad(1), context->needs_input_grad(2),
                      context->needs_input_grad(3)};
    auto [g, K, h, R] = double_backward(saved[0], saved[1], saved[2], saved[3], direction[0], direction[1],
                                        direction[2], saved[4], saved[5], path_of_row, wanted);
    if (context->needs_input_grad(0)) sums[0] = g;
    if (wanted[0]) sums[1] = K;
    if (wanted[1]) sums[2] = h;
    if (wanted[2]) sums[3] = R;
    return sums;
  }

 private:
  static Three backward(const Tensor& g, const Tensor& K, const Tensor& h, const Tensor& R, const Tensor& i,
                        const Tensor& j, IntArrayRef path_of_row, Mask mask) {
    return compactmlip::backward(g, K, h, R, i, j, path_of_row, mask);
  }
};

class ConvolveFunction : public torch::autograd::Function<ConvolveFunction> {
 public:
  static Tensor forward(AutogradContext* context, const Tensor& K, const Tensor& h, const Tensor& R,
                        const Tensor& i, const Tensor& j, std::vector<int64_t> path_of_row) {
    at::AutoDispatchBelowADInplaceOrView below;
    Tensor out = convolve(K, h, R, i, j, path_of_row);
    context->save_for_backward({K, h, R, i, j});
    context->saved_data["path_of_row"] = std::move(path_of_row);
    return out;
  }

  static variable_list backward(AutogradContext* context, variable_list gradients) {
    variable_list sums(6);
    if (!gradients[0].defined()) return sums;
    const auto saved = context->get_saved_variables();
    const Mask mask{context->needs_input_grad(0), context->needs_input_grad(1), context->needs_input_grad(2)};
    auto [K, h, R] = compactmlip::backward(gradients[0], saved[0], saved[1], saved[2], saved[3], saved[4],
                                           context->saved_data["path_of_row"].toIntVector(), mask);
    if (mask[0]) sums[0] = K;
    if (mask[1]) sums[1] = h;
    if (mask[2]) sums[2] = R;
    return sums;
  }
};

Tensor convolve_autograd(const Tensor& K, const Tensor& h, const Tensor& R, const Tensor& i, const Tensor& j,
                         IntArrayRef path_of_row) {
  return ConvolveFunction::apply(K, h, R, i, j, path_of_row.vec());
}

Three backward_autograd(const Tensor& g, const Tensor& K, const Tensor& h, const Tensor& R, const Tensor& i,
                        const Tensor& j, IntArrayRef path_of_row, Mask mask) {
  auto found = BackwardFunction::apply(g, K, h, R, i, j, path_of_row.vec(), mask);
  return {found[0], found[1], found[2]};
}

}  // namespace

TORCH_LIBRARY_IMPL(compactmlip, Autograd, m) {
  m.impl("convolve", convolve_autograd);
  m.impl("convolve_backward", backward_autograd);
}

}  // namespace compactmlip
