// The sweeps of contraction.h over all atoms and channels: sorting, tiles, threads.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/zeros.h>

#include <vector>

#include "contraction.h"

namespace {

using at::Tensor;

// Null pointers stand for what is not there or not wanted.
template <typename T> struct Arrays {
  const T *x, *weights, *terms;
  const T *tangent_x = nullptr, *tangent_weights = nullptr, *grad = nullptr;
  T *out = nullptr, *grad_x = nullptr, *grad_weights = nullptr;
  int64_t channels = 0;
};

// Atoms sorted by species.  Those of species[s] are order[first[s]] ... order[first[s + 1] - 1].
struct Sorted {
  std::vector<int64_t> order, species, first;
};

inline Sorted sort_by_species(const int64_t* species, int64_t n, int64_t num_species) {
  std::vector<int64_t> place(num_species + 1, 0);
  // A single set of weights belongs to all species.
  const auto set_of = [&](int64_t i) { return num_species == 1 ? 0 : species[i]; };
  for (int64_t i = 0; i < n; ++i) {
    const int64_t z = set_of(i);
    TORCH_CHECK_INDEX(z >= 0 && z < num_species, "compactmlip::contract: atom ", i, " has species ", z,
                      ", but there are weights of ", num_species, " species");
    ++place[z + 1];
  }
  Sorted sorted{std::vector<int64_t>(n), {}, {}};
  for (int64_t z = 0; z < num_species; ++z) {
    if (place[z + 1] > 0) {
      sorted.species.push_back(z);
      sorted.first.push_back(place[z]);
    }
    place[z + 1] += place[z];
  }
  sorted.first.push_back(n);
  for (int64_t i = 0; i < n; ++i) sorted.order[place[set_of(i)]++] = i;
  return sorted;
}

// Memory of one thread that is kept from call to call: fresh pages would cost more than small systems do.
class Scratch {
 public:
  // Arrays follow one another; all are lost at the next reserve.
  static void reserve(size_t bytes) {
    const size_t needed = bytes / kBytes;
    if (lines().size() < needed) lines().resize(needed);
    used() = 0;
  }
  template <typename N> static N* take(int64_t count) {
    static_assert(sizeof(N) % kBytes == 0);
    Line* start = lines().data() + used();
    used() += count * sizeof(N) / kBytes;
    return reinterpret_cast<N*>(start);
  }

