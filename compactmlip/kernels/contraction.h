// Symmetric contraction: sparse polynomials of every atom's features, and their derivatives.
//
//   out[i, M, c] = sum_r W[z_i, r, c] sum_m A[M, m, r] prod_{k in m} x[i, k, c]
//
// The coefficients A and the weights W of one species are first summed over r to the coefficients
// P[M, m, c] of the species' own polynomials, which its atoms share.  With 1 as an additional component
// all monomials have the same degree.  Each is a prefix times one factor f; a prefix is the product of two
// nodes a and b:
//
//   out[M] = sum_ab node[a] node[b] sum_f P[M, abf] node[f]                             (forward sweep)
//
//   q[abf] = sum_M P[M, abf] g[M],   adjoint[f] += q[abf] node[a] node[b],
//   s[ab] = sum_f q[abf] node[f],    adjoint[a] += s[ab] node[b],   adjoint[b] += s[ab] node[a],
//   gradient of P[M, abf] += g[M] node[a] node[b] node[f]                               (reverse sweep)
//
// Nodes are the components and 1, and from degree 4 on products of two nodes before them.
//
// Second derivatives: with Phi = <g, out(x, W)>, the gradient of <u_x, dPhi/dx> + <u_W, dPhi/dW> is the
// tangent part of both sweeps at x + eps u_x and W + eps u_W.  So the sweeps are templates over real and
// dual numbers.  Lanes are channels.  A tile of U atoms of one species shares every load of a coefficient.
#pragma once

#include <c10/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>

