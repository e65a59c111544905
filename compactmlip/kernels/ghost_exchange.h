// What a program that splits a structure among processes shares with the operators of ghost_exchange.cpp.
//
// Each process evaluates the atoms that it owns.  Nodes of its graph are these atoms, then ghosts: atoms of
// other processes that are neighbours of its own.  Features of ghosts come from their owners, and gradients
// of ghosts go back to them.  How they travel is the program's affair.
#pragma once

#include <cstdint>

extern "C" {

// One row per node in a tensor, owned atoms first.
struct compactmlip_rows {
  void* data;
  int64_t bytes;  // of a row
};

struct compactmlip_exchange {
  int64_t owned, nodes;  // numbers of rows
  void* self;            // first argument of the functions, which may throw
  // Fills the rows of ghosts with those of their owners.  All processes call it together.
  void (*forward)(void* self, const compactmlip_rows* rows, int64_t count);
  // Adds the rows of ghosts to those of their owners; scalars have `scalar` bytes (4: float, 8: double).
  void (*reverse)(void* self, const compactmlip_rows* rows, int64_t count, int64_t scalar);
};

// Sets the exchange of the calling thread, null for none, and returns the one before.
typedef const compactmlip_exchange* (*compactmlip_set_exchange_type)(const compactmlip_exchange*);
const compactmlip_exchange* compactmlip_set_exchange(const compactmlip_exchange* exchange);

}  // extern "C"
