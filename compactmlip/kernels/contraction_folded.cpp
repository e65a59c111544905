// The operators compactmlip::contract_folded and contract_folded_backward: symmetric contractions whose
// weights are constants, for evaluation.
//
// weights (sets, blocks of kBlock channels, trees, kBlock) are those of contraction_program.py, which says
// how the contraction is factored; its programs are compiled into this file as straight lines of vector
// operations, and found by their identity.  Atoms are independent of each other, so bits depend neither on
// the number of threads nor on the other atoms.

// Long sums of the programs overlap only if the compiler interleaves them before it hands out registers.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("schedule-insns", "sched-pressure")
#endif

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "lists.h"
#include "simd.h"

namespace compactmlip {
namespace {

// Channels whose weights are neighbours in memory; a multiple of every kLanes.
constexpr int64_t kBlock = 16;
// Rows of the largest program's features and outputs.
constexpr int64_t kMaxRows = 16;

template <class T>
using Sweep = void (*)(const T* const* x, const T* const* grad, const T* weights, T* const* out,
                       int64_t channel);

template <class T>
struct Program {
  int64_t identity, components, rows, trees;
  Sweep<T> forward, gradient;
};

#include "contraction_programs.h"

template <class T>
const Program<T>& program_of(int64_t identity) {
  for (const Program<T>& program : kPrograms<T>)
    if (program.identity == identity) return program;
  TORCH_CHECK(false, "compactmlip::contract_folded: this library has no program ", identity,
              "; the model was compiled with another version: compile it again");
}

struct Folded {
  std::vector<Tensor> x;
  Tensor weights, species, grad;
  int64_t atoms = 0, channels = 0;

  Folded(TensorList features, const Tensor& weights_, const Tensor& species_, int64_t identity)
      : weights(weights_.contiguous()), species(species_.contiguous()) {
    const auto& program = program_of<float>(identity);
    TORCH_CHECK(!features.empty() && features[0].dim() == 3,
                "compactmlip::contract_folded: x must be tensors of shape (atoms, components, channels)");
    atoms = features[0].size(0), channels = features[0].size(2);
    int64_t components = 0;
    for (const Tensor& t : features) {
      TORCH_CHECK(t.dim() == 3 && t.size(0) == atoms && t.size(2) == channels &&
                      t.scalar_type() == weights.scalar_type(),
                  "compactmlip::contract_folded: all of x must have ", atoms, " atoms, ", channels,
                  " channels and the weights' dtype ", weights.scalar_type(), ", not ", t.sizes(), " ",
                  t.scalar_type());
      components += t.size(1);
      x.push_back(with_close_channels(t));
    }
    TORCH_CHECK(components == program.components, "compactmlip::contract_folded: x must have ",
                program.components, " components, not ", components);
    const int64_t blocks = (channels + kBlock - 1) / kBlock;
    TORCH_CHECK(weights.dim() == 4 && weights.size(0) > 0 && weights.size(1) == blocks &&
                    weights.size(2) == program.trees && weights.size(3) == kBlock,
                "compactmlip::contract_folded: weights must have shape (species, ", blocks, ", ",
                program.trees, ", ", kBlock, "), not ", weights.sizes());
    TORCH_CHECK(species.dim() == 1 && species.size(0) == atoms && species.scalar_type() == at::kLong,
                "compactmlip::contract_folded: species must be ", atoms, " int64, not ", species.sizes(), " ",
                species.scalar_type());
    const int64_t* z = species.const_data_ptr<int64_t>();
    for (int64_t i = 0; weights.size(0) > 1 && i < atoms; ++i)
      TORCH_CHECK_INDEX(z[i] >= 0 && z[i] < weights.size(0), "compactmlip::contract_folded: atom ", i,
                        " has species ", z[i], ", but there are weights of ", weights.size(0), " species");
  }
};

// ---- all atoms --------------------------------------------------------------------------------------

template <class T>
struct Pointers {
  T* at[kMaxRows];
  int64_t count = 0;

