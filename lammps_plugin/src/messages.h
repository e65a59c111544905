// Rows of features on their way between processes: what LAMMPS packs and unpacks.
//
// LAMMPS passes atoms on from process to process, and a node may be several ghosts of LAMMPS.  A row that is sent back
// is cleared, so that each gradient arrives once: what other processes add later to one of the ghosts is sent with that
// ghost, whose turn comes after theirs.
#pragma once

#include <cstdint>

#include "ghost_exchange.h"
#include "system.h"

namespace compactmlip {

class Messages {
 public:
  explicit Messages(const System& system) : system_(system) {}

  // From here on rows of these tensors travel; returns the doubles that one atom needs.
  int begin(const compactmlip_rows* rows, int64_t count, int64_t scalar);

  int pack(int n, const int* atoms, double* buffer) const;          // of atoms that others have as ghosts
  void unpack(int n, int first, const double* buffer) const;        // into ghosts
  int pack_reverse(int n, int first, double* buffer) const;         // of ghosts
  void add_reverse(int n, const int* atoms, const double* buffer) const;

 private:
  char* row(int64_t tensor, int64_t node) const {
    return static_cast<char*>(rows_[tensor].data) + node * rows_[tensor].bytes;
  }

  const System& system_;
  const compactmlip_rows* rows_ = nullptr;
  int64_t count_ = 0, scalar_ = 0;
  int width_ = 0;
};

}  // namespace compactmlip
