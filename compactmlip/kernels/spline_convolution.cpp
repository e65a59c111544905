// compactmlip::spline_convolve: messages of all paths from edge vectors, neighbours' features and tables of
// radial weights; and its gradient with respect to vectors and features.
//
// For deployed models: second derivatives are refused.
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "spline_convolution.h"

namespace compactmlip {
namespace {

using at::TensorList;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Gradients = std::tuple<Tensor, std::vector<Tensor>>;

#define CONVOLUTION_ARGUMENTS                                                                              \
  const Tensor &vectors, TensorList features, const Tensor &species, const Tensor &centers,                \
      const Tensor &neighbors, const Tensor &table, const Tensor &pairs, const Tensor &structure,          \
      const Tensor &coefficients, IntArrayRef paths, IntArrayRef channels, double cutoff,   \
      double kink, int64_t knots_before_kink
#define CONVOLUTION_CALL \
  vectors, features, species, centers, neighbors, table, pairs, structure, coefficients, paths, channels, \
      cutoff, kink, knots_before_kink

// ----------------------------------------------------------------------------------------------- arguments

template <class T>
constexpr int64_t kSmallest = std::min<int64_t>(kVectorBytes, 32) / static_cast<int64_t>(sizeof(T));

void check_types(const Tensor& vectors, const Tensor& species, const Tensor& centers, const Tensor& neighbors,
                 const Tensor& table, const Tensor& pairs, const Tensor& coefficients) {
  const auto type = vectors.scalar_type();
  TORCH_CHECK_VALUE(type == at::kFloat || type == at::kDouble,
                    "compactmlip::spline_convolve: float32 or float64 is needed, not ", type, ".");
  TORCH_CHECK_VALUE(table.scalar_type() == type && coefficients.scalar_type() == type,
                    "compactmlip::spline_convolve: vectors (", type, "), table (", table.scalar_type(),
                    ") and coefficients (", coefficients.scalar_type(), ") must have one type.");
  TORCH_CHECK_VALUE(vectors.dim() == 2 && vectors.size(1) == 3,
                    "compactmlip::spline_convolve: vectors must have shape (edges, 3), not ", vectors.sizes(), ".");
  for (const Tensor* index : {&centers, &neighbors})
    TORCH_CHECK_VALUE(index->dim() == 1 && index->scalar_type() == at::kLong && index->size(0) == vectors.size(0),
                      "compactmlip::spline_convolve: centers and neighbors must be ", vectors.size(0),
                      " int64, not ", index->sizes(), " ", index->scalar_type(), ".");
  TORCH_CHECK_VALUE(species.dim() == 1 && species.scalar_type() == at::kLong,
                    "compactmlip::spline_convolve: species must be int64 with one axis.");
  TORCH_CHECK_VALUE(pairs.dim() == 2 && pairs.scalar_type() == at::kLong && pairs.size(0) == pairs.size(1) &&
                        pairs.is_contiguous(),
                    "compactmlip::spline_convolve: pairs must be a square int64 matrix.");
  TORCH_CHECK_VALUE(table.dim() == 4 && table.is_contiguous() && table.size(1) >= 2 && table.size(0) >= 1,
                    "compactmlip::spline_convolve: the table must be (types, knots, values, columns), not ",
                    table.sizes(), ".");
  TORCH_CHECK_VALUE(coefficients.dim() == 1 && coefficients.is_contiguous(),
                    "compactmlip::spline_convolve: coefficients must be a contiguous vector.");
}

// Types of all pairs that occur, and species of all atoms, must exist in the table.
void check_species(const Tensor& species, const Tensor& pairs, int64_t types) {
  const int64_t n = pairs.size(0), *type = pairs.const_data_ptr<int64_t>();
  if (n == 0) {
    TORCH_CHECK_VALUE(types == 1, "compactmlip::spline_convolve: without pairs there is one type, not ", types,
                      ".");
    return;
  }
  for (int64_t k = 0; k < n * n; k++)
    TORCH_CHECK_INDEX(type[k] >= 0 && type[k] < types, "compactmlip::spline_convolve: pair type ", type[k],
                      " is not in the table, which has ", types, ".");
  const int64_t* of = species.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < species.size(0); i++)
    TORCH_CHECK_INDEX(of[i] >= 0 && of[i] < n, "compactmlip::spline_convolve: atom ", i, " has species ", of[i],
                      ", but there are ", n, ".");
}

// Features with adjacent channels; they may be part of a wider tensor.
std::vector<Tensor> readable(TensorList features, const Plan& plan, int64_t nodes, at::ScalarType type) {
  std::vector<Tensor> found(features.begin(), features.end());
  for (const Group& group : plan.groups) {
    const int64_t l = group.l1;
    if (features.empty()) {
      TORCH_CHECK_VALUE(l == 0, "compactmlip::spline_convolve: there are no features of order ", l, ".");
      continue;
    }
    TORCH_CHECK_VALUE(l < static_cast<int64_t>(features.size()),
                      "compactmlip::spline_convolve: there are no features of order ", l, ".");
    Tensor& f = found[l];
    TORCH_CHECK_VALUE(f.dim() == 3 && f.size(0) == nodes && f.size(1) == group.components() &&
                          f.size(2) == group.channels && f.scalar_type() == type,
                      "compactmlip::spline_convolve: features of order ", l, " must be (", nodes, ", ",
                      group.components(), ", ", group.channels, ") of type ", type, ", not ", f.sizes(), " ",
                      f.scalar_type(), ".");
    for (int64_t k = group.first; k < group.last; k++)
      TORCH_CHECK_VALUE(plan.paths[k].channels == group.channels, "compactmlip::spline_convolve: path ", k,
                        " must have the ", group.channels, " channels of its features.");
    if (f.stride(2) != 1) f = f.contiguous();
  }
  return found;
}

// ------------------------------------------------------------------------------------ from tensors to loops

struct Outputs {
  std::vector<Tensor> messages;              // by l3; of the forward pass
  std::vector<Tensor> gradients;             // of the messages; of the backward pass
  Tensor vectors;                            // gradients
  std::vector<Tensor> features;              // gradients by l1; empty if they are not wanted
};

template <class T, int64_t B>
void run(CONVOLUTION_ARGUMENTS, const Plan& plan, Outputs& to) {
  TORCH_CHECK_VALUE(table.size(2) == plan.values_per_knot && table.size(3) == plan.columns,
                    "compactmlip::spline_convolve: the table must have ", plan.values_per_knot, " values of ",
                    plan.columns, " columns per knot, not ", table.sizes(), ".");
  int64_t most = 0;
  for (const Path& path : plan.paths) most = std::max(most, path.channels);
  const int64_t nodes = species.size(0);
  check_species(species, pairs, table.size(0));
  const Tensor i = centers.contiguous(), j = neighbors.contiguous(), r = vectors.contiguous();
  const Tensor z = species.contiguous();
  const Edges edges = sort_edges(i, j, nodes);
  const std::vector<Tensor> h = readable(features, plan, nodes, r.scalar_type());
  const double intervals = static_cast<double>(table.size(1) - knots_before_kink - 1);
  const double before = kink > 0 ? static_cast<double>(knots_before_kink - 1) / kink : 0;
  Problem<T, B> s{plan,
               {table.const_data_ptr<T>(), table.size(1), cutoff, kink, knots_before_kink,
                {before, intervals / (cutoff - kink)},
                pairs.size(0) ? pairs.const_data_ptr<int64_t>() : nullptr, pairs.size(0)},
               r.const_data_ptr<T>(), coefficients.const_data_ptr<T>(), z.const_data_ptr<int64_t>(),
               j.const_data_ptr<int64_t>(), edges, features.empty(), {}, {}, {}, nullptr, {}};
  const std::vector<T> ones(features.empty() ? most : 0, T(1));
  if (features.empty()) s.features.push_back({ones.data(), 0, 0, nullptr});
  for (size_t l = 0; l < h.size(); l++)
    s.features.push_back({h[l].const_data_ptr<T>(), h[l].stride(0), h[l].stride(1),
                          to.features.empty() ? nullptr : to.features[l].mutable_data_ptr<T>()});
  for (Tensor& m : to.messages) s.messages.push_back(m.numel() ? m.mutable_data_ptr<T>() : nullptr);
  for (Tensor& g : to.gradients) s.gradients.push_back(g.numel() ? g.const_data_ptr<T>() : nullptr);
  if (to.vectors.defined()) s.vector_gradient = to.vectors.mutable_data_ptr<T>();
  for (const Path& path : plan.paths)
    s.functions.push_back(path_functions<T, B>(path, s.unit));
  if (s.vector_gradient) run_backward<T, B>(s, nodes);
  else run_forward<T, B>(s, nodes);
}

template <class T>
void run(CONVOLUTION_ARGUMENTS, Outputs& to) {
  const Plan plan = read_spline_plan(structure, paths, channels, coefficients.numel());
  bool wide = true;
  for (const Path& path : plan.paths) {
    TORCH_CHECK_VALUE(path.channels % kSmallest<T> == 0, "compactmlip::spline_convolve: ", path.channels,
                      " channels are not a multiple of ", kSmallest<T>, ".");
    wide &= path.channels % kLanes<T> == 0;
  }
  if (wide) run<T, kVectorBytes>(CONVOLUTION_CALL, plan, to);
  else if constexpr (kVectorBytes > 32) run<T, 32>(CONVOLUTION_CALL, plan, to);
}

void run(CONVOLUTION_ARGUMENTS, Outputs& to) {
  check_types(vectors, species, centers, neighbors, table, pairs, coefficients);
  TORCH_CHECK_VALUE(cutoff > 0, "compactmlip::spline_convolve: the cutoff must be positive, not ", cutoff, ".");
  TORCH_CHECK_VALUE(kink == 0 ? knots_before_kink == 0
                              : kink > 0 && kink < cutoff && knots_before_kink >= 2 &&
                                    knots_before_kink <= table.size(1) - 2,
                    "compactmlip::spline_convolve: a kink must be below the cutoff ", cutoff,
                    " with at least two of ", table.size(1), " knots on either side, not ", kink, " behind ",
                    knots_before_kink, " knots.");
  if (vectors.scalar_type() == at::kFloat) run<float>(CONVOLUTION_CALL, to);
  else run<double>(CONVOLUTION_CALL, to);
}

std::vector<Tensor> spline_convolve_cpu(CONVOLUTION_ARGUMENTS) {
  Outputs to;
  const auto sizes = message_channels(paths, channels);
  for (size_t l = 0; l < sizes.size(); l++)
    to.messages.push_back(
        at::empty({species.size(0), static_cast<int64_t>(2 * l + 1), sizes[l]}, vectors.options()));
  run(CONVOLUTION_CALL, to);
  return to.messages;
}

Gradients backward_cpu(TensorList gradients, CONVOLUTION_ARGUMENTS, bool want_features) {
  Outputs to;
  const auto sizes = message_channels(paths, channels);
  TORCH_CHECK_VALUE(gradients.size() == sizes.size(), "compactmlip::spline_convolve_backward: ",
                    gradients.size(), " gradients for ", sizes.size(), " orders.");
  for (size_t l = 0; l < sizes.size(); l++) {
    const std::array<int64_t, 3> shape{species.size(0), static_cast<int64_t>(2 * l + 1), sizes[l]};
    TORCH_CHECK_VALUE(gradients[l].sizes() == at::IntArrayRef(shape) &&
                          gradients[l].scalar_type() == vectors.scalar_type(),
                      "compactmlip::spline_convolve_backward: the gradient of order ", l, " must have shape ",
                      at::IntArrayRef(shape), " and the type of the vectors, not ", gradients[l].sizes(), " ",
                      gradients[l].scalar_type(), ".");
    to.gradients.push_back(gradients[l].contiguous());
  }
  to.vectors = at::zeros(vectors.sizes(), vectors.options());
  if (want_features)
    for (const Tensor& f : features) to.features.push_back(at::zeros(f.sizes(), f.options()));
  run(CONVOLUTION_CALL, to);
  return {to.vectors, to.features};
}

// ------------------------------------------------------------------------------------------------- shapes

std::vector<Tensor> spline_convolve_meta(CONVOLUTION_ARGUMENTS) {
  std::vector<Tensor> found;
  const auto sizes = message_channels(paths, channels);
  for (size_t l = 0; l < sizes.size(); l++)
    found.push_back(vectors.new_empty_symint({species.sym_size(0), static_cast<int64_t>(2 * l + 1), sizes[l]}));
  return found;
}

Gradients backward_meta(TensorList, CONVOLUTION_ARGUMENTS, bool want_features) {
  std::vector<Tensor> found;
  if (want_features)
    for (const Tensor& f : features) found.push_back(f.new_empty_symint(f.sym_sizes()));
  return {vectors.new_empty_symint(vectors.sym_sizes()), found};
}

// ----------------------------------------------------------------------------------------------- autograd

class SplineConvolve : public torch::autograd::Function<SplineConvolve> {
 public:
  static variable_list forward(AutogradContext* context, const Tensor& vectors, TensorList features,
                               const Tensor& species, const Tensor& centers, const Tensor& neighbors,
                               const Tensor& table, const Tensor& pairs, const Tensor& structure,
                               const Tensor& coefficients, IntArrayRef paths, IntArrayRef channels,
                               double cutoff, double kink, int64_t knots_before_kink) {
    at::AutoDispatchBelowADInplaceOrView below;
    static auto op = c10::Dispatcher::singleton()
                         .findSchemaOrThrow("compactmlip::spline_convolve", "")
                         .typed<std::vector<Tensor>(CONVOLUTION_ARGUMENTS)>();
    auto messages = op.call(CONVOLUTION_CALL);
    variable_list saved{vectors, species, centers, neighbors, table, pairs, structure, coefficients};
    saved.insert(saved.end(), features.begin(), features.end());
    context->save_for_backward(saved);
    context->saved_data["paths"] = paths.vec();
    context->saved_data["channels"] = channels.vec();
    context->saved_data["cutoff"] = cutoff;
    context->saved_data["kink"] = kink;
    context->saved_data["before"] = knots_before_kink;
    bool wanted = false;
    for (const Tensor& f : features) wanted |= f.requires_grad();
    context->saved_data["wanted"] = wanted;
    return messages;
  }

