// Compiles the file named by TAB_KERNEL once per instruction set, in tab::baseline, tab::avx2 and
// tab::avx512, on top of what one_isa.h lists. One binary then runs on any x86-64.
//
// To add a kernel x, in cpu/x/ (linear/linear.cpp and linear_kernel.h are the model):
//   x_kernel.h   no include guard, `namespace tab::TAB_ISA`; templates over the element type, and a
//                table of function pointers `template <class T> constexpr XKernels x_kernels`
//   x.cpp        arguments as a plain struct, then
//                    #define TAB_KERNEL "../x/x_kernel.h"
//                    #include "../core/each_isa.h"
//                then the driver (checks, outputs, parallel(), arena()) and the registration; it
//                calls TAB_SELECT(x_kernels<T>). attention.h has the checks of q, k and v, and
//                segments.h the driver of a state that is a sum over tokens.
// Pitfalls: kernel code calls no std:: and no torch:: function, not even an inline one. The linker
// keeps one copy of an inline function, perhaps the AVX-512 one, and the baseline would run it.
// Helpers are TAB_INLINE. Lambdas belong in the driver. Scratch rows are padded to whole vectors
// with zeros (padded<A>(n)), so that gemm needs no masks; tensors are read by load_row and written
// by store_row, which convert. Vectors never cross a function that is not inlined.
#include "task.h"
#include "types.h"

#define TAB_ISA baseline
#define TAB_VECTOR_BYTES 16
#define TAB_TILE_ROWS 4
#include "one_isa.h"

#if TAB_WIDE
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define TAB_ISA avx2
#define TAB_VECTOR_BYTES 32
#define TAB_TILE_ROWS 6
#include "one_isa.h"
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")
#define TAB_ISA avx512
#define TAB_VECTOR_BYTES 64
#define TAB_TILE_ROWS 8
#include "one_isa.h"
#pragma GCC pop_options
#endif
