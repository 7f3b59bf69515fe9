/* Tiles of a matrix product: float32 on a CPU with AVX-512.

   A product of m x k and k x n is computed in tiles of TALL x WIDE sums that stay in registers (the scheme of
   BLIS, https://doi.org/10.1145/2764454). Both matrices are copied first, so that a tile reads them in the order in
   which they lie. It keeps an AMD's units busy, where MKL keeps to AVX2 (docs/performance.md). */

#include "common.h"

enum { TALL = 14, VECTORS = 2, WIDE = VECTORS * LANES };
enum { DEPTH = 256, ROW = DEPTH + LANES }; /* at most so much of a row of the first matrix is copied, to rows that lie no
                                              power of two from each other, which caches dislike */

#if defined(__x86_64__) && defined(__GNUC__)
#define AVX512 __attribute__((target("avx512f")))
#define HAS_AVX512 __builtin_cpu_supports("avx512f")
#define IS_AMD __builtin_cpu_is("amd")
#else
#define AVX512
#define HAS_AVX512 0
#define IS_AMD 0
#endif
#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (lanes){__VA_ARGS__})
#endif

typedef struct {
    const float *at;
    int64_t stride;       /* from one row to the next */
    int transposed;       /* whether the product takes its rows as columns */
    const int64_t *index; /* which row stands for row r; none: r itself */
    const float *scale;   /* what row r is multiplied with; none: 1 */
} matrix;

INLINE const float *row_of(const matrix *m, int64_t r) { return m->at + (m->index ? m->index[r] : r) * m->stride; }

/* rows x WIDE sums over k, which begin at start[WIDE]; row i's are written to to[i], or with add, times scale[i], added to
   what is there. rows, down and along are numbers that the compiler knows: the first matrix's entry of row i
   at place p lies at a[i * down + p * along]. */
INLINE void tile(const int rows, const int down, const int along, int64_t k, const float *a, const float *b,
                 float *const *to, const float *scale, const float *start, const int add)
{
    vector sum[TALL][VECTORS];
    for (int i = 0; i < rows; i++)
        for (int v = 0; v < VECTORS; v++) {
            __builtin_prefetch(to[i] + v * LANES, 1);
            sum[i][v] = *(const vector *)(start + v * LANES);
        }
    for (int64_t p = 0; p < k; p++) {
        vector w[VECTORS];
        for (int v = 0; v < VECTORS; v++)
            w[v] = *(const vector *)(b + p * WIDE + v * LANES);
        for (int i = 0; i < rows; i++) {
            const vector x = a[i * down + p * along] - (vector){0};
            for (int v = 0; v < VECTORS; v++)
                sum[i][v] += x * w[v];
        }
    }
    for (int i = 0; i < rows; i++)
        for (int v = 0; v < VECTORS; v++) {
            vector *at = (vector *)(to[i] + v * LANES);
            *at = add ? (vector)(*at + scale[i] * sum[i][v]) : sum[i][v];
        }
}

#define TILE(n)                                                     \
    case n:                                                         \
        if (transposed)                                             \
            tile(n, 1, TALL, k, a, b, to, scale, start, add);       \
        else                                                        \
            tile(n, ROW, 1, k, a, b, to, scale, start, add);        \
        break;

AVX512 static void tile_of(int rows, int transposed, int64_t k, const float *a, const float *b, float *const *to,
                           const float *scale, const float *start, int add)
{
    switch (rows) {
        TILE(1) TILE(2) TILE(3) TILE(4) TILE(5) TILE(6) TILE(7) TILE(8) TILE(9) TILE(10) TILE(11) TILE(12) TILE(13)
        TILE(14)
    }
}

#define SWAP(h, low, high)                                          \
    for (int i = 0; i < LANES; i++)                                 \
        if (!(i & h)) {                                             \
            const vector one = r[i], other = r[i | h];              \
            r[i] = SHUFFLE(one, other, low);                        \
            r[i | h] = SHUFFLE(one, other, high);                   \
        }
#define LIST(...) __VA_ARGS__

