// Loops of the convolution over edges, paths and channels.
//
// With K the coupling matrices of the edges, h the features of the neighbours and R the radial weights,
// the multilinear form of the operator and an output gradient g is
//
//   Phi = sum_e sum_p sum_{r in p} sum_a sum_c  g[i_e, r, c] K[e, r, a] h[j_e, a, c] R[e, p, c].
//
// Per edge and path everything follows from two small products,
//
//   x[a, c] = h[j, a, c] R[p, c]        z[a, c] = sum_{r in p} g[i, r, c] K[r, a]
//
//   dPhi/dg[r, c] = sum_a K[r, a] x[a, c]      dPhi/dK[r, a] = sum_c g[r, c] x[a, c]
//   dPhi/dh[a, c] = sum_p R[p, c] z[a, c]      dPhi/dR[p, c] = sum_a h[a, c] z[a, c]
//
// The derivative of the last three along a direction (u_K, u_h, u_R) is the same code with dual numbers.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "simd.h"

namespace compactmlip {

constexpr int64_t kMaxA = 64;  // Largest number of components of a feature: l <= 31.

template <class T>
struct Convolution {
  int64_t nodes, edges, rows, components, paths, channels;  // channels: a multiple of kLanes<T>
  const int64_t* neighbors;
  const int64_t* order;                // edges sorted by centre, or nullptr if they are
  const std::vector<int64_t>& begin;   // (nodes + 1) where each centre begins in that order
  const std::vector<int64_t>& row_of;  // (paths + 1) where the rows of each path begin
  const T *K, *h, *R, *g;              // g: gradient of the output
  const T *uK, *uh, *uR;               // direction; nullptr for first derivatives
  int64_t R_stride, uR_stride;         // from edge to edge
  T *out, *gK, *gh, *gR;               // nullptr: not wanted

