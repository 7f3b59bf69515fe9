/* Experts on few rows, without gradients: float32 on a CPU. experts/few_rows.py is what calls this.

   Dimensions: T tokens, D model, F hidden, E experts, K experts per token, N = T K assignments; I and O the sizes of a
   weight.

   An expert's few rows cost little beside reading its weights. So here a weight is read once for up to GROUP rows, from
   its first byte to its last, and a layer takes four calls from Python, however many experts it has. */

#include "common.h"

enum { FEW = 5, ROWS = 8, GROUP = 32 }; /* rows at a time: few, at most; rows that share what was read of a weight */
enum { IN_CACHE = 1 << 15 };            /* floats of a weight that stay in the second cache */
enum { AHEAD = 8192 };                  /* floats from what is read to what memory is asked for */

/* The compiler makes one version per instruction set, the processor chooses when this is loaded. */
#if defined(__x86_64__) && defined(__GNUC__) && defined(__gnu_linux__)
#define EVERY_PROCESSOR __attribute__((target_clones("avx512f", "fma", "default")))
#else
#define EVERY_PROCESSOR
#endif

/* The first column of vector v of O >= LANES columns: the last vector ends with them, and may repeat some. */
INLINE int64_t column_of(int64_t v, int64_t O) { return (v + 1) * LANES <= O ? v * LANES : O - LANES; }

/* sum[v][r] += in[r] (I,) times the columns of vector v of weight (I, O), for some rows r.

   Several rows of the weight at a time, as many as leave registers for the rest: so sums, which may not fit into the
   first cache, are read and written seldom. Memory is faster when it is asked for in the order in which it lies, one
   line after the other, far ahead. */
INLINE void add_rows(const int rows, const float *const *in, const float *weight, int64_t I, int64_t O, vector *sum)
{
    const int deep = rows <= FEW ? 8 : 4;
    const int64_t vectors = (O + LANES - 1) / LANES;
    int64_t i = 0;
    for (; i + deep <= I; i += deep) {
        const float *w = weight + i * O;
        vector *to = sum;
        for (int64_t v = 0; v < vectors; v++, to += rows) {
            const int64_t o = column_of(v, O);
            vector column[8];
            for (int j = 0; j < deep; j++)
                column[j] = *(const vector *)(w + j * O + o);
            for (int j = 0; j < deep; j++)
                __builtin_prefetch(w + deep * o + AHEAD + j * LANES, 0, 1);
            for (int r = 0; r < rows; r++) {
                vector more = to[r];
                for (int j = 0; j < deep; j++)
                    more += in[r][i + j] * column[j];
                to[r] = more;
            }
        }
    }
    for (; i < I; i++)
        for (int64_t v = 0; v < vectors; v++)
            for (int r = 0; r < rows; r++)
                sum[v * rows + r] += in[r][i] * *(const vector *)(weight + i * O + column_of(v, O));
}

/* out[r] = in[r] (I,) times weight (I, O) + bias for n <= GROUP rows r of one expert; sum has room for the vectors of
   GROUP rows. */
EVERY_PROCESSOR void product(int64_t n, const float *const *in, const float *weight, const float *bias, int64_t I,
                             int64_t O, float *const *out, vector *sum)
{
    if (O < LANES) {
        for (int64_t r = 0; r < n; r++) {
            memcpy(out[r], bias, O * sizeof *bias);
            for (int64_t i = 0; i < I; i++)
                for (int64_t o = 0; o < O; o++)
                    out[r][o] += in[r][i] * weight[i * O + o];
        }
        return;
    }
    const int64_t vectors = (O + LANES - 1) / LANES, passes = (n + ROWS - 1) / ROWS;
    const int64_t deep = n <= ROWS ? I : IN_CACHE / (8 * O) * 8 + 8;
    for (int64_t i = 0; i < I; i += deep) {
        for (int64_t pass = 0, row = 0; pass < passes; pass++) {
            const int rows = (int)((n - row) / (passes - pass));
            const int64_t depth = I - i < deep ? I - i : deep;
            const float *w = weight + i * O, *from[ROWS];
            vector *to = sum + row * vectors;
            for (int r = 0; r < rows; r++)
                from[r] = in[row + r] + i;
            for (int64_t v = 0; v < vectors && !i; v++)
                for (int r = 0; r < rows; r++)
                    to[v * rows + r] = *(const vector *)(bias + column_of(v, O));
            switch (rows) { /* numbers that the compiler knows, so that it unrolls the loops */
#define ADD_ROWS(n) case n: add_rows(n, from, w, depth, O, to); break;
                ADD_ROWS(1) ADD_ROWS(2) ADD_ROWS(3) ADD_ROWS(4) ADD_ROWS(5) ADD_ROWS(6) ADD_ROWS(7) ADD_ROWS(8)
            }
            for (int64_t v = 0; v < vectors && i + deep >= I; v++)
                for (int r = 0; r < rows; r++)
                    *(vector *)(out[row + r] + column_of(v, O)) = to[v * rows + r];
            row += rows;
        }
    }
}

