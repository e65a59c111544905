// The operators compactmlip::contract, contract_backward and contract_second.
//
// contract_backward gives the gradients of <grad, out>, and contract_second those of
// <u_x, d<grad, out>/dx> + <u_weights, d<grad, out>/dweights>.  Derivatives of third and higher order are
// those of the same polynomials written with torch's operators, which is slow, and seldom asked for.
#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

#include "contraction_atoms.h"

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using OptionalTensor = std::optional<Tensor>;

// ---- numbers ----------------------------------------------------------------------------------------

Plan plan_of(const Tensor& table) {
  TORCH_CHECK(table.scalar_type() == at::kInt && table.dim() == 1 && table.is_contiguous(),
              "compactmlip::contract: the plan must be a contiguous int32 vector");
  return read_plan(table.const_data_ptr<int32_t>(), table.numel());
}

// Checked and contiguous arguments.
struct Problem {
  Problem(const Tensor& x_, const Tensor& weights_, const Tensor& species_, const Tensor& table_,
          const Tensor& terms_)
      : table(table_), plan(plan_of(table)), x(x_.contiguous()), weights(weights_.contiguous()),
        species(species_.contiguous()), terms(terms_.contiguous()) {
    TORCH_CHECK(x.dim() == 3 && x.size(1) == plan.components,
                "compactmlip::contract: x must have shape (atoms, ", plan.components, ", channels), not ",
                x.sizes());
    TORCH_CHECK(weights.dim() == 3 && weights.size(0) > 0 && weights.size(1) == plan.products &&
                    weights.size(2) == x.size(2),
                "compactmlip::contract: weights must have shape (species, ", plan.products, ", ", x.size(2),
                "), not ", weights.sizes());
    TORCH_CHECK(species.dim() == 1 && species.size(0) == x.size(0) && species.scalar_type() == at::kLong,
                "compactmlip::contract: species must be ", x.size(0), " int64, not ", species.sizes(), " ",
                species.scalar_type());
    TORCH_CHECK(terms.dim() == 1 && terms.size(0) == plan.terms,
                "compactmlip::contract: there must be ", plan.terms, " terms, not ", terms.sizes());
    TORCH_CHECK(weights.scalar_type() == x.scalar_type() && terms.scalar_type() == x.scalar_type(),
                "compactmlip::contract: x, weights and terms must have one dtype, not ", x.scalar_type(),
                ", ", weights.scalar_type(), " and ", terms.scalar_type());
  }

  Tensor checked_grad(const Tensor& grad) const {
    check_like(grad, {x.size(0), plan.rows, x.size(2)}, "the gradient");
    return grad.contiguous();
  }

  // Undefined where there is none.
  Tensor checked_tangent(const OptionalTensor& tangent, const Tensor& like, const char* name) const {
    if (!tangent) return Tensor();
    check_like(*tangent, like.sizes(), name);
    return tangent->contiguous();
  }

  template <typename T> Arrays<T> arrays() const {
    Arrays<T> a{x.const_data_ptr<T>(), weights.const_data_ptr<T>(), terms.const_data_ptr<T>()};
    a.channels = x.size(2);
    return a;
  }

  Tensor nothing() const { return at::empty({0}, x.options()); }

  const Tensor table;  // owns what the plan points to
  const Plan plan;
  const Tensor x, weights, species, terms;

 private:
  void check_like(const Tensor& t, at::IntArrayRef shape, const char* name) const {
    TORCH_CHECK(t.sizes() == shape && t.scalar_type() == x.scalar_type(), "compactmlip::contract: ", name,
                " must have shape ", shape, " and dtype ", x.scalar_type(), ", not ", t.sizes(), " and ",
                t.scalar_type());
  }
};

template <typename T> T* data(Tensor& t) { return t.numel() ? t.mutable_data_ptr<T>() : nullptr; }

Tensor contract(const Tensor& x, const Tensor& weights, const Tensor& species, const Tensor& table,
                const Tensor& terms, int64_t rows) {
  const Problem problem(x, weights, species, table, terms);
  const Plan& p = problem.plan;
  TORCH_CHECK(rows == p.rows, "compactmlip::contract: the plan has ", p.rows, " rows, not ", rows);
  Tensor out = at::empty({x.size(0), rows, x.size(2)}, x.options());
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "compactmlip::contract", [&] {
    auto a = problem.arrays<scalar_t>();
    a.out = data<scalar_t>(out);
    using V = Lanes<scalar_t>;
    contract_all<scalar_t, V, V>(p, a, problem.species, weights.size(0), nullptr);
  });
  return out;
}