namespace {

#define INLINE static inline __attribute__((always_inline))
#define EACH_ATOM _Pragma("GCC unroll 8") for (int u = 0; u < U; ++u)

// ---- numbers ----------------------------------------------------------------------------------------

// Vectors of the processor's width (wider ones go through memory), and atoms per tile by its registers.
#if defined(__AVX512F__)
constexpr int kBytes = 64, kTile = 8;
#elif defined(__AVX__)
constexpr int kBytes = 32, kTile = 4;
#elif defined(__aarch64__)
constexpr int kBytes = 16, kTile = 8;
#else
constexpr int kBytes = 16, kTile = 4;
#endif

template <typename T> struct LanesOf {
  typedef T Type __attribute__((vector_size(kBytes)));
};
template <typename T> using Lanes = typename LanesOf<T>::Type;
template <typename T> constexpr int64_t kLanes = kBytes / sizeof(T);

// value + eps * tangent
template <typename V> struct Dual {
  V value, tangent;
};
template <typename X> constexpr bool is_dual = false;
template <typename V> constexpr bool is_dual<Dual<V>> = true;

template <typename V> INLINE void add_product(V& sum, const V& a, const V& b) { sum += a * b; }
template <typename V> INLINE void add_product(Dual<V>& sum, const Dual<V>& a, const V& b) {
  sum.value += a.value * b;
  sum.tangent += a.tangent * b;
}
template <typename V> INLINE void add_product(Dual<V>& sum, const V& a, const Dual<V>& b) {
  add_product(sum, b, a);
}
template <typename V> INLINE void add_product(Dual<V>& sum, const Dual<V>& a, const Dual<V>& b) {
  sum.value += a.value * b.value;
  sum.tangent += a.value * b.tangent;
  sum.tangent += a.tangent * b.value;
}
template <typename X> INLINE X product(const X& a, const X& b) {
  X result{};
  add_product(result, a, b);
  return result;
}

// What a sweep hands out: values of real numbers, tangents of dual ones.
template <typename V> INLINE const V& part(const V& a) { return a; }
template <typename V> INLINE const V& part(const Dual<V>& a) { return a.tangent; }

// The last block of channels may have fewer than a full vector.
template <typename T> INLINE void load(Lanes<T>& to, const T* from, int64_t lanes) {
  if (lanes >= kLanes<T>) {
    std::memcpy(&to, from, sizeof(to));
  } else {
    to = Lanes<T>{};
    std::memcpy(&to, from, lanes * sizeof(T));
  }
}
template <typename T, typename X>
INLINE void load(X& to, const T* value, const T* tangent, int64_t lanes) {
  if constexpr (is_dual<X>) {
    load<T>(to.value, value, lanes);
    if (tangent) load<T>(to.tangent, tangent, lanes);
    else to.tangent = Lanes<T>{};
  } else {
    load<T>(to, value, lanes);
  }
}
template <typename T> INLINE void store(T* to, const Lanes<T>& from, int64_t lanes) {
  if (lanes >= kLanes<T>) std::memcpy(to, &from, sizeof(from));
  else std::memcpy(to, &from, lanes * sizeof(T));
}

// ---- plan -------------------------------------------------------------------------------------------

// Written by kernels/contraction.py.  *_start partition what they name among the rows, groups or leaves.
struct Plan {
  int64_t components, products, rows, nodes, groups, coefficients, reverse_groups, leaves, terms;
  // Nodes beyond the components and 1: node = node[left] * node[right].
  const int32_t *left, *right;
  // Forward sweep: groups of each row; prefix and coefficients of each group; factor f of each coefficient.
  const int32_t *row_start, *group_left, *group_right, *group_start, *factor;
  // Reverse sweep: prefix and leaves (monomials) of each group; factor and coefficients of each leaf; row of
  // each coefficient, and its position in the forward order.
  const int32_t *reverse_left, *reverse_right, *reverse_start, *leaf_factor, *leaf_start, *leaf_row,
      *leaf_coefficient;
  // Terms of each coefficient in the forward order: products that it is a sum over.
  const int32_t *term_start, *term_product;
};

constexpr int64_t kHeader = 9;

inline void check_range(const int32_t* values, int64_t count, int64_t limit, const char* name) {
  for (int64_t k = 0; k < count; ++k)
    TORCH_CHECK(values[k] >= 0 && values[k] < limit, "compactmlip::contract: plan table '", name,
                "' has entry ", values[k], " outside 0 ... ", limit - 1);
}

inline void check_starts(const int32_t* starts, int64_t count, int64_t total, const char* name) {
  bool good = starts[0] == 0 && starts[count] == total;
  for (int64_t k = 0; good && k < count; ++k) good = starts[k] <= starts[k + 1];
  TORCH_CHECK(good, "compactmlip::contract: plan table '", name, "' is no partition of ", total);
}

inline void check_entries(const Plan& p) {
  TORCH_CHECK(p.components < p.nodes, "compactmlip::contract: the plan has too few nodes");
  for (int64_t k = p.components + 1; k < p.nodes; ++k) {
    check_range(p.left + k, 1, k, "left");
    check_range(p.right + k, 1, k, "right");
  }
  check_starts(p.row_start, p.rows, p.groups, "row_start");
  check_starts(p.group_start, p.groups, p.coefficients, "group_start");
  check_starts(p.reverse_start, p.reverse_groups, p.leaves, "reverse_start");
  check_starts(p.leaf_start, p.leaves, p.coefficients, "leaf_start");
  check_starts(p.term_start, p.coefficients, p.terms, "term_start");
  check_range(p.group_left, p.groups, p.nodes, "group_left");
  check_range(p.group_right, p.groups, p.nodes, "group_right");
  check_range(p.factor, p.coefficients, p.components + 1, "factor");
  check_range(p.reverse_left, p.reverse_groups, p.nodes, "reverse_left");
  check_range(p.reverse_right, p.reverse_groups, p.nodes, "reverse_right");
  check_range(p.leaf_factor, p.leaves, p.components + 1, "leaf_factor");
  check_range(p.leaf_row, p.coefficients, p.rows, "leaf_row");
  check_range(p.leaf_coefficient, p.coefficients, p.coefficients, "leaf_coefficient");
  check_range(p.term_product, p.terms, p.products, "term_product");
}

// Every entry is checked, once per call: a wrong one would read or write outside of the arrays.
inline Plan read_plan(const int32_t* table, int64_t size) {
  TORCH_CHECK(size >= kHeader, "compactmlip::contract: the plan has no header");
  check_range(table, kHeader, INT32_MAX, "header");
  Plan p{};
  int64_t* const sizes[] = {&p.components,   &p.products,       &p.rows,   &p.nodes, &p.groups,
                            &p.coefficients, &p.reverse_groups, &p.leaves, &p.terms};
  for (int64_t k = 0; k < kHeader; ++k) *sizes[k] = table[k];
  const std::pair<const int32_t**, int64_t> parts[] = {
      {&p.left, p.nodes},
      {&p.right, p.nodes},
      {&p.row_start, p.rows + 1},
      {&p.group_left, p.groups},
      {&p.group_right, p.groups},
      {&p.group_start, p.groups + 1},
      {&p.factor, p.coefficients},
      {&p.reverse_left, p.reverse_groups},
      {&p.reverse_right, p.reverse_groups},
      {&p.reverse_start, p.reverse_groups + 1},
      {&p.leaf_factor, p.leaves},
      {&p.leaf_start, p.leaves + 1},
      {&p.leaf_row, p.coefficients},
      {&p.leaf_coefficient, p.coefficients},
      {&p.term_start, p.coefficients + 1},
      {&p.term_product, p.terms},
  };
  int64_t length = kHeader;
  for (const auto& [start, count] : parts) {
    *start = table + length;
    length += count;
  }
  TORCH_CHECK(size == length, "compactmlip::contract: the plan has ", size, " entries, not ", length);
  check_entries(p);
  return p;
}

// ---- sweeps over one tile of U atoms -----------------------------------------------------------------

template <int U, typename X> void evaluate_nodes(const Plan& p, X* nodes) {
  for (int64_t k = p.components + 1; k < p.nodes; ++k) {
    const X *a = nodes + p.left[k] * U, *b = nodes + p.right[k] * U;
    EACH_ATOM nodes[k * U + u] = product(a[u], b[u]);
  }
}

template <int U, typename V, typename X, typename P>
void forward_sweep(const Plan& p, const P* coefficients, const X* nodes, V* out) {
  for (int64_t row = 0; row < p.rows; ++row) {
    X total[U] = {};
    for (int64_t g = p.row_start[row]; g < p.row_start[row + 1]; ++g) {
      X sum[U] = {};
      for (int64_t e = p.group_start[g]; e < p.group_start[g + 1]; ++e) {
        const P coefficient = coefficients[e];
        const X* factor = nodes + p.factor[e] * U;
        EACH_ATOM add_product(sum[u], coefficient, factor[u]);
      }
      const X *a = nodes + p.group_left[g] * U, *b = nodes + p.group_right[g] * U;
      EACH_ATOM add_product(total[u], product(sum[u], a[u]), b[u]);
    }
    EACH_ATOM out[row * U + u] = part(total[u]);
  }
}

// Adds to the adjoint of the nodes and to the gradient of the coefficients, in the order of the leaves.
template <int U, bool kNodes, bool kCoefficients, typename V, typename X, typename P>
void reverse_sweep(const Plan& p, const P* coefficients, const X* nodes, const V* grad, X* adjoint,
                   V* grad_coefficients) {
  for (int64_t g = 0; g < p.reverse_groups; ++g) {
    const int64_t left = p.reverse_left[g] * U, right = p.reverse_right[g] * U;
    X prefix[U], sum[U] = {};
    EACH_ATOM prefix[u] = product(nodes[left + u], nodes[right + u]);
    for (int64_t leaf = p.reverse_start[g]; leaf < p.reverse_start[g + 1]; ++leaf) {
      const int64_t begin = p.leaf_start[leaf], end = p.leaf_start[leaf + 1];
      const X* factor = nodes + p.leaf_factor[leaf] * U;
      if constexpr (kNodes) {
        P q[U] = {};
        for (int64_t e = begin; e < end; ++e) {
          const P coefficient = coefficients[e];
          const V* row = grad + p.leaf_row[e] * U;
          EACH_ATOM add_product(q[u], coefficient, row[u]);
        }
        X* to = adjoint + p.leaf_factor[leaf] * U;
        EACH_ATOM {
          add_product(to[u], prefix[u], q[u]);
          add_product(sum[u], factor[u], q[u]);
        }
      }
      if constexpr (kCoefficients) {
        V monomial[U];
        EACH_ATOM monomial[u] = part(product(prefix[u], factor[u]));
        for (int64_t e = begin; e < end; ++e) {
          const V* row = grad + p.leaf_row[e] * U;
          V total = grad_coefficients[e];
          EACH_ATOM total += monomial[u] * row[u];
          grad_coefficients[e] = total;
        }
      }
    }
    if constexpr (kNodes) EACH_ATOM {
        add_product(adjoint[left + u], sum[u], nodes[right + u]);
        add_product(adjoint[right + u], sum[u], nodes[left + u]);
      }
  }
  if constexpr (!kNodes) return;
  for (int64_t k = p.nodes - 1; k > p.components; --k) {
    const int64_t left = p.left[k] * U, right = p.right[k] * U;
    EACH_ATOM {
      add_product(adjoint[left + u], adjoint[k * U + u], nodes[right + u]);
      add_product(adjoint[right + u], adjoint[k * U + u], nodes[left + u]);
    }
  }
}

}  // namespace
