// The operators compactmlip::gate and gate_backward: activated scalars, and features times activated gates.
//
//   out[0][i, c] = gain_0 silu(z[i, c])                        the first ``kept`` channels of the scalars z
//   out[l][i, m, c] = x[l][i, m, c] gain a(z[i, start_l + c])  the others, order by order; a: silu or sigmoid
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <type_traits>

#include "lists.h"
#include "simd.h"

namespace compactmlip {
namespace {

// ---- activations ------------------------------------------------------------------------------------

template <class T>
struct Exponent;
template <>
struct Exponent<float> {
  using Bits = uint32_t;
  // The high part of ln 2 has few digits, so that its multiples are exact.
  static constexpr float kLow = -104.0f, kHigh2 = 0.693359375f, kLow2 = -2.12194440e-4f, kShift = 12582912.0f;
  static constexpr int kMantissa = 23, kBias = 127, kDegree = 7;
};
template <>
struct Exponent<double> {
  using Bits = uint64_t;
  static constexpr double kLow = -746.0, kHigh2 = 6.93147180369123816490e-01,
                          kLow2 = 1.90821492927058770002e-10, kShift = 6755399441055744.0;
  static constexpr int kMantissa = 52, kBias = 1023, kDegree = 13;
};

template <class T>
struct BitsOf {
  typedef typename Exponent<T>::Bits type __attribute__((vector_size(kVectorBytes)));
};

// exp(x) for x <= 0: 2^n times a polynomial of the rest, which is below half of ln 2.  2^n is applied in two
// halves, because the result may be smaller than every normal number.
template <class T>
inline __attribute__((always_inline)) Vec<T> exp_of_negative(Vec<T> x) {
  using E = Exponent<T>;
  using Bits = typename BitsOf<T>::type;
  x = x < E::kLow ? Vec<T>{} + E::kLow : x;
  const Vec<T> shifted = x * T(1.44269504088896340736) + E::kShift;
  const Vec<T> n = shifted - E::kShift;
  const Vec<T> r = (x - n * E::kHigh2) - n * E::kLow2;
  T factor = 1;
  T inverse[E::kDegree + 1];
  for (int k = 0; k <= E::kDegree; factor /= T(++k)) inverse[k] = factor;
  Vec<T> sum = Vec<T>{} + inverse[E::kDegree];
  for (int k = E::kDegree - 1; k >= 0; --k) sum = sum * r + inverse[k];
  // The lowest digits of ``shifted`` are n as an integer; 4096 keeps it positive while it is halved.
  const Bits whole = reinterpret_cast<Bits>(shifted) - reinterpret_cast<Bits>(Vec<T>{} + E::kShift) + 4096;
  const Bits half = whole / 2, rest = whole - half;
  const Bits bias = Bits{} + (E::kBias - 2048);
  return sum * reinterpret_cast<Vec<T>>((half + bias) << E::kMantissa) *
         reinterpret_cast<Vec<T>>((rest + bias) << E::kMantissa);
}

template <class T>
struct Activated {
  Vec<T> value, slope;
};

// silu(z) or sigmoid(z), and its derivative, times a gain.  Only exp of negative numbers occurs.
template <class T>
inline __attribute__((always_inline)) Activated<T> activate(Vec<T> z, bool sigmoid, T gain) {
  const Vec<T> e = exp_of_negative<T>(z < T(0) ? z : -z);
  const Vec<T> large = T(1) / (T(1) + e), small = e * large;  // sigmoid(|z|) and sigmoid(-|z|)
  const Vec<T> s = z < T(0) ? small : large;
  const Vec<T> slope = small * large;
  if (sigmoid) return {gain * s, gain * slope};
  return {gain * (z * s), gain * (s + z * slope)};
}

template <class T>
inline __attribute__((always_inline)) Vec<T> load_some(const T* p, int64_t count) {
  if (count >= kLanes<T>) return load(p);
  Vec<T> x{};
  for (int64_t k = 0; k < count; ++k) x[k] = p[k];
  return x;
}

template <class T>
inline __attribute__((always_inline)) void store_some(T* p, Vec<T> x, int64_t count) {
  if (count >= kLanes<T>) return store(p, x);
  for (int64_t k = 0; k < count; ++k) p[k] = x[k];
}

// ---- arguments --------------------------------------------------------------------------------------

struct Gate {
  Tensor scalars;
  std::vector<Tensor> features;
  int64_t atoms = 0, kept = 0;
  bool sigmoid;
  double scalar_gain, gate_gain;