// A gradient that is not wanted is empty.
std::tuple<Tensor, Tensor> contract_backward(const Tensor& grad_, const Tensor& x, const Tensor& weights,
                                             const Tensor& species, const Tensor& table,
                                             const Tensor& terms, bool want_x, bool want_weights) {
  const Problem problem(x, weights, species, table, terms);
  const Tensor grad = problem.checked_grad(grad_);
  Tensor grad_x = want_x ? at::empty_like(problem.x) : problem.nothing();
  Tensor grad_weights = want_weights ? at::zeros_like(problem.weights) : problem.nothing();
  if (!want_x && !want_weights) return {grad_x, grad_weights};
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "compactmlip::contract_backward", [&] {
    auto a = problem.arrays<scalar_t>();
    a.grad = grad.const_data_ptr<scalar_t>();
    a.grad_x = data<scalar_t>(grad_x);
    using V = Lanes<scalar_t>;
    contract_all<scalar_t, V, V>(problem.plan, a, problem.species, weights.size(0),
                                 want_weights ? &grad_weights : nullptr);
  });
  return {grad_x, grad_weights};
}

// With respect to grad, x and the weights.
std::tuple<Tensor, Tensor, Tensor> contract_second(const OptionalTensor& u_x,
                                                   const OptionalTensor& u_weights, const Tensor& grad_,
                                                   const Tensor& x, const Tensor& weights,
                                                   const Tensor& species, const Tensor& table,
                                                   const Tensor& terms, bool want_weights) {
  const Problem problem(x, weights, species, table, terms);
  const Tensor grad = problem.checked_grad(grad_);
  const Tensor tangent_x = problem.checked_tangent(u_x, x, "u_x");
  const Tensor tangent_weights = problem.checked_tangent(u_weights, weights, "u_weights");
  Tensor out = at::empty_like(grad), grad_x = at::empty_like(problem.x);
  Tensor grad_weights = want_weights ? at::zeros_like(problem.weights) : problem.nothing();
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "compactmlip::contract_second", [&] {
    auto a = problem.arrays<scalar_t>();
    a.grad = grad.const_data_ptr<scalar_t>();
    if (u_x) a.tangent_x = tangent_x.const_data_ptr<scalar_t>();
    if (u_weights) a.tangent_weights = tangent_weights.const_data_ptr<scalar_t>();
    a.out = data<scalar_t>(out);
    a.grad_x = data<scalar_t>(grad_x);
    using V = Lanes<scalar_t>;
    using D = Dual<V>;
    const auto run = u_weights ? contract_all<scalar_t, D, D> : contract_all<scalar_t, D, V>;
    run(problem.plan, a, problem.species, weights.size(0), want_weights ? &grad_weights : nullptr);
  });
  return {out, grad_x, grad_weights};
}

// The same as contract with torch's operators: differentiable any number of times.
Tensor contract_plainly(const Tensor& x, const Tensor& weights, const Tensor& species, const Tensor& table,
                        const Tensor& terms) {
  const Problem problem(x, weights, species, table, terms);
  const Plan& p = problem.plan;
  const auto index = [&](const int32_t* values, int64_t count) {
    return at::from_blob(const_cast<int32_t*>(values), {count}, at::kInt).to(at::kLong);
  };
  const auto owner = [&](const int32_t* starts, int64_t count) {
    return at::repeat_interleave(index(starts + 1, count) - index(starts, count));
  };
  variable_list nodes = x.unbind(1);
  nodes.push_back(at::ones_like(nodes[0]));
  for (int64_t k = p.components + 1; k < p.nodes; ++k) nodes.push_back(nodes[p.left[k]] * nodes[p.right[k]]);
  const Tensor node = at::stack(nodes, 1), group = owner(p.group_start, p.groups);
  const Tensor prefix = node.index_select(1, index(p.group_left, p.groups)) *
                        node.index_select(1, index(p.group_right, p.groups));
  const Tensor factor = node.index_select(1, index(p.factor, p.coefficients));
  const Tensor monomial = prefix.index_select(1, group) * factor;
  const Tensor parts = weights.index_select(1, index(p.term_product, p.terms)) * terms.unsqueeze(1);
  const Tensor coefficients = at::zeros({weights.size(0), p.coefficients, x.size(2)}, x.options())
                                  .index_add(1, owner(p.term_start, p.coefficients), parts);
  const Tensor set = weights.size(0) == 1 ? at::zeros_like(species) : species;
  const Tensor row = owner(p.row_start, p.rows).index_select(0, group);
  return at::zeros({x.size(0), p.rows, x.size(2)}, x.options())
      .index_add(1, row, monomial * coefficients.index_select(0, set));
}

