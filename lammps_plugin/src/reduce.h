// Numbers of all processes together.
#pragma once

#include <mpi.h>

#include <vector>

namespace compactmlip {

// Sums, or the largest values, over `processes`, on each of them; throws std::runtime_error without MPI.
void add_up(MPI_Comm world, int processes, std::vector<double>& values);
void find_largest(MPI_Comm world, int processes, std::vector<double>& values);

}  // namespace compactmlip
