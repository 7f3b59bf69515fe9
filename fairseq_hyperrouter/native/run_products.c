/* Products of one expert's rows, and what lies between them: float32 on a CPU with AVX-512. experts/run_products.py is
   what calls this.

   A product of m x k and k x n is computed in tiles (tiles.h):

   1. Copy DEPTH x COLUMNS of the second matrix, which stay in the second cache.
   2. Copy up to TALL rows of the first, which then stay in the first cache.
   3. Multiply these rows with each WIDE columns, and add the sums to the result.

   So rows are gathered, multiplied with their gates and added to their tokens on the way, where torch needs a pass over
   memory for each. Threads share the columns of the result: every sum is the same with any number of them. */

#include "tiles.h"

enum { COLUMNS = 512 };
enum { ONE_THREAD = 1 << 20 }; /* multiply-adds that are done before other threads are there */

typedef struct {
    float *at;
    int64_t stride;
    const float *bias;    /* is added to every row */
    const int64_t *index; /* the row to which row r is added; none: r itself, which is overwritten */
    const float *scale;   /* what row r is multiplied with before; none: 1 */
    float *sums;          /* of the second matrix's columns */
} result;

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
    return module_of_tiles(&module, "amd", IS_AMD != 0);
}