// ---- shapes without numbers -------------------------------------------------------------------------

Tensor contract_meta(const Tensor& x, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                     int64_t rows) {
  return at::empty_symint({x.sym_size(0), rows, x.sym_size(2)}, x.options());
}

std::tuple<Tensor, Tensor> backward_meta(const Tensor&, const Tensor& x, const Tensor& weights,
                                         const Tensor&, const Tensor&, const Tensor&, bool want_x,
                                         bool want_weights) {
  return {want_x ? at::empty_like(x) : at::empty({0}, x.options()),
          want_weights ? at::empty_like(weights) : at::empty({0}, x.options())};
}

std::tuple<Tensor, Tensor, Tensor> second_meta(const OptionalTensor&, const OptionalTensor&,
                                               const Tensor& grad, const Tensor& x, const Tensor& weights,
                                               const Tensor&, const Tensor&, const Tensor&,
                                               bool want_weights) {
  return {at::empty_like(grad), at::empty_like(x),
          want_weights ? at::empty_like(weights) : at::empty({0}, x.options())};
}

// ---- derivatives ------------------------------------------------------------------------------------

// Through the dispatcher, so that the next derivative can be taken.
template <typename Function, typename... Arguments>
auto call(const char* name, const Arguments&... arguments) {
  const auto handle = c10::Dispatcher::singleton().findSchemaOrThrow(name, "");
  return handle.template typed<Function>().call(arguments...);
}

#define CALL(function, ...) call<decltype(function)>("compactmlip::" #function, __VA_ARGS__)

OptionalTensor optional(const Tensor& t) { return t.defined() ? OptionalTensor(t) : std::nullopt; }

struct Contract : torch::autograd::Function<Contract> {
  static Tensor forward(AutogradContext* context, const Tensor& x, const Tensor& weights,
                        const Tensor& species, const Tensor& table, const Tensor& terms, int64_t rows) {
    at::AutoDispatchBelowADInplaceOrView below;
    context->save_for_backward({x, weights, species, table, terms});
    return CALL(contract, x, weights, species, table, terms, rows);
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    variable_list result(6);
    if (!grads[0].defined()) return result;
    const auto saved = context->get_saved_variables();
    const bool want_x = context->needs_input_grad(0), want_weights = context->needs_input_grad(1);
    const auto [x, weights] = CALL(contract_backward, grads[0], saved[0], saved[1], saved[2], saved[3],
                                   saved[4], want_x, want_weights);
    if (want_x) result[0] = x;
    if (want_weights) result[1] = weights;
    return result;
  }
};

struct Backward : torch::autograd::Function<Backward> {
  static variable_list forward(AutogradContext* context, const Tensor& grad, const Tensor& x,
                               const Tensor& weights, const Tensor& species, const Tensor& table,
                               const Tensor& terms, bool want_x, bool want_weights) {
    at::AutoDispatchBelowADInplaceOrView below;
    context->save_for_backward({grad, x, weights, species, table, terms});
    context->set_materialize_grads(false);
    auto [grad_x, grad_weights] =
        CALL(contract_backward, grad, x, weights, species, table, terms, want_x, want_weights);
    return {grad_x, grad_weights};
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    variable_list result(8);
    if (!grads[0].defined() && !grads[1].defined()) return result;
    const auto saved = context->get_saved_variables();
    const bool want_weights = context->needs_input_grad(2);
    const auto [grad, x, weights] = CALL(contract_second, optional(grads[0]), optional(grads[1]), saved[0],
                                         saved[1], saved[2], saved[3], saved[4], saved[5], want_weights);
    if (context->needs_input_grad(0)) result[0] = grad;
    if (context->needs_input_grad(1)) result[1] = x;
    if (want_weights) result[2] = weights;
    return result;
  }
};

// Something to differentiate with respect to, part of the graph that it came from if there is one.
Tensor differentiable(const Tensor& t) {
  if (!t.defined() || (t.requires_grad() && at::GradMode::is_enabled())) return t;
  return t.detach().requires_grad_();
}

Tensor overlap(const Tensor& a, const Tensor& b) { return (a * b).sum(); }

variable_list gradients(const Tensor& of, const variable_list& with_respect_to) {
  return torch::autograd::grad({of}, with_respect_to, {}, true, true, true);
}

