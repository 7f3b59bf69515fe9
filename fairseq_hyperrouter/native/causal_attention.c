/* Causal self-attention without gradients: float32 on a CPU with AVX-512. models/causal_attention.py is what calls this.

   softmax(q k^T / sqrt(d)) v of one head of one sample, T queries and keys of width d:

   1. Copy the keys and the values, WIDE columns after WIDE columns (tiles.h).
   2. For TALL queries after the other: their products with the keys up to the last one's own, ...
   3. ... e to the power of these less the largest, in place (as a power of 2), and nothing for keys after a query's
      own, ...
   4. ... and the products of that with the values, divided by its sum.

   So scores never leave the cache, and little is computed that the mask hides. Threads share heads and samples. */

#include "tiles.h"

enum { PART = TALL * ROW }; /* the scores of TALL queries and DEPTH keys */

/* 2 to the power of x <= 0, to 2 units in the last place: of x = n + f, n whole, a polynomial of f (the closest one of
   degree 5 between -1/2 and 1/2 with 1 at 0: 9.2e-8 of the value beside it), to whose exponent n is added. */
INLINE vector power_of_two(vector x)
{
    const vector lowest = (vector){0} - 125; /* 2 to that stands for all that is smaller; NaN stays NaN */
    const lanes low = x < lowest;
    x = (vector)(((lanes)x & ~low) | ((lanes)lowest & low));
    const vector rounding = (vector){0} + 0x1.8p23f; /* makes the last bits of a sum a whole number */
    const vector shifted = x + rounding, f = x - (shifted - rounding);
    vector y = f * 0x1.5bba14p-10f + 0x1.3cea88p-7f;
    y = y * f + 0x1.c6b752p-5f;
    y = y * f + 0x1.ebf9bcp-3f;
    y = y * f + 0x1.62e42ap-1f;
    y = y * f + 1;
    return (vector)((lanes)y + (((lanes)shifted << 23) & (x == x))); /* a NaN's bits are no number to add to */
}

INLINE vector larger(vector a, vector b)
{
    const lanes more = b > a;
    return (vector)(((lanes)b & more) | ((lanes)a & ~more));
}

/* 2 to the power of n scores less the largest of them, and their sum. Those from *own* on, less than 2 WIDE, are hidden. */
INLINE float softmax(float *score, int64_t own, int64_t n)
{
    for (int64_t s = own; s < n; s++)
        score[s / DEPTH * PART + s % DEPTH] = -__builtin_inff();
    vector most[VECTORS], sum[VECTORS] = {{0}};
    for (int v = 0; v < VECTORS; v++)
        most[v] = *(const vector *)(score + v * LANES);
    float *part = score;
    for (int64_t left = n; left > 0; left -= DEPTH, part += PART)
        for (int64_t s = 0; s < DEPTH && s < left; s += WIDE)
            for (int v = 0; v < VECTORS; v++)
                most[v] = larger(most[v], *(const vector *)(part + s + v * LANES));
    for (int v = 1; v < VECTORS; v++)
        most[0] = larger(most[0], most[v]);
    float largest = most[0][0], total = 0;
    for (int l = 1; l < LANES; l++)
        largest = most[0][l] > largest ? most[0][l] : largest;
    part = score;
    for (int64_t left = n; left > 0; left -= DEPTH, part += PART)
        for (int64_t s = 0; s < DEPTH && s < left; s += WIDE)
            for (int v = 0; v < VECTORS; v++) {
                vector *at = (vector *)(part + s + v * LANES);
                sum[v] += *at = power_of_two(*at - largest);
            }
    for (int64_t s = own; s < n; s++)
        score[s / DEPTH * PART + s % DEPTH] = 0; /* beside a sum of 1 or more what stood there is nothing */
    for (int v = 1; v < VECTORS; v++)
        sum[0] += sum[v];
    for (int l = 0; l < LANES; l++)
        total += sum[0][l];
    return total;
}

static int64_t room_for(int64_t T, int64_t d)
{
    const int64_t wide_T = (T + WIDE - 1) / WIDE * WIDE, wide_d = (d + WIDE - 1) / WIDE * WIDE;
    return wide_T * d + T * wide_d + ((wide_T + DEPTH - 1) / DEPTH + 1) * PART;
}

