// The convolution with tabulated radial weights over all centres, and its gradient.
//
//   out_i[l3, r, p, c] = sum_j R_p,c(r_ij) sum_a K_p[r, a](r_ij) h_j[l1, a, c]
//
// Nothing of the size edges x channels is stored: radial weights and coupling entries are formed tile by tile.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <vector>

#include "edges.h"
#include "spline_paths.h"

namespace compactmlip {

template <class T>
struct Feature {  // of one order; values is null for features that are one
  const T* values;
  int64_t node_stride, row_stride;
  T* gradient;  // (nodes, components, channels), or null
};

template <class T, int64_t B>
struct Problem {
  const Plan& plan;
  const Table<T> table;
  const T *vectors, *coefficients;
  const int64_t *species, *neighbors;
  const Edges& edges;
  bool unit;                                  // the features are one
  std::vector<Feature<T>> features;           // by l1
  std::vector<T*> messages;                   // by l3, (nodes, rows, channels); null where there are none
  std::vector<const T*> gradients;            // of the messages
  T* vector_gradient;
  std::vector<PathFunctions<T, B>> functions;  // by path

  int64_t edge(int64_t k) const { return edges.order.empty() ? k : edges.order[k]; }
};

// Memory of one thread, kept from call to call.
template <class T>
class Workspace {
 public:
  T* take(int64_t count) {
    const int64_t first = used_;
    used_ += (count + 15) / 16 * 16;
    return reinterpret_cast<T*>(lines_.data()) + first;
  }
  template <class V>
  V* take_vectors(int64_t count) {
    return reinterpret_cast<V*>(take(count * static_cast<int64_t>(sizeof(V) / sizeof(T))));
  }
  void reserve(int64_t count) {
    const size_t needed = (static_cast<size_t>(count) * sizeof(T) + sizeof(Line) - 1) / sizeof(Line) + 1;
    if (lines_.size() < needed) lines_.resize(needed);
    used_ = 0;
  }