struct Second : torch::autograd::Function<Second> {
  static variable_list forward(AutogradContext* context, const OptionalTensor& u_x,
                               const OptionalTensor& u_weights, const Tensor& grad, const Tensor& x,
                               const Tensor& weights, const Tensor& species, const Tensor& table,
                               const Tensor& terms, bool want_weights) {
    at::AutoDispatchBelowADInplaceOrView below;
    context->save_for_backward({u_x.value_or(Tensor()), u_weights.value_or(Tensor()), grad, x, weights,
                                species, table, terms});
    context->set_materialize_grads(false);
    auto [a, b, c] =
        CALL(contract_second, u_x, u_weights, grad, x, weights, species, table, terms, want_weights);
    return {a, b, c};
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    auto saved = context->get_saved_variables();
    const bool further = at::GradMode::is_enabled();
    variable_list leaves(5), result(9);
    for (int k = 0; k < 5; ++k) leaves[k] = differentiable(saved[k]);
    at::AutoGradMode enabled(true);
    const Tensor &u_x = leaves[0], &u_weights = leaves[1], &grad = leaves[2];
    const Tensor &x = leaves[3], &weights = leaves[4];
    const Tensor out = contract_plainly(x, weights, saved[5], saved[6], saved[7]);
    const variable_list first = gradients(overlap(grad, out), {x, weights});
    Tensor along = at::zeros({}, x.options());
    if (u_x.defined()) along = along + overlap(u_x, first[0]);
    if (u_weights.defined()) along = along + overlap(u_weights, first[1]);
    const variable_list second = gradients(along, {grad, x, weights});
    Tensor total = at::zeros({}, x.options());
    for (int k = 0; k < 3; ++k)
      if (grads[k].defined() && second[k].defined()) total = total + overlap(grads[k], second[k]);
    variable_list wanted;
    for (const Tensor& leaf : leaves)
      if (leaf.defined()) wanted.push_back(leaf);
    variable_list third(wanted.size());
    if (total.requires_grad()) third = gradients(total, wanted);
    for (int k = 0, next = 0; k < 5; ++k)
      if (leaves[k].defined()) {
        const Tensor& g = third[next++];
        if (g.defined()) result[k] = further ? g : g.detach();
      }
    return result;
  }
};

Tensor contract_autograd(const Tensor& x, const Tensor& weights, const Tensor& species, const Tensor& table,
                         const Tensor& terms, int64_t rows) {
  return Contract::apply(x, weights, species, table, terms, rows);
}

std::tuple<Tensor, Tensor> backward_autograd(const Tensor& grad, const Tensor& x, const Tensor& weights,
                                             const Tensor& species, const Tensor& table,
                                             const Tensor& terms, bool want_x, bool want_weights) {
  const auto r = Backward::apply(grad, x, weights, species, table, terms, want_x, want_weights);
  return {r[0], r[1]};
}

std::tuple<Tensor, Tensor, Tensor> second_autograd(const OptionalTensor& u_x,
                                                   const OptionalTensor& u_weights, const Tensor& grad,
                                                   const Tensor& x, const Tensor& weights,
                                                   const Tensor& species, const Tensor& table,
                                                   const Tensor& terms, bool want_weights) {
  const auto r = Second::apply(u_x, u_weights, grad, x, weights, species, table, terms, want_weights);
  return {r[0], r[1], r[2]};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(compactmlip, m) {
  m.def("contract(Tensor x, Tensor weights, Tensor species, Tensor table, Tensor terms, int rows) "
        "-> Tensor");
  m.def("contract_backward(Tensor grad, Tensor x, Tensor weights, Tensor species, Tensor table, "
        "Tensor terms, bool want_x, bool want_weights) -> (Tensor, Tensor)");
  m.def("contract_second(Tensor? u_x, Tensor? u_weights, Tensor grad, Tensor x, Tensor weights, "
        "Tensor species, Tensor table, Tensor terms, bool want_weights) -> (Tensor, Tensor, Tensor)");
}
TORCH_LIBRARY_IMPL(compactmlip, CPU, m) {
  m.impl("contract", contract);
  m.impl("contract_backward", contract_backward);
  m.impl("contract_second", contract_second);
}
TORCH_LIBRARY_IMPL(compactmlip, Meta, m) {
  m.impl("contract", contract_meta);
  m.impl("contract_backward", backward_meta);
  m.impl("contract_second", second_meta);
}
TORCH_LIBRARY_IMPL(compactmlip, Autograd, m) {
  m.impl("contract", contract_autograd);
  m.impl("contract_backward", backward_autograd);
  m.impl("contract_second", second_autograd);
}
