// Channel loops of the convolution with tabulated radial weights: one path, the edges of one tile.
//
// With x[a] = R h[a], coupling entries K[r, a] and output gradient g[r], all per channel but K:
//
//   out[r] += sum_a K[r, a] x[a]                          z[a] = sum_r g[r] K[r, a]
//   dh[a]  += R z[a]      dR = sum_a h[a] z[a]            dK[r, a] = sum_c g[r] x[a]
//
// A = 2 l1 + 1 components and NR = 2 l3 + 1 rows are unrolled where they are 1, 3, 5 or 7; 0 is any size.
// kUnit: the features are one, and have no gradient.  Paths with l2 = 0 have K[r, a] = k if r = a, else zero,
// whatever the direction.
#pragma once

#include <algorithm>
#include <cstdint>

#include "simd.h"
#include "spline_tile.h"

namespace compactmlip {

// Radial weights of one path and their derivatives per Angstrom, from two knots of the table.
template <class T, int64_t B, int V, bool kSlope>
inline void radial_row(const Tile<T>& t, int e, int64_t columns, int64_t column, int64_t channels, T* R,
                       T* dR) {
  const T* row = t.row[e] + column;
  T w[2 * V], d[2 * V];
  for (int k = 0; k < 2 * V; k++) w[k] = t.weight[k][e], d[k] = t.slope[k][e];
  for (int64_t c = 0; c < channels; c += kLanes<T, B>) {
    Vec<T, B> value = w[0] * load<T, B>(row + c), slope = d[0] * load<T, B>(row + c);
    for (int k = 1; k < 2 * V; k++) {
      const Vec<T, B> knot = load<T, B>(row + k * columns + c);
      value += w[k] * knot;
      if constexpr (kSlope) slope += d[k] * knot;
    }
    store(R + c, value);
    if constexpr (kSlope) store(dR + c, slope);
  }
}

template <class T>
struct ForwardPath {
  int count;
  int64_t channels, components, rows;
  const T* h[kTile];
  int64_t h_stride;
  const T *R, *K;  // (kTile, channels), (rows * components, kTile)
  T* out;
  int64_t out_stride;
  bool first;  // of the edges of this centre: out holds nothing yet
};

template <class T, int64_t B, int A, int NR, bool kUnit, int CB>
inline void forward_channels(const ForwardPath<T>& p, int64_t from, int64_t to) {
  constexpr int64_t lanes = kLanes<T, B>;
  for (int64_t c = from; c < to; c += CB * lanes) {
    Vec<T, B> sum[NR][CB];
    for (int r = 0; r < NR; r++)
      for (int b = 0; b < CB; b++)
        sum[r][b] = p.first ? Vec<T, B>{} : load<T, B>(p.out + r * p.out_stride + c + b * lanes);
    for (int e = 0; e < p.count; e++) {
      const T *R = p.R + e * p.channels + c, *K = p.K + e;
#pragma GCC unroll 8
      for (int a = 0; a < A; a++) {
        Vec<T, B> x[CB];
        for (int b = 0; b < CB; b++) {
          x[b] = load<T, B>(R + b * lanes);
          if constexpr (!kUnit) x[b] *= load<T, B>(p.h[e] + a * p.h_stride + c + b * lanes);
        }
#pragma GCC unroll 8
        for (int r = 0; r < NR; r++) {
          const T k = K[(r * A + a) * kTile];
          for (int b = 0; b < CB; b++) sum[r][b] += k * x[b];
        }
      }
    }
    for (int r = 0; r < NR; r++)
      for (int b = 0; b < CB; b++) store(p.out + r * p.out_stride + c + b * lanes, sum[r][b]);
  }
}

template <class T, int64_t B, int A, int NR, bool kUnit>
void forward_path(const ForwardPath<T>& p) {
  constexpr int64_t lanes = kLanes<T, B>;
  if constexpr (A > 0 && NR > 0) {
    // Two vectors share every load of an entry where the sums fit the registers.
    constexpr int CB = NR <= 5 ? 2 : 1;
    const int64_t paired = p.channels / (CB * lanes) * (CB * lanes);
    forward_channels<T, B, A, NR, kUnit, CB>(p, 0, paired);
    if constexpr (CB > 1) forward_channels<T, B, A, NR, kUnit, 1>(p, paired, p.channels);
    return;
  }
  for (int64_t r = 0; r < p.rows; r++)
    for (int64_t c = 0; c < p.channels; c += lanes) {
      Vec<T, B> sum = p.first ? Vec<T, B>{} : load<T, B>(p.out + r * p.out_stride + c);
      for (int e = 0; e < p.count; e++)
        for (int64_t a = 0; a < p.components; a++)
          sum += p.K[(r * p.components + a) * kTile + e] * load<T, B>(p.R + e * p.channels + c) *
                 load<T, B>(p.h[e] + a * p.h_stride + c);
      store(p.out + r * p.out_stride + c, sum);
    }
}

// l2 = 0.
template <class T, int64_t B>
void forward_diagonal(const ForwardPath<T>& p) {
  for (int64_t r = 0; r < p.rows; r++)
    for (int64_t c = 0; c < p.channels; c += kLanes<T, B>) {
      Vec<T, B> sum = p.first ? Vec<T, B>{} : load<T, B>(p.out + r * p.out_stride + c);
      for (int e = 0; e < p.count; e++)
        sum += p.K[0] * load<T, B>(p.R + e * p.channels + c) * load<T, B>(p.h[e] + r * p.h_stride + c);
      store(p.out + r * p.out_stride + c, sum);
    }
}

template <class T, int64_t B>
struct BackwardPath {
  int count;  // edges of the tile, one or two
  int64_t channels, components, rows;
  const T* h[2];
  int64_t h_stride;
  const T *R[2], *dR[2], *K, *g;  // K: of the first of the edges
  int64_t g_stride;
  T* dh[2];            // (components, channels), or null
  Vec<T, B>* slope[2];  // lanes of the derivative with respect to the distance; added to
  Vec<T, B>* dK;        // lanes of the derivatives with respect to the entries, (rows * components, kTile)
  bool first;           // path of the group: dh holds nothing yet
  T* x;                 // scratch, (components, channels)
};

// One component: everything stays in registers, and EB edges share the loads of the gradient.
template <class T, int64_t B, int NR, bool kUnit, int EB>
inline void backward_scalar(const BackwardPath<T, B>& p, int e0) {
  using V = Vec<T, B>;
  V entries[EB][NR], slope[EB];
  for (int e = 0; e < EB; e++) {
    slope[e] = V{};
    for (int r = 0; r < NR; r++) entries[e][r] = V{};
  }
  for (int64_t c = 0; c < p.channels; c += kLanes<T, B>) {
    V z[EB], x[EB], h[EB];
    for (int e = 0; e < EB; e++) {
      z[e] = V{};
      x[e] = load<T, B>(p.R[e0 + e] + c);
      if constexpr (!kUnit) {
        h[e] = load<T, B>(p.h[e0 + e] + c);
        x[e] *= h[e];
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < NR; r++) {
      const V g = load<T, B>(p.g + r * p.g_stride + c);
      for (int e = 0; e < EB; e++) {
        z[e] += p.K[r * kTile + e0 + e] * g;
        entries[e][r] += g * x[e];
      }
    }
    for (int e = 0; e < EB; e++) {
      const V slope_here = load<T, B>(p.dR[e0 + e] + c);
      if constexpr (kUnit) {
        slope[e] += slope_here * z[e];
      } else {
        slope[e] += slope_here * (h[e] * z[e]);
        T* dh = p.dh[e0 + e];
        if (dh) {
          const V here = load<T, B>(p.R[e0 + e] + c) * z[e];
          store(dh + c, p.first ? here : load<T, B>(dh + c) + here);
        }
      }
    }
  }
  for (int e = 0; e < EB; e++) {
    *p.slope[e0 + e] += slope[e];
    for (int r = 0; r < NR; r++) p.dK[r * kTile + e0 + e] = entries[e][r];
  }
}

// z, and from it the gradients of features and distance; keeps x for the entries.
template <class T, int64_t B, int A, int NR>
inline void backward_features(const BackwardPath<T, B>& p, int e) {
  using V = Vec<T, B>;
  V slope{};
  for (int64_t c = 0; c < p.channels; c += kLanes<T, B>) {
    V z[A], t{};
    for (int a = 0; a < A; a++) z[a] = V{};
#pragma GCC unroll 8
    for (int r = 0; r < NR; r++) {
      const V g = load<T, B>(p.g + r * p.g_stride + c);
#pragma GCC unroll 8
      for (int a = 0; a < A; a++) z[a] += p.K[(r * A + a) * kTile + e] * g;
    }
    const V R = load<T, B>(p.R[e] + c);
#pragma GCC unroll 8
    for (int a = 0; a < A; a++) {
      const V h = load<T, B>(p.h[e] + a * p.h_stride + c);
      t += h * z[a];
      store(p.x + a * p.channels + c, R * h);
      if (p.dh[e]) {
        T* to = p.dh[e] + a * p.channels + c;
        store(to, p.first ? R * z[a] : load<T, B>(to) + R * z[a]);
      }
    }
    slope += t * load<T, B>(p.dR[e] + c);
  }
  *p.slope[e] += slope;
}

template <class T, int64_t B, int A, int TR>
inline void entry_rows(const BackwardPath<T, B>& p, int row, int e) {
  using V = Vec<T, B>;
  V sum[TR][A];
  for (int r = 0; r < TR; r++)
    for (int a = 0; a < A; a++) sum[r][a] = V{};
  for (int64_t c = 0; c < p.channels; c += kLanes<T, B>) {
    V g[TR];
    for (int r = 0; r < TR; r++) g[r] = load<T, B>(p.g + (row + r) * p.g_stride + c);
#pragma GCC unroll 8
    for (int a = 0; a < A; a++) {
      const V x = load<T, B>(p.x + a * p.channels + c);
      for (int r = 0; r < TR; r++) sum[r][a] += g[r] * x;
    }
  }
  for (int r = 0; r < TR; r++)
    for (int a = 0; a < A; a++) p.dK[((row + r) * A + a) * kTile + e] = sum[r][a];
}

template <class T, int64_t B, int A, int NR>
inline void backward_entries(const BackwardPath<T, B>& p, int e) {
#if defined(__AVX512F__) || defined(__aarch64__)
  constexpr int registers = 28;
#else
  constexpr int registers = 12;
#endif
  constexpr int TR = std::clamp(registers / A, 1, NR);
  int row = 0;
  for (; row + TR <= NR; row += TR) entry_rows<T, B, A, TR>(p, row, e);
  if constexpr (NR % TR != 0) entry_rows<T, B, A, NR % TR>(p, row, e);
}

// Any sizes.
template <class T, int64_t B>
inline void backward_any(const BackwardPath<T, B>& p, int e) {
  using V = Vec<T, B>;
  const int64_t A = p.components;
  V *sums = p.dK + e, slope{};
  for (int64_t k = 0; k < p.rows * A; k++) sums[k * kTile] = V{};
  for (int64_t c = 0; c < p.channels; c += kLanes<T, B>) {
    const V R = load<T, B>(p.R[e] + c), dR = load<T, B>(p.dR[e] + c);
    for (int64_t a = 0; a < A; a++) {
      const V h = load<T, B>(p.h[e] + a * p.h_stride + c);
      V z{};
      for (int64_t r = 0; r < p.rows; r++) {
        const V g = load<T, B>(p.g + r * p.g_stride + c);
        z += p.K[(r * A + a) * kTile + e] * g;
        sums[(r * A + a) * kTile] += g * (R * h);
      }
      slope += dR * (h * z);
      if (p.dh[e]) {
        T* to = p.dh[e] + a * p.channels + c;
        store(to, p.first ? R * z : load<T, B>(to) + R * z);
      }
    }
  }
  *p.slope[e] += slope;
}

// l2 = 0: the entries do not depend on the direction, and their derivatives are not formed.
template <class T, int64_t B, bool kUnit>
void backward_diagonal(const BackwardPath<T, B>& p) {
  using V = Vec<T, B>;
  for (int e = 0; e < p.count; e++) {
    V slope{};
    for (int64_t c = 0; c < p.channels; c += kLanes<T, B>) {
      const V R = load<T, B>(p.R[e] + c);
      V t{};
      for (int64_t r = 0; r < p.rows; r++) {
        const V z = p.K[e] * load<T, B>(p.g + r * p.g_stride + c);
        if constexpr (kUnit) {
          t += z;
        } else {
          t += z * load<T, B>(p.h[e] + r * p.h_stride + c);
          if (!p.dh[e]) continue;
          T* to = p.dh[e] + r * p.channels + c;
          store(to, p.first ? R * z : load<T, B>(to) + R * z);
        }
      }
      slope += t * load<T, B>(p.dR[e] + c);
    }
    *p.slope[e] += slope;
  }
}

template <class T, int64_t B, int A, int NR, bool kUnit>
void backward_path(const BackwardPath<T, B>& p) {
  if constexpr (A == 1 && NR > 0) {
    if (NR <= 5 && p.count == 2) return backward_scalar<T, B, NR, kUnit, 2>(p, 0);
    for (int e = 0; e < p.count; e++) backward_scalar<T, B, NR, kUnit, 1>(p, e);
  } else {
    for (int e = 0; e < p.count; e++) {
      if constexpr (A > 0 && NR > 0) {
        backward_features<T, B, A, NR>(p, e);
        backward_entries<T, B, A, NR>(p, e);
      } else {
        backward_any<T, B>(p, e);
      }
    }
  }
}

// The instance for the sizes of a path.
template <class T, int64_t B>
struct PathFunctions {
  void (*forward)(const ForwardPath<T>&);
  void (*backward)(const BackwardPath<T, B>&);
};

template <class T, int64_t B, int A, int NR>
PathFunctions<T, B> path_functions(bool unit) {
  if constexpr (A == 1 && NR > 0)
    if (unit) return {forward_path<T, B, 1, NR, true>, backward_path<T, B, 1, NR, true>};
  return {forward_path<T, B, A, NR, false>, backward_path<T, B, A, NR, false>};
}

template <class T, int64_t B, int A>
PathFunctions<T, B> path_functions(int64_t rows, bool unit) {
  switch (rows) {
    case 1: return path_functions<T, B, A, 1>(unit);
    case 3: return path_functions<T, B, A, 3>(unit);
    case 5: return path_functions<T, B, A, 5>(unit);
    case 7: return path_functions<T, B, A, 7>(unit);
  }
  return path_functions<T, B, A, 0>(unit);
}

template <class T, int64_t B>
PathFunctions<T, B> path_functions(const Path& path, bool unit) {
  const int64_t components = path.components(), rows = path.rows();
  if (path.l2 == 0)
    return {forward_diagonal<T, B>, unit ? backward_diagonal<T, B, true> : backward_diagonal<T, B, false>};
  if (rows > 7) return path_functions<T, B, 0, 0>(unit);
  switch (components) {
    case 1: return path_functions<T, B, 1>(rows, unit);
    case 3: return path_functions<T, B, 3>(rows, unit);
    case 5: return path_functions<T, B, 5>(rows, unit);
    case 7: return path_functions<T, B, 7>(rows, unit);
  }
  return path_functions<T, B, 0, 0>(unit);
}

}  // namespace compactmlip