 private:
  struct alignas(64) Line {
    char bytes[64];
  };
  std::vector<Line> lines_;
  int64_t used_ = 0;
};

struct Sizes {  // largest of any group
  int64_t entries = 0, channels = 0, columns = 0, features = 0;
  explicit Sizes(const Plan& plan) {
    for (const Group& g : plan.groups) {
      entries = std::max(entries, g.entries);
      for (int64_t n = g.first; n < g.last; n++) channels = std::max(channels, plan.paths[n].channels);
      columns = std::max(columns, g.columns);
      features = std::max(features, g.size());
    }
  }
};

template <class T, int64_t B>
void radial_rows(const Problem<T, B>& s, const Tile<T>& t, int e, int64_t column, int64_t channels, T* R, T* dR) {
  const int64_t W = s.plan.columns;
  if (s.plan.values_per_knot == 2) {
    if (dR) radial_row<T, B, 2, true>(t, e, W, column, channels, R, dR);
    else radial_row<T, B, 2, false>(t, e, W, column, channels, R, dR);
  } else {
    if (dR) radial_row<T, B, 3, true>(t, e, W, column, channels, R, dR);
    else radial_row<T, B, 3, false>(t, e, W, column, channels, R, dR);
  }
}

// Calls work(tile, first) for the edges of a centre, a tile at a time.
template <class T, int64_t B, class F>
void over_tiles(const Problem<T, B>& s, int64_t center, Tile<T>& t, const F& work) {
  for (int64_t k = s.edges.begin[center]; k < s.edges.begin[center + 1]; k += kTile) {
    t.count = static_cast<int>(std::min<int64_t>(kTile, s.edges.begin[center + 1] - k));
    for (int e = 0; e < t.count; e++) t.edge[e] = s.edge(k + e);
    read_tile(t, s.plan, s.table, s.vectors, s.species, center, s.neighbors, s.coefficients);
    work(k);
  }
}

template <class T, int64_t B>
void forward_center(const Problem<T, B>& s, const Sizes& sizes, Workspace<T>& memory, int64_t center) {
  if (s.edges.begin[center] == s.edges.begin[center + 1]) {
    for (size_t l = 0; l < s.messages.size(); l++) {
      const int64_t size = (2 * l + 1) * s.plan.message_channels[l];
      if (s.messages[l]) std::fill_n(s.messages[l] + center * size, size, T(0));
    }
    return;
  }
  memory.reserve(sizes.entries * kTile + sizes.channels * kTile + 64);
  T *K = memory.take(sizes.entries * kTile), *R = memory.take(sizes.channels * kTile);
  Tile<T> t;
  over_tiles(s, center, t, [&](int64_t k) {
    for (const Group& group : s.plan.groups) {
      couple(t, group, s.coefficients, K);
      const Feature<T>& feature = s.features[group.l1];
      ForwardPath<T> p{t.count, 0, group.components()};
      p.h_stride = feature.row_stride;
      for (int e = 0; e < t.count; e++)
        p.h[e] = feature.values + (feature.node_stride ? s.neighbors[t.edge[e]] * feature.node_stride : 0);
      p.R = R;
      p.first = k == s.edges.begin[center];
      for (int64_t n = group.first; n < group.last; n++) {
        const Path& path = s.plan.paths[n];
        for (int e = 0; e < t.count; e++)
          radial_rows<T, B>(s, t, e, path.column, path.channels, R + e * path.channels, nullptr);
        p.channels = path.channels;
        p.rows = path.rows();
        p.K = K + path.entry * kTile;
        p.out_stride = s.plan.message_channels[path.l3];
        p.out = s.messages[path.l3] + center * path.rows() * p.out_stride + path.message;
        s.functions[n].forward(p);
      }
    }
  });
}

// dh: gradients of the features of each edge, (edges of this call, feature_size) beginning with edge k0; or
// null, and then they are added to those of the neighbours at once.
template <class T, int64_t B>
void backward_center(const Problem<T, B>& s, const Sizes& sizes, Workspace<T>& memory, int64_t center, T* dh,
                     int64_t feature_size, int64_t k0) {
  using V = Vec<T, B>;
  constexpr int64_t lanes = kLanes<T, B>;
  memory.reserve((2 + lanes) * kTile * sizes.entries + 4 * sizes.columns + 3 * sizes.features +
                 (1 + lanes) * kTile + 512);
  T *K = memory.take(sizes.entries * kTile), *dK = memory.take(sizes.entries * kTile);
  T *R = memory.take(2 * sizes.columns), *dR = memory.take(2 * sizes.columns);
  T *local = memory.take(2 * sizes.features), *x = memory.take(sizes.features), *radial = memory.take(kTile);
  // Lanes of the sums over channels; the lanes of eight edges are added together.
  V* entries = memory.template take_vectors<V>(sizes.entries * kTile);
  V* slopes = memory.template take_vectors<V>(kTile);
  Tile<T> t;
  over_tiles(s, center, t, [&](int64_t k) {
    std::fill_n(slopes, kTile, V{});
    std::fill_n(t.dy[0], std::max<int64_t>(4, (s.plan.lmax + 1) * (s.plan.lmax + 1)) * kTile, T(0));
    int64_t offset = 0;
    for (const Group& group : s.plan.groups) {
      couple(t, group, s.coefficients, K);
      const Feature<T>& feature = s.features[group.l1];
      const int64_t size = group.size();
      for (int e = 0; e < t.count; e += 2) {
        BackwardPath<T, B> p{std::min(2, t.count - e), 0, group.components()};
        p.h_stride = feature.row_stride;
        p.x = x;
        for (int n = 0; n < p.count; n++) {
          p.h[n] = feature.values + (feature.node_stride ? s.neighbors[t.edge[e + n]] * feature.node_stride : 0);
          p.slope[n] = slopes + e + n;
          p.dh[n] = nullptr;
          if (feature.gradient)
            p.dh[n] = dh ? dh + (k + e + n - k0) * feature_size + offset : local + n * sizes.features;
          radial_rows<T, B>(s, t, e + n, group.column, group.columns, R + n * sizes.columns,
                            dR + n * sizes.columns);
        }
        for (int64_t n = group.first; n < group.last; n++) {
          const Path& path = s.plan.paths[n];
          for (int m = 0; m < p.count; m++) {
            p.R[m] = R + m * sizes.columns + path.column - group.column;
            p.dR[m] = dR + m * sizes.columns + path.column - group.column;
          }
          p.dK = entries + path.entry * kTile + e;
          p.channels = path.channels;
          p.rows = path.rows();
          p.K = K + path.entry * kTile + e;
          p.g_stride = s.plan.message_channels[path.l3];
          p.g = s.gradients[path.l3] + center * path.rows() * p.g_stride + path.message;
          p.first = n == group.first;
          s.functions[n].backward(p);
        }
        for (int n = 0; feature.gradient && !dh && n < p.count; n++) {
          T* to = feature.gradient + s.neighbors[t.edge[e + n]] * size;
          for (int64_t c = 0; c < size; c += lanes)
            store(to + c, load<T, B>(to + c) + load<T, B>(p.dh[n] + c));
        }
      }
      sum_lanes<T>(entries, group.entries * kTile, dK);
      uncouple(t, group, s.coefficients, dK);
      if (feature.gradient) offset += size;
    }
    sum_lanes<T>(slopes, kTile, radial);
    write_tile(t, s.plan, s.coefficients, radial, s.vector_gradient);
  });
}

// Threads claim pieces as they get on: centres differ in their neighbours, and shared processors in their speed.
constexpr int64_t kPieces = 16;  // for each thread
constexpr int64_t kRounds = 4;   // of slices that become smaller, see slices()

// Calls work(i, memory) for the centres first ... last - 1, in parallel.
template <class T, class F>
void over_centers(int64_t first, int64_t last, const F& work) {
  const int64_t threads = at::in_parallel_region() ? 1 : at::get_num_threads();
  const int64_t piece = threads == 1 ? last - first : std::max<int64_t>(1, (last - first) / (kPieces * threads));
  std::atomic<int64_t> next{first};
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    static thread_local Workspace<T> memory;
    for (int64_t from; (from = next.fetch_add(piece)) < last;)
      for (int64_t i = from; i < std::min(last, from + piece); i++) work(i, memory);
  });
}