  Gate(const Tensor& scalars_, TensorList features_, int64_t kept_, bool sigmoid_, double scalar_gain_,
       double gate_gain_)
      : kept(kept_), sigmoid(sigmoid_), scalar_gain(scalar_gain_), gate_gain(gate_gain_) {
    TORCH_CHECK(scalars_.dim() == 3 && scalars_.size(1) == 1,
                "compactmlip::gate: the scalars must have shape (atoms, 1, channels), not ", scalars_.sizes());
    scalars = with_close_channels(scalars_);
    atoms = scalars.size(0);
    int64_t channels = kept;
    for (const Tensor& t : features_) {
      TORCH_CHECK(t.dim() == 3 && t.size(0) == atoms && t.scalar_type() == scalars.scalar_type(),
                  "compactmlip::gate: features must have shape (", atoms, ", 2l+1, channels) and dtype ",
                  scalars.scalar_type(), ", not ", t.sizes(), " and ", t.scalar_type());
      channels += t.size(2);
      features.push_back(with_close_channels(t));
    }
    TORCH_CHECK(kept >= 0 && channels == scalars.size(2), "compactmlip::gate: ", kept, " scalars and a gate "
                "per channel of the features are ", channels, " channels, not ", scalars.size(2));
  }

  std::vector<Tensor> check_grads(TensorList grads) const {
    TORCH_CHECK(grads.size() == features.size() + 1, "compactmlip::gate: there must be ",
                features.size() + 1, " gradients, not ", grads.size());
    std::vector<Tensor> result;
    for (size_t k = 0; k < grads.size(); ++k) {
      const int64_t rows = k ? features[k - 1].size(1) : 1, channels = k ? features[k - 1].size(2) : kept;
      TORCH_CHECK(grads[k].sizes() == at::IntArrayRef({atoms, rows, channels}) &&
                      grads[k].scalar_type() == scalars.scalar_type(),
                  "compactmlip::gate: gradient ", k, " must have shape (", atoms, ", ", rows, ", ", channels,
                  ") and dtype ", scalars.scalar_type(), ", not ", grads[k].sizes(), " and ",
                  grads[k].scalar_type());
      result.push_back(with_close_channels(grads[k]));
    }
    return result;
  }
};

// Calls work(channel, count); count is known to the compiler but for the last channels.
template <class T, class Work>
inline __attribute__((always_inline)) void each_vector(int64_t channels, const Work& work) {
  const int64_t whole = channels / kLanes<T> * kLanes<T>;
  for (int64_t c = 0; c < whole; c += kLanes<T>) work(c, std::integral_constant<int64_t, kLanes<T>>());
  if (whole < channels) work(whole, channels - whole);
}

template <class T>
void gate_atom(const Gate& g, const typename Rows<T>::Part& z, const Rows<T>& x, const Rows<T>& out,
               int64_t i) {
  const T* scalars = z.row(i, 0);
  T* first = out.parts[0].row(i, 0);
  const T scalar_gain = T(g.scalar_gain), gate_gain = T(g.gate_gain);
  const bool sigmoid = g.sigmoid;
  each_vector<T>(g.kept, [=](int64_t c, auto n) {
    store_some(first + c, activate<T>(load_some(scalars + c, n), false, scalar_gain).value, n);
  });
  scalars += g.kept;
  for (size_t k = 0; k < x.parts.size(); ++k) {
    // Copies, so that no store can change them in the compiler's eyes.
    const auto from = x.parts[k], to = out.parts[k + 1];
    const int64_t channels = g.features[k].size(2);
    each_vector<T>(channels, [=](int64_t c, auto n) {
      const Vec<T> a = activate<T>(load_some(scalars + c, n), sigmoid, gate_gain).value;
      const T* read = from.row(i, 0) + c;
      T* write = to.row(i, 0) + c;
      for (int64_t m = 0; m < from.rows; ++m, read += from.row_stride, write += to.row_stride)
        store_some(write, a * load_some(read, n), n);
    });
    scalars += channels;
  }
}

template <class T>
void gate_backward_atom(const Gate& g, const typename Rows<T>::Part& z, const Rows<T>& x,
                        const Rows<T>& grad, const Rows<T>& out, int64_t i) {
  const T *scalars = z.row(i, 0), *first = grad.parts[0].row(i, 0);
  T* slopes = out.parts[0].row(i, 0);
  const T scalar_gain = T(g.scalar_gain), gate_gain = T(g.gate_gain);
  const bool sigmoid = g.sigmoid;
  each_vector<T>(g.kept, [=](int64_t c, auto n) {
    const Vec<T> slope = activate<T>(load_some(scalars + c, n), false, scalar_gain).slope;
    store_some(slopes + c, slope * load_some(first + c, n), n);
  });
  scalars += g.kept, slopes += g.kept;
  for (size_t k = 0; k < x.parts.size(); ++k) {
    const auto features = x.parts[k], from = grad.parts[k + 1], to = out.parts[k + 1];
    const int64_t channels = g.features[k].size(2);
    each_vector<T>(channels, [=](int64_t c, auto n) {
      const auto a = activate<T>(load_some(scalars + c, n), sigmoid, gate_gain);
      const T *feature = features.row(i, 0) + c, *read = from.row(i, 0) + c;
      T* write = to.row(i, 0) + c;
      Vec<T> total{};
      for (int64_t m = 0; m < features.rows; ++m) {
        const Vec<T> y = load_some(read, n);
        total += y * load_some(feature, n);
        store_some(write, a.value * y, n);
        feature += features.row_stride, read += from.row_stride, write += to.row_stride;
      }
      store_some(slopes + c, a.slope * total, n);
    });
    scalars += channels, slopes += channels;
  }
}

constexpr int64_t kGrain = 16;

std::vector<Tensor> gate(const Tensor& scalars, TensorList features, int64_t kept, bool sigmoid,
                         double scalar_gain, double gate_gain) {
  const Gate g(scalars, features, kept, sigmoid, scalar_gain, gate_gain);
  std::vector<Tensor> results{at::empty({g.atoms, 1, kept}, scalars.options())};
  for (const Tensor& t : g.features) results.push_back(at::empty(t.sizes(), t.options()));
  AT_DISPATCH_FLOATING_TYPES(scalars.scalar_type(), "compactmlip::gate", [&] {
    Rows<scalar_t> z, x, out;
    z.add(g.scalars);
    for (const Tensor& t : g.features) x.add(t);
    for (const Tensor& t : results) out.add(t);
    at::parallel_for(0, g.atoms, kGrain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) gate_atom<scalar_t>(g, z.parts[0], x, out, i);
    });
  });
  return results;
}

