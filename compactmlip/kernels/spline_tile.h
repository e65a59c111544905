// What belongs to edges alone: distances, spline weights, spherical harmonics, coupling entries, and the way
// back from their adjoints to the edge vectors.  A tile is a few edges of one centre; lanes are edges.
//
// With n = r / |r| the first order is sqrt(3) n (solid harmonics: sqrt(3) r), and each higher order a
// bilinear step from the one below and the first, as in models/angular.py.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "spline_plan.h"

namespace compactmlip {

constexpr int kTile = 8;
#define EACH_EDGE _Pragma("omp simd") for (int e = 0; e < kTile; e++)

// Knots lie evenly from zero to the kink, and, with a second knot there, from the kink to the cutoff: the
// second derivatives on its two sides differ.
template <class T>
struct Table {
  const T* values;  // (types, knots, values per knot, columns)
  int64_t knots;
  double cutoff, kink;      // kink: zero where there is none
  int64_t before;           // knots up to the kink
  double per_angstrom[2];   // intervals per Angstrom on both sides
  const int64_t* pairs;    // (species, species) type by species of centre and neighbour, or null
  int64_t num_species;
};

template <class T>
struct alignas(64) Tile {
  int count;
  int64_t edge[kTile];
  T direction[3][kTile], length[kTile], inverse[kTile];
  T weight[6][kTile], slope[6][kTile];  // of the values at the two knots; slope: derivative per Angstrom
  const T* row[kTile];                  // values at the two knots
  T y[kMaxHarmonics][kTile], dy[kMaxHarmonics][kTile];
};

// Hermite interpolation between two knots with value and derivative (2 values per knot), or second derivative
// as well (3), at u in [0, 1]: weights times scale, and their derivatives times slope.
template <class T>
inline void hermite(Tile<T>& t, int values, const double* u, const double* scale, const double* slope) {
  auto set = [&](int k, int e, double w, double d) {
    t.weight[k][e] = static_cast<T>(scale[e] * w);
    t.slope[k][e] = static_cast<T>(slope[e] * d);
  };
  if (values == 2) {
    EACH_EDGE {
      const double x = u[e], v = 1 - x;
      set(0, e, (1 + 2 * x) * v * v, -6 * x * v);
      set(1, e, x * v * v, v * (1 - 3 * x));
      set(2, e, x * x * (3 - 2 * x), 6 * x * v);
      set(3, e, -x * x * v, x * (3 * x - 2));
    }
    return;
  }
  EACH_EDGE {
    const double x = u[e], v = 1 - x, x2 = x * x, x3 = x2 * x, v2 = v * v, v3 = v2 * v;
    set(0, e, v3 * (1 + x * (3 + 6 * x)), -30 * x2 * v2);
    set(1, e, v3 * x * (1 + 3 * x), v2 * (1 + x * (2 - 15 * x)));
    set(2, e, v3 * x2 / 2, v2 * x * (2 - 5 * x) / 2);
    set(3, e, x3 * (1 + v * (3 + 6 * v)), 30 * x2 * v2);
    set(4, e, -x3 * v * (1 + 3 * v), x2 * (1 + v * (2 - 15 * v)));
    set(5, e, x3 * v2 / 2, -x2 * v * (2 - 5 * v) / 2);
  }
}

// Vectors, spline weights and harmonics of the edges listed in the tile.  The lanes behind the last edge
// repeat it and are not used.
template <class T>
inline void read_tile(Tile<T>& t, const Plan& plan, const Table<T>& table, const T* vectors,
                      const int64_t* species, int64_t center, const int64_t* neighbors, const T* coefficients) {
  const int values = static_cast<int>(plan.values_per_knot);
  for (int e = 0; e < kTile; e++) {
    const int64_t edge = t.edge[std::min(e, t.count - 1)];
    for (int k = 0; k < 3; k++) t.direction[k][e] = vectors[3 * edge + k];
  }
  // Distances are in double precision throughout: the place between two knots costs digits, and little time.
  double length[kTile];
  EACH_EDGE {
    const double x = t.direction[0][e], y = t.direction[1][e], z = t.direction[2][e];
    length[e] = std::sqrt(x * x + y * y + z * z);
    const double inverse = 1 / length[e];
    t.length[e] = static_cast<T>(length[e]);
    t.inverse[e] = static_cast<T>(inverse);
    t.direction[0][e] = static_cast<T>(x * inverse);
    t.direction[1][e] = static_cast<T>(y * inverse);
    t.direction[2][e] = static_cast<T>(z * inverse);
  }
  double place[kTile], scale[kTile], slope[kTile];
  for (int e = 0; e < kTile; e++) {
    const int64_t edge = t.edge[std::min(e, t.count - 1)];
    int64_t type = 0;
    if (table.pairs) type = table.pairs[species[center] * table.num_species + species[neighbors[edge]]];
    const bool inside = length[e] < table.cutoff, behind = !(length[e] < table.kink);
    const double per_angstrom = table.per_angstrom[behind];
    const double position = inside ? (length[e] - (behind ? table.kink : 0)) * per_angstrom : 0;
    const int64_t last = (behind ? table.knots - table.before : table.before) - 2;
    const int64_t interval = std::min(static_cast<int64_t>(position), last);
    const int64_t knot = interval + (behind ? table.before : 0);
    // Zero beyond the cutoff; what is not a number must not look like one.
    scale[e] = inside ? 1.0 : length[e] >= table.cutoff ? 0.0 : std::numeric_limits<double>::quiet_NaN();
    place[e] = position - static_cast<double>(interval);
    slope[e] = scale[e] * per_angstrom;
    t.row[e] = table.values + (type * table.knots + knot) * values * plan.columns;
  }
  hermite(t, values, place, scale, slope);
  EACH_EDGE t.y[0][e] = 1;
  if (plan.lmax > 0) {
    const T first = static_cast<T>(std::sqrt(3.0));
    for (int k = 0; k < 3; k++)
      EACH_EDGE t.y[1 + k][e] = first * t.direction[k][e] * (plan.solid ? t.length[e] : T(1));
  }
  for (int64_t b = 4; b < (plan.lmax + 1) * (plan.lmax + 1); b++) EACH_EDGE t.y[b][e] = 0;
  for (int64_t s = 0; s < plan.num_steps; s++) {
    const int32_t* step = plan.steps + 3 * s;
    EACH_EDGE t.y[step[0]][e] += coefficients[s] * t.y[step[1]][e] * t.y[step[2]][e];
  }
}

// Coupling entries of a group from the harmonics, (entries, kTile).
template <class T>
inline void couple(const Tile<T>& t, const Group& group, const T* coefficients, T* entries) {
  std::fill_n(entries, group.entries * kTile, T(0));
  for (int64_t k = 0; k < group.num_terms; k++) {
    const T value = coefficients[group.term_values + k];
    T* to = entries + group.terms[2 * k] * kTile;
    const T* from = t.y[group.terms[2 * k + 1]];
    EACH_EDGE to[e] += value * from[e];
  }
}

// The adjoint of couple.
template <class T>
inline void uncouple(Tile<T>& t, const Group& group, const T* coefficients, const T* adjoint) {
  for (int64_t k = 0; k < group.num_terms; k++) {
    if (group.terms[2 * k + 1] == 0) continue;  // a constant
    const T value = coefficients[group.term_values + k];
    const T* from = adjoint + group.terms[2 * k] * kTile;
    T* to = t.dy[group.terms[2 * k + 1]];
    EACH_EDGE to[e] += value * from[e];
  }
}

// Gradients with respect to the vectors from the adjoints of harmonics and distances.
template <class T>
inline void write_tile(Tile<T>& t, const Plan& plan, const T* coefficients, const T* radial, T* gradient) {
  for (int64_t s = plan.num_steps - 1; s >= 0; s--) {
    const int32_t* step = plan.steps + 3 * s;
    EACH_EDGE t.dy[step[1]][e] += coefficients[s] * t.dy[step[0]][e] * t.y[step[2]][e];
    EACH_EDGE t.dy[step[2]][e] += coefficients[s] * t.dy[step[0]][e] * t.y[step[1]][e];
  }
  const T first = plan.lmax > 0 ? static_cast<T>(std::sqrt(3.0)) : T(0);
  T result[3][kTile];
  EACH_EDGE {
    const T gx = first * t.dy[1][e], gy = first * t.dy[2][e], gz = first * t.dy[3][e];
    const T nx = t.direction[0][e], ny = t.direction[1][e], nz = t.direction[2][e];
    const T along = plan.solid ? T(0) : nx * gx + ny * gy + nz * gz;
    const T scale = plan.solid ? T(1) : t.inverse[e];
    result[0][e] = (gx - along * nx) * scale + radial[e] * nx;
    result[1][e] = (gy - along * ny) * scale + radial[e] * ny;
    result[2][e] = (gz - along * nz) * scale + radial[e] * nz;
  }
  for (int e = 0; e < t.count; e++)
    for (int k = 0; k < 3; k++) gradient[3 * t.edge[e] + k] = result[k][e];
}

}  // namespace compactmlip
