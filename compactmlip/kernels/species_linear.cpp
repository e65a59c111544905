// compactmlip::species_linear: each atom's features times the matrix of its species.
//
//   out[i, m, d] = sum_c x[i, m, c] W[z_i, c, d]
//
// The weights are constants: the gradient is with respect to x only.
#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <vector>

namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

void check(const Tensor& x, const Tensor& weights, const Tensor& species) {
  TORCH_CHECK_VALUE(x.dim() == 3 && weights.dim() == 3 && x.size(2) == weights.size(1) &&
                        x.scalar_type() == weights.scalar_type(),
                    "compactmlip::species_linear: x (atoms, components, c) and weights (species, c, d) must fit "
                    "each other, not ",
                    x.sizes(), " ", x.scalar_type(), " and ", weights.sizes(), " ", weights.scalar_type(), ".");
  TORCH_CHECK_VALUE(species.dim() == 1 && species.scalar_type() == at::kLong && species.size(0) == x.size(0),
                    "compactmlip::species_linear: species must be ", x.size(0), " int64, not ", species.sizes(),
                    " ", species.scalar_type(), ".");
}

// One matrix product per species that is present.
Tensor species_linear_cpu(const Tensor& x, const Tensor& weights, const Tensor& species) {
  check(x, weights, species);
  const int64_t num_species = weights.size(0), n = x.size(0);
  const Tensor z = species.contiguous();
  const int64_t* of = z.const_data_ptr<int64_t>();
  std::vector<int64_t> count(num_species, 0);
  for (int64_t i = 0; i < n; i++) {
    TORCH_CHECK_INDEX(of[i] >= 0 && of[i] < num_species, "compactmlip::species_linear: atom ", i,
                      " has species ", of[i], ", but there are weights of ", num_species, ".");
    count[of[i]]++;
  }
  Tensor out;
  for (int64_t s = 0; s < num_species; s++) {
    if (count[s] == 0) continue;
    if (count[s] == n) return at::matmul(x, weights[s]);
    if (!out.defined()) out = at::empty({n, x.size(1), weights.size(2)}, x.options());
    Tensor chosen = at::empty({count[s]}, z.options());
    int64_t* at = chosen.mutable_data_ptr<int64_t>();
    for (int64_t i = 0; i < n; i++)
      if (of[i] == s) *at++ = i;
    out.index_copy_(0, chosen, at::matmul(x.index_select(0, chosen), weights[s]));
  }
  return out.defined() ? out : at::zeros({n, x.size(1), weights.size(2)}, x.options());
}

Tensor species_linear_meta(const Tensor& x, const Tensor& weights, const Tensor& species) {
  return x.new_empty_symint({x.sym_size(0), x.sym_size(1), weights.sym_size(2)});
}

class SpeciesLinear : public torch::autograd::Function<SpeciesLinear> {
 public:
  static Tensor forward(AutogradContext* context, const Tensor& x, const Tensor& weights,
                        const Tensor& species) {
    at::AutoDispatchBelowADInplaceOrView below;
    context->save_for_backward({weights, species});
    return call(x, weights, species);
  }

  static variable_list backward(AutogradContext* context, variable_list gradients) {
    const auto saved = context->get_saved_variables();
    TORCH_CHECK(!saved[0].requires_grad(),
                "compactmlip::species_linear has no gradient with respect to its weights.");
    return {call(gradients[0], saved[0].transpose(1, 2), saved[1]), Tensor(), Tensor()};
  }

  static Tensor call(const Tensor& x, const Tensor& weights, const Tensor& species) {
    static auto op = c10::Dispatcher::singleton()
                         .findSchemaOrThrow("compactmlip::species_linear", "")
                         .typed<Tensor(const Tensor&, const Tensor&, const Tensor&)>();
    return op.call(x, weights, species);
  }
};

Tensor species_linear_autograd(const Tensor& x, const Tensor& weights, const Tensor& species) {
  return SpeciesLinear::apply(x, weights, species);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(compactmlip, m) {
  m.def("species_linear(Tensor x, Tensor weights, Tensor species) -> Tensor");
}

TORCH_LIBRARY_IMPL(compactmlip, CPU, m) { m.impl("species_linear", species_linear_cpu); }
TORCH_LIBRARY_IMPL(compactmlip, Meta, m) { m.impl("species_linear", species_linear_meta); }
TORCH_LIBRARY_IMPL(compactmlip, Autograd, m) { m.impl("species_linear", species_linear_autograd); }