std::vector<Tensor> gate_backward(TensorList grads_, const Tensor& scalars, TensorList features, int64_t kept,
                                  bool sigmoid, double scalar_gain, double gate_gain) {
  const Gate g(scalars, features, kept, sigmoid, scalar_gain, gate_gain);
  const std::vector<Tensor> grads = g.check_grads(grads_);
  std::vector<Tensor> results{at::empty(scalars.sizes(), scalars.options())};
  for (const Tensor& t : g.features) results.push_back(at::empty(t.sizes(), t.options()));
  AT_DISPATCH_FLOATING_TYPES(scalars.scalar_type(), "compactmlip::gate_backward", [&] {
    Rows<scalar_t> z, x, grad, out;
    z.add(g.scalars);
    for (const Tensor& t : g.features) x.add(t);
    for (const Tensor& t : grads) grad.add(t);
    for (const Tensor& t : results) out.add(t);
    at::parallel_for(0, g.atoms, kGrain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) gate_backward_atom<scalar_t>(g, z.parts[0], x, grad, out, i);
    });
  });
  return results;
}

// ---- shapes without numbers -------------------------------------------------------------------------

std::vector<Tensor> gate_meta(const Tensor& scalars, TensorList features, int64_t kept, bool, double,
                              double) {
  std::vector<Tensor> results{at::empty_symint({scalars.sym_size(0), 1, kept}, scalars.options())};
  for (const Tensor& t : features) results.push_back(at::empty_symint(t.sym_sizes(), t.options()));
  return results;
}

std::vector<Tensor> gate_backward_meta(TensorList, const Tensor& scalars, TensorList features, int64_t, bool,
                                       double, double) {
  std::vector<Tensor> results{at::empty_symint(scalars.sym_sizes(), scalars.options())};
  for (const Tensor& t : features) results.push_back(at::empty_symint(t.sym_sizes(), t.options()));
  return results;
}

// ---- derivatives ------------------------------------------------------------------------------------

