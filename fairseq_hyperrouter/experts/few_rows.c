/* Experts on few rows, without gradients: float32 on a CPU. few_rows.py is what calls this.

   Dimensions: T tokens, D model, F hidden, E experts, K experts per token, N = T K assignments; I and O the sizes of a
   weight.

   An expert's few rows cost little beside reading its weights. So here a weight is read once, from its first byte to
   its last, for up to ROWS rows at a time, and a layer takes four calls from Python, however many experts it has.

   Pointers come as integers (Tensor.data_ptr()); what they point to is contiguous, indices are int64. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <string.h>

enum { ROWS = 6, LANES = 16, IN_CACHE = 1 << 16 }; /* rows; floats of a vector; floats of a weight that stay in L2 */

typedef float vector __attribute__((vector_size(LANES * sizeof(float)), aligned(sizeof(float)), may_alias));

/* The compiler makes one version per instruction set, the processor chooses when this is loaded. */
#if defined(__x86_64__) && defined(__GNUC__) && defined(__gnu_linux__)
#define EVERY_PROCESSOR __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define EVERY_PROCESSOR
#endif
#define INLINE static inline __attribute__((always_inline))

/* out[r][0 .. width) += in[r] (I,) times columns 0 .. width of weight (I, O), for some rows r. Four rows of the weight
   at a time: out is then read and written once per four products. */
INLINE void add_rows(const int rows, const float *const *in, const float *weight, int64_t I, int64_t O, int64_t width,
                     float *const *out)
{
    int64_t i = 0;
    for (; i + 4 <= I; i += 4) {
        const float *w0 = weight + i * O, *w1 = w0 + O, *w2 = w1 + O, *w3 = w2 + O;
        vector v[ROWS][4];
        for (int r = 0; r < rows; r++)
            for (int j = 0; j < 4; j++)
                v[r][j] = in[r][i + j] - (vector){0};
        int64_t o = 0;
        for (; o + LANES <= width; o += LANES) {
            const vector a0 = *(const vector *)(w0 + o), a1 = *(const vector *)(w1 + o);
            const vector a2 = *(const vector *)(w2 + o), a3 = *(const vector *)(w3 + o);
            for (int j = 4; j < 8; j++)
                __builtin_prefetch(w0 + j * O + o, 0, 0); /* the next four rows, soon and once: the processor
                                                              itself foresees no more than a page */
            for (int r = 0; r < rows; r++) {
                vector sum = *(const vector *)(out[r] + o);
                sum += v[r][0] * a0;
                sum += v[r][1] * a1;
                sum += v[r][2] * a2;
                sum += v[r][3] * a3;
                *(vector *)(out[r] + o) = sum;
            }
        }
        for (; o < width; o++)
            for (int r = 0; r < rows; r++)
                out[r][o] += in[r][i] * w0[o] + in[r][i + 1] * w1[o] + in[r][i + 2] * w2[o] + in[r][i + 3] * w3[o];
    }
    for (; i < I; i++)
        for (int r = 0; r < rows; r++)
            for (int64_t o = 0; o < width; o++)
                out[r][o] += in[r][i] * weight[i * O + o];
}

/* The n rows of one expert. With more than ROWS the weight is read more than once: as many columns at a time as stay in
   the cache. */
EVERY_PROCESSOR void add_product(int64_t n, const float *const *in, const float *weight, int64_t I, int64_t O,
                                 float **out)
{
    const int64_t columns = n <= ROWS || O < 512 ? O : 512, depth = n <= ROWS ? I : IN_CACHE / columns;
    for (int64_t o = 0; o < O; o += columns) {
        const int64_t width = O - o < columns ? O - o : columns;
        for (int64_t i = 0; i < I; i += depth) {
            const int64_t deep = I - i < depth ? I - i : depth;
            for (int64_t row = 0; row < n; row += ROWS) {
                const int rows = n - row < ROWS ? (int)(n - row) : ROWS;
                const float *from[ROWS];
                float *part[ROWS];
                for (int r = 0; r < rows; r++) {
                    from[r] = in[row + r] + i;
                    part[r] = out[row + r] + o;
                }
                const float *w = weight + i * O + o;
                switch (rows) { /* a number that the compiler knows, so that it unrolls the loops */
                case 1: add_rows(1, from, w, deep, O, width, part); break;
                case 2: add_rows(2, from, w, deep, O, width, part); break;
                case 3: add_rows(3, from, w, deep, O, width, part); break;
                case 4: add_rows(4, from, w, deep, O, width, part); break;
                case 5: add_rows(5, from, w, deep, O, width, part); break;
                default: add_rows(ROWS, from, w, deep, O, width, part);
                }
            }
        }
    }
}

#define POINTER(type, integer) ((type *)(uintptr_t)(integer))

PyDoc_STRVAR(order_doc,
             "order(expert_index (N,), kept (N,) bool or 0, order (N,), starts (E + 1,), N, E)\n\n"
             "Sort by expert: expert e has the assignments order[starts[e]] to order[starts[e + 1] - 1].");
static PyObject *order(PyObject *self, PyObject *args)
{
    unsigned long long index_at, kept_at, order_at, starts_at;
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
    unsigned long long rows_at, order_at, starts_at, weight_at, bias_at, out_at;
    Py_ssize_t K, E, I, O;
    if (!PyArg_ParseTuple(args, "KKnKKKKnnn", &rows_at, &order_at, &K, &starts_at, &weight_at, &bias_at, &out_at, &E,
                          &I, &O))
        return NULL;
    const float *rows = POINTER(float, rows_at), *weight = POINTER(float, weight_at), *bias = POINTER(float, bias_at);
    const int64_t *order = POINTER(int64_t, order_at), *starts = POINTER(int64_t, starts_at);
    float *out = POINTER(float, out_at);
    const float **in = PyMem_Malloc((starts[E] + 1) * sizeof *in);
    float **to = PyMem_Malloc((starts[E] + 1) * sizeof *to);
    if (!in || !to) {
        PyMem_Free(in);
        PyMem_Free(to);
        return PyErr_NoMemory();
    }
    Py_BEGIN_ALLOW_THREADS
    for (int64_t n = 0; n < starts[E]; n++) {
        in[n] = rows + (order ? order[n] / K : n) * I;
        to[n] = out + n * O;
    }
    for (Py_ssize_t e = 0; e < E; e++) {
        for (int64_t n = starts[e]; n < starts[e + 1]; n++)
            memcpy(to[n], bias + e * O, O * sizeof *bias);
        if (starts[e + 1] > starts[e])
            add_product(starts[e + 1] - starts[e], in + starts[e], weight + e * I * O, I, O, to + starts[e]);
    }
    Py_END_ALLOW_THREADS
    PyMem_Free(in);
    PyMem_Free(to);
    Py_RETURN_NONE;
}

PyDoc_STRVAR(combine_doc,
             "combine(rows (N, D), gate (N,), order, y (T, D), n, K, D)\n\n"
             "y[order[i] // K] += gate[order[i]] * rows[i] for the first n places i.");
static PyObject *combine(PyObject *self, PyObject *args)
{
    unsigned long long rows_at, gate_at, order_at, y_at;
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
