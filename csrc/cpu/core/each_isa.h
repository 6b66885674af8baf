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
#include <utility>

#include "task.h"
#include "types.h"

// What the two compilers spell differently. The lanes of y follow those of x.
#if defined(__clang__)
#define TAB_OUTLINE __attribute__((noinline))
#define TAB_SHUFFLE(x, y, ...) __builtin_shufflevector(x, y, __VA_ARGS__)
#else
#define TAB_OUTLINE __attribute__((noinline, noclone))
#define TAB_SHUFFLE(x, y, ...) __builtin_shuffle(x, y, decltype(x == y){__VA_ARGS__})
#endif

#define TAB_ISA baseline
#define TAB_VECTOR_BYTES 16
#define TAB_TILE_ROWS 4
#include "one_isa.h"

#if TAB_WIDE
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
#define TAB_ISA avx2
#define TAB_VECTOR_BYTES 32
#define TAB_TILE_ROWS 6
#include "one_isa.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")
#endif
#define TAB_ISA avx512
#define TAB_VECTOR_BYTES 64
#define TAB_TILE_ROWS 8
#include "one_isa.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
