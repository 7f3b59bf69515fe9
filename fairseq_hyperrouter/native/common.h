/* What all of our C code starts with. Pointers come from Python as integers (Tensor.data_ptr()), 0 for none; what they
   point to is contiguous, indices are int64. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <string.h>

typedef unsigned long long address;
#define POINTER(type, integer) ((type *)(uintptr_t)(integer))

#pragma GCC diagnostic ignored "-Wpsabi" /* about calls; all functions that take vectors are inlined */
#define INLINE static inline __attribute__((always_inline))

enum { LANES = 16 }; /* floats of a vector */
typedef float vector __attribute__((vector_size(LANES * sizeof(float)), aligned(sizeof(float)), may_alias));
typedef int lanes __attribute__((vector_size(LANES * sizeof(int))));

/* Read a line of memory now, to have it in the first cache; a processor may drop a prefetch, but not this. */
#define TOUCH(at) (void)*(const volatile int *)(at)