template <class T, int64_t B>
void run_forward(const Problem<T, B>& s, int64_t nodes) {
  const Sizes sizes(s.plan);
  over_centers<T>(0, nodes, [&](int64_t center, Workspace<T>& memory) {
    forward_center<T, B>(s, sizes, memory, center);
  });
}

// Largest sum of the copies below, in bytes.
constexpr int64_t kCopies = int64_t{64} << 20;

// Bounds of slices of the centres: rounds of a slice for each thread, with half of the edges that are left, then
// half of these, and at last all of them.  Claimed in this order, they end nearly at the same time on processors
// that are not equally fast.
inline std::vector<int64_t> slices(const std::vector<int64_t>& begin, int64_t threads, int64_t rounds) {
  const int64_t nodes = static_cast<int64_t>(begin.size()) - 1, edges = begin[nodes];
  std::vector<int64_t> bounds{0};
  double done = 0, share = 1;
  for (int64_t round = 0; round < rounds; round++) {
    if (round + 1 < rounds) share /= 2;
    for (int64_t n = 0; n < threads; n++) {
      done += share / static_cast<double>(threads);
      const auto edge = static_cast<int64_t>(done * static_cast<double>(edges));
      bounds.push_back(std::lower_bound(begin.begin(), begin.end() - 1, edge) - begin.begin());
    }
  }
  bounds.back() = nodes;
  return bounds;
}

