// Atoms of LAMMPS as the graph of a model.
#pragma once

#include <vector>

#include "model.h"

namespace LAMMPS_NS {
class Atom;
class NeighList;
}  // namespace LAMMPS_NS

namespace compactmlip {

class System {
 public:
  // Numbers the nodes.  species: of each type, -1 where the model does not apply.  Periodic images of own atoms are
  // these atoms; images of one atom of another process are one ghost.
  void number_nodes(LAMMPS_NS::Atom& atom, const std::vector<int>& species);
  // Species as another model counts them, which leaves out the same types.
  void set_species(LAMMPS_NS::Atom& atom, const std::vector<int>& species);
  // Edges of the neighbour list that are shorter than the cutoff; false if atoms lie on top of each other, which are
  // then the ends of the last edge.
  bool find_edges(LAMMPS_NS::Atom& atom, LAMMPS_NS::NeighList& list, double cutoff);

  const Graph& graph() const { return graph_; }
  bool has_ghosts() const { return graph_.nodes() > graph_.owned; }
  // Node of a LAMMPS atom, -1 if it has none, and the LAMMPS atoms of owned nodes and of the ends of edges.
  int node(int atom) const { return node_[atom]; }
  int atom_of_node(int64_t node) const { return atom_of_node_[node]; }
  int center(int64_t edge) const { return atom_of_node_[graph_.centers[edge]]; }
  int neighbor(int64_t edge) const { return neighbor_[edge]; }
  double bytes() const;

 private:
  Graph graph_;
  std::vector<int> node_, atom_of_node_, neighbor_;
};

}  // namespace compactmlip