 private:
  struct alignas(kBytes) Line {
    char bytes[kBytes];
  };
  static std::vector<Line>& lines() {
    static thread_local std::vector<Line> lines;
    return lines;
  }
  static size_t& used() {
    static thread_local size_t used = 0;
    return used;
  }
};

// Works on some blocks of channels of some atoms.  X: numbers of the features, P: of the coefficients.
template <typename T, typename X, typename P> class Worker {
  using V = Lanes<T>;
  static constexpr int kAtoms = is_dual<X> ? kTile / 2 : kTile;

 public:
  Worker(const Plan& plan, const Arrays<T>& arrays, int64_t max_blocks) : p(plan), a(arrays) {
    const int64_t large = max_blocks * p.coefficients;
    Scratch::reserve(kAtoms * (2 * p.nodes * sizeof(X) + p.rows * sizeof(V)) +
                     p.products * (sizeof(P) + sizeof(V)) + max_blocks * footprint(p, a, a.grad_weights));
    nodes = Scratch::take<X>(p.nodes * kAtoms);
    if (a.grad_x) adjoint = Scratch::take<X>(p.nodes * kAtoms);
    rows = Scratch::take<V>(p.rows * kAtoms);
    weights = Scratch::take<P>(p.products);
    sums = Scratch::take<V>(p.products);
    if (a.out) forward_coefficients = Scratch::take<P>(large);
    if (a.grad_x) reverse_coefficients = Scratch::take<P>(large);
    if (a.grad_weights) gradient = Scratch::take<V>(large);
  }

  // Bytes of coefficients per block of channels.
  static int64_t footprint(const Plan& p, const Arrays<T>& a, bool grad_weights) {
    return p.coefficients * ((a.out ? sizeof(P) : 0) + (a.grad_x ? sizeof(P) : 0) +
                             (grad_weights ? sizeof(V) : 0));
  }

  // Atoms begin ... end - 1 in sorted order.  All blocks of a tile come one after another, because they
  // are neighbours in memory.
  void run(const Sorted& sorted, int64_t begin, int64_t end, int64_t first_block, int64_t last_block,
           T* grad_weights) {
    const auto each_block = [&](const auto& work) {
      for (int64_t b = first_block; b < last_block; ++b) {
        channel = b * kLanes<T>;
        lanes = std::min(a.channels - channel, kLanes<T>);
        offset = (b - first_block) * p.coefficients;
        work();
      }
    };
    for (size_t s = 0; s < sorted.species.size(); ++s) {
      const int64_t last = std::min(end, sorted.first[s + 1]), start = sorted.species[s] * p.products;
      int64_t i = std::max(begin, sorted.first[s]);
      if (i >= last) continue;
      each_block([&] { prepare(start * a.channels + channel); });
      while (i < last) {
        const int64_t count = std::min<int64_t>(last - i, kAtoms);
        each_block([&] { choose_tile(sorted.order.data() + i, count); });
        i += count;
      }
      if (grad_weights) each_block([&] { finish(grad_weights + start * a.channels + channel); });
    }
  }

 private:
  // Coefficients of one species' polynomials, in the orders of both sweeps.
  void prepare(int64_t start) {
    for (int64_t r = 0; r < p.products; ++r) {
      const int64_t from = start + r * a.channels;
      const T* tangent = a.tangent_weights ? a.tangent_weights + from : nullptr;
      load(weights[r], a.weights + from, tangent, lanes);
    }
    for (int64_t e = 0; a.out && e < p.coefficients; ++e)
      forward_coefficients[offset + e] = coefficient(e);
    for (int64_t e = 0; a.grad_x && e < p.coefficients; ++e)
      reverse_coefficients[offset + e] = coefficient(p.leaf_coefficient[e]);
    if (a.grad_weights) std::fill_n(gradient + offset, p.coefficients, V{});
  }

  P coefficient(int64_t e) const {
    P sum{};
    for (int64_t t = p.term_start[e]; t < p.term_start[e + 1]; ++t)
      add_product(sum, weights[p.term_product[t]], V{} + a.terms[t]);
    return sum;
  }

  // From the gradient of the coefficients to that of the weights.
  void finish(T* grad_weights) {
    for (int64_t r = 0; r < p.products; ++r) load<T>(sums[r], grad_weights + r * a.channels, lanes);
    for (int64_t e = 0; e < p.coefficients; ++e) {
      const int64_t k = p.leaf_coefficient[e];
      for (int64_t t = p.term_start[k]; t < p.term_start[k + 1]; ++t)
        sums[p.term_product[t]] += gradient[offset + e] * a.terms[t];
    }
    for (int64_t r = 0; r < p.products; ++r) store<T>(grad_weights + r * a.channels, sums[r], lanes);
  }

  void choose_tile(const int64_t* atoms, int64_t count) {
    if (count == 1) tile<1>(atoms, count);
    else if (count <= kAtoms / 2) tile<(kAtoms > 2 ? kAtoms / 2 : 1)>(atoms, count);
    else tile<kAtoms>(atoms, count);
  }

  // The first ``count`` of U atoms exist; the others are zero.
  template <int U> void tile(const int64_t* atoms, int64_t count) {
    std::fill_n(nodes, (p.components + 1) * U, X{});
    for (int64_t k = 0; k < p.components; ++k)
      for (int u = 0; u < count; ++u) {
        const int64_t from = (atoms[u] * p.components + k) * a.channels + channel;
        load(nodes[k * U + u], a.x + from, a.tangent_x ? a.tangent_x + from : nullptr, lanes);
      }
    for (int u = 0; u < U; ++u) {
      if constexpr (is_dual<X>) nodes[p.components * U + u].value += T(1);
      else nodes[p.components * U + u] += T(1);
    }
    evaluate_nodes<U>(p, nodes);
    if (a.out) forward<U>(atoms, count);
    if (a.grad_x || a.grad_weights) backward<U>(atoms, count);
  }

  template <int U> void forward(const int64_t* atoms, int64_t count) {
    forward_sweep<U>(p, forward_coefficients + offset, nodes, rows);
    for (int64_t m = 0; m < p.rows; ++m)
      for (int u = 0; u < count; ++u)
        store<T>(a.out + (atoms[u] * p.rows + m) * a.channels + channel, rows[m * U + u], lanes);
  }

  template <int U> void backward(const int64_t* atoms, int64_t count) {
    std::fill_n(rows, p.rows * U, V{});
    for (int64_t m = 0; m < p.rows; ++m)
      for (int u = 0; u < count; ++u)
        load<T>(rows[m * U + u], a.grad + (atoms[u] * p.rows + m) * a.channels + channel, lanes);
    V* grad = a.grad_weights ? gradient + offset : nullptr;
    if (!a.grad_x) return reverse_sweep<U, false, true, V, X, P>(p, nullptr, nodes, rows, nullptr, grad);
    const P* coefficients = reverse_coefficients + offset;
    std::fill_n(adjoint, p.nodes * U, X{});
    if (grad) reverse_sweep<U, true, true>(p, coefficients, nodes, rows, adjoint, grad);
    else reverse_sweep<U, true, false>(p, coefficients, nodes, rows, adjoint, grad);
    for (int64_t k = 0; k < p.components; ++k)
      for (int u = 0; u < count; ++u) {
        const int64_t at = (atoms[u] * p.components + k) * a.channels + channel;
        store<T>(a.grad_x + at, part(adjoint[k * U + u]), lanes);
      }
  }

  const Plan& p;
  const Arrays<T>& a;
  X *nodes = nullptr, *adjoint = nullptr;
  V *rows = nullptr, *sums = nullptr;
  P *weights = nullptr, *forward_coefficients = nullptr, *reverse_coefficients = nullptr;
  V* gradient = nullptr;
  int64_t channel = 0, lanes = 0, offset = 0;
};

// Coefficients that a group of blocks may have: what a second-level cache holds beside the features.
constexpr int64_t kCache = 768 * 1024;

// Groups of blocks of channels are independent.  If they are too few for the threads, atoms are divided as
// well, and each part has its own gradient of the weights; the parts are added in order.
template <typename T, typename X, typename P>
void contract_all(const Plan& p, Arrays<T> a, const Tensor& species, int64_t num_species,
                  Tensor* grad_weights) {
  const int64_t n = species.numel(), blocks = (a.channels + kLanes<T> - 1) / kLanes<T>;
  const Sorted sorted = sort_by_species(species.const_data_ptr<int64_t>(), n, num_species);
  if (n == 0 || blocks == 0) return;
  const int64_t threads = at::get_num_threads();
  const int64_t bytes = std::max<int64_t>(1, Worker<T, X, P>::footprint(p, a, grad_weights));
  const int64_t size = std::clamp<int64_t>(std::min(kCache / bytes, blocks / threads), 1, blocks);
  const int64_t groups = (blocks + size - 1) / size;
  const int64_t wanted = groups >= threads ? 1 : 2 * threads / groups;
  const int64_t parts = std::clamp<int64_t>(n / kTile, 1, wanted);
  const int64_t stride = num_species * p.products * a.channels;
  Tensor partial;
  if (grad_weights) {
    partial = parts == 1 ? *grad_weights : at::zeros({parts, stride}, grad_weights->options());
    a.grad_weights = partial.mutable_data_ptr<T>();
  }
  at::parallel_for(0, groups * parts, 1, [&](int64_t begin, int64_t end) {
    Worker<T, X, P> worker(p, a, size);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t part = task % parts, first = task / parts * size;
      T* to = a.grad_weights ? a.grad_weights + part * stride : nullptr;
      worker.run(sorted, n * part / parts, n * (part + 1) / parts, first, std::min(blocks, first + size), to);
    }
  });
  for (int64_t k = 0; grad_weights && parts > 1 && k < parts; ++k)
    grad_weights->add_(partial[k].view_as(*grad_weights));
}

}  // namespace