// With several threads, the gradients of features are added to a copy for each slice of the centres, the first to
// the result; the copies are added afterwards in their order, so that the bits do not depend on who was faster.
template <class T, int64_t B>
void backward_with_copies(const Problem<T, B>& s, const Sizes& sizes, int64_t nodes, int64_t feature_size) {
  const int64_t threads = at::get_num_threads(), size = nodes * feature_size;
  const int64_t most = 1 + kCopies / std::max<int64_t>(1, size * static_cast<int64_t>(sizeof(T)));
  const std::vector<int64_t> bounds =
      slices(s.edges.begin, threads, std::min(kRounds, std::max<int64_t>(1, most / threads)));
  const int64_t count = static_cast<int64_t>(bounds.size()) - 1;
  const std::unique_ptr<T[]> copies(new T[(count - 1) * size]);
  std::atomic<int64_t> next{0};
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    static thread_local Workspace<T> memory;
    for (int64_t slice; (slice = next.fetch_add(1)) < count;) {
      Problem<T, B> mine = s;
      T* copy = copies.get() + (slice - 1) * size;
      if (slice > 0) std::fill_n(copy, size, T(0));
      for (const Group& g : s.plan.groups) {
        if (slice == 0 || !s.features[g.l1].gradient) continue;
        mine.features[g.l1].gradient = copy;
        copy += nodes * g.size();
      }
      for (int64_t i = bounds[slice]; i < bounds[slice + 1]; i++)
        backward_center<T, B>(mine, sizes, memory, i, nullptr, feature_size, 0);
    }
  });
  int64_t offset = 0;
  for (const Group& g : s.plan.groups) {
    T* sum = s.features[g.l1].gradient;
    if (!sum) continue;
    at::parallel_for(0, nodes * g.size(), 4096, [&](int64_t from, int64_t to) {
      for (int64_t block = from; block < to; block += 1024)
        for (int64_t slice = 1; slice < count; slice++) {
          const T* copy = copies.get() + (slice - 1) * size + offset;
          for (int64_t k = block; k < std::min(to, block + 1024); k++) sum[k] += copy[k];
        }
    });
    offset += nodes * g.size();
  }
}

// Where the copies would be too large, gradients of features are written edge by edge into a buffer that stays in
// the cache, and then added in the order of the edges, each thread for its own columns: no two threads write to
// one place.
template <class T, int64_t B>
void backward_with_buffer(const Problem<T, B>& s, const Sizes& sizes, int64_t nodes, int64_t feature_size) {
  const std::vector<int64_t>& begin = s.edges.begin;
  const int64_t threads = at::get_num_threads(), lanes = kLanes<T, B>;
  std::vector<T> buffer;
  for (int64_t i = 0, end; i < nodes; i = end) {
    // Enough centres that no thread waits long for another, and as many for each.
    end = i + 1;
    const auto enough = [&] {
      const int64_t centers = end - i, edges = begin[end] - begin[i];
      return centers % threads == 0 && centers >= 16 * threads && edges >= 256 * threads;
    };
    while (end < nodes && !enough()) end++;
    const int64_t first = begin[i], last = begin[end];
    buffer.resize(std::max<size_t>(buffer.size(), (last - first) * feature_size));
    over_centers<T>(i, end, [&](int64_t center, Workspace<T>& memory) {
      backward_center<T, B>(s, sizes, memory, center, buffer.data(), feature_size, first);
    });
    at::parallel_for(0, feature_size / lanes, 4, [&](int64_t from, int64_t to) {
      int64_t offset = 0;
      for (const Group& g : s.plan.groups) {
        if (!s.features[g.l1].gradient) continue;
        const int64_t c0 = std::max(from * lanes, offset), c1 = std::min(to * lanes, offset + g.size());
        for (int64_t k = first; c0 < c1 && k < last; k++) {
          const T* here = buffer.data() + (k - first) * feature_size;
          T* sum = s.features[g.l1].gradient + s.neighbors[s.edge(k)] * g.size() - offset;
          for (int64_t c = c0; c < c1; c += lanes) store(sum + c, load<T, B>(sum + c) + load<T, B>(here + c));
        }
        offset += g.size();
      }
    });
  }
}

template <class T, int64_t B>
void run_backward(const Problem<T, B>& s, int64_t nodes) {
  const Sizes sizes(s.plan);
  int64_t feature_size = 0;
  for (const Group& g : s.plan.groups)
    if (s.features[g.l1].gradient) feature_size += g.size();
  const int64_t threads = at::in_parallel_region() ? 1 : at::get_num_threads();
  const int64_t copies = (threads - 1) * nodes * feature_size * static_cast<int64_t>(sizeof(T));
  if (feature_size == 0 || threads == 1) {
    over_centers<T>(0, nodes, [&](int64_t center, Workspace<T>& memory) {
      backward_center<T, B>(s, sizes, memory, center, nullptr, feature_size, 0);
    });
  } else if (copies <= kCopies) {
    backward_with_copies(s, sizes, nodes, feature_size);
  } else {
    backward_with_buffer(s, sizes, nodes, feature_size);
  }
}

}  // namespace compactmlip
