/* Products of one expert's rows, and what lies between them: float32 on a CPU with AVX-512. run_products.py is what
   calls this.

   A product of m x k and k x n is computed in tiles of TALL x WIDE sums that stay in registers (the scheme of
   BLIS, https://doi.org/10.1145/2764454):

   1. Copy DEPTH x COLUMNS of the second matrix, WIDE columns after WIDE columns, so that they are read in the order in
      which they lie and stay in the second cache.
   2. Copy up to TALL rows of the first, which then stay in the first cache.
   3. Multiply these rows with each WIDE columns, and add the sums to the result.

   So rows are gathered, multiplied with their gates and added to their tokens on the way, where torch needs a pass over
   memory for each; and the products keep an AMD's units busy, where MKL keeps to AVX2 (docs/performance.md). Threads
   share the columns of the result: every sum is the same with any number of them.

   Pointers come as integers (Tensor.data_ptr()), 0 for none; what they point to is contiguous, indices are int64. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <string.h>

enum { LANES = 16, TALL = 14, VECTORS = 2, WIDE = VECTORS * LANES, DEPTH = 256, COLUMNS = 512 };
enum { ROW = DEPTH + LANES };   /* a copied row of the first matrix: not a power of two, which caches dislike */
enum { ONE_THREAD = 1 << 20 };  /* multiply-adds that are done before other threads are there */

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
#pragma GCC diagnostic ignored "-Wpsabi" /* about calls; all functions that take vectors are inlined */
#define INLINE static inline __attribute__((always_inline))

typedef float vector __attribute__((vector_size(LANES * sizeof(float)), aligned(sizeof(float)), may_alias));
typedef int lanes __attribute__((vector_size(LANES * sizeof(int))));

typedef struct {
    const float *at;
    int64_t stride;       /* from one row to the next */
    int transposed;       /* whether the product takes its rows as columns */
    const int64_t *index; /* which row stands for row r; none: r itself */
    const float *scale;   /* what row r is multiplied with; none: 1 */
} matrix;

typedef struct {
    float *at;
    int64_t stride;
    const float *bias;    /* is added to every row */
    const int64_t *index; /* the row to which row r is added; none: r itself, which is overwritten */
    const float *scale;   /* what row r is multiplied with before; none: 1 */
    float *sums;          /* of the second matrix's columns */
} result;

INLINE const float *row_of(const matrix *m, int64_t r) { return m->at + (m->index ? m->index[r] : r) * m->stride; }

/* rows x WIDE sums over k. rows, down and along are numbers that the compiler knows: the first matrix's entry of row i
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

/* Rows p .. p + k and columns j .. j + n of the second matrix, WIDE columns after WIDE columns, the last ones filled up
   with zeros; sums += its columns. */
