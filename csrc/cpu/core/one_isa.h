// Once per instruction set, out of each_isa.h: vectors, what is made of them, and the kernel. None of
// these files has an include guard.
#include "simd.h"
#include "rows.h"
#include "exp.h"
#include "gemm.h"
#include TAB_KERNEL

#undef TAB_ISA
#undef TAB_VECTOR_BYTES
#undef TAB_TILE_ROWS
