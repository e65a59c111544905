// compactmlip::convolve: messages of all paths that start from one order, summed over neighbours.
//
//   out[i, r, c] = sum_{e: centers[e] = i} (sum_a coupling[e, r, a] features[neighbors[e], a, c])
//                  * radial[e, path_of_row[r], c]
//
// Three operators: the convolution, its first derivatives, and the derivatives of those along a direction.
// convolution_autograd.cpp says how they follow from each other.
#include <ATen/Parallel.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <array>
#include <optional>

#include "convolution.h"
#include "convolution_checks.h"

namespace compactmlip {
namespace {

using Optional = std::optional<Tensor>;

// ------------------------------------------------------------------------------------ from tensors to loops

// Contiguous, with zeros behind the last channel up to a multiple of the vector's width.
Tensor padded(const Tensor& x, int64_t lanes) {
  const int64_t missing = (lanes - x.size(2) % lanes) % lanes;
  return missing ? at::constant_pad_nd(x, {0, missing}) : x.contiguous();
}

// As padded, but edges may be apart: a slice of a wider tensor needs no copy.
Tensor padded_rows(const Tensor& x, int64_t lanes) {
  const bool usable = x.size(2) % lanes == 0 && x.stride(2) == 1 && x.stride(1) == x.size(2);
  return usable ? x : padded(x, lanes);
}

Tensor unpadded(const Tensor& x, int64_t channels) {
  return x.size(2) == channels ? x : x.narrow(2, 0, channels).contiguous();
}

int64_t lanes_of(const Tensor& x) {
  return x.scalar_type() == at::kFloat ? kLanes<float> : kLanes<double>;
}

// Calls f(i) for every centre i that has edges, in parallel over edges from..to.
template <class F>
void over_centers(const std::vector<int64_t>& begin, int64_t from, int64_t to, const F& f) {
  at::parallel_for(from, to, 64, [&](int64_t first, int64_t last) {
    int64_t i = std::lower_bound(begin.begin(), begin.end(), first) - begin.begin();
    for (; i + 1 < static_cast<int64_t>(begin.size()) && begin[i] < last; i++)
      if (begin[i + 1] > begin[i]) f(i);
  });
}

template <class F>
void with_components(int64_t components, F&& f) {
  switch (components) {
    case 1: return f(std::integral_constant<int, 1>{});
    case 3: return f(std::integral_constant<int, 3>{});
    case 5: return f(std::integral_constant<int, 5>{});
    case 7: return f(std::integral_constant<int, 7>{});
    case 9: return f(std::integral_constant<int, 9>{});
  }
  f(std::integral_constant<int, 0>{});
}

// Derivatives of all edges.  What belongs to neighbours is written edge by edge into a buffer that stays in
// the cache, and then added in the order of the edges, each thread for its own columns: no two threads write
// to one place, and the sums do not depend on the number of threads.
template <class T, bool kDual, int A>
void backward_edges(const Convolution<T>& s) {
  const int64_t columns = s.components * s.channels, lanes = kLanes<T>;
  const int64_t at_once = 256 * at::get_num_threads();
  std::vector<T> buffer;
  for (int64_t first = 0; first < s.edges;) {
    // Up to the end of a centre.
    auto end = std::lower_bound(s.begin.begin(), s.begin.end(), std::min(first + at_once, s.edges));
    const int64_t last = *end;
    if (s.gh) buffer.resize(std::max<size_t>(buffer.size(), (last - first) * columns));
    over_centers(s.begin, first, last, [&](int64_t i) {
      thread_local std::vector<Vec<T>> sums;
      sums.resize(s.gK ? s.rows * s.components : 0);
      backward_center<T, kDual, A>(s, i, s.gh ? buffer.data() : nullptr, first, sums.data());
    });
    if (s.gh) {
      at::parallel_for(0, columns / lanes, 4, [&](int64_t from, int64_t to) {
        for (int64_t k = first; k < last; k++) {
          const T* here = buffer.data() + (k - first) * columns;
          T* sum = s.gh + s.neighbors[s.edge(k)] * columns;
          for (int64_t c = from * lanes; c < to * lanes; c += lanes)
            store(sum + c, load(sum + c) + load(here + c));
        }
      });
    }
    first = last;
  }
}

struct Inputs {
  Tensor K, h, R, g, uK, uh, uR;  // g and u: undefined where there is none
};

struct Outputs {
  Tensor out, K, h, R;  // undefined where not wanted
};

template <class T>
void run(const Inputs& in, const Outputs& to, const Tensor& centers, const Tensor& neighbors,
         IntArrayRef path_of_row) {
  const int64_t nodes = in.h.size(0);
  const Tensor i = centers.contiguous(), j = neighbors.contiguous();
  const Edges edges = sort_edges(i, j, nodes);
  const std::vector<int64_t> row_of = first_rows(path_of_row, in.R.size(1));
  const auto read = [](const Tensor& x) { return x.defined() ? x.const_data_ptr<T>() : nullptr; };
  const auto write = [](const Tensor& x) { return x.defined() ? x.data_ptr<T>() : nullptr; };
  const Convolution<T> s{nodes,          i.size(0),         in.K.size(1), in.K.size(2), in.R.size(1),
                         in.h.size(2),   j.const_data_ptr<int64_t>(),
                         edges.order.empty() ? nullptr : edges.order.data(), edges.begin, row_of,
                         read(in.K),     read(in.h),        read(in.R),   read(in.g),   read(in.uK),
                         read(in.uh),    read(in.uR),       in.R.stride(0),
                         in.uR.defined() ? in.uR.stride(0) : 0,
                         write(to.out),  write(to.K),       write(to.h),  write(to.R)};
  if (s.edges == 0 || s.rows == 0 || s.channels == 0) return;
  with_components(s.components, [&](auto a) {
    constexpr int A = decltype(a)::value;
    if (in.uK.defined())
      backward_edges<T, true, A>(s);
    else if (in.g.defined())
      backward_edges<T, false, A>(s);
    else
      over_centers(s.begin, 0, s.edges, [&](int64_t c) { forward_center<T, A>(s, c); });
  });
}

void run(const Inputs& in, const Outputs& to, const Tensor& centers, const Tensor& neighbors,
         IntArrayRef path_of_row) {
  if (in.h.scalar_type() == at::kFloat)
    run<float>(in, to, centers, neighbors, path_of_row);
  else
    run<double>(in, to, centers, neighbors, path_of_row);
}

// A place for a derivative; zeros where nothing is computed (no edges) or where sums are formed.
Tensor place(bool wanted, const Tensor& like, int64_t channels, bool zero) {
  if (!wanted) return Tensor();
  const std::array<int64_t, 3> sizes{like.size(0), like.size(1), channels};
  return zero ? at::zeros(sizes, like.options()) : at::empty(sizes, like.options());
}

bool nothing_to_do(const Tensor& K, const Tensor& h) {
  return K.size(0) == 0 || K.size(1) == 0 || h.size(2) == 0;
}

Tensor none(const Tensor& like) { return at::empty({0}, like.options()); }

Tensor convolve_cpu(const Tensor& K, const Tensor& h, const Tensor& R, const Tensor& i, const Tensor& j,
                    IntArrayRef path_of_row) {
  check(K, h, R, i, j, path_of_row);
  const int64_t lanes = lanes_of(h);
  Inputs in;
  in.K = K.contiguous(), in.h = padded(h, lanes), in.R = padded_rows(R, lanes);
  Outputs to;
  to.out = at::zeros({h.size(0), K.size(1), in.h.size(2)}, h.options());
  run(in, to, i, j, path_of_row);
  return unpadded(to.out, h.size(2));
}

using Three = std::tuple<Tensor, Tensor, Tensor>;
using Four = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using Mask = std::array<bool, 3>;

// Inputs and outputs that first and second derivatives share.
void prepare(Inputs& in, Outputs& to, const Tensor& g, const Tensor& K, const Tensor& h, const Tensor& R,
             const Mask& mask) {
  const int64_t lanes = lanes_of(h);
  in.K = K.contiguous(), in.h = padded(h, lanes), in.R = padded_rows(R, lanes), in.g = padded(g, lanes);
  const bool nothing = nothing_to_do(K, h);
  to.K = place(mask[0], K, K.size(2), nothing);
  to.h = place(mask[1], h, in.h.size(2), true);
  to.R = place(mask[2], R, in.h.size(2), nothing);
}

Three derivatives(const Outputs& to, const Tensor& h) {
  const int64_t C = h.size(2);
  return {to.K.defined() ? to.K : none(h), to.h.defined() ? unpadded(to.h, C) : none(h),
          to.R.defined() ? unpadded(to.R, C) : none(h)};
}

Three backward_cpu(const Tensor& g, const Tensor& K, const Tensor& h, const Tensor& R, const Tensor& i,
                   const Tensor& j, IntArrayRef path_of_row, Mask mask) {
  check(K, h, R, i, j, path_of_row);
  check_gradient(g, K, h);
  Inputs in;
  Outputs to;
  prepare(in, to, g, K, h, R, mask);
  run(in, to, i, j, path_of_row);
  return derivatives(to, h);
}

Four double_backward_cpu(const Tensor& g, const Tensor& K, const Tensor& h, const Tensor& R,
                         const Optional& uK, const Optional& uh, const Optional& uR, const Tensor& i,
                         const Tensor& j, IntArrayRef path_of_row, Mask mask) {
  check(K, h, R, i, j, path_of_row);
  check_gradient(g, K, h);
  Inputs in;
  Outputs to;
  prepare(in, to, g, K, h, R, mask);
  const auto direction = [](const Optional& u, const Tensor& like, const char* what) {
    if (!u || !u->defined()) return at::zeros_like(like);
    check_like(*u, like, what);
    return *u;
  };
  const int64_t lanes = lanes_of(h);
  in.uK = direction(uK, K, "the direction of coupling").contiguous();
  in.uh = padded(direction(uh, h, "the direction of features"), lanes);
  in.uR = padded_rows(direction(uR, R, "the direction of radial"), lanes);
  to.out = at::zeros(in.g.sizes(), g.options());
  run(in, to, i, j, path_of_row);
  auto [gK, gh, gR] = derivatives(to, h);
  return {unpadded(to.out, h.size(2)), gK, gh, gR};
}

// ------------------------------------------------------------------------------------------------- shapes

Tensor convolve_meta(const Tensor& K, const Tensor& h, const Tensor& R, const Tensor& i, const Tensor& j,
                     IntArrayRef path_of_row) {
  check(K, h, R, i, j, path_of_row);
  return h.new_empty_symint({h.sym_size(0), K.sym_size(1), h.sym_size(2)});
}

Tensor shape_of(bool wanted, const Tensor& x) {
  return wanted ? x.new_empty_symint(x.sym_sizes()) : x.new_empty({0});
}

Three backward_meta(const Tensor& g, const Tensor& K, const Tensor& h, const Tensor& R, const Tensor& i,
                    const Tensor& j, IntArrayRef path_of_row, Mask mask) {
  check(K, h, R, i, j, path_of_row);
  check_gradient(g, K, h);
  return {shape_of(mask[0], K), shape_of(mask[1], h), shape_of(mask[2], R)};
}

Four double_backward_meta(const Tensor& g, const Tensor& K, const Tensor& h, const Tensor& R, const Optional&,
                          const Optional&, const Optional&, const Tensor& i, const Tensor& j,
                          IntArrayRef path_of_row, Mask mask) {
  auto [gK, gh, gR] = backward_meta(g, K, h, R, i, j, path_of_row, mask);
  return {shape_of(true, g), gK, gh, gR};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(compactmlip, m) {
  m.def(
      "convolve(Tensor coupling, Tensor features, Tensor radial, Tensor centers, Tensor neighbors, "
      "int[] path_of_row) -> Tensor");
  m.def(
      "convolve_backward(Tensor gradient, Tensor coupling, Tensor features, Tensor radial, Tensor centers, "
      "Tensor neighbors, int[] path_of_row, bool[3] mask) -> (Tensor, Tensor, Tensor)");
  m.def(
      "convolve_double_backward(Tensor gradient, Tensor coupling, Tensor features, Tensor radial, "
      "Tensor? d_coupling, Tensor? d_features, Tensor? d_radial, Tensor centers, Tensor neighbors, "
      "int[] path_of_row, bool[3] mask) -> (Tensor, Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(compactmlip, CPU, m) {
  m.impl("convolve", convolve_cpu);
  m.impl("convolve_backward", backward_cpu);
  m.impl("convolve_double_backward", double_backward_cpu);
}

TORCH_LIBRARY_IMPL(compactmlip, Meta, m) {
  m.impl("convolve", convolve_meta);
  m.impl("convolve_backward", backward_meta);
  m.impl("convolve_double_backward", double_backward_meta);
}

}  // namespace compactmlip