/* One head of one sample; a token's numbers lie *stride* from the next one's. */
AVX512 static void attend(const float *q, const float *k, const float *v, float *y, int64_t T, int64_t d,
                          int64_t stride, float *room)
{
    static const float zeros[WIDE] = {0};
    const matrix queries = {q, stride}, keys = {k, stride, 1}, values = {v, stride};
    float *const key = room, *const value = key + (T + WIDE - 1) / WIDE * WIDE * d;
    float *const query = value + (d + WIDE - 1) / WIDE * WIDE * T, *const score = query + PART;
    const float scaling = 1.44269504f / __builtin_sqrtf((float)d); /* log2(e): powers of 2 are easier than those of e */
    copy_second(&keys, 0, d, 0, T, key, NULL);
    copy_second(&values, 0, T, 0, d, value, NULL);
    const int64_t tiles = (T + TALL - 1) / TALL;
    for (int64_t t = 0, i = 0; t < tiles; t++) {
        const int rows = (int)((T - i) / (tiles - t));
        const int64_t n = (i + rows + WIDE - 1) / WIDE * WIDE; /* keys up to the last query's own, and hidden ones */
        float *out[TALL], scale[TALL];
        copy_first(&queries, i, rows, 0, d, query);
        for (int r = 0; r < rows; r++)
            for (int64_t c = 0; c < d; c++)
                query[r * ROW + c] *= scaling;
        for (int64_t s = 0; s < n; s += WIDE) {
            for (int r = 0; r < rows; r++)
                out[r] = score + s / DEPTH * PART + r * ROW + s % DEPTH;
            tile_of(rows, 0, d, query, key + s * d, out, scale, zeros, 0);
        }
        for (int r = 0; r < rows; r++)
            scale[r] = 1 / softmax(score + r * ROW, i + r + 1, n);
        for (int64_t c = 0; c < d; c += WIDE) {
            const int64_t width = d - c < WIDE ? d - c : WIDE;
            float sum[TALL][WIDE] = {0};
            for (int r = 0; r < rows; r++)
                out[r] = sum[r];
            for (int64_t s = 0; s < i + rows; s += DEPTH)
                tile_of(rows, 0, i + rows - s < DEPTH ? i + rows - s : DEPTH, score + s / DEPTH * PART,
                        value + c * T + s * WIDE, out, scale, zeros, 1);
            for (int r = 0; r < rows; r++)
                memcpy(y + (i + r) * stride + c, sum[r], width * sizeof *y);
        }
        i += rows;
    }
}

PyDoc_STRVAR(attention_doc,
             "attention(q, k, v, y (T, N, d), room, T, N, d, threads)\n\n"
             "y = causal self-attention of N heads of samples; room has room(T, d) floats for each of the threads.");
static PyObject *attention(PyObject *self, PyObject *args)
{
    address q_at, k_at, v_at, y_at, room_at;
    Py_ssize_t T, N, d;
    int threads;
    if (!PyArg_ParseTuple(args, "KKKKKnnni", &q_at, &k_at, &v_at, &y_at, &room_at, &T, &N, &d, &threads))
        return NULL;
    const float *q = POINTER(float, q_at), *k = POINTER(float, k_at), *v = POINTER(float, v_at);
    float *y = POINTER(float, y_at), *room = POINTER(float, room_at);
    Py_BEGIN_ALLOW_THREADS
#pragma omp parallel for num_threads(threads) schedule(static, 1) if (threads > 1)
    for (int thread = 0; thread < threads; thread++)
        for (Py_ssize_t n = N * thread / threads; n < N * (thread + 1) / threads; n++)
            attend(q + n * d, k + n * d, v + n * d, y + n * d, T, d, N * d, room + thread * room_for(T, d));
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

PyDoc_STRVAR(room_doc, "room(T, d): how many floats a thread needs.");
static PyObject *room(PyObject *self, PyObject *args)
{
    Py_ssize_t T, d;
    if (!PyArg_ParseTuple(args, "nn", &T, &d))
        return NULL;
    return PyLong_FromLongLong(room_for(T, d));
}

static PyMethodDef methods[] = {
    {"attention", attention, METH_VARARGS, attention_doc},
    {"room", room, METH_VARARGS, room_doc},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_causal_attention", "Causal attention; see causal_attention.py.", -1, methods,
};

PyMODINIT_FUNC PyInit__causal_attention(void)
{
    return module_of_tiles(&module, "widest", DEPTH); /* a tile takes all of a query at once */
}
