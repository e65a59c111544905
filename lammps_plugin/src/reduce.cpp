#include "reduce.h"

#include <stdexcept>

// MPI is that of LAMMPS.  A process that shows no MPI to its libraries can still use one rank.
extern "C" int MPI_Allreduce(const void*, void*, int, MPI_Datatype, MPI_Op, MPI_Comm) __attribute__((weak));

namespace compactmlip {
namespace {

void reduce(MPI_Comm world, int processes, std::vector<double>& values, MPI_Op operation) {
  if (processes == 1) return;
  if (!MPI_Allreduce) throw std::runtime_error("the MPI of this LAMMPS is not visible to its plugins");
  const std::vector<double> mine = values;
  MPI_Allreduce(mine.data(), values.data(), static_cast<int>(values.size()), MPI_DOUBLE, operation, world);
}

}  // namespace

void add_up(MPI_Comm world, int processes, std::vector<double>& values) { reduce(world, processes, values, MPI_SUM); }
void find_largest(MPI_Comm world, int processes, std::vector<double>& values) {
  reduce(world, processes, values, MPI_MAX);
}

}  // namespace compactmlip