  static variable_list backward(AutogradContext* context, variable_list gradients) {
    TORCH_CHECK(!at::GradMode::is_enabled(),
                "compactmlip::spline_convolve has no second derivatives; use the model before it was compiled "
                "(the checkpoint), or finite differences of forces.");
    const auto saved = context->get_saved_variables();
    const TensorList features = TensorList(saved).slice(8);
    const auto paths = context->saved_data["paths"].toIntVector();
    const auto channels = context->saved_data["channels"].toIntVector();
    const bool wanted = context->saved_data["wanted"].toBool();
    static auto op = c10::Dispatcher::singleton()
                         .findSchemaOrThrow("compactmlip::spline_convolve_backward", "")
                         .typed<Gradients(TensorList, CONVOLUTION_ARGUMENTS, bool)>();
    auto [vectors, of_features] =
        op.call(gradients, saved[0], features, saved[1], saved[2], saved[3], saved[4], saved[5], saved[6],
                saved[7], paths, channels, context->saved_data["cutoff"].toDouble(),
                context->saved_data["kink"].toDouble(), context->saved_data["before"].toInt(), wanted);
    variable_list found{vectors};
    if (wanted) found.insert(found.end(), of_features.begin(), of_features.end());
    else found.resize(1 + features.size());
    found.resize(found.size() + 12);
    return found;
  }
};

std::vector<Tensor> spline_convolve_autograd(CONVOLUTION_ARGUMENTS) {
  return SplineConvolve::apply(CONVOLUTION_CALL);
}

}  // namespace

