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
// a and b hold partial sums; returns those of a and of b side by side, half as many of each.  kStep lanes lie
// between the two that are added; in blocks of 16 bytes each is one instruction on x86.
template <int kStep, int kBlock, class V, int... I>
inline __attribute__((always_inline)) V fold(V a, V b, std::integer_sequence<int, I...>) {
  constexpr int lanes = sizeof...(I);
  // Within blocks (of the lanes that differ): a0 + a2, b0 + b2, a1 + a3, b1 + b3, then a, b, c, d.
  constexpr auto within = [](int i, int shift) {
    const int block = i / kBlock * kBlock, j = i % kBlock;
    if (kStep == kBlock / 2) return (j % 2 ? lanes : 0) + block + j / 2 + shift;
    return (j < 2 ? 0 : lanes) + block + j % 2 + shift;
  };
  // Whole blocks: the halves of a, then those of b.
  constexpr auto across = [](int i, int shift) {
    constexpr int half = kStep, segment = 2 * kStep, segments = lanes / segment;
    const int place = i / half, source = place < segments ? 0 : lanes;
    return source + place % segments * segment + i % half + shift;
  };
  if constexpr (kStep < kBlock) {
    constexpr int shift = kStep == kBlock / 2 ? kStep : 2;
    return __builtin_shufflevector(a, b, within(I, 0)...) + __builtin_shufflevector(a, b, within(I, shift)...);
  } else {
    return __builtin_shufflevector(a, b, across(I, 0)...) + __builtin_shufflevector(a, b, across(I, kStep)...);
  }
}

template <int kLanes, int kStep, int kBlock, int kCount, class V>
inline __attribute__((always_inline)) void fold_all(V* x) {
  if constexpr (kCount > 1) {
    for (int k = 0; k < kCount / 2; k++)
      x[k] = fold<kStep, kBlock>(x[2 * k], x[2 * k + 1], std::make_integer_sequence<int, kLanes>{});
    // Within blocks first, then from half the width down to one block.
    constexpr int next = kStep > kBlock ? kStep / 2 : kStep == kBlock ? 0 : kStep > 1 ? kStep / 2 : kLanes / 2;
    fold_all<kLanes, next, kBlock, kCount / 2>(x);
  }
}
#endif

// out[m] = sum of the lanes of x[m], always in the same order.
template <class T, class V>
inline void sum_lanes(const V* x, int64_t count, T* out) {
  constexpr int lanes = sizeof(V) / sizeof(T);
  int64_t m = 0;
#ifdef COMPACTMLIP_SHUFFLE
  constexpr int block = 16 / sizeof(T);
  for (; m + lanes <= count; m += lanes) {
    V sums[lanes];
    for (int k = 0; k < lanes; k++) sums[k] = x[m + k];
    fold_all<lanes, block / 2, block, lanes>(sums);
    store(out + m, sums[0]);
  }
#endif
  for (; m < count; m++) {
    T sum = 0;
    for (int lane = 0; lane < lanes; lane++) sum += x[m][lane];
    out[m] = sum;
  }
}

}  // namespace compactmlip