  int64_t edge(int64_t k) const { return order ? order[k] : k; }
};

// Row loops are unrolled for the sizes that occur in models; 0 stands for any size.
template <int A, int NR>
struct Shape {
  const int64_t components, rows, channels;
  inline __attribute__((always_inline)) int64_t a() const { return A ? A : components; }
  inline __attribute__((always_inline)) int64_t r() const { return NR ? NR : rows; }
  static constexpr int64_t max_a = A ? A : kMaxA;
};

template <class T, int A, int NR>
inline void forward_path(Shape<A, NR> n, const T* __restrict h, const T* __restrict w,
                         const T* __restrict k, T* __restrict out) {
  for (int64_t c = 0; c < n.channels; c += kLanes<T>) {
    const Vec<T> weight = load(w + c);
    Vec<T> x[n.max_a];
    for (int64_t a = 0; a < n.a(); a++) x[a] = load(h + a * n.channels + c) * weight;
    for (int64_t r = 0; r < n.r(); r++) {
      T* o = out + r * n.channels + c;
      Vec<T> sum = load(o);
      for (int64_t a = 0; a < n.a(); a++) sum += x[a] * k[r * n.a() + a];
      store(o, sum);
    }
  }
}

template <class T>
struct Pointers {  // of one edge and path; d*: the direction
  const T *h, *dh, *w, *dw, *k, *dk, *g;
  T *out, *gh, *gR;
  bool first;
};

template <class T, bool kDual, int A, int NR>
inline void backward_path(Shape<A, NR> n, Pointers<T> p) {
  using N = Number<T, kDual>;
  for (int64_t c = 0; c < n.channels; c += kLanes<T>) {
    const N weight = N::read(p.w + c, p.dw + c);
    N z[n.max_a], x[n.max_a];
    for (int64_t a = 0; a < n.a(); a++) {
      z[a] = N::zero();
      if constexpr (kDual) x[a] = N::read(p.h + a * n.channels + c, p.dh + a * n.channels + c).times(weight);
    }
    for (int64_t r = 0; r < n.r(); r++) {
      const Vec<T> g = load(p.g + r * n.channels + c);
      const T *k = p.k + r * n.a(), *dk = p.dk + r * n.a();
      for (int64_t a = 0; a < n.a(); a++) z[a].add(g, k[a], dk[a]);
      if constexpr (kDual) {
        T* o = p.out + r * n.channels + c;
        Vec<T> sum = load(o);
        for (int64_t a = 0; a < n.a(); a++) {
          sum += x[a].d * k[a];
          sum += x[a].v * dk[a];
        }
        store(o, sum);
      }
    }
    if (p.gR) {
      Vec<T> sum = Vec<T>{};
      for (int64_t a = 0; a < n.a(); a++)
        sum += N::read(p.h + a * n.channels + c, p.dh + a * n.channels + c).times(z[a]).result();
      store(p.gR + c, sum);
    }
    if (p.gh) {
      for (int64_t a = 0; a < n.a(); a++) {
        T* o = p.gh + a * n.channels + c;
        const Vec<T> here = weight.times(z[a]).result();
        store(o, p.first ? here : load(o) + here);
      }
    }
  }
}

// Rows whose derivatives with respect to K are accumulated in registers together.
template <int A, int NR>
constexpr int64_t kTile = A == 0 ? 1 : std::max<int64_t>(1, std::min<int64_t>(NR ? NR : 4, 21 / A));

template <class T, bool kDual, int64_t kRows, int A, int NR>
inline void coupling_tile(Shape<A, NR> n, const Pointers<T>& p, int64_t row, Vec<T>* sums) {
  using N = Number<T, kDual>;
  Vec<T> sum[kRows][n.max_a];
  for (int64_t r = 0; r < kRows; r++)
    for (int64_t a = 0; a < n.a(); a++) sum[r][a] = Vec<T>{};
  for (int64_t c = 0; c < n.channels; c += kLanes<T>) {
    const N weight = N::read(p.w + c, p.dw + c);
    Vec<T> g[kRows];
    for (int64_t r = 0; r < kRows; r++) g[r] = load(p.g + (row + r) * n.channels + c);
    for (int64_t a = 0; a < n.a(); a++) {
      const Vec<T> x =
          N::read(p.h + a * n.channels + c, p.dh + a * n.channels + c).times(weight).result();
      for (int64_t r = 0; r < kRows; r++) sum[r][a] += g[r] * x;
    }
  }
  for (int64_t r = 0; r < kRows; r++)
    for (int64_t a = 0; a < n.a(); a++) sums[(row + r) * n.a() + a] = sum[r][a];
}

// sums[r, a] = lanes of dPhi/dK[r, a] of the rows of one path.
template <class T, bool kDual, int A, int NR>
inline void coupling_path(Shape<A, NR> n, const Pointers<T>& p, Vec<T>* sums) {
  constexpr int64_t tile = kTile<A, NR>;
  int64_t row = 0;
  for (; row + tile <= n.r(); row += tile) coupling_tile<T, kDual, tile>(n, p, row, sums);
  for (; row < n.r(); row++) coupling_tile<T, kDual, 1>(n, p, row, sums);
}

template <int A, class F>
inline void with_rows(int64_t components, int64_t rows, int64_t channels, F&& f) {
  if constexpr (A >= 1 && A <= 7) {
    switch (rows) {
      case 1: return f(Shape<A, 1>{components, rows, channels});
      case 3: return f(Shape<A, 3>{components, rows, channels});
      case 5: return f(Shape<A, 5>{components, rows, channels});
      case 7: return f(Shape<A, 7>{components, rows, channels});
    }
  }
  f(Shape<A, 0>{components, rows, channels});
}

// Add the messages of the edges of one centre to out[i].
template <class T, int A>
void forward_center(const Convolution<T>& s, int64_t i) {
  const int64_t C = s.channels, n = s.components;
  T* out = s.out + i * s.rows * C;
  for (int64_t k = s.begin[i]; k < s.begin[i + 1]; k++) {
    const int64_t e = s.edge(k);
    const T *K = s.K + e * s.rows * n, *R = s.R + e * s.R_stride, *h = s.h + s.neighbors[e] * n * C;
    for (int64_t p = 0; p < s.paths; p++) {
      const int64_t row = s.row_of[p];
      with_rows<A>(n, s.row_of[p + 1] - row, C,
                   [&](auto shape) { forward_path<T>(shape, h, R + p * C, K + row * n, out + row * C); });
    }
  }
}

// Derivatives of the edges of one centre.  gh: (edges of this call, A, C), beginning with the k0-th edge;
// sums: (rows * A) scratch.
template <class T, bool kDual, int A>
void backward_center(const Convolution<T>& s, int64_t i, T* gh, int64_t k0, Vec<T>* sums) {
  const int64_t C = s.channels, n = s.components;
  for (int64_t k = s.begin[i]; k < s.begin[i + 1]; k++) {
    const int64_t e = s.edge(k), j = s.neighbors[e];
    for (int64_t p = 0; p < s.paths; p++) {
      const int64_t row = s.row_of[p];
      Pointers<T> at{};
      at.h = s.h + j * n * C;
      at.w = s.R + e * s.R_stride + p * C;
      at.k = s.K + (e * s.rows + row) * n;
      at.g = s.g + (i * s.rows + row) * C;
      at.dh = kDual ? s.uh + j * n * C : at.h;
      at.dw = kDual ? s.uR + e * s.uR_stride + p * C : at.w;
      at.dk = kDual ? s.uK + (e * s.rows + row) * n : at.k;
      at.out = kDual ? s.out + (i * s.rows + row) * C : nullptr;
      at.gh = gh ? gh + (k - k0) * n * C : nullptr;
      at.gR = s.gR ? s.gR + (e * s.paths + p) * C : nullptr;
      at.first = p == 0;
      with_rows<A>(n, s.row_of[p + 1] - row, C, [&](auto shape) {
        if (kDual || at.gh || at.gR) backward_path<T, kDual>(shape, at);
        if (s.gK) coupling_path<T, kDual>(shape, at, sums + row * n);
      });
    }
    if (s.gK) sum_lanes<T>(sums, s.rows * n, s.gK + e * s.rows * n);
  }
}

}  // namespace compactmlip
