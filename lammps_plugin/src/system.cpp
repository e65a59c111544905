#include "system.h"

#include <unordered_map>

#include "atom.h"
#include "neigh_list.h"

namespace compactmlip {
namespace {

constexpr double kShortest = 1e-3;  // Angstrom; shorter edges have no direction

}  // namespace

void System::number_nodes(LAMMPS_NS::Atom& atom, const std::vector<int>& species) {
  const int local = atom.nlocal, all = local + atom.nghost;
  node_.assign(all, -1);
  atom_of_node_.clear();
  graph_.species.clear();
  graph_.owned = 0;
  std::unordered_map<LAMMPS_NS::tagint, int> node_of_tag;
  node_of_tag.reserve(all);
  for (int i = 0; i < all; i++) {
    const int kind = species[atom.type[i]];
    if (kind < 0) continue;
    const auto [found, is_new] = node_of_tag.try_emplace(atom.tag[i], static_cast<int>(graph_.species.size()));
    node_[i] = found->second;
    if (is_new) {
      atom_of_node_.push_back(i);
      graph_.species.push_back(kind);
    }
    if (i < local) graph_.owned = static_cast<int64_t>(graph_.species.size());
  }
}

void System::set_species(LAMMPS_NS::Atom& atom, const std::vector<int>& species) {
  for (size_t node = 0; node < atom_of_node_.size(); node++)
    graph_.species[node] = species[atom.type[atom_of_node_[node]]];
}

bool System::find_edges(LAMMPS_NS::Atom& atom, LAMMPS_NS::NeighList& list, double cutoff) {
  const double* const* x = atom.x;
  const double longest = cutoff * cutoff;
  graph_.centers.clear();
  graph_.neighbors.clear();
  graph_.vectors.clear();
  neighbor_.clear();
  for (int k = 0; k < list.inum; k++) {
    const int i = list.ilist[k];
    if (node_[i] < 0) continue;
    const double from[3] = {x[i][0], x[i][1], x[i][2]};
    const int *first = list.firstneigh[i], *last = first + list.numneigh[i];
    for (const int* at = first; at != last; at++) {
      const int j = *at & NEIGHMASK;
      const double r[3] = {x[j][0] - from[0], x[j][1] - from[1], x[j][2] - from[2]};
      const double square = r[0] * r[0] + r[1] * r[1] + r[2] * r[2];
      if (square >= longest || node_[j] < 0) continue;
      graph_.centers.push_back(node_[i]);
      graph_.neighbors.push_back(node_[j]);
      graph_.vectors.insert(graph_.vectors.end(), r, r + 3);
      neighbor_.push_back(j);
      if (square < kShortest * kShortest) return false;
    }
  }
  return true;
}

double System::bytes() const {
  const auto of = [](const auto& v) { return static_cast<double>(v.capacity() * sizeof(v[0])); };
  return of(graph_.species) + of(graph_.centers) + of(graph_.neighbors) + of(graph_.vectors) + of(node_) +
         of(atom_of_node_) + of(neighbor_);
}

}  // namespace compactmlip