AVX512 static void copy_second(const matrix *b, int64_t p, int64_t k, int64_t j, int64_t n, float *to, float *sums)
{
    for (int64_t end = j + n; j < end; j += WIDE, to += k * WIDE) {
        const int64_t width = end - j < WIDE ? end - j : WIDE;
        if (b->transposed) {
            const float *from[WIDE];
            for (int64_t l = 0; l < width; l++)
                from[l] = row_of(b, j + l) + p;
            int64_t q = 0;
            if (width == WIDE)
                for (; q + LANES <= k; q += LANES)
                    for (int v = 0; v < VECTORS; v++)
                        transpose(from + v * LANES, q, to + q * WIDE + v * LANES);
            for (; q < k; q++)
                for (int64_t l = 0; l < WIDE; l++)
                    to[q * WIDE + l] = l < width ? from[l][q] : 0;
            continue;
        }
        vector sum[VECTORS] = {0};
        for (int64_t q = 0; q < k; q++) {
            const float *from = row_of(b, p + q) + j, scale = b->scale ? b->scale[p + q] : 1;
            float last[WIDE] = {0};
            if (width < WIDE)
                from = memcpy(last, from, width * sizeof *last);
            for (int v = 0; v < VECTORS; v++) {
                const vector entry = scale * *(const vector *)(from + v * LANES);
                *(vector *)(to + q * WIDE + v * LANES) = entry;
                sum[v] += entry;
            }
        }
        if (sums)
            for (int64_t l = 0; l < width; l++)
                sums[j + l] += sum[l / LANES][l % LANES];
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

/* Columns *from* to *end* of the m x n result of m x k and k x n. */
AVX512 static void columns(const matrix *a, const matrix *b, const result *c, int64_t m, int64_t k, int64_t from,
                           int64_t end)
{
    static _Thread_local float second[DEPTH * COLUMNS] __attribute__((aligned(64)));
    static _Thread_local float first[TALL * ROW] __attribute__((aligned(64)));
    const int64_t tiles = (m + TALL - 1) / TALL, parts = k ? (k + DEPTH - 1) / DEPTH : 1;
    for (int64_t j = from; j < end; j += COLUMNS) {
        const int64_t n = end - j < COLUMNS ? end - j : COLUMNS;
        for (int64_t part = 0, p = 0; part < parts; part++) { /* equal parts, rather than a small last one */
            const int64_t deep = (k - p) / (parts - part);
            const int add = c->index || part;
            copy_second(b, p, deep, j, n, second, c->sums);
            for (int64_t t = 0, i = 0; t < tiles; t++) {
                const int rows = (int)((m - i) / (tiles - t));
                float *to[TALL], scale[TALL];
                for (int r = 0; r < rows; r++) {
                    to[r] = c->at + (c->index ? c->index[i + r] : i + r) * c->stride + j;
                    scale[r] = c->scale ? c->scale[i + r] : 1;
                }
                copy_first(a, i, rows, p, deep, first);
                for (int64_t l = 0; l < n; l += WIDE) {
                    const int64_t width = n - l < WIDE ? n - l : WIDE;
                    float start[WIDE] = {0}, edge[TALL][WIDE], *out[TALL];
                    if (c->bias && !part)
                        memcpy(start, c->bias + j + l, width * sizeof *start);
                    for (int r = 0; r < rows; r++)
                        out[r] = width < WIDE ? edge[r] : to[r] + l;
                    tile_of(rows, a->transposed, deep, first, second + l * deep, out, scale, start,
                            width < WIDE ? 0 : add);
                    for (int r = 0; r < rows && width < WIDE; r++)
                        for (int64_t o = 0; o < width; o++)
                            to[r][l + o] = add ? to[r][l + o] + scale[r] * edge[r][o] : edge[r][o];
                }
                i += rows;
            }
            p += deep;
        }
    }
}

static void product(const matrix *a, const matrix *b, const result *c, int64_t m, int64_t n, int64_t k, int threads)
{
    const int64_t panels = (n + WIDE - 1) / WIDE;
    if (threads > panels)
        threads = (int)panels;
    if (threads <= 1 || m * n * k <= ONE_THREAD) {
        columns(a, b, c, m, k, 0, n);
        return;
    }
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int t = 0; t < threads; t++) {
        const int64_t from = panels * t / threads * WIDE, end = panels * (t + 1) / threads * WIDE;
        columns(a, b, c, m, k, from, end < n ? end : n);
    }
}

INLINE float dot(const float *a, const float *b, int64_t n)
{
    vector sum[4] = {0};
    int64_t i = 0;
    for (; i + 4 * LANES <= n; i += 4 * LANES)
        for (int v = 0; v < 4; v++)
            sum[v] += *(const vector *)(a + i + v * LANES) * *(const vector *)(b + i + v * LANES);
    const vector all = (sum[0] + sum[1]) + (sum[2] + sum[3]);
    float total = 0;
    for (int l = 0; l < LANES; l++)
        total += all[l];
    for (; i < n; i++)
        total += a[i] * b[i];
    return total;
}

AVX512 static void gate_row(float *dhidden, const float *activated, int64_t F, const float *dy, const float *bias,
                            int64_t D, float gate, float *dgate)
{
    *dgate = dot(dhidden, activated, F) + dot(dy, bias, D);
    for (int64_t f = 0; f < F; f++)
        dhidden[f] *= gate;
}

#define POINTER(type, integer) ((type *)(uintptr_t)(integer))
typedef unsigned long long address;

PyDoc_STRVAR(rows_doc,
             "rows(a, index (n,) or 0, weight, transposed, bias (O,) or 0, out (n, O), n, I, O, threads)\n\n"
             "out[i] = a[index[i]] times weight + bias; weight is (I, O), or (O, I) transposed.");
static PyObject *rows(PyObject *self, PyObject *args)
{
    address a_at, index, weight, bias, out;
    Py_ssize_t n, I, O;
    int transposed, threads;
    if (!PyArg_ParseTuple(args, "KKKpKKnnni", &a_at, &index, &weight, &transposed, &bias, &out, &n, &I, &O, &threads))
        return NULL;
    const matrix a = {POINTER(float, a_at), I, 0, POINTER(int64_t, index)};
    const matrix b = {POINTER(float, weight), transposed ? I : O, transposed};
    const result c = {POINTER(float, out), O, POINTER(float, bias)};
    Py_BEGIN_ALLOW_THREADS
    product(&a, &b, &c, n, O, I, threads);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

PyDoc_STRVAR(add_rows_doc,
             "add_rows(a (n, I), weight, transposed, bias (O,) or 0, gate (n,) or 0, index (n,), out, n, I, O, threads)"
             "\n\nout[index[i]] += gate[i] (a[i] times weight + bias).");
static PyObject *add_rows(PyObject *self, PyObject *args)
{
    address a_at, weight, bias, gate, index, out;
    Py_ssize_t n, I, O;
    int transposed, threads;
    if (!PyArg_ParseTuple(args, "KKpKKKKnnni", &a_at, &weight, &transposed, &bias, &gate, &index, &out, &n, &I, &O,
                          &threads))
        return NULL;
    const matrix a = {POINTER(float, a_at), I};
    const matrix b = {POINTER(float, weight), transposed ? I : O, transposed};
    const result c = {POINTER(float, out), O, POINTER(float, bias), POINTER(int64_t, index), POINTER(float, gate)};
    Py_BEGIN_ALLOW_THREADS
    product(&a, &b, &c, n, O, I, threads);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

PyDoc_STRVAR(weight_doc,
             "weight(a, a_index (n,) or 0, b, b_index (n,) or 0, gate (n,) or 0, out (I, O), sums (O,), n, I, O, "
             "threads)\n\nout = sum over i of a[a_index[i]] times gate[i] b[b_index[i]] (I, O), sums = that of the "
             "latter alone.");
static PyObject *weight(PyObject *self, PyObject *args)
{
    address a_at, a_index, b_at, b_index, gate, out, sums;
    Py_ssize_t n, I, O;
    int threads;
    if (!PyArg_ParseTuple(args, "KKKKKKKnnni", &a_at, &a_index, &b_at, &b_index, &gate, &out, &sums, &n, &I, &O,
                          &threads))
        return NULL;
    const matrix a = {POINTER(float, a_at), I, 1, POINTER(int64_t, a_index)};
    const matrix b = {POINTER(float, b_at), O, 0, POINTER(int64_t, b_index), POINTER(float, gate)};
    const result c = {.at = POINTER(float, out), .stride = O, .sums = POINTER(float, sums)};
    Py_BEGIN_ALLOW_THREADS
    memset(c.sums, 0, O * sizeof *c.sums);
    product(&a, &b, &c, I, O, n, threads);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

PyDoc_STRVAR(gates_doc,
             "gates(dhidden (n, F), activated (n, F), dy, index (n,) or 0, bias (D,), gate (n,), dgate (n,), n, F, D, "
             "threads)\n\ndgate[i] = dhidden[i] times activated[i] + dy[index[i]] times bias; dhidden[i] *= gate[i].");
static PyObject *gates(PyObject *self, PyObject *args)
{
    address dhidden_at, activated_at, dy_at, index_at, bias, gate_at, dgate_at;
    Py_ssize_t n, F, D;
    int threads;
    if (!PyArg_ParseTuple(args, "KKKKKKKnnni", &dhidden_at, &activated_at, &dy_at, &index_at, &bias, &gate_at,
                          &dgate_at, &n, &F, &D, &threads))
        return NULL;
    float *dhidden = POINTER(float, dhidden_at), *dgate = POINTER(float, dgate_at);
    const float *activated = POINTER(float, activated_at), *gate = POINTER(float, gate_at);
    const matrix dy = {POINTER(float, dy_at), D, 0, POINTER(int64_t, index_at)};
    if (n * F <= ONE_THREAD)
        threads = 1;
    Py_BEGIN_ALLOW_THREADS
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (Py_ssize_t i = 0; i < n; i++)
        gate_row(dhidden + i * F, activated + i * F, F, row_of(&dy, i), POINTER(float, bias), D, gate[i], dgate + i);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"rows", rows, METH_VARARGS, rows_doc},
    {"add_rows", add_rows, METH_VARARGS, add_rows_doc},
    {"weight", weight, METH_VARARGS, weight_doc},
    {"gates", gates, METH_VARARGS, gates_doc},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_run_products", "Products of one expert's rows; see run_products.py.", -1, methods,
};

PyMODINIT_FUNC PyInit__run_products(void)
{
    if (!HAS_AVX512) {
        PyErr_SetString(PyExc_ImportError, "made for processors with AVX-512");
        return NULL;
    }
    PyObject *self = PyModule_Create(&module);
    if (self && PyModule_AddIntConstant(self, "amd", IS_AMD != 0)) {
        Py_DECREF(self);
        return NULL;
    }
    return self;
}