  // What is written is asked for as well: it is another thing that a store waits for.
  template <int kWrite>
  void prefetch(int64_t channel) const {
    for (int64_t k = 0; k < count; ++k) __builtin_prefetch(at[k] + channel, kWrite);
  }
};

// Channels that do not fill a vector go through zero-padded copies.
template <class T>
void last_channels(Sweep<T> sweep, const Pointers<T>& x, const Pointers<T>& grad, const T* weights,
                   const Pointers<T>& out, int64_t channel, int64_t count) {
  alignas(kVectorBytes) T copies[3][kMaxRows][kLanes<T>] = {};
  T* rows[3][kMaxRows];
  for (int part = 0; part < 3; ++part)
    for (int64_t k = 0; k < kMaxRows; ++k) rows[part][k] = copies[part][k];
  for (int64_t k = 0; k < x.count; ++k) std::copy_n(x.at[k] + channel, count, rows[0][k]);
  for (int64_t k = 0; k < grad.count; ++k) std::copy_n(grad.at[k] + channel, count, rows[1][k]);
  sweep(rows[0], rows[1], weights, rows[2], 0);
  for (int64_t k = 0; k < out.count; ++k) std::copy_n(rows[2][k], count, out.at[k] + channel);
}

template <class T>
void sweep_all(const Folded& f, Sweep<T> sweep, const Rows<T>& x, const Rows<T>& grad, const Rows<T>& out) {
  const int64_t channels = f.channels, whole = channels / kLanes<T> * kLanes<T>;
  const int64_t sets = f.weights.size(0), stride = f.weights.stride(0), block_stride = f.weights.stride(1);
  const T* weights = f.weights.const_data_ptr<T>();
  const int64_t* species = f.species.const_data_ptr<int64_t>();
  // One line of the cache ahead of what is computed: there are more rows than a processor follows by itself.
  constexpr int64_t line = std::max<int64_t>(64 / sizeof(T), kLanes<T>);
  at::parallel_for(0, channels ? f.atoms : 0, 4, [&](int64_t begin, int64_t end) {
    Pointers<T> here[3], next[3];
    const Rows<T>* rows[3] = {&x, &grad, &out};
    const auto find = [&](int64_t i, Pointers<T>* to) {
      for (int k = 0; k < 3; ++k) to[k].count = rows[k]->of_atom(i, to[k].at);
    };
    find(begin, next);
    for (int64_t i = begin; i < end; ++i) {
      std::copy_n(next, 3, here);
      find(std::min(i + 1, end - 1), next);
      const T* set = weights + (sets == 1 ? 0 : species[i] * stride);
      for (int64_t c = 0; c < whole; c += kLanes<T>) {
        if (c % line == 0) {
          const bool more = c + line < channels;
          const Pointers<T>* ahead = more ? here : next;
          ahead[0].template prefetch<0>(more ? c + line : 0);
          ahead[1].template prefetch<0>(more ? c + line : 0);
          ahead[2].template prefetch<1>(more ? c + line : 0);
        }
        sweep(here[0].at, here[1].at, set + c / kBlock * block_stride + c % kBlock, here[2].at, c);
      }
      if (whole < channels)
        last_channels<T>(sweep, here[0], here[1], set + whole / kBlock * block_stride + whole % kBlock, here[2],
                         whole, channels - whole);
    }
  });
}

Tensor contract_folded(TensorList x_, const Tensor& weights, const Tensor& species, int64_t program,
                       int64_t rows) {
  const Folded f(x_, weights, species, program);
  TORCH_CHECK(rows == program_of<float>(program).rows, "compactmlip::contract_folded: the program has ",
              program_of<float>(program).rows, " rows, not ", rows);
  Tensor result = at::empty({f.atoms, rows, f.channels}, f.weights.options());
  AT_DISPATCH_FLOATING_TYPES(weights.scalar_type(), "compactmlip::contract_folded", [&] {
    Rows<scalar_t> x, out;
    for (const Tensor& t : f.x) x.add(t);
    out.add(result);
    sweep_all<scalar_t>(f, program_of<scalar_t>(program).forward, x, {}, out);
  });
  return result;
}

std::vector<Tensor> contract_folded_backward(const Tensor& grad_, TensorList x_, const Tensor& weights,
                                             const Tensor& species, int64_t program) {
  const Folded f(x_, weights, species, program);
  const int64_t rows = program_of<float>(program).rows;
  TORCH_CHECK(grad_.sizes() == at::IntArrayRef({f.atoms, rows, f.channels}) &&
                  grad_.scalar_type() == weights.scalar_type(),
              "compactmlip::contract_folded: the gradient must have shape (", f.atoms, ", ", rows, ", ",
              f.channels, ") and dtype ", weights.scalar_type(), ", not ", grad_.sizes(), " and ",
              grad_.scalar_type());
  const Tensor close = with_close_channels(grad_);
  std::vector<Tensor> results;
  for (const Tensor& t : f.x) results.push_back(at::empty(t.sizes(), f.weights.options()));
  AT_DISPATCH_FLOATING_TYPES(weights.scalar_type(), "compactmlip::contract_folded_backward", [&] {
    Rows<scalar_t> x, grad, out;
    for (const Tensor& t : f.x) x.add(t);
    grad.add(close);
    for (const Tensor& t : results) out.add(t);
    sweep_all<scalar_t>(f, program_of<scalar_t>(program).gradient, x, grad, out);
  });
  return results;
}

// ---- shapes without numbers -------------------------------------------------------------------------

Tensor folded_meta(TensorList x, const Tensor&, const Tensor&, int64_t, int64_t rows) {
  return at::empty_symint({x[0].sym_size(0), rows, x[0].sym_size(2)}, x[0].options());
}

std::vector<Tensor> folded_backward_meta(const Tensor&, TensorList x, const Tensor&, const Tensor&, int64_t) {
  std::vector<Tensor> results;
  for (const Tensor& t : x) results.push_back(at::empty_symint(t.sym_sizes(), t.options()));
  return results;
}

// ---- derivatives ------------------------------------------------------------------------------------

struct FoldedFunction : torch::autograd::Function<FoldedFunction> {
  static Tensor forward(AutogradContext* context, PARTS(x), const Tensor& weights, const Tensor& species,
                        int64_t program, int64_t rows) {
    at::AutoDispatchBelowADInplaceOrView below;
    const variable_list x = list_of({ALL_PARTS(x)});
    variable_list saved(x);
    saved.push_back(weights);
    saved.push_back(species);
    context->save_for_backward(saved);
    context->saved_data["program"] = program;
    return CALL_OPERATOR(contract_folded, TensorList(x), weights, species, program, rows);
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    variable_list result(kMaxParts + 4);
    if (!grads[0].defined()) return result;
    const auto saved = context->get_saved_variables();
    const size_t n = saved.size() - 2;
    const std::vector<Tensor> x =
        CALL_OPERATOR(contract_folded_backward, grads[0], TensorList(saved.data(), n), saved[n],
                      saved[n + 1], context->saved_data["program"].toInt());
    std::copy(x.begin(), x.end(), result.begin());
    return result;
  }
};

// The gradient, as something that must not be differentiated again.
struct FoldedBackward : torch::autograd::Function<FoldedBackward> {
  static variable_list forward(AutogradContext*, const Tensor& grad, PARTS(x), const Tensor& weights,
                               const Tensor& species, int64_t program) {
    at::AutoDispatchBelowADInplaceOrView below;
    const variable_list x = list_of({ALL_PARTS(x)});
    return CALL_OPERATOR(contract_folded_backward, grad, TensorList(x), weights, species, program);
  }