#define CONVOLUTION_SCHEMA                                                                                  \
  "Tensor vectors, Tensor[] features, Tensor species, Tensor centers, Tensor neighbors, Tensor table, "     \
  "Tensor pairs, Tensor structure, Tensor coefficients, int[] paths, int[] channels, float cutoff"
// Defaults: files of format 3 were written without.
#define KINK_SCHEMA ", float kink=0., int knots_before_kink=0"

TORCH_LIBRARY_FRAGMENT(compactmlip, m) {
  m.def("spline_convolve(" CONVOLUTION_SCHEMA KINK_SCHEMA ") -> Tensor[]");
  m.def("spline_convolve_backward(Tensor[] gradients, " CONVOLUTION_SCHEMA
        ", float kink, int knots_before_kink, bool want_features) -> (Tensor, Tensor[])");
}

TORCH_LIBRARY_IMPL(compactmlip, CPU, m) {
  m.impl("spline_convolve", spline_convolve_cpu);
  m.impl("spline_convolve_backward", backward_cpu);
}

TORCH_LIBRARY_IMPL(compactmlip, Meta, m) {
  m.impl("spline_convolve", spline_convolve_meta);
  m.impl("spline_convolve_backward", backward_meta);
}

TORCH_LIBRARY_IMPL(compactmlip, Autograd, m) { m.impl("spline_convolve", spline_convolve_autograd); }

}  // namespace compactmlip