struct GateFunction : torch::autograd::Function<GateFunction> {
  static variable_list forward(AutogradContext* context, const Tensor& scalars, PARTS(x), int64_t kept,
                               bool sigmoid, double scalar_gain, double gate_gain) {
    at::AutoDispatchBelowADInplaceOrView below;
    const variable_list x = list_of({ALL_PARTS(x)});
    variable_list saved{scalars};
    saved.insert(saved.end(), x.begin(), x.end());
    context->save_for_backward(saved);
    context->saved_data["kept"] = kept;
    context->saved_data["sigmoid"] = sigmoid;
    context->saved_data["scalar_gain"] = scalar_gain;
    context->saved_data["gate_gain"] = gate_gain;
    return CALL_OPERATOR(gate, scalars, TensorList(x), kept, sigmoid, scalar_gain, gate_gain);
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const auto saved = context->get_saved_variables();
    auto& data = context->saved_data;
    variable_list found = CALL_OPERATOR(
        gate_backward, TensorList(grads), saved[0], TensorList(saved.data() + 1, saved.size() - 1),
        data["kept"].toInt(), data["sigmoid"].toBool(), data["scalar_gain"].toDouble(),
        data["gate_gain"].toDouble());
    found.resize(1 + kMaxParts + 4);
    return found;
  }
};

// The gradient, as something that must not be differentiated again.
struct GateBackward : torch::autograd::Function<GateBackward> {
  static variable_list forward(AutogradContext*, const Tensor& first_grad, PARTS(grad), const Tensor& scalars,
                               PARTS(x), int64_t kept, bool sigmoid, double scalar_gain, double gate_gain) {
    at::AutoDispatchBelowADInplaceOrView below;
    variable_list grads = list_of({ALL_PARTS(grad)});
    grads.insert(grads.begin(), first_grad);
    return CALL_OPERATOR(gate_backward, TensorList(grads), scalars, TensorList(list_of({ALL_PARTS(x)})), kept,
                         sigmoid, scalar_gain, gate_gain);
  }

  static variable_list backward(AutogradContext*, const variable_list&) {
    TORCH_CHECK(false, "compactmlip::gate has first derivatives only; for second ones use the model before "
                       "it was lowered");
  }
};

std::vector<Tensor> gate_autograd(const Tensor& scalars, TensorList features, int64_t kept, bool sigmoid,
                                  double scalar_gain, double gate_gain) {
  const auto [ALL_PARTS(x)] = parts_of(features, "compactmlip::gate");
  return GateFunction::apply(scalars, ALL_PARTS(x), kept, sigmoid, scalar_gain, gate_gain);
}

std::vector<Tensor> gate_backward_autograd(TensorList grads, const Tensor& scalars, TensorList features,
                                           int64_t kept, bool sigmoid, double scalar_gain, double gate_gain) {
  TORCH_CHECK(!grads.empty(), "compactmlip::gate: there must be gradients");
  const auto [ALL_PARTS(g)] = parts_of(grads.slice(1), "compactmlip::gate");
  const auto [ALL_PARTS(x)] = parts_of(features, "compactmlip::gate");
  return GateBackward::apply(grads[0], ALL_PARTS(g), scalars, ALL_PARTS(x), kept, sigmoid, scalar_gain,
                             gate_gain);
}

}  // namespace
}  // namespace compactmlip

TORCH_LIBRARY_FRAGMENT(compactmlip, m) {
  m.def("gate(Tensor scalars, Tensor[] features, int kept, bool sigmoid, float scalar_gain, "
        "float gate_gain) -> Tensor[]");
  m.def("gate_backward(Tensor[] grads, Tensor scalars, Tensor[] features, int kept, bool sigmoid, "
        "float scalar_gain, float gate_gain) -> Tensor[]");
}
TORCH_LIBRARY_IMPL(compactmlip, CPU, m) {
  m.impl("gate", compactmlip::gate);
  m.impl("gate_backward", compactmlip::gate_backward);
}
TORCH_LIBRARY_IMPL(compactmlip, Meta, m) {
  m.impl("gate", compactmlip::gate_meta);
  m.impl("gate_backward", compactmlip::gate_backward_meta);
}
TORCH_LIBRARY_IMPL(compactmlip, Autograd, m) {
  m.impl("gate", compactmlip::gate_autograd);
  m.impl("gate_backward", compactmlip::gate_backward_autograd);
}