  static variable_list backward(AutogradContext*, const variable_list&) {
    TORCH_CHECK(false, "compactmlip::contract_folded has first derivatives only; for second ones use the "
                       "model before it was lowered");
  }
};

void refuse_weights(const Tensor& weights) {
  TORCH_CHECK(!(weights.requires_grad() && at::GradMode::is_enabled()),
              "compactmlip::contract_folded has no derivatives for its weights; detach them, or train the "
              "model before it is lowered");
}

Tensor folded_autograd(TensorList x, const Tensor& weights, const Tensor& species, int64_t program,
                       int64_t rows) {
  refuse_weights(weights);
  const auto [ALL_PARTS(p)] = parts_of(x, "compactmlip::contract_folded");
  return FoldedFunction::apply(ALL_PARTS(p), weights, species, program, rows);
}

std::vector<Tensor> folded_backward_autograd(const Tensor& grad, TensorList x, const Tensor& weights,
                                             const Tensor& species, int64_t program) {
  refuse_weights(weights);
  const auto [ALL_PARTS(p)] = parts_of(x, "compactmlip::contract_folded");
  return FoldedBackward::apply(grad, ALL_PARTS(p), weights, species, program);
}

}  // namespace
}  // namespace compactmlip

TORCH_LIBRARY_FRAGMENT(compactmlip, m) {
  m.def("contract_folded(Tensor[] x, Tensor weights, Tensor species, int program, int rows) -> Tensor");
  m.def("contract_folded_backward(Tensor grad, Tensor[] x, Tensor weights, Tensor species, int program) "
        "-> Tensor[]");
}
TORCH_LIBRARY_IMPL(compactmlip, CPU, m) {
  m.impl("contract_folded", compactmlip::contract_folded);
  m.impl("contract_folded_backward", compactmlip::contract_folded_backward);
}
TORCH_LIBRARY_IMPL(compactmlip, Meta, m) {
  m.impl("contract_folded", compactmlip::folded_meta);
  m.impl("contract_folded_backward", compactmlip::folded_backward_meta);
}
TORCH_LIBRARY_IMPL(compactmlip, Autograd, m) {
  m.impl("contract_folded", compactmlip::folded_autograd);
  m.impl("contract_folded_backward", compactmlip::folded_backward_autograd);
}