PyDoc_STRVAR(order_doc,
             "order(expert_index (N,), kept (N,) bool or 0, order (N,), starts (E + 1,), N, E)\n\n"
             "Sort by expert: expert e has the assignments order[starts[e]] to order[starts[e + 1] - 1].");
static PyObject *order(PyObject *self, PyObject *args)
{
    address index_at, kept_at, order_at, starts_at;
    Py_ssize_t N, E;
    if (!PyArg_ParseTuple(args, "KKKKnn", &index_at, &kept_at, &order_at, &starts_at, &N, &E))
        return NULL;
    const int64_t *index = POINTER(int64_t, index_at);
    const unsigned char *kept = POINTER(unsigned char, kept_at);
    int64_t *order = POINTER(int64_t, order_at), *starts = POINTER(int64_t, starts_at);
    memset(starts, 0, (E + 1) * sizeof *starts);
    for (Py_ssize_t j = 0; j < N; j++)
        if (!kept || kept[j]) {
            if (index[j] < 0 || index[j] >= E) {
                PyErr_Format(PyExc_IndexError, "expert_index %lld: must be in 0 .. %zd", (long long)index[j], E - 1);
                return NULL;
            }
            starts[index[j]]++;
        }
    for (Py_ssize_t e = 1; e <= E; e++)
        starts[e] += starts[e - 1]; /* where the expert ends; taken back to where it starts below */
    for (Py_ssize_t j = N; j-- > 0;)
        if (!kept || kept[j])
            order[--starts[index[j]]] = j;
    Py_RETURN_NONE;
}

PyDoc_STRVAR(products_doc,
             "products(rows, order or 0, K, starts, weight (E, I, O), bias (E, O), out (N, O), E, I, O)\n\n"
             "out[n] = row of n times weight[e] + bias[e] for every place n of every expert e; the row of n is\n"
             "rows[order[n] // K], or rows[n] without an order.");
static PyObject *products(PyObject *self, PyObject *args)
{
    address rows_at, order_at, starts_at, weight_at, bias_at, out_at;
    Py_ssize_t K, E, I, O;
    if (!PyArg_ParseTuple(args, "KKnKKKKnnn", &rows_at, &order_at, &K, &starts_at, &weight_at, &bias_at, &out_at, &E,
                          &I, &O))
        return NULL;
    const float *rows = POINTER(float, rows_at), *weight = POINTER(float, weight_at), *bias = POINTER(float, bias_at);
    const int64_t *order = POINTER(int64_t, order_at), *starts = POINTER(int64_t, starts_at);
    float *out = POINTER(float, out_at);
    void *room = PyMem_Malloc((GROUP * (O / LANES + 1) + 1) * sizeof(vector));
    if (!room)
        return PyErr_NoMemory();
    vector *sum = POINTER(vector, ((uintptr_t)room / sizeof(vector) + 1) * sizeof(vector)); /* where a line starts */
    Py_BEGIN_ALLOW_THREADS
    for (Py_ssize_t e = 0; e < E; e++)
        for (int64_t first = starts[e]; first < starts[e + 1]; first += GROUP) {
            const int64_t n = starts[e + 1] - first < GROUP ? starts[e + 1] - first : GROUP;
            const float *in[GROUP];
            float *to[GROUP];
            for (int64_t r = 0; r < n; r++) {
                in[r] = rows + (order ? order[first + r] / K : first + r) * I;
                to[r] = out + (first + r) * O;
            }
            product(n, in, weight + e * I * O, bias + e * O, I, O, to, sum);
        }
    Py_END_ALLOW_THREADS
    PyMem_Free(room);
    Py_RETURN_NONE;
}

PyDoc_STRVAR(combine_doc,
             "combine(rows (N, D), gate (N,), order, y (T, D), n, K, D)\n\n"
             "y[order[i] // K] += gate[order[i]] * rows[i] for the first n places i.");
static PyObject *combine(PyObject *self, PyObject *args)
{
    address rows_at, gate_at, order_at, y_at;
    Py_ssize_t n, K, D;
    if (!PyArg_ParseTuple(args, "KKKKnnn", &rows_at, &gate_at, &order_at, &y_at, &n, &K, &D))
        return NULL;
    const float *rows = POINTER(float, rows_at), *gate = POINTER(float, gate_at);
    const int64_t *order = POINTER(int64_t, order_at);
    for (Py_ssize_t i = 0; i < n; i++) {
        float *y = POINTER(float, y_at) + order[i] / K * D;
        for (Py_ssize_t d = 0; d < D; d++)
            y[d] += gate[order[i]] * rows[i * D + d];
    }
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"order", order, METH_VARARGS, order_doc},
    {"products", products, METH_VARARGS, products_doc},
    {"combine", combine, METH_VARARGS, combine_doc},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_few_rows", "Experts on few rows; see few_rows.py.", -1, methods,
};

PyMODINIT_FUNC PyInit__few_rows(void)
{
    return PyModule_Create(&module);
}