/* to[c][r] = row r's entry c, for LANES rows and entries: exchange halves, then quarters ... */
INLINE void transpose(const float *const *from, int64_t p, float *to)
{
    vector r[LANES];
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++)
        r[i] = *(const vector *)(from[i] + p);
#pragma GCC unroll 16
    SWAP(8, LIST(0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23),
         LIST(8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31))
#pragma GCC unroll 16
    SWAP(4, LIST(0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27),
         LIST(4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31))
#pragma GCC unroll 16
    SWAP(2, LIST(0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29),
         LIST(2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31))
#pragma GCC unroll 16
    SWAP(1, LIST(0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30),
         LIST(1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31))
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++)
        *(vector *)(to + i * WIDE) = r[i];
}

/* The same as below of a matrix whose rows lie as columns. */
AVX512 static void copy_transposed(const matrix *b, int64_t p, int64_t k, int64_t j, int64_t n, float *to)
{
    for (int64_t end = j + n; j < end; j += WIDE, to += k * WIDE) {
        const int64_t width = end - j < WIDE ? end - j : WIDE;
        const float *from[WIDE];
        for (int64_t l = 0; l < width; l++) {
            from[l] = row_of(b, j + l) + p;
            for (int64_t q = 0; q < k; q += LANES)
                TOUCH(from[l] + q);
        }
        int64_t q = 0;
        if (width == WIDE)
            for (; q + LANES <= k; q += LANES)
                for (int v = 0; v < VECTORS; v++)
                    transpose(from + v * LANES, q, to + q * WIDE + v * LANES);
        for (; q < k; q++)
            for (int64_t l = 0; l < WIDE; l++)
                to[q * WIDE + l] = l < width ? from[l][q] : 0;
    }
}

/* Rows p .. p + k and columns j .. j + n of the second matrix, WIDE columns after WIDE columns, the last ones filled up
   with zeros; sums += its columns. Memory is read in the order in which it lies, which is twice as fast. */
AVX512 static void copy_second(const matrix *b, int64_t p, int64_t k, int64_t j, int64_t n, float *to, float *sums)
{
    if (b->transposed) {
        copy_transposed(b, p, k, j, n, to);
        return;
    }
    for (int64_t q = 0; q < k; q++) {
        const float *from = row_of(b, p + q) + j, scale = b->scale ? b->scale[p + q] : 1;
        float *row = to + q * WIDE;
        int64_t l = 0;
        for (; l + LANES <= n; l += LANES)
            *(vector *)(row + l / WIDE * k * WIDE + l % WIDE) = scale * *(const vector *)(from + l);
        for (; l < n || l % WIDE; l++)
            row[l / WIDE * k * WIDE + l % WIDE] = l < n ? scale * from[l] : 0;
        for (l = 0; l < n && sums; l++)
            sums[j + l] += scale * from[l];
    }
}

/* Rows i .. i + rows and columns p .. p + k of the first matrix: row after row, or TALL rows beside each other where
   they lie so. */
AVX512 static void copy_first(const matrix *a, int64_t i, int rows, int64_t p, int64_t k, float *to)
{
    if (!a->transposed)
        for (int r = 0; r < rows; r++)
            memcpy(to + r * ROW, row_of(a, i + r) + p, k * sizeof *to);
    else if (i + LANES <= a->stride) /* there is no harm in what is copied beyond the rows: it is overwritten */
        for (int64_t q = 0; q < k; q++)
            *(vector *)(to + q * TALL) = *(const vector *)(row_of(a, p + q) + i);
    else
        for (int64_t q = 0; q < k; q++)
            memcpy(to + q * TALL, row_of(a, p + q) + i, rows * sizeof *to);
}

/* The module, if this processor can run it; its constant *name* is *value*. */
INLINE PyObject *module_of_tiles(struct PyModuleDef *module, const char *name, long value)
{
    if (!HAS_AVX512) {
        PyErr_SetString(PyExc_ImportError, "made for processors with AVX-512");
        return NULL;
    }
    PyObject *self = PyModule_Create(module);
    if (self && PyModule_AddIntConstant(self, name, value)) {
        Py_DECREF(self);
        return NULL;
    }
    return self;
}
