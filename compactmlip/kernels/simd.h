// Vectors of the processor's width in plain C++ (vector extensions of GCC and Clang), and dual numbers.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

namespace compactmlip {

#if defined(__AVX512F__)
constexpr int64_t kVectorBytes = 64;
#elif defined(__AVX__)
constexpr int64_t kVectorBytes = 32;
#else
constexpr int64_t kVectorBytes = 16;
#endif

template <class T, int64_t kBytes>
struct VectorOf {
  typedef T type __attribute__((vector_size(kBytes)));
};
template <class T, int64_t kBytes = kVectorBytes>
using Vec = typename VectorOf<T, kBytes>::type;

template <class T, int64_t kBytes = kVectorBytes>
constexpr int64_t kLanes = kBytes / static_cast<int64_t>(sizeof(T));

template <class T, int64_t kBytes = kVectorBytes>
inline __attribute__((always_inline)) Vec<T, kBytes> load(const T* p) {
  Vec<T, kBytes> x;
  std::memcpy(&x, p, sizeof(x));
  return x;
}

template <class T, class V>
inline __attribute__((always_inline)) void store(T* p, V x) {
  static_assert(std::is_same_v<std::remove_cvref_t<decltype(x[0])>, T>);
  std::memcpy(p, &x, sizeof(x));
}

// A vector (kDual false), or a vector with its derivative along one direction (kDual true).  A kernel
// that is written once computes its result, or the derivative of its result: what is never read of the
// other part is left out by the compiler.
template <class T, bool kDual>
struct Number;

template <class T>
struct Number<T, false> {
  Vec<T> v;
  static inline __attribute__((always_inline)) Number read(const T* p, const T*) { return {load(p)}; }
  static inline __attribute__((always_inline)) Number zero() { return {Vec<T>{}}; }
  inline __attribute__((always_inline)) Number times(const Number& o) const { return {v * o.v}; }
  // this += q k, where q does not depend on the direction and k is a scalar with derivative dk.
  inline __attribute__((always_inline)) void add(Vec<T> q, T k, T) { v += q * k; }
  inline __attribute__((always_inline)) Vec<T> result() const { return v; }
};

template <class T>
struct Number<T, true> {
  Vec<T> v, d;
  static inline __attribute__((always_inline)) Number read(const T* p, const T* dp) {
    return {load(p), load(dp)};
  }
  static inline __attribute__((always_inline)) Number zero() { return {Vec<T>{}, Vec<T>{}}; }
  inline __attribute__((always_inline)) Number times(const Number& o) const {
    return {v * o.v, v * o.d + d * o.v};
  }
  inline __attribute__((always_inline)) void add(Vec<T> q, T k, T dk) {
    v += q * k;
    d += q * dk;
  }
  inline __attribute__((always_inline)) Vec<T> result() const { return d; }
};

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define COMPACTMLIP_SHUFFLE 1
#endif
#endif

#ifdef COMPACTMLIP_SHUFFLE
// a and b hold partial sums in segments of G lanes; returns the segments of a, then of b, folded to G/2.
template <int G, class V, int... I>
inline __attribute__((always_inline)) V fold(V a, V b, std::integer_sequence<int, I...>) {
  constexpr int lanes = sizeof...(I), half = G / 2, segments = lanes / G;
  constexpr auto from = [](int i, int shift) {
    int segment = i / half, source = segment < segments ? 0 : lanes;
    return source + (segment % segments) * G + i % half + shift;
  };
  return __builtin_shufflevector(a, b, from(I, 0)...) + __builtin_shufflevector(a, b, from(I, half)...);
}

template <int kLanes, int G, class V>
inline __attribute__((always_inline)) void fold_all(V* x) {
  if constexpr (G > 1) {
    for (int k = 0; k < G / 2; k++)
      x[k] = fold<G>(x[2 * k], x[2 * k + 1], std::make_integer_sequence<int, kLanes>{});
    fold_all<kLanes, G / 2>(x);
  }
}
#endif

// out[m] = sum of the lanes of x[m], always in the same order.
template <class T, class V>
inline void sum_lanes(const V* x, int64_t count, T* out) {
  constexpr int64_t lanes = sizeof(V) / sizeof(T);
  for (int64_t m = 0; m < count; m += lanes) {
    const int64_t here = count - m < lanes ? count - m : lanes;
#ifdef COMPACTMLIP_SHUFFLE
    V block[lanes];
    for (int64_t k = 0; k < lanes; k++) block[k] = k < here ? x[m + k] : V{};
    fold_all<lanes, lanes>(block);
    std::memcpy(out + m, block, static_cast<size_t>(here) * sizeof(T));
#else
    for (int64_t k = 0; k < here; k++) {
      T sum = 0;
      for (int64_t lane = 0; lane < lanes; lane++) sum += x[m + k][lane];
      out[m + k] = sum;
    }
#endif
  }
}

}  // namespace compactmlip
